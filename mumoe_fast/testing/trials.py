"""Trials: a public function of each operator family on random inputs of given sizes, and what must come of it."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

import torch
from torch import Tensor
from torch.func import functional_call

from mumoe_fast import functional
from mumoe_fast.reference import Norm
from mumoe_fast.testing.acceptance import Verdict
from mumoe_fast.testing.problems_bilinear import BilinearProblem, bilinear_expected, full_problem, tucker_problem
from mumoe_fast.testing.problems_cp import CPProblem, cp_expected, cp_problem
from mumoe_fast.testing.problems_gate import (
    Expected,
    Tensors,
    entmax_problem,
    entmax_rows,
    gate_hierarchy_problem,
    gate_problem,
    learned_entmax_problem,
)
from mumoe_fast.testing.problems_layer import LayerCase, layer_expected
from mumoe_fast.testing.problems_mxd import mxd_expected, mxd_problem, topk_expected, topk_problem
from mumoe_fast.testing.problems_tr import TRProblem, tr_expected, tr_problem


@dataclass(frozen=True)
class Trial:
    """Inputs, upstream gradients, and a public function of the library.

    Args:
        inputs: what is differentiated, by name.
        upstream: a random gradient for every result of `compute`, under the result's name.
        compute: results by name for an implementation's name and (differentiable copies of) the inputs.
        expected: by the acceptance rule, the results and the gradient of every input under its name with a d in front.
        backward: whether gradients are computed; without, the function runs under `torch.no_grad`.
    """

    inputs: Tensors
    upstream: Tensors
    compute: Callable[[str, Tensors], Tensors]
    expected: Callable[[], Expected]
    backward: bool = True

    @property
    def names(self) -> tuple[str, ...]:
        """Everything that `run` returns."""
        return (*self.upstream, *(f"d{name}" for name in self.inputs if self.backward))

    def run(self, impl: str) -> Tensors:
        """The results, and the gradients of their products with the upstream gradients."""
        if not self.backward:
            with torch.no_grad():
                return self.compute(impl, self.inputs)
        leaves = {name: x.detach().requires_grad_() for name, x in self.inputs.items()}
        with torch.enable_grad():
            results = self.compute(impl, leaves)
            upstream = [self.upstream[name] for name in results]
            gradients = torch.autograd.grad(list(results.values()), list(leaves.values()), upstream)
        named = {f"d{name}": gradient for name, gradient in zip(leaves, gradients, strict=True)}
        return {name: x.detach() for name, x in results.items()} | named

    @cached_property
    def answer(self) -> Expected:
        """What is expected, computed once for all implementations."""
        return self.expected()

    def judge(self, impl: str, names: Collection[str] | None = None) -> list[Verdict]:
        """The acceptance rule on what an implementation gives: on all of it, or on what is named."""
        chosen = self.names if names is None else names
        results = {name: x for name, x in self.run(impl).items() if name in chosen}
        return self.answer.only(chosen).verdicts(results)


def _activation(name: str) -> str | None:
    """As the public functions take what the problems and kernels call "none"."""
    return None if name == "none" else name


def entmax(dtype: torch.dtype, device: torch.device, *, T: int, N: int, alpha: float, rows: str = "normal") -> Trial:
    """α-entmax of rows of one kind (`entmax_rows`)."""
    x, da = entmax_rows(rows, T, N).to(device, dtype), torch.randn(T, N).to(device, dtype)

    def compute(impl: str, inputs: Tensors) -> Tensors:
        return {"a": functional.entmax(inputs["x"], alpha, impl=impl)}

    return Trial({"x": x}, {"a": da}, compute, lambda: entmax_problem(x, da, alpha))


def learned_entmax(dtype: torch.dtype, device: torch.device, *, T: int, N: int, alpha: float) -> Trial:
    """α-entmax with a gradient for α."""
    x, da = entmax_rows("normal", T, N).to(device, dtype), torch.randn(T, N).to(device, dtype)
    inputs = {"x": x, "alpha": torch.tensor(alpha, device=device)}

    def compute(impl: str, inputs: Tensors) -> Tensors:
        return {"a": functional.entmax(inputs["x"], inputs["alpha"], impl=impl)}

    return Trial(inputs, {"a": da}, compute, lambda: learned_entmax_problem(x, da, inputs["alpha"]))


def gate(
    dtype: torch.dtype,
    device: torch.device,
    *,
    T: int,
    I: int,
    N: int,
    norm: Norm = "layer",
    alpha: float = 1.5,
    bias: bool = False,
    weights: str = "trained",
) -> Trial:
    """The gate; its weights are "trained", "fresh" (zero) or "master" weights in float32 under autocast."""
    weight = torch.zeros(N, I) if weights == "fresh" else torch.randn(N, I) / math.sqrt(I)
    parameters = {"weight": weight, **({"bias": torch.randn(N)} if bias else {})}
    master = torch.float32 if weights == "master" else dtype
    inputs = {"z": torch.randn(T, I).to(device, dtype)} | {n: x.to(device, master) for n, x in parameters.items()}
    da = torch.randn(T, N).to(device, dtype)

    def compute(impl: str, inputs: Tensors) -> Tensors:
        z, weight, b = inputs["z"], inputs["weight"], inputs.get("bias")
        with torch.autocast(device.type, dtype, enabled=weights == "master"):
            if norm == "batch":
                return {"a": functional.batch_norm_gate(z, weight, alpha=alpha, impl=impl)[0]}
            return {"a": functional.gate(z, weight, b, norm=norm, alpha=alpha, impl=impl)}

    def expected() -> Expected:
        return gate_problem(inputs["z"], inputs["weight"], inputs.get("bias"), da, norm=norm, alpha=alpha)

    return Trial(inputs, {"a": da}, compute, expected)


def gate_hierarchy(
    dtype: torch.dtype,
    device: torch.device,
    *,
    T: int,
    I: int,
    N: tuple[int, ...],
    norm: Norm = "layer",
    alpha: float = 1.5,
    bias: bool = False,
    weights: str = "trained",
) -> Trial:
    """The gates of all levels; their weights are "trained", or "master" weights in float32 under autocast."""
    E, master = range(len(N)), torch.float32 if weights == "master" else dtype
    parameters = {f"weight_{e}": torch.randn(N[e], I) / math.sqrt(I) for e in E}
    parameters |= {f"bias_{e}": torch.randn(N[e]) for e in E if bias}
    inputs = {"z": torch.randn(T, I).to(device, dtype)} | {n: x.to(device, master) for n, x in parameters.items()}
    da = {f"a_{e}": torch.randn(T, N[e]).to(device, dtype) for e in E}

    def levels(inputs: Tensors) -> tuple[list[Tensor], list[Tensor]]:
        return [inputs[f"weight_{e}"] for e in E], [inputs[f"bias_{e}"] for e in E if bias]

    def compute(impl: str, inputs: Tensors) -> Tensors:
        G, b = levels(inputs)
        with torch.autocast(device.type, dtype, enabled=weights == "master"):
            a = functional.gate_hierarchy(inputs["z"], G, b or None, norm=norm, alpha=alpha, impl=impl)
        return dict(zip(da, a, strict=True))

    def expected() -> Expected:
        return gate_hierarchy_problem(inputs["z"], *levels(inputs), list(da.values()), norm=norm, alpha=alpha)

    return Trial(inputs, da, compute, expected)


def _of_experts(
    problem: CPProblem | TRProblem | BilinearProblem,
    inputs: Tensors,
    function: Callable[..., Tensor],
    arguments: Callable[[Tensors], Sequence[Any]],
    expected: Callable[[], Expected],
) -> Trial:
    """Experts by one of the public functions, which takes what `arguments` picks of the inputs, in its order."""
    activation = _activation(problem.activation)

    def compute(impl: str, x: Tensors) -> Tensors:
        return {"y": function(*arguments(x), activation=activation, impl=impl)}

    return Trial(inputs, {"y": problem.dy}, compute, expected)


def _levels(x: Tensors, letter: str) -> list[Tensor]:
    """The coefficients ("a") or the expert factors and cores ("U"), one per hierarchy level."""
    return [value for name, value in x.items() if name.startswith(f"{letter}_")]


def cp(dtype: torch.dtype, device: torch.device, **sizes: Any) -> Trial:
    """CP experts; `sizes` are `cp_problem`'s."""
    problem = cp_problem(**sizes, dtype=dtype, device=device)

    def arguments(x: Tensors) -> Sequence[Any]:
        return x["z"], _levels(x, "a"), _levels(x, "U"), x["in_factor"], x["out_factor"], x.get("in_bias")

    return _of_experts(problem, problem.inputs(), functional.cp_experts, arguments, partial(cp_expected, problem))


def tensor_ring(dtype: torch.dtype, device: torch.device, **sizes: Any) -> Trial:
    """Tensor-ring experts; `sizes` are `tr_problem`'s."""
    problem = tr_problem(**sizes, dtype=dtype, device=device)

    def arguments(x: Tensors) -> Sequence[Any]:
        return x["z"], _levels(x, "a"), _levels(x, "U"), x["in_core"], x["out_core"], x.get("in_bias")

    return _of_experts(problem, problem.inputs, functional.tr_experts, arguments, partial(tr_expected, problem))


def tucker(dtype: torch.dtype, device: torch.device, **sizes: Any) -> Trial:
    """Tucker experts; `sizes` are `tucker_problem`'s."""
    problem = tucker_problem(**sizes, dtype=dtype, device=device)

    def arguments(x: Tensors) -> Sequence[Any]:
        shared = x["in_factor"], x["core"], x["out_factor"], x.get("in_bias")
        return x["z"], _levels(x, "a"), _levels(x, "U"), *shared

    return _of_experts(
        problem, problem.inputs, functional.tucker_experts, arguments, lambda: bilinear_expected(problem)
    )


def full(dtype: torch.dtype, device: torch.device, **sizes: Any) -> Trial:
    """Unfactorised experts on joint coefficients; `sizes` are `full_problem`'s."""
    problem = full_problem(**sizes, dtype=dtype, device=device)

    def arguments(x: Tensors) -> Sequence[Any]:
        return x["z"], [x["a"]], x["weight"], x.get("bias")

    return _of_experts(problem, problem.inputs, functional.full_experts, arguments, partial(bilinear_expected, problem))


def topk(
    dtype: torch.dtype, device: torch.device, *, T: int, I: int, N: int, k: int, bias: bool = True, shift: float = 0.0
) -> Trial:
    """The Mixture of Decoders' gate; with a negative `shift` some rows have fewer than k positive logits."""
    problem = topk_problem(T, I, N, k, bias=bias, shift=shift, dtype=dtype, device=device)

    def compute(impl: str, inputs: Tensors) -> Tensors:
        z, weight, b = inputs["z"], inputs["weight"], inputs.get("bias")
        return {"values": functional.topk_gate(z, weight, b, k=k, impl=impl)[0]}

    return Trial(problem.inputs, {"values": problem.dvalues}, compute, lambda: topk_expected(problem)[0])


def mxd(
    dtype: torch.dtype, device: torch.device, *, T: int, H: int, O: int, N: int, k: int, activation: str = "none"
) -> Trial:
    """The Mixture of Decoders' experts."""
    problem = mxd_problem(T, H, O, N, k, activation=activation, dtype=dtype, device=device)

    def compute(impl: str, x: Tensors) -> Tensors:
        arguments = x["z"], x["values"], problem.indices, x["expert_factors"], x["out_factor"]
        return {"y": functional.mxd_experts(*arguments, activation=_activation(activation), impl=impl)}

    return Trial(problem.inputs, {"y": problem.dy}, compute, lambda: mxd_expected(problem))


def layer(case: LayerCase, backward: bool, dtype: torch.dtype, device: torch.device) -> Trial:
    """A whole layer, gate and experts, by all its parameters; without gradients it may be one call."""
    parameters = {name: p.detach() for name, p in case.build("reference", device).named_parameters()}
    z = torch.randn(case.tokens, case.in_features).to(device, dtype)
    dy = torch.randn(case.tokens, case.out_features).to(device, dtype)

    def compute(impl: str, x: Tensors) -> Tensors:
        with torch.random.fork_rng(devices=[]):  # its own parameters are drawn, and replaced
            made = case.build(impl, device)
        return {"y": functional_call(made, {name: x[name] for name in parameters}, (x["z"],))}

    return Trial({"z": z, **parameters}, {"y": dy}, compute, lambda: layer_expected(case, parameters, z, dy), backward)

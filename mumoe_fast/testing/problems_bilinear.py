"""Inputs of the Tucker and the full layer's contractions, and the three answers that the acceptance rule compares."""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from mumoe_fast import reference
from mumoe_fast.testing.acceptance import EXACT, Rounding
from mumoe_fast.testing.problems_gate import Expected

Tensors = dict[str, Tensor]

FULL_NEEDS = ("z", "a", "weight", "bias")
TUCKER_NEEDS = ("z", "coefficients", "expert_factors", "in_factor", "in_bias", "core", "out_factor")


@dataclass(frozen=True)
class BilinearProblem:
    """Differentiable inputs by name, all of one dtype, and an upstream gradient.

    Tucker: z, a_0 …, U_0 …, in_factor, in_bias, core, out_factor. Full: z, a, weight, bias. A bias may be missing.
    """

    inputs: Tensors
    dy: Tensor
    activation: str = "none"

    @property
    def dtype(self) -> torch.dtype:
        """The dtype that the kernel works in."""
        return self.dy.dtype

    @property
    def levels(self) -> range:
        """Tucker's hierarchy levels."""
        return range(sum(name.startswith("U_") for name in self.inputs))

    def map(self, function: Callable[[Tensor], Tensor]) -> BilinearProblem:
        """The same problem with every tensor replaced."""
        return replace(self, inputs={name: function(x) for name, x in self.inputs.items()}, dy=function(self.dy))


def _problem(
    shapes: dict[str, tuple[int, ...]],
    dy: tuple[int, ...],
    activation: str,
    dtype: torch.dtype,
    device: torch.device | str,
) -> BilinearProblem:
    """Random inputs: coefficients as a gate gives them, three in four exactly zero and the rows summing to 1."""

    def random(name: str, shape: tuple[int, ...]) -> Tensor:
        x = torch.randn(shape)
        if name.startswith("a"):
            sparse = torch.rand(shape) * (torch.rand(shape) < 0.25)
            x = sparse / sparse.sum(-1, keepdim=True).clamp(min=1e-3)
        return x.to(device, dtype)

    return BilinearProblem({name: random(name, shape) for name, shape in shapes.items()}, random("dy", dy), activation)


def tucker_problem(
    T: int,
    I: int,
    O: int,
    N: tuple[int, ...],
    R: tuple[int, ...],
    *,
    bias: bool = True,
    activation: str = "none",
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
) -> BilinearProblem:
    """Tucker with the ranks R = (R_1, …, R_E, R_I, R_O)."""
    *expert_ranks, R_I, R_O = R
    shapes: dict[str, tuple[int, ...]] = {"z": (T, I), "in_factor": (R_I, I), "core": R, "out_factor": (O, R_O)}
    for e, (n, rank) in enumerate(zip(N, expert_ranks, strict=True)):
        shapes |= {f"a_{e}": (T, n), f"U_{e}": (n, rank)}
    return _problem(shapes | ({"in_bias": (R_I,)} if bias else {}), (T, O), activation, dtype, device)


def full_problem(
    T: int,
    I: int,
    O: int,
    N: int,
    *,
    bias: bool = True,
    activation: str = "none",
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
) -> BilinearProblem:
    """The full layer with N joint coefficients."""
    shapes: dict[str, tuple[int, ...]] = {"z": (T, I), "a": (T, N), "weight": (N, O, I)}
    return _problem(shapes | ({"bias": (N, O)} if bias else {}), (T, O), activation, dtype, device)


def _contract(problem: BilinearProblem, rounding: Rounding) -> Tensor:
    """The reference's formulas, rounding where the kernels do."""
    x = problem.inputs
    z = x["z"] if problem.activation == "none" else rounding(reference.activate(x["z"], problem.activation))
    if "weight" in x:
        y = torch.einsum("tn,noi,ti->to", x["a"], x["weight"], z)
        return y if "bias" not in x else y + x["a"] @ x["bias"]
    modes = [rounding(x[f"a_{e}"] @ x[f"U_{e}"]) for e in problem.levels]
    modes.append(rounding(F.linear(z, x["in_factor"], x.get("in_bias"))))
    c = rounding(reference.joint_coefficients(modes) @ x["core"].flatten(0, -2))
    return c @ x["out_factor"].t()


def _reference(problem: BilinearProblem, _: Rounding) -> Tensor:
    """The reference itself."""
    x, activation = problem.inputs, None if problem.activation == "none" else problem.activation
    if "weight" in x:
        return reference.full_experts(x["z"], [x["a"]], x["weight"], x.get("bias"), activation=activation)
    a, factors = [x[f"a_{e}"] for e in problem.levels], [x[f"U_{e}"] for e in problem.levels]
    return reference.tucker_experts(
        x["z"], a, factors, x["in_factor"], x["core"], x["out_factor"], x.get("in_bias"), activation=activation
    )


def _solve(
    problem: BilinearProblem, contract: Callable[[BilinearProblem, Rounding], Tensor], rounding: Rounding = EXACT
) -> Tensors:
    """y, and the gradient of every input under its name with a d in front."""
    problem = problem.map(lambda x: x.detach().requires_grad_())
    with torch.enable_grad():
        y = contract(problem, rounding)
        gradients = torch.autograd.grad(y, list(problem.inputs.values()), problem.dy)
    return {"y": y.detach()} | {f"d{name}": dx for name, dx in zip(problem.inputs, gradients, strict=True)}


def bilinear_expected(problem: BilinearProblem, only: Collection[str] | None = None) -> Expected:
    """What y and the gradients must be (those named in `only`, if given), by the acceptance rule.

    t̄ is the contraction on absolute values in float64; an activation, of slope at most 1.13, passes |z|.
    """
    eager = _solve(problem.map(Tensor.float), _contract, Rounding(problem.dtype))
    absolute = replace(problem.map(lambda x: x.detach().double().abs()), activation="none")
    answers = (
        _solve(problem.map(Tensor.double), _reference),
        {name: x.to(problem.dtype) for name, x in eager.items()},
        _solve(absolute, _contract),
    )
    truth, eager, magnitude = (
        {name: x for name, x in answer.items() if only is None or name in only} for answer in answers
    )
    return Expected(truth, eager, magnitude, problem.dtype)


def run_full(
    launchers: Any, problem: BilinearProblem, needed: Collection[str] = FULL_NEEDS, **options: bool
) -> Tensors:
    """y and the gradients of the arguments in `needed`, as `launchers.full_forward` and `full_backward` give them."""
    x = problem.inputs
    arguments = x["z"], x["a"], x["weight"], x.get("bias")
    gradients = launchers.full_backward(
        problem.dy, *arguments, activation=problem.activation, needs=_flags(needed, FULL_NEEDS), **options
    )
    named = {f"d{name}": gradient for name, gradient in zip(FULL_NEEDS, gradients, strict=True)}
    return _present(named | {"y": launchers.full_forward(*arguments, activation=problem.activation)})


def run_tucker(
    launchers: Any, problem: BilinearProblem, needed: Collection[str] = TUCKER_NEEDS, **options: bool
) -> Tensors:
    """y and the gradients of the arguments in `needed`, as `launchers.tucker_forward` and its backward give them."""
    x, activation = problem.inputs, problem.activation
    levels = [x[f"a_{e}"] for e in problem.levels], [x[f"U_{e}"] for e in problem.levels]
    arguments = x["z"], *levels, x["in_factor"], x.get("in_bias"), x["core"], x["out_factor"]
    y, B, c = launchers.tucker_forward(*arguments, activation=activation, save=True)
    dz, da, d_factors, *shared = launchers.tucker_backward(
        problem.dy, *arguments, B, c, activation=activation, needs=_flags(needed, TUCKER_NEEDS), **options
    )
    named = {"y": y, "dz": dz} | {f"d{name}": dx for name, dx in zip(TUCKER_NEEDS[3:], shared, strict=True)}
    named |= {f"da_{e}": dx for e, dx in enumerate(da)} | {f"dU_{e}": dx for e, dx in enumerate(d_factors)}
    return _present(named)


def _flags(needed: Collection[str], names: Collection[str]) -> list[bool]:
    return [name in needed for name in names]


def _present(results: dict[str, Tensor | None]) -> Tensors:
    return {name: result for name, result in results.items() if result is not None}

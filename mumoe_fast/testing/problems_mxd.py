"""The Mixture of Decoders' inputs as data, and what the acceptance rule compares its kernels with."""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from mumoe_fast import reference
from mumoe_fast.testing.acceptance import EXACT, Rounding
from mumoe_fast.testing.problems_gate import Expected

Tensors = dict[str, Tensor]

MARGIN = 1e-4  # between the logits that top-k compares: a hundred times what float32 rounds on a few dozen products


@dataclass(frozen=True)
class TopkProblem:
    """Inputs and an upstream gradient of the top-k gate."""

    z: Tensor
    weight: Tensor
    bias: Tensor | None
    dvalues: Tensor
    k: int

    @property
    def inputs(self) -> Tensors:
        """What can be differentiated, by name."""
        named = {"z": self.z, "weight": self.weight}
        return named if self.bias is None else named | {"bias": self.bias}


def topk_problem(
    T: int,
    I: int,
    N: int,
    k: int,
    *,
    bias: bool = True,
    shift: float = 0.0,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
) -> TopkProblem:
    """Random inputs whose k largest logits no rounding can change: all positive ones are MARGIN apart, and from zero.

    `shift` is added to every bias: below zero it leaves some rows fewer than k positive logits.
    """
    while True:
        z, weight = torch.randn(T, I).to(device, dtype), torch.randn(N, I).to(device, dtype)
        b = (torch.randn(N) + shift).to(device, dtype) if bias else None
        s = reference.gate_logits(z.double(), weight.double(), None if b is None else b.double())
        candidates = torch.cat([s.relu(), s.new_zeros(T, 1)], -1).sort(-1, descending=True).values[:, : k + 1]
        gaps = -candidates.diff(dim=-1)
        if (gaps[candidates[:, :-1] > 0] > MARGIN).all() and (s.abs() > MARGIN).all():
            return TopkProblem(z, weight, b, torch.randn(T, k).to(device, dtype), k)


def topk_expected(problem: TopkProblem, only: Collection[str] | None = None) -> tuple[Expected, Tensor]:
    """``values`` (T, k), ``dz``, ``dweight`` and ``dbias`` by the acceptance rule, and the indices of their experts."""
    dtype = problem.z.dtype
    truth, indices = _solve_topk(problem, EXACT, torch.float64)
    eager, _ = _solve_topk(problem, Rounding(dtype), torch.float32)
    z, weight = (x.detach().to(dtype).double().abs() for x in (problem.z, problem.weight))
    size = F.linear(z, weight, None if problem.bias is None else problem.bias.to(dtype).double().abs())
    ds = torch.zeros_like(size).scatter(-1, indices, problem.dvalues.double().abs())
    magnitude = {"values": size.gather(-1, indices), "dz": ds @ weight, "dweight": ds.T @ z, "dbias": ds.sum(0)}
    return _expected(truth, eager, magnitude, dtype, only), indices


def _solve_topk(problem: TopkProblem, rounding: Rounding, dtype: torch.dtype) -> tuple[Tensors, Tensor]:
    """The reference on weight and bias quantised to z's dtype, as autocast's master copies are; and the indices."""
    leaves = {name: x.detach().to(problem.z.dtype).to(dtype).requires_grad_() for name, x in problem.inputs.items()}
    with torch.enable_grad():
        a = reference.topk_gate(rounding.gradient(leaves["z"]), leaves["weight"], leaves.get("bias"), problem.k)
        values, indices = a.topk(problem.k, dim=-1)
        values = rounding(values)
        gradients = torch.autograd.grad(values, list(leaves.values()), problem.dvalues.to(dtype))
    named = {f"d{name}": gradient for name, gradient in zip(leaves, gradients, strict=True)}
    return {"values": values.detach(), **named}, indices


def _expected(
    truth: Tensors, eager: Tensors, magnitude: Tensors, dtype: torch.dtype, only: Collection[str] | None
) -> Expected:
    def named(results: Tensors) -> Tensors:
        return {name: x for name, x in results.items() if only is None or name in only}

    return Expected(named(truth), named(eager), named(magnitude), dtype)


@dataclass(frozen=True)
class MxDProblem:
    """Inputs and an upstream gradient of the experts, all of one dtype but the indices."""

    z: Tensor
    values: Tensor
    indices: Tensor
    expert_factors: Tensor
    out_factor: Tensor
    dy: Tensor
    activation: str = "none"

    @property
    def dtype(self) -> torch.dtype:
        """The dtype that the kernel works in."""
        return self.z.dtype

    @property
    def inputs(self) -> Tensors:
        """What can be differentiated, by name."""
        names = ("z", "values", "expert_factors", "out_factor")
        return {name: getattr(self, name) for name in names}

    def map(self, function: Callable[[Tensor], Tensor]) -> MxDProblem:
        """The same problem with every floating-point tensor replaced."""
        return replace(
            self,
            z=function(self.z),
            values=function(self.values),
            expert_factors=function(self.expert_factors),
            out_factor=function(self.out_factor),
            dy=function(self.dy),
        )


def mxd_problem(
    T: int,
    H: int,
    O: int,
    N: int,
    k: int,
    *,
    activation: str = "none",
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
) -> MxDProblem:
    """Random inputs: k different experts for every token, and one value in four zero, as relu leaves them."""

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape).to(device, dtype)

    values = torch.rand(T, k) * (torch.rand(T, k) < 0.75)
    indices = torch.rand(T, N).argsort(-1)[:, :k].to(device)
    return MxDProblem(
        normal(T, H), values.to(device, dtype), indices, normal(N, O), normal(O, H), normal(T, O), activation
    )


def _dense(problem: MxDProblem) -> Tensor:
    """The coefficients (T, N) that the support stands for."""
    zeros = problem.values.new_zeros(len(problem.values), len(problem.expert_factors))
    return zeros.scatter_add(-1, problem.indices.long(), problem.values)


def _truth(problem: MxDProblem) -> Tensor:
    """The reference itself, on dense coefficients."""
    activation = None if problem.activation == "none" else problem.activation
    factors = problem.expert_factors, problem.out_factor
    return reference.mxd_experts(problem.z, _dense(problem), *factors, activation=activation)


def _product(problem: MxDProblem, rounding: Rounding) -> tuple[Tensor, Tensor]:
    """A as the kernel holds it, and B as it is stored: their product is y."""
    activated = problem.z
    if problem.activation != "none":
        activated = rounding(reference.activate(problem.z, problem.activation))
    return _dense(problem) @ problem.expert_factors, rounding(activated @ problem.out_factor.t())


def _eager(problem: MxDProblem, rounding: Rounding) -> Tensors:
    """y and the gradients, rounding where the kernel does: y sees A in float32, backward the stored A and dA."""
    A, B = _product(problem, rounding)
    y = (A * B).detach()
    return {"y": y, **_gradients(problem, rounding(A) * B)}


def _gradients(problem: MxDProblem, y: Tensor) -> Tensors:
    inputs = problem.inputs
    gradients = torch.autograd.grad(y, list(inputs.values()), problem.dy)
    return {f"d{name}": gradient for name, gradient in zip(inputs, gradients, strict=True)}


def mxd_expected(problem: MxDProblem, only: Collection[str] | None = None) -> Expected:
    """What y and the gradients must be (those named in `only`, if given), by the acceptance rule."""
    dtype = problem.dtype
    with torch.enable_grad():
        exact = problem.map(lambda x: x.detach().double().requires_grad_())
        y = _truth(exact)
        truth = {"y": y.detach(), **_gradients(exact, y)}
        eager = _eager(problem.map(lambda x: x.detach().float().requires_grad_()), Rounding(dtype))
        positive = replace(exact.map(lambda x: x.detach().abs().requires_grad_()), activation="none")
        y = _truth(positive)
        magnitude = {"y": y.detach(), **_gradients(positive, y)}
    eager = {name: x.to(dtype) for name, x in eager.items()}
    return _expected(truth, eager, magnitude, dtype, only)

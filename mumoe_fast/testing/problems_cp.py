"""CP's inputs as data, and the three answers that the acceptance rule compares: truth, eager and magnitude."""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from mumoe_fast import reference
from mumoe_fast.testing.acceptance import EXACT, Rounding
from mumoe_fast.testing.problems_gate import Expected


@dataclass(frozen=True)
class CPProblem:
    """Inputs and an upstream gradient of the CP contraction, all of one dtype."""

    z: Tensor
    coefficients: tuple[Tensor, ...]
    expert_factors: tuple[Tensor, ...]
    in_factor: Tensor
    in_bias: Tensor | None
    out_factor: Tensor
    dy: Tensor
    activation: str = "none"

    @property
    def dtype(self) -> torch.dtype:
        """The dtype that the kernel works in."""
        return self.z.dtype

    def inputs(self) -> dict[str, Tensor]:
        """What can be differentiated, by name: one entry per level for a and U, no bias where there is none."""
        named = {"z": self.z, "in_factor": self.in_factor, "out_factor": self.out_factor}
        for e, (a, factor) in enumerate(zip(self.coefficients, self.expert_factors, strict=True)):
            named |= {f"a_{e}": a, f"U_{e}": factor}
        return named if self.in_bias is None else named | {"in_bias": self.in_bias}

    def map(self, function: Callable[[Tensor], Tensor]) -> CPProblem:
        """The same problem with every tensor replaced."""
        return replace(
            self,
            z=function(self.z),
            coefficients=tuple(map(function, self.coefficients)),
            expert_factors=tuple(map(function, self.expert_factors)),
            in_factor=function(self.in_factor),
            in_bias=None if self.in_bias is None else function(self.in_bias),
            out_factor=function(self.out_factor),
            dy=function(self.dy),
        )


def cp_problem(
    T: int,
    I: int,
    O: int,
    N: tuple[int, ...],
    R: int,
    *,
    share: float = 0.25,
    bias: bool = True,
    activation: str = "none",
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
) -> CPProblem:
    """Random inputs: coefficients as a gate gives them, about `share` of them nonzero and the rows summing to 1."""

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape).to(device, dtype)

    def coefficients(n: int) -> Tensor:
        sparse = torch.rand(T, n) * (torch.rand(T, n) < share)
        return (sparse / sparse.sum(-1, keepdim=True).clamp(min=1e-3)).to(device, dtype)

    return CPProblem(
        z=normal(T, I),
        coefficients=tuple(coefficients(n) for n in N),
        expert_factors=tuple(normal(n, R) for n in N),
        in_factor=normal(R, I),
        in_bias=normal(R) if bias else None,
        out_factor=normal(O, R),
        dy=normal(T, O),
        activation=activation,
    )


class _StoredValue(torch.autograd.Function):
    """A value that the kernel saves for backward, whose gradient it keeps in float32."""

    @staticmethod
    def forward(ctx: object, x: Tensor, rounding: Rounding) -> Tensor:
        return x if rounding.dtype is None else x.to(rounding.dtype).to(x.dtype)

    @staticmethod
    def backward(ctx: object, dx: Tensor) -> tuple[Tensor, None]:
        return dx, None


def _stored(x: Tensor, rounding: Rounding) -> Tensor:
    return _StoredValue.apply(x, rounding)  # type: ignore[no-untyped-call,no-any-return]


def _contract(problem: CPProblem, rounding: Rounding, saved: bool) -> Tensor:
    """The reference's formula, rounding where the kernel does; with A and B as backward sees them if `saved`."""
    activated = problem.z
    if problem.activation != "none":
        activated = rounding(reference.activate(problem.z, problem.activation))
    A = torch.ones_like(problem.in_factor[:1, :1])
    for a, factor in zip(problem.coefficients, problem.expert_factors, strict=True):
        A = A * rounding.gradient(a @ factor)
    B = rounding.gradient(activated @ problem.in_factor.t())
    B = B if problem.in_bias is None else B + problem.in_bias
    if saved:
        A, B = _stored(A, rounding), _stored(B, rounding)
    return _stored(A * B, rounding) @ problem.out_factor.t()


def _solve(problem: CPProblem, rounding: Rounding = EXACT) -> dict[str, Tensor]:
    """y, and the gradient of every input under its name with a d in front."""
    problem = problem.map(lambda x: x.detach().requires_grad_())
    named = problem.inputs()
    with torch.enable_grad():
        y = _contract(problem, rounding, saved=False)
        gradients = torch.autograd.grad(_contract(problem, rounding, saved=True), list(named.values()), problem.dy)
    return {"y": y.detach()} | {f"d{name}": gradient for name, gradient in zip(named, gradients, strict=True)}


def _truth(problem: CPProblem) -> dict[str, Tensor]:
    """The reference itself, in float64, on the inputs as they are."""
    exact = problem.map(lambda x: x.detach().double().requires_grad_())
    named = exact.inputs()
    with torch.enable_grad():
        y = reference.cp_experts(
            exact.z,
            exact.coefficients,
            exact.expert_factors,
            exact.in_factor,
            exact.out_factor,
            exact.in_bias,
            activation=None if exact.activation == "none" else exact.activation,
        )
        gradients = torch.autograd.grad(y, list(named.values()), exact.dy)
    return {"y": y.detach()} | {f"d{name}": gradient for name, gradient in zip(named, gradients, strict=True)}


def _eager(problem: CPProblem) -> dict[str, Tensor]:
    """The same formula in float32, rounded to the problem's dtype wherever the kernel rounds."""
    results = _solve(problem.map(Tensor.float), Rounding(problem.dtype))
    return {name: x.to(problem.dtype) for name, x in results.items()}


def _magnitude(problem: CPProblem) -> dict[str, Tensor]:
    """The contraction on absolute values in float64; an activation, of slope at most 1.13, passes |z|."""
    return _solve(replace(problem.map(lambda x: x.detach().double().abs()), activation="none"))


def cp_expected(problem: CPProblem, only: Collection[str] | None = None) -> Expected:
    """What y and the gradients must be (those named in `only`, if given), by the acceptance rule."""

    def named(answers: dict[str, Tensor]) -> dict[str, Tensor]:
        return {name: x for name, x in answers.items() if only is None or name in only}

    return Expected(named(_truth(problem)), named(_eager(problem)), named(_magnitude(problem)), problem.dtype)

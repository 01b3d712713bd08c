"""The tensor ring's inputs as data, and what the acceptance rule compares its kernels with; TT is the case R_1 = 1."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from mumoe_fast import reference
from mumoe_fast.testing.acceptance import EXACT, Rounding
from mumoe_fast.testing.problems_gate import Expected, Tensors


@dataclass(frozen=True)
class TRProblem:
    """Differentiable inputs by name, all of one dtype, and an upstream gradient.

    z, a_0 …, U_0 …, in_core, in_bias (which may be missing) and out_core.
    """

    inputs: Tensors
    dy: Tensor
    activation: str = "none"

    @property
    def dtype(self) -> torch.dtype:
        """The dtype that the kernel works in."""
        return self.dy.dtype

    def levels(self, letter: str) -> list[Tensor]:
        """The coefficients ("a") or the expert cores ("U"), one per hierarchy level."""
        return [x for name, x in self.inputs.items() if name.startswith(f"{letter}_")]

    def map(self, function: Callable[[Tensor], Tensor]) -> TRProblem:
        """The same problem with every tensor replaced."""
        return replace(self, inputs={name: function(x) for name, x in self.inputs.items()}, dy=function(self.dy))


def tr_problem(
    T: int,
    I: int,
    O: int,
    N: tuple[int, ...],
    R: tuple[int, ...],
    *,
    share: float = 0.25,
    bias: bool = True,
    activation: str = "none",
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
) -> TRProblem:
    """Random inputs with the ranks R_1 … R_{E+2}; `share` of the coefficients are nonzero, at least one in a row."""

    def coefficients(n: int) -> Tensor:
        kept = torch.rand(T, n) < share
        kept[:, :1] = True
        a = torch.rand(T, n) * kept
        return a / a.sum(-1, keepdim=True)

    E = len(N)
    inputs = {"z": torch.randn(T, I), "in_core": torch.randn(*R[E:], I)}
    inputs["out_core"] = torch.randn(O, R[0], R[-1])
    for e, n in enumerate(N):
        inputs |= {f"a_{e}": coefficients(n), f"U_{e}": torch.randn(n, R[e], R[e + 1])}
    if bias:
        inputs["in_bias"] = torch.randn(R[E:])
    return TRProblem(inputs, torch.randn(T, O), activation).map(lambda x: x.to(device, dtype))


def _solve(problem: TRProblem, rounding: Rounding = EXACT) -> Tensors:
    """y and all gradients by the reference's formula, rounding what the kernels store."""
    leaves = problem.map(lambda x: x.detach().requires_grad_())
    named = leaves.inputs
    with torch.enable_grad():
        z = named["z"]
        if problem.activation != "none":
            z = rounding(reference.activate(z, problem.activation))
        modes = leaves.levels("a"), leaves.levels("U"), named["in_core"], named.get("in_bias")
        A, B = reference.tr_modes(z, *modes)
        h = rounding((rounding(A) @ rounding(B)).flatten(-2))
        y = rounding(h @ named["out_core"].flatten(1).t())
        gradients = torch.autograd.grad(y, list(named.values()), problem.dy)
    return {"y": y.detach()} | {f"d{name}": gradient for name, gradient in zip(named, gradients, strict=True)}


def tr_expected(problem: TRProblem) -> Expected:
    """What y and the gradients must be, by the acceptance rule; an activation, of slope at most 1.13, passes |z|."""
    eager = _solve(problem.map(Tensor.float), Rounding(problem.dtype))
    return Expected(
        truth=_solve(problem.map(Tensor.double)),
        eager={name: x.to(problem.dtype) for name, x in eager.items()},
        magnitude=_solve(replace(problem.map(lambda x: x.detach().double().abs()), activation="none")),
        dtype=problem.dtype,
    )

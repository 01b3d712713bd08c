"""The acceptance rule: a kernel may err twice as much as eager torch does, and not more.

*Truth* is the reference in float64 on inputs already quantised to the kernel's dtype. *Eager* is the reference in
float32, rounded to the kernel's dtype wherever the kernel rounds. A result passes when it is finite and

    max|kernel − truth| ≤ 2·(max|eager − truth| + eps·max|truth| + 2⁻²⁴·max t̄)

with eps the dtype's and t̄ the same contraction on absolute values, a bound on what cancellation can cost in float32.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


class _Round(torch.autograd.Function):
    """Round values on the way forward and gradients on the way back, each if asked."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, dtype: torch.dtype, forward: bool) -> Tensor:
        ctx.dtype = dtype
        return x.to(dtype).to(x.dtype) if forward else x.view_as(x)

    @staticmethod
    def backward(ctx: Any, dx: Tensor) -> tuple[Tensor, None, None]:
        return dx.to(ctx.dtype).to(dx.dtype), None, None


@dataclass(frozen=True)
class Rounding:
    """Where eager rounds as the kernel does; with dtype None (truth) nothing is rounded."""

    dtype: torch.dtype | None

    def __call__(self, x: Tensor) -> Tensor:
        """A value that the kernel stores, whose gradient it stores too."""
        return x if self.dtype is None else _Round.apply(x, self.dtype, True)  # type: ignore[no-untyped-call]

    def gradient(self, x: Tensor) -> Tensor:
        """A value that the kernel keeps in float32, but whose gradient it stores."""
        return x if self.dtype is None else _Round.apply(x, self.dtype, False)  # type: ignore[no-untyped-call]


EXACT = Rounding(None)


@dataclass(frozen=True)
class Verdict:
    """One tensor of one case: the kernel's largest error against what it may be."""

    name: str
    error: float
    eager_error: float
    allowance: float
    finite: bool

    @property
    def passed(self) -> bool:
        """Whether the result is finite and within the allowance."""
        return self.finite and self.error <= self.allowance

    @property
    def of_allowance(self) -> float:
        """The error as a multiple of the allowance: at most 1 passes."""
        if not self.finite:
            return float("inf")
        return self.error / self.allowance if self.allowance else float(self.error > 0)

    def __str__(self) -> str:
        finite = "" if self.finite else ", NOT FINITE"
        return (
            f"{self.name}: error {self.error:.3e} is {self.of_allowance:.2f} of the allowed {self.allowance:.3e} "
            f"(eager's own error {self.eager_error:.3e}){finite}"
        )


def judge(name: str, kernel: Tensor, eager: Tensor, truth: Tensor, magnitude: Tensor, dtype: torch.dtype) -> Verdict:
    """Apply the rule to one tensor; `dtype` is the kernel's and `magnitude` is t̄."""
    if kernel.shape != truth.shape:
        raise AssertionError(f"{name}: expected shape {tuple(truth.shape)}, got {tuple(kernel.shape)}")
    if truth.numel() == 0:
        return Verdict(name, 0.0, 0.0, 0.0, True)
    result, truth = kernel.detach().double().cpu(), truth.detach().double().cpu()
    eager_error = (eager.detach().double().cpu() - truth).abs().max().item()
    scale, reach = truth.abs().max().item(), magnitude.detach().double().abs().max().item()
    allowance = 2 * (eager_error + torch.finfo(dtype).eps * scale + 2.0**-24 * reach)
    error = (result - truth).abs().max().item()
    return Verdict(name, error, eager_error, allowance, bool(torch.isfinite(result).all()))


def judge_all(
    kernel: Mapping[str, Tensor],
    eager: Mapping[str, Tensor],
    truth: Mapping[str, Tensor],
    magnitude: Mapping[str, Tensor],
    dtypes: Mapping[str, torch.dtype],
) -> list[Verdict]:
    """Judge every named tensor; the kernel must return exactly the tensors that the truth has."""
    if kernel.keys() != truth.keys():
        raise AssertionError(f"expected results {sorted(truth)}, got {sorted(kernel)}")
    return [judge(name, kernel[name], eager[name], truth[name], magnitude[name], dtypes[name]) for name in truth]


def assert_accepted(verdicts: Iterable[Verdict]) -> None:
    """Raise AssertionError that lists every result outside the rule, worst first."""
    failed = sorted((v for v in verdicts if not v.passed), key=lambda v: -v.of_allowance)
    if failed:
        raise AssertionError("outside the acceptance rule:\n" + "\n".join(f"  {v}" for v in failed))

"""The gate with batch norm, in the three operators between which its statistics can be all-reduced.

`gate_logits`: ``s = z Gᵀ`` in float32. `batch_norm_statistics`: mean and biased variance of s over the tokens.
`batch_entmax`: ``a = entmax((s − mean) · rstd)``. Each has its own gradient, so that the chain of the three, with a
differentiable all-reduce between the second and the third, is batch norm's backward under DDP too.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from mumoe_fast.ops._library import define, launchers

_FLOAT32 = torch.float32


def _logits(z: Tensor, weight: Tensor, impl: str) -> Tensor:
    s: Tensor = launchers(impl, "batch_norm").gate_logits_forward(z, weight)
    return s


def _logits_fake(z: Tensor, weight: Tensor, impl: str) -> Tensor:
    return z.new_empty(z.shape[0], weight.shape[0], dtype=_FLOAT32)


def _logits_backward(ds: Tensor, z: Tensor, weight: Tensor, impl: str) -> tuple[Tensor, Tensor]:
    dz, dweight = launchers(impl, "batch_norm").gate_logits_backward(ds, z, weight)
    return dz, dweight


def _logits_backward_fake(ds: Tensor, z: Tensor, weight: Tensor, impl: str) -> tuple[Tensor, Tensor]:
    return z.new_empty(z.shape), weight.new_empty(weight.shape, dtype=_FLOAT32)


def _logits_flops(z: Sequence[int], weight: Sequence[int], *_: Any, **__: Any) -> int:
    return 2 * z[0] * z[1] * weight[0]


def _logits_backward_flops(ds: Any, z: Any, weight: Any, *_: Any, **__: Any) -> int:
    return 2 * _logits_flops(z, weight)


gate_logits_backward = define(
    "gate_logits_backward(Tensor ds, Tensor z, Tensor weight, str impl) -> (Tensor, Tensor)",
    _logits_backward,
    _logits_backward_fake,
    flops=_logits_backward_flops,
)


def _logits_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    z, weight, ctx.impl = inputs
    ctx.save_for_backward(z, weight)


def _logits_autograd(ctx: Any, ds: Tensor) -> tuple[Tensor, Tensor, None]:
    z, weight = ctx.saved_tensors
    dz, dweight = gate_logits_backward(ds, z, weight, ctx.impl)
    return dz, dweight.to(weight.dtype), None


gate_logits = define(
    "gate_logits(Tensor z, Tensor weight, str impl) -> Tensor",
    _logits,
    _logits_fake,
    setup_context=_logits_context,
    backward=_logits_autograd,
    flops=_logits_flops,
)


def _statistics(s: Tensor, impl: str) -> tuple[Tensor, Tensor]:
    mean, var = launchers(impl, "batch_norm").batch_norm_statistics(s)
    return mean, var


def _statistics_fake(s: Tensor, impl: str) -> tuple[Tensor, Tensor]:
    return s.new_empty(s.shape[1]), s.new_empty(s.shape[1])


def _statistics_backward(dmean: Tensor, dvar: Tensor, s: Tensor, mean: Tensor, impl: str) -> Tensor:
    ds: Tensor = launchers(impl, "batch_norm").batch_norm_statistics_backward(dmean, dvar, s, mean)
    return ds


def _statistics_backward_fake(dmean: Tensor, dvar: Tensor, s: Tensor, mean: Tensor, impl: str) -> Tensor:
    return s.new_empty(s.shape)


batch_norm_statistics_backward = define(
    "batch_norm_statistics_backward(Tensor dmean, Tensor dvar, Tensor s, Tensor mean, str impl) -> Tensor",
    _statistics_backward,
    _statistics_backward_fake,
)


def _statistics_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    s, ctx.impl = inputs
    ctx.save_for_backward(s, output[0])


def _statistics_autograd(ctx: Any, dmean: Tensor, dvar: Tensor) -> tuple[Tensor, None]:
    s, mean = ctx.saved_tensors
    return batch_norm_statistics_backward(dmean, dvar, s, mean, ctx.impl), None


batch_norm_statistics = define(
    "batch_norm_statistics(Tensor s, str impl) -> (Tensor, Tensor)",
    _statistics,
    _statistics_fake,
    setup_context=_statistics_context,
    backward=_statistics_autograd,
)


def _entmax(s: Tensor, mean: Tensor, rstd: Tensor, alpha: float, dtype: torch.dtype, impl: str) -> Tensor:
    a: Tensor = launchers(impl, "batch_norm").batch_entmax_forward(s, mean, rstd, alpha, dtype)
    return a


def _entmax_fake(s: Tensor, mean: Tensor, rstd: Tensor, alpha: float, dtype: torch.dtype, impl: str) -> Tensor:
    return s.new_empty(s.shape, dtype=dtype)


def _entmax_backward(
    da: Tensor, a: Tensor, s: Tensor, mean: Tensor, rstd: Tensor, alpha: float, impl: str
) -> tuple[Tensor, Tensor, Tensor]:
    ds, dmean, drstd = launchers(impl, "batch_norm").batch_entmax_backward(da, a, s, mean, rstd, alpha)
    return ds, dmean, drstd


def _entmax_backward_fake(
    da: Tensor, a: Tensor, s: Tensor, mean: Tensor, rstd: Tensor, alpha: float, impl: str
) -> tuple[Tensor, Tensor, Tensor]:
    return s.new_empty(s.shape), mean.new_empty(mean.shape), rstd.new_empty(rstd.shape)


batch_entmax_backward = define(
    "batch_entmax_backward(Tensor da, Tensor a, Tensor s, Tensor mean, Tensor rstd, float alpha, str impl)"
    " -> (Tensor, Tensor, Tensor)",
    _entmax_backward,
    _entmax_backward_fake,
)


def _entmax_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    s, mean, rstd, ctx.alpha, _, ctx.impl = inputs
    ctx.save_for_backward(output, s, mean, rstd)


def _entmax_autograd(ctx: Any, da: Tensor) -> tuple[Tensor | None, ...]:
    ds, dmean, drstd = batch_entmax_backward(da, *ctx.saved_tensors, ctx.alpha, ctx.impl)
    return ds, dmean, drstd, None, None, None


batch_entmax = define(
    "batch_entmax(Tensor s, Tensor mean, Tensor rstd, float alpha, ScalarType dtype, str impl) -> Tensor",
    _entmax,
    _entmax_fake,
    setup_context=_entmax_context,
    backward=_entmax_autograd,
)

__all__ = [
    "batch_entmax",
    "batch_entmax_backward",
    "batch_norm_statistics",
    "batch_norm_statistics_backward",
    "gate_logits",
    "gate_logits_backward",
]

"""`mumoe::entmax`: α-entmax of each row of a matrix, ``a_n = [(α−1)x_n − τ]₊^{1/(α−1)}`` with ``Σ a_n = 1``.

`mumoe::learned_entmax` takes α as a scalar tensor on x's device and has a gradient for it (Correia et al., 2019).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mumoe_fast.ops._library import define, launchers


def _forward(x: Tensor, alpha: float, impl: str) -> Tensor:
    a: Tensor = launchers(impl, "entmax").entmax_forward(x, alpha)
    return a


def _forward_fake(x: Tensor, alpha: float, impl: str) -> Tensor:
    return x.new_empty(x.shape)


def _backward(da: Tensor, a: Tensor, alpha: float, impl: str) -> Tensor:
    dx: Tensor = launchers(impl, "entmax").entmax_backward(da, a, alpha)
    return dx


def _backward_fake(da: Tensor, a: Tensor, alpha: float, impl: str) -> Tensor:
    return a.new_empty(a.shape)


entmax_backward = define(
    "entmax_backward(Tensor da, Tensor a, float alpha, str impl) -> Tensor", _backward, _backward_fake
)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, ctx.alpha, ctx.impl = inputs
    ctx.save_for_backward(output)


def _autograd(ctx: Any, da: Tensor) -> tuple[Tensor, None, None]:
    (a,) = ctx.saved_tensors
    return entmax_backward(da, a, ctx.alpha, ctx.impl), None, None


entmax = define(
    "entmax(Tensor x, float alpha, str impl) -> Tensor",
    _forward,
    _forward_fake,
    setup_context=_setup_context,
    backward=_autograd,
)


def _learned_forward(x: Tensor, alpha: Tensor, impl: str) -> Tensor:
    a: Tensor = launchers(impl, "entmax").learned_entmax_forward(x, alpha)
    return a


def _learned_forward_fake(x: Tensor, alpha: Tensor, impl: str) -> Tensor:
    return x.new_empty(x.shape)


def _learned_backward(da: Tensor, a: Tensor, alpha: Tensor, impl: str) -> tuple[Tensor, Tensor]:
    dx, dalpha = launchers(impl, "entmax").learned_entmax_backward(da, a, alpha)
    return dx, dalpha


def _learned_backward_fake(da: Tensor, a: Tensor, alpha: Tensor, impl: str) -> tuple[Tensor, Tensor]:
    return a.new_empty(a.shape), alpha.new_empty((), dtype=torch.float32)


learned_entmax_backward = define(
    "learned_entmax_backward(Tensor da, Tensor a, Tensor alpha, str impl) -> (Tensor, Tensor)",
    _learned_backward,
    _learned_backward_fake,
)


def _learned_setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, alpha, ctx.impl = inputs
    ctx.save_for_backward(output, alpha)


def _learned_autograd(ctx: Any, da: Tensor) -> tuple[Tensor, Tensor, None]:
    a, alpha = ctx.saved_tensors
    dx, dalpha = learned_entmax_backward(da, a, alpha, ctx.impl)
    return dx, dalpha.to(alpha.dtype), None


learned_entmax = define(
    "learned_entmax(Tensor x, Tensor alpha, str impl) -> Tensor",
    _learned_forward,
    _learned_forward_fake,
    setup_context=_learned_setup_context,
    backward=_learned_autograd,
)

__all__ = ["entmax", "entmax_backward", "learned_entmax", "learned_entmax_backward"]

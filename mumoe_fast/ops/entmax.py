"""`mumoe::entmax`: α-entmax of each row of a matrix, ``a_n = [(α−1)x_n − τ]₊^{1/(α−1)}`` with ``Σ a_n = 1``."""

from __future__ import annotations

from typing import Any

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

__all__ = ["entmax", "entmax_backward"]

"""`mumoe::gate`: expert coefficients ``a = entmax(norm(z Gᵀ + b))`` in one operator, for layer norm or none.

The weight may be float32 while z is half: under autocast the gate keeps its master weight, so that the gradient of a
fresh gate (390 times a trained one's, past float16's range) is accumulated and returned in float32.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from mumoe_fast.ops._library import absent, define, launchers, present

_ARGUMENTS = "Tensor z, Tensor weight, Tensor? bias, str norm, float alpha, float eps"


def _forward(z: Tensor, weight: Tensor, bias: Tensor | None, norm: str, alpha: float, eps: float, impl: str) -> Tensor:
    a: Tensor = launchers(impl, "gate").gate_forward(z, weight, bias, norm=norm, alpha=alpha, eps=eps)
    return a


def _forward_fake(
    z: Tensor, weight: Tensor, bias: Tensor | None, norm: str, alpha: float, eps: float, impl: str
) -> Tensor:
    return z.new_empty(z.shape[0], weight.shape[0])


def _backward(
    da: Tensor,
    a: Tensor,
    z: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    norm: str,
    alpha: float,
    eps: float,
    needs: Sequence[bool],
    impl: str,
) -> tuple[Tensor, ...]:
    gradients = launchers(impl, "gate").gate_backward(
        da, a, z, weight, bias, norm=norm, alpha=alpha, eps=eps, needs=tuple(needs)
    )
    return tuple(absent(z) if gradient is None else gradient for gradient in gradients)


def _backward_fake(
    da: Tensor,
    a: Tensor,
    z: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    norm: str,
    alpha: float,
    eps: float,
    needs: Sequence[bool],
    impl: str,
) -> tuple[Tensor, ...]:
    dz = z.new_empty(z.shape) if needs[0] else absent(z)
    dweight = weight.new_empty(weight.shape, dtype=torch.float32) if needs[1] else absent(z)
    dbias = weight.new_empty(weight.shape[0], dtype=torch.float32) if needs[2] else absent(z)
    return dz, dweight, dbias


def _forward_flops(z: Sequence[int], weight: Sequence[int], *_: Any, **__: Any) -> int:
    return 2 * z[0] * z[1] * weight[0]


def _backward_flops(
    da: Any, a: Any, z: Any, weight: Any, bias: Any, norm: str, alpha: float, eps: float, needs: Any, *_: Any, **__: Any
) -> int:
    """The logits once more, then one product for each of dz and dweight."""
    return _forward_flops(z, weight) * (1 + int(needs[0]) + int(needs[1]))


gate_backward = define(
    f"gate_backward(Tensor da, Tensor a, {_ARGUMENTS}, bool[] needs, str impl) -> (Tensor, Tensor, Tensor)",
    _backward,
    _backward_fake,
    flops=_backward_flops,
)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    z, weight, bias, *ctx.options, ctx.impl = inputs
    ctx.save_for_backward(output, z, weight, bias)


def _autograd(ctx: Any, da: Tensor) -> tuple[Tensor | None, ...]:
    a, z, weight, bias = ctx.saved_tensors
    needs = list(ctx.needs_input_grad[:3])
    dz, dweight, dbias = present(gate_backward(da, a, z, weight, bias, *ctx.options, needs, ctx.impl), needs)
    dweight = None if dweight is None else dweight.to(weight.dtype)
    dbias = None if dbias is None else dbias.to(bias.dtype)
    return dz, dweight, dbias, None, None, None, None


gate = define(
    f"gate({_ARGUMENTS}, str impl) -> Tensor",
    _forward,
    _forward_fake,
    setup_context=_setup_context,
    backward=_autograd,
    flops=_forward_flops,
)

__all__ = ["gate", "gate_backward"]

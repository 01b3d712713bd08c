"""`mumoe::gate`: expert coefficients ``a = entmax(norm(z Gᵀ + b))`` in one operator, for layer norm or none.

`mumoe::gate_hierarchy` is the same for every level of a hierarchy at once, in lists; `biases` is empty where there are
none. Two operators, because a schema with `Tensor[]` doubles the cost of a call.

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
_HIERARCHY_ARGUMENTS = "Tensor z, Tensor[] weights, Tensor[] biases, str norm, float alpha, float eps"


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


def _hierarchy_forward(
    z: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor], norm: str, alpha: float, eps: float, impl: str
) -> list[Tensor]:
    launcher = launchers(impl, "gate").gate_hierarchy_forward
    return list(launcher(z, weights, biases, norm=norm, alpha=alpha, eps=eps))


def _hierarchy_forward_fake(z: Tensor, weights: Sequence[Tensor], *_: Any) -> list[Tensor]:
    return [z.new_empty(z.shape[0], weight.shape[0]) for weight in weights]


def _hierarchy_backward(
    da: Sequence[Tensor],
    a: Sequence[Tensor],
    z: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor],
    norm: str,
    alpha: float,
    eps: float,
    needs: Sequence[bool],
    impl: str,
) -> list[Tensor]:
    dz, d_weights, d_biases = launchers(impl, "gate").gate_hierarchy_backward(
        da, a, z, weights, biases, norm=norm, alpha=alpha, eps=eps, needs=tuple(needs)
    )
    gradients = [dz, *(d_weights or [None] * len(weights)), *(d_biases or [None] * len(biases))]
    return [absent(z) if gradient is None else gradient for gradient in gradients]


def _hierarchy_backward_fake(
    da: Any,
    a: Any,
    z: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor],
    norm: Any,
    alpha: Any,
    eps: Any,
    needs: Sequence[bool],
    impl: Any,
) -> list[Tensor]:
    parameters = [(weight, needs[1]) for weight in weights] + [(bias, needs[2]) for bias in biases]
    return [
        z.new_empty(z.shape) if needs[0] else absent(z),
        *(x.new_empty(x.shape, dtype=torch.float32) if needed else absent(z) for x, needed in parameters),
    ]


def hierarchy_flops(z: Sequence[int], weights: Sequence[Sequence[int]], *_: Any, **__: Any) -> int:
    """The logits of every level."""
    return sum(_forward_flops(z, weight) for weight in weights)


def _hierarchy_backward_flops(
    da: Any, a: Any, z: Any, weights: Any, biases: Any, norm: Any, alpha: Any, eps: Any, needs: Any, *_: Any, **__: Any
) -> int:
    return sum(_backward_flops(None, None, z, weight, None, norm, alpha, eps, needs) for weight in weights)


gate_hierarchy_backward = define(
    f"gate_hierarchy_backward(Tensor[] da, Tensor[] a, {_HIERARCHY_ARGUMENTS}, bool[] needs, str impl) -> Tensor[]",
    _hierarchy_backward,
    _hierarchy_backward_fake,
    flops=_hierarchy_backward_flops,
)


def _hierarchy_context(ctx: Any, inputs: tuple[Any, ...], output: list[Tensor]) -> None:
    z, weights, biases, *ctx.options, ctx.impl = inputs
    ctx.levels = len(weights)
    ctx.save_for_backward(z, *output, *weights, *biases)


def _hierarchy_autograd(ctx: Any, da: Sequence[Tensor]) -> tuple[Any, ...]:
    z, *tensors = ctx.saved_tensors
    E = ctx.levels
    a, weights, biases = tensors[:E], tensors[E : 2 * E], tensors[2 * E :]
    needs = [any(need) if isinstance(need, list) else need for need in ctx.needs_input_grad[:3]]
    results = gate_hierarchy_backward(da, a, z, weights, biases, *ctx.options, needs, ctx.impl)
    flags = [needs[0], *[needs[1]] * E, *[needs[2]] * len(biases)]
    dz, *gradients = present(results, flags)
    parameters = zip(gradients, (*weights, *biases), strict=True)
    d_parameters = [None if gradient is None else gradient.to(x.dtype) for gradient, x in parameters]
    return dz, d_parameters[:E], d_parameters[E:], None, None, None, None


gate_hierarchy = define(
    f"gate_hierarchy({_HIERARCHY_ARGUMENTS}, str impl) -> Tensor[]",
    _hierarchy_forward,
    _hierarchy_forward_fake,
    setup_context=_hierarchy_context,
    backward=_hierarchy_autograd,
    flops=hierarchy_flops,
)

__all__ = ["gate", "gate_backward", "gate_hierarchy", "gate_hierarchy_backward", "hierarchy_flops"]

"""`mumoe::topk_gate` and `mumoe::mxd`: the Mixture of Decoders on the support that top-k leaves.

The gate's weight may be float32 while z is half, as in `mumoe::gate`. A FLOP is counted where the support is: k rows
for each token and not N.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from mumoe_fast.ops._library import absent, define, launchers, present

Shape = Sequence[int]

# --- the gate ---------------------------------------------------------------------------------------------------------


def _gate_forward(z: Tensor, weight: Tensor, bias: Tensor | None, k: int, impl: str) -> tuple[Tensor, Tensor]:
    values, indices = launchers(impl, "mxd").topk_gate_forward(z, weight, bias, k)
    return values, indices


def _gate_forward_fake(z: Tensor, weight: Tensor, bias: Tensor | None, k: int, impl: str) -> tuple[Tensor, Tensor]:
    return z.new_empty(z.shape[0], k), z.new_empty(z.shape[0], k, dtype=torch.int64)


def _gate_backward(
    dvalues: Tensor, values: Tensor, indices: Tensor, z: Tensor, weight: Tensor, needs: Sequence[bool], impl: str
) -> tuple[Tensor, ...]:
    gradients = launchers(impl, "mxd").topk_gate_backward(dvalues, values, indices, z, weight, needs=tuple(needs))
    return tuple(absent(z) if gradient is None else gradient for gradient in gradients)


def _gate_backward_fake(
    dvalues: Tensor, values: Tensor, indices: Tensor, z: Tensor, weight: Tensor, needs: Sequence[bool], impl: str
) -> tuple[Tensor, ...]:
    dz = z.new_empty(z.shape) if needs[0] else absent(z)
    dweight = weight.new_empty(weight.shape, dtype=torch.float32) if needs[1] else absent(z)
    dbias = weight.new_empty(weight.shape[0], dtype=torch.float32) if needs[2] else absent(z)
    return dz, dweight, dbias


def _gate_forward_flops(z: Shape, weight: Shape, *_: Any, **__: Any) -> int:
    return 2 * z[0] * z[1] * weight[0]


def _gate_backward_flops(
    dvalues: Shape, values: Any, indices: Any, z: Shape, weight: Any, needs: Any, *_: Any, **__: Any
) -> int:
    """k rows for each token, once for each of dz and dweight."""
    return 2 * dvalues[0] * dvalues[1] * z[1] * (int(needs[0]) + int(needs[1]))


topk_gate_backward = define(
    "topk_gate_backward(Tensor dvalues, Tensor values, Tensor indices, Tensor z, Tensor weight, bool[] needs, str impl)"
    " -> (Tensor, Tensor, Tensor)",
    _gate_backward,
    _gate_backward_fake,
    flops=_gate_backward_flops,
)


def _gate_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    z, weight, bias, _, ctx.impl = inputs
    values, indices = output
    ctx.mark_non_differentiable(indices)
    ctx.set_materialize_grads(False)
    ctx.bias_dtype = None if bias is None else bias.dtype
    ctx.save_for_backward(values, indices, z, weight)


def _gate_autograd(ctx: Any, dvalues: Tensor, _: Any) -> tuple[Tensor | None, ...]:
    values, indices, z, weight = ctx.saved_tensors
    needs = list(ctx.needs_input_grad[:3])
    dz, dweight, dbias = present(topk_gate_backward(dvalues, values, indices, z, weight, needs, ctx.impl), needs)
    dweight = None if dweight is None else dweight.to(weight.dtype)
    dbias = None if dbias is None else dbias.to(ctx.bias_dtype)
    return dz, dweight, dbias, None, None


topk_gate = define(
    "topk_gate(Tensor z, Tensor weight, Tensor? bias, int k, str impl) -> (Tensor, Tensor)",
    _gate_forward,
    _gate_forward_fake,
    setup_context=_gate_context,
    backward=_gate_autograd,
    flops=_gate_forward_flops,
)

# --- the experts ------------------------------------------------------------------------------------------------------

_ARGUMENTS = "Tensor z, Tensor values, Tensor indices, Tensor expert_factors, Tensor out_factor, str activation"


def _forward(
    z: Tensor,
    values: Tensor,
    indices: Tensor,
    expert_factors: Tensor,
    out_factor: Tensor,
    activation: str,
    save: bool,
    impl: str,
) -> tuple[Tensor, Tensor, Tensor]:
    y, A, B = launchers(impl, "mxd").mxd_forward(
        z, values, indices, expert_factors, out_factor, activation=activation, save=save
    )
    return y, A, B


def _forward_fake(
    z: Tensor,
    values: Tensor,
    indices: Tensor,
    expert_factors: Tensor,
    out_factor: Tensor,
    activation: str,
    save: bool,
    impl: str,
) -> tuple[Tensor, Tensor, Tensor]:
    y = z.new_empty(z.shape[0], out_factor.shape[0])
    if not save:
        return y, absent(z), absent(z)
    A = absent(z) if impl == "native" else torch.empty_like(y)  # the native backward gathers it once more
    return y, A, torch.empty_like(y)


def _backward(
    dy: Tensor,
    A: Tensor,
    B: Tensor,
    z: Tensor,
    values: Tensor,
    indices: Tensor,
    expert_factors: Tensor,
    out_factor: Tensor,
    activation: str,
    needs: Sequence[bool],
    impl: str,
) -> tuple[Tensor, ...]:
    tensors = (dy, A, B, z, values, indices, expert_factors, out_factor)
    gradients = launchers(impl, "mxd").mxd_backward(*tensors, activation=activation, needs=tuple(needs))
    return tuple(absent(z) if gradient is None else gradient for gradient in gradients)


def _backward_fake(
    dy: Tensor,
    A: Tensor,
    B: Tensor,
    z: Tensor,
    values: Tensor,
    indices: Tensor,
    expert_factors: Tensor,
    out_factor: Tensor,
    activation: str,
    needs: Sequence[bool],
    impl: str,
) -> tuple[Tensor, ...]:
    arguments = (z, values, expert_factors, out_factor)
    return tuple(x.new_empty(x.shape) if needed else absent(z) for x, needed in zip(arguments, needs, strict=True))


def _forward_flops(
    z: Shape, values: Shape, indices: Any, expert_factors: Shape, out_factor: Shape, *_: Any, **__: Any
) -> int:
    return 2 * z[0] * out_factor[0] * (values[1] + out_factor[1])


def _backward_flops(
    dy: Any,
    A: Any,
    B: Any,
    z: Shape,
    values: Shape,
    indices: Any,
    expert_factors: Any,
    out_factor: Shape,
    activation: Any,
    needs: Any,
    *_: Any,
    **__: Any,
) -> int:
    """One product like a forward one for each gradient asked for."""
    O, H = out_factor
    need_z, need_values, need_experts, need_out = (int(needed) for needed in needs)
    return 2 * z[0] * O * (values[1] * (need_values + need_experts) + H * (need_z + need_out))


mxd_backward = define(
    f"mxd_backward(Tensor dy, Tensor A, Tensor B, {_ARGUMENTS}, bool[] needs, str impl)"
    " -> (Tensor, Tensor, Tensor, Tensor)",
    _backward,
    _backward_fake,
    flops=_backward_flops,
)


def _context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    *tensors, ctx.activation, _, ctx.impl = inputs
    _, A, B = output
    ctx.mark_non_differentiable(A, B)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(A, B, *tensors)


def _autograd(ctx: Any, dy: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
    need_z, need_values, _, need_experts, need_out = ctx.needs_input_grad[:5]
    needs = [need_z, need_values, need_experts, need_out]
    gradients = mxd_backward(dy, *ctx.saved_tensors, ctx.activation, needs, ctx.impl)
    dz, dvalues, dexpert_factors, dout_factor = present(gradients, needs)
    return dz, dvalues, None, dexpert_factors, dout_factor, None, None, None


mxd = define(
    f"mxd({_ARGUMENTS}, bool save, str impl) -> (Tensor, Tensor, Tensor)",
    _forward,
    _forward_fake,
    setup_context=_context,
    backward=_autograd,
    flops=_forward_flops,
)

__all__ = ["mxd", "mxd_backward", "topk_gate", "topk_gate_backward"]

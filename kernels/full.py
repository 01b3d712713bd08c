"""The unfactorised layer's contraction (Eq. 1, 15), a dense MoE, forward and backward.

Forward, with b = 0 where there is no bias:

    y = Σ_n a_n (W_n act(z) + b_n)

Backward:

    dz = act'(z) ⊙ Σ_n a_n W_nᵀ dy,  da_n = dyᵀ (W_n act(z) + b_n),  dW_n = Σ_t a_n dy act(z)ᵀ,  db_n = Σ_t a_n dy

which is `bilinear` with v = a, x = act(z) and C_n = W_nᵀ. act(z) is a transient of size T×I, computed once and not by
every expert's tiles. z (T, I), a (T, N) the joint coefficients of all levels, W (N, O, I), b (N, O), y (T, O).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from mumoe_fast.kernels._common import matmul_float32
from mumoe_fast.kernels._plans import planned
from mumoe_fast.kernels._tiles import activated, activation_pass
from mumoe_fast.kernels.bilinear import bilinear_backward, bilinear_forward, core_gradient


@planned
def full_forward(z: Tensor, a: Tensor, weight: Tensor, bias: Tensor | None, *, activation: str) -> Tensor:
    """y (T, O). The sum over experts is kept in float32."""
    return bilinear_forward([a], activated(z, activation), weight.mT, bias)


@planned
def full_backward(
    dy: Tensor,
    z: Tensor,
    a: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    *,
    activation: str,
    needs: Sequence[bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """dz, da, dW, db, each None where `needs` (one flag per argument) does not ask for it.

    Accumulated in float32, in the tensors' dtype. Alive at most: act(z), dz, and the buffer of `bilinear_backward`.
    """
    needs_z, needs_a, needs_weight, needs_bias = needs
    x = activated(z, activation) if needs_a or needs_weight else z
    d_weight = core_gradient(x, [a], dy) if needs_weight else None
    da, dz = bilinear_backward(dy, [a], x, weight.mT, needs_v=needs_a, needs_x=needs_z)
    if dz is not None and activation != "none":
        activation_pass(z, activation, dz, None)
    d_a = None
    if da is not None:
        d_a = (da[0] if bias is None else da[0] + matmul_float32(dy, bias.t())).to(a.dtype)
    d_bias = torch.mm(a.t(), dy) if bias is not None and needs_bias else None
    return dz, d_a, d_weight, d_bias

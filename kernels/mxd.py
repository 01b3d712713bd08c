"""The Mixture of Decoders: the top-k gate and the experts, forward and backward, on the gate's support.

Gate, with b = 0 where there is no bias; logits in float32:

    s = z Gᵀ + b,  (v, i) = the k largest of relu(s) and their experts
    ds_tk = dv_tk where v_tk > 0, else 0
    dz_t = Σ_k ds_tk G[i_tk],  dG_n = Σ_{i_tk = n} ds_tk z_t,  db_n = Σ_{i_tk = n} ds_tk

Experts, with C kept as its transpose (N, O), one row per expert:

    A_t = Σ_k v_tk Cᵀ[i_tk],  B = act(z) Dᵀ,  y = A ⊙ B
    dA = dy ⊙ B,  dB = dy ⊙ A,  dv_tk = dA_t · Cᵀ[i_tk],  dCᵀ_n = Σ_{i_tk = n} v_tk dA_t
    dz = (dB D) ⊙ act'(z),  dD = dBᵀ act(z)

z (T, I) at the gate and (T, H) at the experts, G (N, I), b (N), v and i (T, k), D (O, H), y (T, O). Of the N experts
only a token's k take part after the logits. relu keeps the order, and so it comes after the k largest are found.

B goes to memory whoever contracts it: the kernel saves only the way of act(z), which is longer than B's, and pays with
an activation in every block of columns. `vendor_contracts` says where it is worth that.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from mumoe_fast.kernels._common import aligned, alignment, dot_precision, launch, load, store, tiles
from mumoe_fast.kernels._logits import chunks_of_tokens, logits
from mumoe_fast.kernels._tiles import (
    contract,
    distance,
    grouped_blocks,
    input_mode_gradients,
    matrix,
    offsets,
    vendor_product,
)
from mumoe_fast.kernels.configs import cp_forward_config, product_backward_config, vendor_contracts
from mumoe_fast.kernels.support import gather_dot, gather_sum, gather_sum_times, segment_sum, segments


class MxDNeeds(NamedTuple):
    """Which of the experts' gradients are needed."""

    z: bool = True
    values: bool = True
    expert_factors: bool = True
    out_factor: bool = True


@triton.jit(do_not_specialize=["T"])
def _decoder_kernel(
    z,
    out_factor,
    B_ptr,
    T,
    H,
    O,
    H_ALIGN: tl.constexpr,
    O_ALIGN: tl.constexpr,
    ACTIVATION: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_T: tl.constexpr,
):
    H, O = H * H_ALIGN, O * O_ALIGN
    block_t, block_o = grouped_blocks(T, O, BLOCK_T, BLOCK_R, GROUP_T)
    offs_t, offs_o = offsets(block_t, BLOCK_T), offsets(block_o, BLOCK_R)
    mask_t, mask_o = offs_t < T, offs_o < O
    B = contract(z, out_factor, H, offs_t, offs_o, mask_t, mask_o, ACTIVATION, BLOCK_K, PRECISION)
    store(B_ptr + offs_t[:, None] * O + offs_o[None, :], B, mask_t[:, None] & mask_o[None, :])


@triton.jit(do_not_specialize=["T"])
def _product_backward_kernel(
    dy,
    A_ptr,
    B_ptr,
    dA_ptr,
    dB_ptr,
    T,
    O,
    O_ALIGN: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    O = O * O_ALIGN
    blocks_o = tl.cdiv(O, BLOCK_R)
    offs_t, offs_o = offsets(tl.program_id(0) // blocks_o, BLOCK_T), offsets(tl.program_id(0) % blocks_o, BLOCK_R)
    mask = (offs_t < T)[:, None] & (offs_o < O)[None, :]
    offs = offs_t[:, None] * O + offs_o[None, :]
    dy_tile = load(dy[0] + distance(dy, offs_t[:, None], offs_o[None, :]), mask)
    if dA_ptr is not None:
        store(dA_ptr + offs, dy_tile * load(B_ptr + offs, mask), mask)
    if dB_ptr is not None:
        store(dB_ptr + offs, dy_tile * load(A_ptr + offs, mask), mask)


def topk_gate_forward(z: Tensor, weight: Tensor, bias: Tensor | None, k: int) -> tuple[Tensor, Tensor]:
    """The values (T, k), falling and in z's dtype, and their experts (T, k), int64.

    Exactly k are kept, zeros among them where fewer logits are positive; which of equal logits is torch.topk's choice.
    A row with NaN or ±inf among its logits has NaN values. weight and bias may be float32 where z is half: they are
    cast. Tokens are worked through in `chunks_of_tokens`.
    """
    weight, bias = weight.to(z.dtype), None if bias is None else bias.to(z.dtype)
    values, indices = z.new_empty(len(z), k), torch.empty(len(z), k, dtype=torch.int64, device=z.device)
    for tokens in chunks_of_tokens(len(z), len(weight)):
        s = logits(z[tokens], weight, bias)
        largest = s.topk(k, dim=-1)
        low, high = s.aminmax(dim=-1, keepdim=True)
        values[tokens] = largest.values.relu() + 0 * (low + high)
        indices[tokens] = largest.indices
    return values, indices


def topk_gate_backward(
    dvalues: Tensor,
    values: Tensor,
    indices: Tensor,
    z: Tensor,
    weight: Tensor,
    *,
    needs: tuple[bool, bool, bool] = (True, True, True),
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """dz (T, I) in z's dtype, dG (N, I) and db (N,) in float32, each None where `needs` says so."""
    ds = torch.where(values > 0, dvalues, 0 * values)  # 0 · NaN: a bad row has bad gradients
    dz = gather_sum(ds, indices, weight.to(z.dtype)) if needs[0] else None
    if not (needs[1] or needs[2]):
        return dz, None, None
    by_expert = segments(ds, indices, len(weight))
    d_weight = segment_sum(ds, by_expert, z, torch.float32) if needs[1] else None
    ones = z.new_ones(1, 1).expand(len(z), 1)
    d_bias = segment_sum(ds, by_expert, ones, torch.float32).squeeze(1) if needs[2] else None
    return dz, d_weight, d_bias


def _decode(z: Tensor, out_factor: Tensor, activation: str) -> Tensor:
    """``B = act(z) Dᵀ`` (T, O), by the vendor's GEMM, or by the kernel that activates on the way in."""
    (T, H), O = z.shape, len(out_factor)
    if activation == "none" or vendor_contracts("cp", z.device, z.dtype, T, H, activation):
        return vendor_product(z, out_factor.t(), activation=activation)
    B = z.new_empty(T, O)
    config = cp_forward_config(z.device, z.dtype, T, wide=alignment(H, O) >= 8)
    launch(
        _decoder_kernel,
        (tiles(config, T=T, R=O),),
        config,
        z.device,
        z=matrix(z),
        out_factor=matrix(out_factor.t()),
        B_ptr=B,
        T=T,
        **aligned(H=H, O=O),
        ACTIVATION=activation,
        PRECISION=dot_precision(z.dtype),
    )
    return B


def mxd_forward(
    z: Tensor,
    values: Tensor,
    indices: Tensor,
    expert_factors: Tensor,
    out_factor: Tensor,
    *,
    activation: str,
    save: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """y (T, O), and A and B (T, O) in the tensors' dtype if they are to be saved for backward, else empty.

    Alive at most: A, B and y; and before them, where the vendor contracts through an activation, B and one transient
    T×H, which is no more than backward holds.
    """
    B = _decode(z, out_factor, activation)
    y, A = gather_sum_times(values, indices, expert_factors, B, save)
    return y, A, B if save else z.new_empty(0)


def _product_backward(dy: Tensor, A: Tensor, B: Tensor, needs_A: bool, needs_B: bool) -> tuple[Tensor | None, ...]:
    """dA and dB (T, O) of ``y = A ⊙ B``, each None where it is not needed."""
    T, O = dy.shape
    dA, dB = B.new_empty(T, O) if needs_A else None, A.new_empty(T, O) if needs_B else None
    config = product_backward_config(dy.device)
    launch(
        _product_backward_kernel,
        (tiles(config, T=T, R=O),),
        config,
        dy.device,
        dy=matrix(dy),
        A_ptr=A.contiguous(),
        B_ptr=B.contiguous(),
        dA_ptr=dA,
        dB_ptr=dB,
        T=T,
        **aligned(O=O),
    )
    return dA, dB


def mxd_backward(
    dy: Tensor,
    A: Tensor,
    B: Tensor,
    z: Tensor,
    values: Tensor,
    indices: Tensor,
    expert_factors: Tensor,
    out_factor: Tensor,
    *,
    activation: str,
    needs: tuple[bool, ...],
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """dz, dvalues, dCᵀ (N, O), dD (O, H), each None where it is not needed; A and B are what `mxd_forward` saved.

    Weight gradients accumulate in float32 and come in the factors' dtype.
    """
    needs = MxDNeeds(*needs)
    dA, dB = _product_backward(dy, A, B, needs.values or needs.expert_factors, needs.z or needs.out_factor)
    dvalues, d_expert_factors, dz, d_out_factor = None, None, None, None
    if dA is not None and needs.values:
        dvalues = gather_dot(dA, indices, expert_factors)
    if dA is not None and needs.expert_factors:
        by_expert = segments(values, indices, len(expert_factors))
        d_expert_factors = segment_sum(values, by_expert, dA, expert_factors.dtype)
    del dA
    if dB is not None:
        dz, d_out_factor = input_mode_gradients(dB, z, out_factor, activation, needs.z, needs.out_factor)
    return dz, dvalues, d_expert_factors, d_out_factor

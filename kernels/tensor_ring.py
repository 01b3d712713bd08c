"""The tensor ring's expert contraction (Eq. 3, 17–18) for any number of levels E, forward and backward.

A token's small matrices are P×M and M×R, with P = R_1, M = R_{E+1}, R = R_{E+2}. Forward, b = 0 without a bias:

    A_e = U_e ×₂ a_e (R_e × R_{e+1}),  A = A_1 ⋯ A_E,  B = U_in ×₂ act(z) + b,  h = A B
    y_o = Σ_{p r} h_pr U_out[o, p, r]

Backward:

    dU_out[o, p, r] = Σ_t dy_o h_pr,  dh_pr = Σ_o dy_o U_out[o, p, r],  dB = Aᵀ dh,  dA = dh Bᵀ,  db = Σ_t dB
    dA_e = (A_1 ⋯ A_{e−1})ᵀ dA (A_{e+1} ⋯ A_E)ᵀ

and from dB and dA_e the gradients of the input and expert modes as `_tiles` has them. Both kernels walk over the
matrices' rows one at a time, so that a GEMM tile is never wider than BLOCK_R and meets its row of A in the epilogue;
for few tokens, whose tiles are narrow, forward takes all rows in one. `vendor_contracts` says of B and dh whether the
kernel contracts them, so that they never go to memory, or the vendor's GEMM makes them and the kernel reads their rows.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from mumoe_fast.kernels._common import aligned, alignment, dot_precision, launch, load, store, tiles
from mumoe_fast.kernels._plans import planned
from mumoe_fast.kernels._ring_levels import (
    expert_gradients,
    fit_in_a_tile,
    level_matrix,
    product_of_levels,
    ring_levels,
)
from mumoe_fast.kernels._tiles import (
    contracted,
    grouped_blocks,
    input_mode_gradients,
    made,
    offsets,
    product_tile,
    vendor_product,
)
from mumoe_fast.kernels.configs import tr_backward_config, tr_forward_config, vendor_contracts


@triton.jit
def _column(x, column):
    """One column of every matrix in a tile (BLOCK_T, rows, columns)."""
    return tl.sum(tl.where(tl.arange(0, x.shape[2])[None, None, :] == column, x, 0.0), axis=2)


@triton.jit
def _input_rows(
    input_product,
    in_bias_ptr,
    B_ptr,
    first,
    M,
    R,
    offs_t,
    offs_r,
    mask_t,
    mask_r,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """BLOCK_M rows of every token's B, (BLOCK_T, BLOCK_M BLOCK_R) by one product, and stored if there is a B_ptr."""
    offs_m = first + tl.arange(0, BLOCK_M)
    columns: tl.constexpr = BLOCK_M * offs_r.shape[0]
    offs_mr = tl.reshape(offs_m[:, None] * R + offs_r[None, :], (columns,))
    mask_mr = tl.reshape((offs_m < M)[:, None] & mask_r[None, :], (columns,))
    B = product_tile(input_product, offs_t, offs_mr, mask_t, mask_mr, BLOCK_K, PRECISION)
    if in_bias_ptr is not None:
        B += load(in_bias_ptr + offs_mr, mask_mr)[None, :]
    if B_ptr is not None and tl.program_id(1) == 0:
        store(B_ptr + offs_t[:, None] * M * R + offs_mr[None, :], B, mask_t[:, None] & mask_mr[None, :])
    return B


@triton.jit(do_not_specialize=["T"])
def _tr_forward_kernel(
    input_product,
    in_bias_ptr,
    levels,
    h_ptr,
    A_ptr,
    B_ptr,
    T,
    P,
    M,
    R,
    R_ALIGN: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_T: tl.constexpr,
):
    # With levels, A is contracted here and written for backward; without, it is read.
    R = R * R_ALIGN
    block_t, block_r = grouped_blocks(T, R, BLOCK_T, BLOCK_R, GROUP_T)
    offs_t, offs_r, offs_p = offsets(block_t, BLOCK_T), offsets(block_r, BLOCK_R), offsets(tl.program_id(1), BLOCK_P)
    mask_t, mask_r, mask_p = offs_t < T, offs_r < R, offs_p < P
    A_rows = (offs_t[:, None] * P + offs_p[None, :]) * M
    mask_tp = mask_t[:, None] & mask_p[None, :]
    if len(levels) > 0:
        A = level_matrix(levels[0], offs_t, mask_t, BLOCK_K, PRECISION)
        for e in tl.static_range(1, len(levels)):
            A_e = level_matrix(levels[e], offs_t, mask_t, BLOCK_K, PRECISION)
            A = tl.sum(A[:, :, :, None] * A_e[:, None, :, :], axis=2)
        if A_ptr is not None and block_r == 0:
            offs_m = tl.arange(0, A.shape[2])
            mask = mask_tp[:, :, None] & (offs_m < M)[None, None, :]
            store(A_ptr + A_rows[:, :, None] + offs_m[None, None, :], A, mask)

    if BLOCK_M == 1:
        h = tl.zeros((BLOCK_T, BLOCK_P, BLOCK_R), tl.float32)
        for m in range(M):
            B = _input_rows(
                *(input_product, in_bias_ptr, B_ptr, m, M, R, offs_t, offs_r, mask_t, mask_r),
                *(BLOCK_M, BLOCK_K, PRECISION),
            )
            A_m = _column(A, m) if len(levels) > 0 else load(A_ptr + A_rows + m, mask_tp)
            h += A_m[:, :, None] * B[:, None, :]
    else:  # all rows
        B = _input_rows(
            *(input_product, in_bias_ptr, B_ptr, 0, M, R, offs_t, offs_r, mask_t, mask_r),
            *(BLOCK_M, BLOCK_K, PRECISION),
        )
        B = tl.reshape(B, (BLOCK_T, BLOCK_M, BLOCK_R))
        if len(levels) == 0:
            offs_m = tl.arange(0, BLOCK_M)
            A = load(
                A_ptr + A_rows[:, :, None] + offs_m[None, None, :], mask_tp[:, :, None] & (offs_m < M)[None, None, :]
            )
        h = tl.sum(A[:, :, :, None] * B[:, None, :, :], axis=2)
    offs_pr = offs_p[:, None] * R + offs_r[None, :]
    mask = mask_tp[:, :, None] & mask_r[None, None, :]
    store(h_ptr + offs_t[:, None, None] * P * R + offs_pr[None, :, :], h, mask)


@triton.jit(do_not_specialize=["T"])
def _tr_backward_kernel(
    output_product,
    A_ptr,
    B_ptr,
    h_ptr,
    dB_ptr,
    db_ptr,
    dA_ptr,
    T,
    P,
    M,
    R,
    R_ALIGN: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_T: tl.constexpr,
):
    # BLOCK_P rows of B and dB (there are M) stay in registers while the rows of dh (there are P) pass by. dA is a sum
    # over ranks: every block of them writes its own part.
    R = R * R_ALIGN
    block_t, block_r = grouped_blocks(T, R, BLOCK_T, BLOCK_R, GROUP_T)
    offs_t, offs_r, offs_m = offsets(block_t, BLOCK_T), offsets(block_r, BLOCK_R), offsets(tl.program_id(1), BLOCK_P)
    mask_t, mask_r, mask_m = offs_t < T, offs_r < R, offs_m < M
    mask_tm, mask_tr = mask_t[:, None] & mask_m[None, :], mask_t[:, None] & mask_r[None, :]
    mask = mask_tm[:, :, None] & mask_r[None, None, :]
    offs_mr = offs_m[:, None] * R + offs_r[None, :]
    offs = offs_t[:, None, None] * M * R + offs_mr[None, :, :]
    B = load(B_ptr + offs, mask)
    dB = tl.where(mask, 0.0, B)  # zero in B's layout: another would be A's too, and a load for every entry
    for p in range(P):
        offs_pr = p * R + offs_r
        dh = product_tile(output_product, offs_t, offs_pr, mask_t, mask_r, BLOCK_K, PRECISION)
        A_offs = (offs_t[:, None] * P + p) * M + offs_m[None, :]
        A_p = load(A_ptr + A_offs, mask_tm)
        if h_ptr is not None:
            store(h_ptr + offs_t[:, None] * P * R + offs_pr[None, :], tl.sum(A_p[:, :, None] * B, axis=1), mask_tr)
        if dA_ptr is not None:
            part = dA_ptr + block_r.to(tl.int64) * T * P * M
            tl.store(part + A_offs, tl.sum(dh[:, None, :] * B, axis=2), mask=mask_tm)
        dB += A_p[:, :, None] * dh[:, None, :]
    if dB_ptr is not None:
        store(dB_ptr + offs, dB, mask)
    if db_ptr is not None:
        part = db_ptr + block_t.to(tl.int64) * M * R
        tl.store(part + offs_mr, tl.sum(dB, axis=0), mask=mask_m[:, None] & mask_r[None, :])


@planned
def tr_forward(
    z: Tensor,
    coefficients: Sequence[Tensor],
    expert_cores: Sequence[Tensor],
    in_core: Tensor,
    in_bias: Tensor | None,
    out_core: Tensor,
    *,
    activation: str,
    save: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """y (T, O), and A (T, P, M) and B (T, M, R) in the tensors' dtype if they are to be saved for backward, else empty.

    h is computed from float32 tiles, or from what the vendor rounded of B, written once, and multiplied with U_out by
    the vendor's GEMM. Where the vendor makes B, B is alive beside h even if it is not saved, and before them B and,
    with an activation, one transient T×I.
    """
    (T, I), (M, R, _), P = z.shape, in_core.shape, expert_cores[0].shape[1]
    in_weight = in_core.contiguous().flatten(0, 1).t()
    made_B: Tensor | None = None
    if vendor_contracts("tr", z.device, z.dtype, T, I, activation):
        made_B = vendor_product(z, in_weight, None if in_bias is None else in_bias.flatten(), activation)
    config = tr_forward_config(z.device, z.dtype, T, rows=(P, M), wide=alignment(R) >= 8, reads_B=made_B is not None)
    fused = fit_in_a_tile(expert_cores, config.blocks["BLOCK_P"])
    A = product_of_levels(coefficients, expert_cores) if not fused else z.new_empty(T, P, M) if save else None
    B = made_B.view(T, M, R) if made_B is not None else z.new_empty(T, M, R) if save else None
    h = z.new_empty(T, P, R)
    blocks = tiles(config, T=T, R=R)
    launch(
        _tr_forward_kernel,
        (blocks, triton.cdiv(P, config.blocks["BLOCK_P"])),
        config,
        z.device,
        input_product=contracted(z, in_weight, activation) if made_B is None else made(made_B),
        in_bias_ptr=None if in_bias is None or made_B is not None else in_bias.contiguous(),
        levels=ring_levels(coefficients, expert_cores) if fused else (),
        h_ptr=h,
        A_ptr=None if A is None else A.contiguous(),
        B_ptr=B if made_B is None else None,
        T=T,
        P=P,
        M=M,
        **aligned(R=R),
        PRECISION=dot_precision(z.dtype),
    )
    y = torch.mm(h.flatten(1), out_core.flatten(1).t())
    return (y, A, B) if save and A is not None and B is not None else (y, z.new_empty(0), z.new_empty(0))


@planned
def tr_backward(
    dy: Tensor,
    z: Tensor,
    coefficients: Sequence[Tensor],
    expert_cores: Sequence[Tensor],
    in_core: Tensor,
    in_bias: Tensor | None,
    out_core: Tensor,
    A: Tensor,
    B: Tensor,
    *,
    activation: str,
    needs: Sequence[bool],
) -> tuple[Tensor | None, list[Tensor | None], list[Tensor | None], Tensor | None, Tensor | None, Tensor | None]:
    """dz, [da_e], [dU_e], dU_in, db, dU_out, each None where `needs` (one flag per argument) does not ask for it.

    A and B are what `tr_forward` saved. Weight gradients accumulate in float32 and come in the cores' dtype. Alive at
    most: h (T, P, R), dB (T, M, R) and, where the vendor makes it, dh (T, P, R), then dB beside dz.
    """
    needs_z, needs_a, needs_experts, needs_in, needs_bias, needs_out = needs
    (T, O), (_, P, M), R = dy.shape, A.shape, in_core.shape[1]
    dh = None
    if any((needs_z, needs_a, needs_experts, needs_in, needs_bias)) and vendor_contracts(
        "tr", z.device, z.dtype, T, O, "none"
    ):
        dh = vendor_product(dy, out_core.flatten(1))
    config = tr_backward_config(z.device, z.dtype, T, rows=M, wide=alignment(R, O) >= 8, reads_dh=dh is not None)
    blocks_t, blocks_r = triton.cdiv(T, config.blocks["BLOCK_T"]), triton.cdiv(R, config.blocks["BLOCK_R"])
    blocks_m = triton.cdiv(M, config.blocks["BLOCK_P"])
    # A program sees all of h = A B only where it holds all of B's rows.
    h = (z.new_empty(T, P, R) if blocks_m == 1 else torch.bmm(A, B)) if needs_out else None
    dB = z.new_empty(T, M, R) if needs_z or needs_in else None
    dA = z.new_empty(blocks_r, T, P, M, dtype=torch.float32) if needs_a or needs_experts else None
    db = z.new_empty(blocks_t, M, R, dtype=torch.float32) if in_bias is not None and needs_bias else None
    launch(
        _tr_backward_kernel,
        (blocks_t * blocks_r, blocks_m),
        config,
        z.device,
        output_product=contracted(dy, out_core.flatten(1)) if dh is None else made(dh),
        A_ptr=A.contiguous(),
        B_ptr=B.contiguous(),
        h_ptr=h if blocks_m == 1 else None,
        dB_ptr=dB,
        db_ptr=db,
        dA_ptr=dA,
        T=T,
        P=P,
        M=M,
        **aligned(R=R),
        PRECISION=dot_precision(z.dtype),
    )
    del dh
    d_out_core = None if h is None else torch.mm(dy.t(), h.flatten(1)).view(out_core.shape)
    del h
    nothing: list[Tensor | None] = [None] * len(coefficients)
    das, d_cores = nothing, list(nothing)
    if dA is not None:
        das, d_cores = expert_gradients(dA.sum(0).to(z.dtype), coefficients, expert_cores, needs_a, needs_experts)
    d_in_bias = None if db is None else db.sum(0).to(z.dtype)
    dz, d_in_core = None, None
    if dB is not None:
        dz, d_in_core = input_mode_gradients(dB.flatten(1), z, in_core.flatten(0, 1), activation, needs_z, needs_in)
        d_in_core = None if d_in_core is None else d_in_core.view(in_core.shape)
    return dz, das, d_cores, d_in_core, d_in_bias, d_out_core

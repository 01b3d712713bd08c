"""CP's expert contraction (Eq. 2, 16) for any number of levels E, forward and backward.

Forward, with b = 0 where there is no bias:

    A_e = a_e U_e,  A = Π_e A_e,  B = act(z) U_inᵀ + b,  h = A ⊙ B,  y = h U_outᵀ

Backward:

    dU_out = dyᵀ h,  dh = dy U_out,  dB = dh ⊙ A,  dA_e = dh ⊙ B ⊙ Π_{e'≠e} A_{e'},  db = Σ_t dB

and from dB and dA_e the gradients of the input and expert modes as `_tiles` has them. z (T, I), a_e (T, N_e),
U_e (N_e, R), U_in (R, I), b (R), U_out (O, R), y (T, O).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from mumoe_fast.kernels._common import Launch, alignment, dot_precision, launch, load, store
from mumoe_fast.kernels._plans import planned
from mumoe_fast.kernels._tiles import (
    column_sums,
    contract,
    contract_level,
    expert_levels,
    expert_mode_gradients,
    grouped_blocks,
    input_mode_gradients,
    matrix,
    offsets,
    times_level,
)
from mumoe_fast.kernels.configs import cp_backward_config, cp_forward_config


class CPNeeds(NamedTuple):
    """Which of the gradients are needed; one entry stands for all levels of its kind."""

    z: bool = True
    coefficients: bool = True
    expert_factors: bool = True
    in_factor: bool = True
    in_bias: bool = True
    out_factor: bool = True


@triton.jit(do_not_specialize=["T"])
def _cp_forward_kernel(
    z,
    in_factor,
    in_bias_ptr,
    levels,
    h_ptr,
    A_ptr,
    B_ptr,
    T,
    I,
    R,
    I_ALIGN: tl.constexpr,
    R_ALIGN: tl.constexpr,
    ACTIVATION: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_T: tl.constexpr,
):
    I, R = I * I_ALIGN, R * R_ALIGN
    block_t, block_r = grouped_blocks(T, R, BLOCK_T, BLOCK_R, GROUP_T)
    offs_t, offs_r = offsets(block_t, BLOCK_T), offsets(block_r, BLOCK_R)
    mask_t, mask_r = offs_t < T, offs_r < R

    A = contract_level(levels[0], offs_t, offs_r, mask_t, mask_r, BLOCK_K, PRECISION)
    for e in tl.static_range(1, len(levels)):
        A = times_level(A, levels[e], T, offs_t, offs_r, mask_t, mask_r, BLOCK_K, PRECISION)
    B = contract(z, in_factor, I, offs_t, offs_r, mask_t, mask_r, ACTIVATION, BLOCK_K, PRECISION)
    if in_bias_ptr is not None:
        B += load(in_bias_ptr + offs_r, mask_r)[None, :]

    mask = mask_t[:, None] & mask_r[None, :]
    offs = offs_t[:, None] * R + offs_r[None, :]
    store(h_ptr + offs, A * B, mask)
    if A_ptr is not None:
        store(A_ptr + offs, A, mask)
        store(B_ptr + offs, B, mask)


@triton.jit(do_not_specialize=["T"])
def _cp_backward_kernel(
    dy,
    out_factor,
    levels,
    A_ptr,
    B_ptr,
    h_ptr,
    dB_ptr,
    partial_ptr,
    dA_ptrs,
    T,
    O,
    R,
    O_ALIGN: tl.constexpr,
    R_ALIGN: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_T: tl.constexpr,
):
    # dy U_out is contracted here and not by a GEMM of its own: dh never goes to memory and back (of the
    # 7 T×R tensors otherwise moved, 2), and stays in float32.
    O, R = O * O_ALIGN, R * R_ALIGN
    block_t, block_r = grouped_blocks(T, R, BLOCK_T, BLOCK_R, GROUP_T)
    offs_t, offs_r = offsets(block_t, BLOCK_T), offsets(block_r, BLOCK_R)
    mask_t, mask_r = offs_t < T, offs_r < R
    dh = contract(dy, out_factor, O, offs_t, offs_r, mask_t, mask_r, "none", BLOCK_K, PRECISION)

    mask = mask_t[:, None] & mask_r[None, :]
    offs = offs_t[:, None] * R + offs_r[None, :]
    A = load(A_ptr + offs, mask)
    if dB_ptr is not None:
        store(dB_ptr + offs, dh * A, mask)
    if partial_ptr is not None:
        column_sums(dh * A, partial_ptr, block_t, offs_r, R, mask_r)
    B = load(B_ptr + offs, mask)
    if h_ptr is not None:
        store(h_ptr + offs, A * B, mask)
    dh *= B
    for e in tl.static_range(len(dA_ptrs)):
        dA = dh
        for other in tl.static_range(len(dA_ptrs)):
            if other != e:  # recomputed, since A / A_e would divide by coefficients that are zero
                dA = times_level(dA, levels[other], T, offs_t, offs_r, mask_t, mask_r, BLOCK_K, PRECISION)
        store(dA_ptrs[e] + offs, dA, mask)


def _wide(R: int, contracted: int, expert_factors: Sequence[Tensor]) -> bool:
    """Whether rows of the large operands start on 16 bytes (in half types; a level of 4 experts is small enough)."""
    return alignment(R, contracted) >= 8 and all(alignment(len(factor)) >= 4 for factor in expert_factors)


@planned
def _launch_forward(
    z: Tensor,
    in_factor: Tensor,
    in_bias: Tensor | None,
    h: Tensor,
    A: Tensor | None,
    B: Tensor | None,
    *levels: Tensor,
    device: torch.device,
    activation: str,
    precision: str,
) -> Launch:
    (T, I), R = z.shape, len(in_factor)
    coefficients, expert_factors = levels[: len(levels) // 2], levels[len(levels) // 2 :]
    config = cp_forward_config(device, z.dtype, _wide(R, I, expert_factors))
    grid = (triton.cdiv(T, config.blocks["BLOCK_T"]) * triton.cdiv(R, config.blocks["BLOCK_R"]),)
    arguments = {
        "z": matrix(z),
        "in_factor": matrix(in_factor.t()),
        "in_bias_ptr": in_bias,
        "levels": expert_levels(coefficients, expert_factors),
        "h_ptr": h,
        "A_ptr": A,
        "B_ptr": B,
        "T": T,
        "I": I // alignment(I),
        "R": R // alignment(R),
        "I_ALIGN": alignment(I),
        "R_ALIGN": alignment(R),
        "ACTIVATION": activation,
        "PRECISION": precision,
    }
    return Launch(_cp_forward_kernel, grid, config, arguments)


def cp_forward(
    z: Tensor,
    coefficients: Sequence[Tensor],
    expert_factors: Sequence[Tensor],
    in_factor: Tensor,
    in_bias: Tensor | None,
    out_factor: Tensor,
    *,
    activation: str,
    save: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """y (T, O), and A and B (T, R) in the tensors' dtype if they are to be saved for backward, else empty.

    h is computed from the float32 A and B, written once, and multiplied with U_out by the vendor's GEMM.
    """
    T, R = len(z), len(in_factor)
    h = z.new_empty(T, R)
    A, B = (z.new_empty(T, R), z.new_empty(T, R)) if save else (z.new_empty(0), z.new_empty(0))
    saved = (A, B) if save else (None, None)
    levels = (*coefficients, *expert_factors)
    precision = dot_precision(z.dtype)
    in_bias = None if in_bias is None else in_bias.contiguous()
    _launch_forward(z, in_factor, in_bias, h, *saved, *levels, activation=activation, precision=precision)
    return torch.mm(h, out_factor.t()), A, B


def cp_backward(
    dy: Tensor,
    z: Tensor,
    coefficients: Sequence[Tensor],
    expert_factors: Sequence[Tensor],
    in_factor: Tensor,
    in_bias: Tensor | None,
    out_factor: Tensor,
    A: Tensor,
    B: Tensor,
    *,
    activation: str,
    needs: Sequence[bool],
) -> tuple[Tensor | None, list[Tensor | None], list[Tensor | None], Tensor | None, Tensor | None, Tensor | None]:
    """dz, [da_e], [dU_e], dU_in, db, dU_out, each None where it is not needed.

    A and B are what `cp_forward` saved. Weight gradients accumulate in float32 and come in the factors' dtype. Alive at
    most: 2 + E transients T×R (h, dB and the dA_e, each freed after the GEMMs that read it, dB last), then dB beside
    dz.
    """
    needs = CPNeeds(*needs)
    (T, O), R = dy.shape, len(in_factor)
    needs_A, needs_B = needs.coefficients or needs.expert_factors, needs.z or needs.in_factor
    others = expert_factors if len(expert_factors) > 1 else ()
    config = cp_backward_config(z.device, z.dtype, len(coefficients), _wide(R, O, others))
    blocks_t, blocks_r = triton.cdiv(T, config.blocks["BLOCK_T"]), triton.cdiv(R, config.blocks["BLOCK_R"])
    h = z.new_empty(T, R) if needs.out_factor else None
    dB = z.new_empty(T, R) if needs_B else None
    dA = [z.new_empty(T, R) for _ in coefficients] if needs_A else []
    partial = None
    if in_bias is not None and needs.in_bias:
        partial = z.new_empty(blocks_t, R, dtype=torch.float32)
    launch(
        _cp_backward_kernel,
        (blocks_t * blocks_r,),
        config,
        z.device,
        dy=matrix(dy),
        out_factor=matrix(out_factor),
        levels=expert_levels(coefficients, expert_factors),
        A_ptr=A.contiguous(),
        B_ptr=B.contiguous(),
        h_ptr=h,
        dB_ptr=dB,
        partial_ptr=partial,
        dA_ptrs=tuple(dA),
        T=T,
        O=O // alignment(O),
        R=R // alignment(R),
        O_ALIGN=alignment(O),
        R_ALIGN=alignment(R),
        PRECISION=dot_precision(z.dtype),
    )
    d_out_factor = None if h is None else torch.mm(dy.t(), h)
    del h
    d_coefficients: list[Tensor | None] = []
    d_expert_factors: list[Tensor | None] = []
    for a, factor in zip(coefficients, expert_factors, strict=True):
        da, d_factor = None, None
        if dA:
            da, d_factor = expert_mode_gradients(dA.pop(0), a, factor, needs.coefficients, needs.expert_factors)
        d_coefficients.append(da)
        d_expert_factors.append(d_factor)
    d_in_bias = None if partial is None else partial.sum(0).to(z.dtype)
    dz, d_in_factor = None, None
    if dB is not None:
        dz, d_in_factor = input_mode_gradients(dB, z, in_factor, activation, needs.z, needs.in_factor)
    return dz, d_coefficients, d_expert_factors, d_in_factor, d_in_bias, d_out_factor

"""CP's expert contraction (Eq. 2, 16) for any number of levels E, forward and backward.

Forward, with b = 0 where there is no bias:

    A_e = a_e U_e,  A = Π_e A_e,  B = act(z) U_inᵀ + b,  h = A ⊙ B,  y = h U_outᵀ

Backward:

    dU_out = dyᵀ h,  dh = dy U_out,  dB = dh ⊙ A,  dA_e = dh ⊙ B ⊙ Π_{e'≠e} A_{e'},  db = Σ_t dB

and from dB and dA_e the gradients of the input and expert modes as `_tiles` has them. z (T, I), a_e (T, N_e),
U_e (N_e, R), U_in (R, I), b (R), U_out (O, R), y (T, O).

Backward reads B, and A where the experts are many; of few, A is contracted again, which takes no longer than its way to
memory and back, and a block keeps a fifth less. A_e, B and dh are products of two matrices. `vendor_contracts` says of
each whether the kernel contracts it, so that it never goes to memory, or the vendor's GEMM makes it and the kernel
reads it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from mumoe_fast.kernels._common import aligned, alignment, dot_precision, launch, load, store, tiles
from mumoe_fast.kernels._plans import planned
from mumoe_fast.kernels._tiles import (
    Product,
    column_sums,
    contracted,
    expert_mode_gradients,
    grouped_blocks,
    input_mode_gradients,
    is_made,
    made,
    offsets,
    product_tile,
    times_product,
    vendor_product,
)
from mumoe_fast.kernels.configs import cp_backward_config, cp_forward_config, vendor_contracts

# Of bfloat16 on an H200 an entry of A is contracted from N experts in 2 N / 500 TFLOP/s, and written and read in
# 4 bytes / 4.3 TB/s: as long at N = 230. To twice that the memory is worth it.
_MOST_CONTRACTED_AGAIN = 512


def keeps_A(num_experts: Sequence[int]) -> bool:
    """Whether forward saves A for backward, by the levels' numbers of experts."""
    return sum(num_experts) > _MOST_CONTRACTED_AGAIN


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
    levels,
    input_product,
    in_bias_ptr,
    h_ptr,
    A_ptr,
    B_ptr,
    T,
    R,
    E: tl.constexpr,
    R_ALIGN: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_T: tl.constexpr,
):
    R = R * R_ALIGN
    block_t, block_r = grouped_blocks(T, R, BLOCK_T, BLOCK_R, GROUP_T)
    offs_t, offs_r = offsets(block_t, BLOCK_T), offsets(block_r, BLOCK_R)
    mask_t, mask_r = offs_t < T, offs_r < R

    A = product_tile(levels[0], offs_t, offs_r, mask_t, mask_r, BLOCK_K, PRECISION)
    for e in tl.static_range(1, E):
        A = times_product(A, levels[e], T, offs_t, offs_r, mask_t, mask_r, BLOCK_K, PRECISION)
    B = product_tile(input_product, offs_t, offs_r, mask_t, mask_r, BLOCK_K, PRECISION)
    if in_bias_ptr is not None:
        B += load(in_bias_ptr + offs_r, mask_r)[None, :]

    # h may lie where B was read: a program writes no tile but the one that it has read.
    mask = mask_t[:, None] & mask_r[None, :]
    offs = offs_t[:, None] * R + offs_r[None, :]
    store(h_ptr + offs, A * B, mask)
    if A_ptr is not None:
        store(A_ptr + offs, A, mask)
    if B_ptr is not None:
        store(B_ptr + offs, B, mask)


@triton.jit(do_not_specialize=["T"])
def _cp_backward_kernel(
    output_product,
    A_products,
    levels,
    B_ptr,
    h_ptr,
    dB_ptr,
    partial_ptr,
    dA_ptrs,
    T,
    R,
    A_LEVELS: tl.constexpr,
    R_ALIGN: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_T: tl.constexpr,
):
    R = R * R_ALIGN
    block_t, block_r = grouped_blocks(T, R, BLOCK_T, BLOCK_R, GROUP_T)
    offs_t, offs_r = offsets(block_t, BLOCK_T), offsets(block_r, BLOCK_R)
    mask_t, mask_r = offs_t < T, offs_r < R
    if A_LEVELS == 1 and A_products[0][1] is None:  # read last: it waits in no register for the contraction
        dh = product_tile(output_product, offs_t, offs_r, mask_t, mask_r, BLOCK_K, PRECISION)
        A = product_tile(A_products[0], offs_t, offs_r, mask_t, mask_r, BLOCK_K, PRECISION)
    else:
        A = product_tile(A_products[0], offs_t, offs_r, mask_t, mask_r, BLOCK_K, PRECISION)
        for e in tl.static_range(1, A_LEVELS):
            A = times_product(A, A_products[e], T, offs_t, offs_r, mask_t, mask_r, BLOCK_K, PRECISION)
        dh = product_tile(output_product, offs_t, offs_r, mask_t, mask_r, BLOCK_K, PRECISION)

    mask = mask_t[:, None] & mask_r[None, :]
    offs = offs_t[:, None] * R + offs_r[None, :]
    if dB_ptr is not None:
        if output_product[1] is None:  # dB goes where dh was read, in a small tile by several threads each entry
            tl.debug_barrier()
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
                dA = times_product(dA, levels[other], T, offs_t, offs_r, mask_t, mask_r, BLOCK_K, PRECISION)
        store(dA_ptrs[e] + offs, dA, mask)


def _wide(R: int, contracted: int, expert_factors: Sequence[Tensor]) -> bool:
    """Whether rows of the large operands start on 16 bytes (in half types; a level of 4 experts is small enough)."""
    return alignment(R, contracted) >= 8 and all(alignment(len(factor)) >= 4 for factor in expert_factors)


def _made_level(a: Tensor, factor: Tensor) -> Tensor | None:
    """A_e (T, R) if it is the vendor's to contract."""
    T, N = a.shape
    return vendor_product(a, factor) if vendor_contracts("cp", a.device, a.dtype, T, N, "none") else None


def _products(
    levels: Sequence[Tensor | None], coefficients: Sequence[Tensor], expert_factors: Sequence[Tensor]
) -> tuple[Product, ...]:
    """Every level's A_e as one kernel argument, whatever the number of levels."""
    return tuple(
        contracted(a, factor) if A_e is None else made(A_e)
        for A_e, a, factor in zip(levels, coefficients, expert_factors, strict=True)
    )


@planned
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
    """y (T, O), and in the tensors' dtype what is saved for backward: B (T, R), and A (T, R) if `keeps_A`; else empty.

    h is computed from the float32 A and B, or from what the vendor rounded of them, written once, and multiplied with
    U_out by the vendor's GEMM. Alive at most: A, B and h, unless they are saved h alone and what the vendor made; and
    before them, where the vendor contracts through an activation, B and one transient T×I.
    """
    (T, I), (R, _) = z.shape, in_factor.shape
    made_B = None
    if vendor_contracts("cp", z.device, z.dtype, T, I, activation):
        made_B = vendor_product(z, in_factor.t(), in_bias, activation)
    levels = list(map(_made_level, coefficients, expert_factors))
    made_A = levels[0] if len(levels) == 1 else None
    save_A = save and keeps_A([len(factor) for factor in expert_factors])
    A = z.new_empty(0) if not save_A else z.new_empty(T, R) if made_A is None else made_A
    B = z.new_empty(0) if not save else z.new_empty(T, R) if made_B is None else made_B
    h = z.new_empty(T, R) if save or made_B is None else made_B
    reads = {"reads_A": made_A is not None, "reads_B": made_B is not None}
    config = cp_forward_config(z.device, z.dtype, T, wide=_wide(R, I, expert_factors), **reads)
    launch(
        _cp_forward_kernel,
        (tiles(config, T=T, R=R),),
        config,
        z.device,
        levels=_products(levels, coefficients, expert_factors),
        input_product=contracted(z, in_factor.t(), activation) if made_B is None else made(made_B),
        in_bias_ptr=None if in_bias is None or made_B is not None else in_bias.contiguous(),
        h_ptr=h,
        A_ptr=A if save_A and made_A is None else None,
        B_ptr=B if save and made_B is None else None,
        T=T,
        **aligned(R=R),
        E=len(levels),
        PRECISION=dot_precision(z.dtype),
    )
    return torch.mm(h, out_factor.t()), A, B


@planned
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

    A and B are what `cp_forward` saved; an empty A is made again. Weight gradients accumulate in float32 and come in
    the factors' dtype. Alive at most: 2 + E transients T×R (h, dB and the dA_e, each freed after the GEMMs that read
    it, dB last; where the vendor makes dh it lies where dB will, and what it makes of A or of several levels is one
    more each until the dA_e are there), then dB beside dz.
    """
    needs = CPNeeds(*needs)
    (T, O), R = dy.shape, len(in_factor)
    needs_A, needs_B = needs.coefficients or needs.expert_factors, needs.z or needs.in_factor
    needs_bias = in_bias is not None and needs.in_bias
    dh = None
    if (needs_A or needs_B or needs_bias) and vendor_contracts("cp", z.device, z.dtype, T, O, "none"):
        dh = vendor_product(dy, out_factor)
    several = needs_A and len(expert_factors) > 1  # a single level's dA needs no other level
    products: tuple[Product, ...] = ()
    if several or not A.numel():
        products = _products(list(map(_made_level, coefficients, expert_factors)), coefficients, expert_factors)
    A_products, levels = (made(A),) if A.numel() else products, products if several else ()
    config = cp_backward_config(
        z.device,
        z.dtype,
        T,
        levels=len(levels),
        wide=_wide(R, O, expert_factors if products else ()),
        reads_A=all(is_made(product) for product in A_products),
        reads_dh=dh is not None,
    )
    blocks_t, blocks_r = triton.cdiv(T, config.blocks["BLOCK_T"]), triton.cdiv(R, config.blocks["BLOCK_R"])
    h = z.new_empty(T, R) if needs.out_factor else None
    dB = None if not needs_B else z.new_empty(T, R) if dh is None else dh
    dA = [z.new_empty(T, R) for _ in coefficients] if needs_A else []
    partial = z.new_empty(blocks_t, R, dtype=torch.float32) if needs_bias else None
    launch(
        _cp_backward_kernel,
        (blocks_t * blocks_r,),
        config,
        z.device,
        output_product=contracted(dy, out_factor) if dh is None else made(dh),
        A_products=A_products,
        levels=levels,
        B_ptr=B.contiguous(),
        h_ptr=h,
        dB_ptr=dB,
        partial_ptr=partial,
        dA_ptrs=tuple(dA),
        T=T,
        **aligned(R=R),
        A_LEVELS=len(A_products),
        PRECISION=dot_precision(z.dtype),
    )
    del dh, products, A_products, levels
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

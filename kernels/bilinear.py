"""A bilinear contraction per token, the product of Tucker's core and of the full layer, forward and backward.

With v (T, M), x (T, K), C (M, K, R), and one row of b (M, R) for each m where there is a bias:

    c_tr = Σ_m v_tm (Σ_k act(x)_tk C_mkr + b_mr)

Backward from dc (T, R), with G_m = dc C_mᵀ (T, K), which both of the first two read from the same tile:

    d act(x) = Σ_m v_m ⊙ G_m,  dv_tm = Σ_k act(x)_tk G_m,tk,  dC_mkr = Σ_t v_tm act(x)_tk dc_tr

v is given by levels, v_m = Π_e v_e[m_e] with v_e (T, M_e) and M = Π M_e, m's digits m_e in row-major order; their outer
product is formed m by m in registers. Each m is a GEMM tile, scaled by v_m when it is added to the sum: scaling x
before the product would save that second accumulator, but round v_m x to the tensors' dtype. Neither (T, M K) nor
(T, M, R) is ever formed. A token's row is computed from its own row alone, and every sum has a fixed order.

Few tokens only stream C, and have `bilinear_few_tokens`.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from mumoe_fast.kernels._common import (
    aligned,
    alignment,
    dot,
    dot_precision,
    launch,
    load,
    load_operand,
    round_to,
    store,
    tiles,
)
from mumoe_fast.kernels._tiles import contract, distance, from_stack, grouped_blocks, matrix, offsets, stack
from mumoe_fast.kernels.bilinear_few_tokens import are_few, few_tokens_forward
from mumoe_fast.kernels.configs import bilinear_config, core_gradient_config

# Entries of the float32 buffer (blocks of K, M, tokens) that dv is summed from: 64 MiB. Tokens are taken in turns of as
# many as it holds, or of one block where M alone is larger.
_DV_BUFFER = 2**24


@triton.jit
def _joint(levels, m, offs_t, mask_t):
    """v_m of a block of tokens, in float32: the product of the levels at m's digits, 1 without levels."""
    v = tl.full((offs_t.shape[0],), 1.0, tl.float32)
    for e in tl.static_range(len(levels) - 1, -1, -1):
        v *= load(levels[e][0][0] + distance(levels[e][0], offs_t, m % levels[e][1]), mask_t)
        m = m // levels[e][1]
    return v


@triton.jit(do_not_specialize=["T"])
def _bilinear_kernel(
    x,
    C,
    bias,
    levels,
    other,
    sum_ptr,
    dots_ptr,
    T,
    M,
    K,
    R,
    K_ALIGN: tl.constexpr,
    R_ALIGN: tl.constexpr,
    ACTIVATION: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_T: tl.constexpr,
):
    # Writes Σ_m v_m ⊙ (act(x) C_m + b_m) and, for every m, this block's part of the rows' dot products with `other`.
    K, R = K * K_ALIGN, R * R_ALIGN
    block_t, block_r = grouped_blocks(T, R, BLOCK_T, BLOCK_R, GROUP_T)
    offs_t, offs_r = offsets(block_t, BLOCK_T), offsets(block_r, BLOCK_R)
    mask_t, mask_r = offs_t < T, offs_r < R
    mask = mask_t[:, None] & mask_r[None, :]
    if dots_ptr is not None:
        other_tile = load(other[0] + distance(other, offs_t[:, None], offs_r[None, :]), mask)
        dots_ptr += block_r.to(tl.int64) * M * T + offs_t
    total = tl.zeros((BLOCK_T, BLOCK_R), tl.float32)
    for index in range(M):
        m = tl.cast(index, tl.int64)
        product = contract(x, from_stack(C, m), K, offs_t, offs_r, mask_t, mask_r, ACTIVATION, BLOCK_K, PRECISION)
        if dots_ptr is not None:
            tl.store(dots_ptr + m * T, tl.sum(product * other_tile, axis=1), mask=mask_t)
        if bias is not None:
            product += load(bias[0] + distance(bias, m, offs_r), mask_r)[None, :]
        if sum_ptr is not None:
            total += _joint(levels, m, offs_t, mask_t)[:, None] * product
    if sum_ptr is not None:
        store(sum_ptr + offs_t[:, None] * R + offs_r[None, :], total, mask)


@triton.jit(do_not_specialize=["T"])
def _core_gradient_kernel(
    x,
    dc,
    levels,
    dC_ptr,
    T,
    K,
    R,
    K_ALIGN: tl.constexpr,
    R_ALIGN: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    # Here v_m must scale an operand, since the sum is over tokens. One program sums all of them, in their order.
    K, R = K * K_ALIGN, R * R_ALIGN
    blocks_k, blocks_r = tl.cdiv(K, BLOCK_K), tl.cdiv(R, BLOCK_R)
    program = tl.program_id(0)
    m = (program // (blocks_k * blocks_r)).to(tl.int64)
    offs_k, offs_r = offsets(program // blocks_r % blocks_k, BLOCK_K), offsets(program % blocks_r, BLOCK_R)
    mask_k, mask_r = offs_k < K, offs_r < R
    acc = tl.zeros((BLOCK_K, BLOCK_R), tl.float32)
    for t in range(0, T, BLOCK_T):
        offs_t = tl.cast(t, tl.int64) + tl.arange(0, BLOCK_T)
        mask_t = offs_t < T
        v = _joint(levels, m, offs_t, mask_t)
        x_tile = load(x[0] + distance(x, offs_t[None, :], offs_k[:, None]), mask_k[:, None] & mask_t[None, :])
        dc_tile = load_operand(
            dc[0] + distance(dc, offs_t[:, None], offs_r[None, :]), mask_t[:, None] & mask_r[None, :]
        )
        acc = dot(round_to(x_tile * v[None, :], x[0].dtype.element_ty), dc_tile, acc, PRECISION)
    offs = (m * K + offs_k[:, None]) * R + offs_r[None, :]
    store(dC_ptr + offs, acc, mask_k[:, None] & mask_r[None, :])


def _levels(v: Sequence[Tensor]) -> tuple[Any, ...]:
    """Every level's v_e (T, M_e) and M_e as one kernel argument."""
    return tuple((matrix(level), level.shape[1]) for level in v)


def _contract(
    v: Sequence[Tensor],
    x: Tensor,
    C: Tensor,
    *,
    bias: Tensor | None = None,
    other: Tensor | None = None,
    total: Tensor | None = None,
    needs_dots: bool = False,
    activation: str = "none",
) -> Tensor | None:
    """Fill `total` (T, R) with Σ_m v_m ⊙ (act(x) C_m + b_m), and return the dots (M, T) of act(x) C_m with `other`."""
    T, (M, K, R) = len(x), C.shape
    config = bilinear_config(x.device, x.dtype, alignment(K, R) >= 8, T)
    blocks_r = triton.cdiv(R, config.blocks["BLOCK_R"])
    dots = x.new_empty(blocks_r, M, T, dtype=torch.float32) if needs_dots else None
    launch(
        _bilinear_kernel,
        (triton.cdiv(T, config.blocks["BLOCK_T"]) * blocks_r,),
        config,
        x.device,
        x=matrix(x),
        C=stack(C),
        bias=None if bias is None else matrix(bias),
        levels=_levels(v),
        other=None if other is None else matrix(other),
        sum_ptr=total,
        dots_ptr=dots,
        T=T,
        M=M,
        **aligned(K=K, R=R),
        ACTIVATION=activation,
        PRECISION=dot_precision(x.dtype),
    )
    return None if dots is None else dots.sum(0)


def bilinear_forward(
    v: Sequence[Tensor], x: Tensor, C: Tensor, bias: Tensor | None = None, *, activation: str = "none"
) -> Tensor:
    """c (T, R), from x (T, K), C (Π M_e, K, R), bias (Π M_e, R) and the levels v_e (T, M_e).

    Without levels v is 1 and M is 1: an ordinary product, with the activation on the way in. It is computed again for
    every m: whoever has many activates x once.
    """
    if activation == "none" and are_few(x, C):
        return few_tokens_forward(v, [None] * len(v), x, C, bias)
    c = x.new_empty(len(x), C.shape[2])
    _contract(v, x, C, bias=bias, total=c, activation=activation)
    return c


def _tokens_at_once(x: Tensor, C: Tensor) -> int:
    """How many tokens' dots the buffer holds in backward, where C's K is split into blocks: whole blocks of tokens."""
    M, K, R = C.shape
    blocks = bilinear_config(x.device, x.dtype, alignment(K, R) >= 8, len(x)).blocks
    dots_per_block = M * triton.cdiv(K, blocks["BLOCK_R"]) * blocks["BLOCK_T"]
    return max(_DV_BUFFER // int(dots_per_block), 1) * blocks["BLOCK_T"]


def bilinear_backward(
    dc: Tensor, v: Sequence[Tensor], x: Tensor, C: Tensor, *, needs_v: bool, needs_x: bool
) -> tuple[list[Tensor] | None, Tensor | None]:
    """[dv_e] in float32 and dx in x's dtype, each None where it is not needed. x is activated already.

    dv is summed over blocks of K, and over the other levels' digits, by torch, from a buffer of bounded size.
    """
    T = len(x)
    dv = [torch.empty_like(level, dtype=torch.float32) for level in v] if needs_v else None
    dx = x.new_empty(x.shape) if needs_x else None
    if dv is None and dx is None:
        return None, None
    for start in range(0, T, step := _tokens_at_once(x, C) if needs_v else max(T, 1)):
        tokens = slice(start, start + step)
        levels = [level[tokens] for level in v]
        part = None if dx is None else dx[tokens]
        dots = _contract(levels, dc[tokens], C.mT, other=x[tokens], total=part, needs_dots=needs_v)
        if dv is not None and dots is not None:
            for gradient, sums in zip(dv, _digit_sums(dots, levels), strict=True):
                gradient[tokens] = sums
    return dv, dx


def _digit_sums(dv: Tensor, v: Sequence[Tensor]) -> list[Tensor]:
    """[dv_e] (T, M_e) from dv (Π M_e, T): for each level, the sum over the other levels' digits times their v."""
    E, (_, T) = len(v), dv.shape
    dv = dv.view(*(level.shape[1] for level in v), T)
    sums = []
    for e in range(E):
        others = [operand for o, level in enumerate(v) if o != e for operand in (level.float(), [E, o])]
        sums.append(torch.einsum(dv, [*range(E), E], *others, [E, e]))
    return sums


def core_gradient(dc: Tensor, v: Sequence[Tensor], x: Tensor) -> Tensor:
    """dC (Π M_e, K, R) in x's dtype, accumulated in float32 over tokens in their order. x is activated already."""
    (T, K), R, M = x.shape, dc.shape[1], prod(level.shape[1] for level in v)
    dC = x.new_empty(M, K, R)
    config = core_gradient_config(x.device, x.dtype, alignment(K, R) >= 8, len(v))
    launch(
        _core_gradient_kernel,
        (M * tiles(config, K=K, R=R),),
        config,
        x.device,
        x=matrix(x),
        dc=matrix(dc),
        levels=_levels(v),
        dC_ptr=dC,
        T=T,
        **aligned(K=K, R=R),
        PRECISION=dot_precision(x.dtype),
    )
    return dC

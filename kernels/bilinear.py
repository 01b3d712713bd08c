"""A bilinear contraction per token, the product of Tucker's core and of the full layer, forward and backward.

With v (T, M), x (T, K), C (M, K, R), and one row of b (M, R) for each m where there is a bias:

    c_tr = Σ_m v_tm (Σ_k act(x)_tk C_mkr + b_mr)

Backward from dc (T, R), with G_m = dc C_mᵀ (T, K), which both of the first two read from the same tile:

    d act(x) = Σ_m v_m ⊙ G_m,  dv_tm = Σ_k act(x)_tk G_m,tk,  dC_mkr = Σ_t v_tm act(x)_tk dc_tr

v is given by levels, v_m = Π_e v_e[m_e] with v_e (T, M_e) and M = Π M_e, m's digits m_e in row-major order; their outer
product is formed m by m in registers. Each m is a GEMM tile, scaled by v_m when it is added to the sum: scaling x
before the product would save that second accumulator, but round v_m x to the tensors' dtype. Neither (T, M K) nor
(T, M, R) is ever formed. A token's row is computed from its own row alone, and every sum has a fixed order.

Few tokens only stream C. They have a kernel of their own, one loop over all of m and k, so that the loads of the next m
are under way while this one is multiplied; and a level's v_e may come as the product of a_e (T, N_e) with U_e
(N_e, M_e), which is then a contraction in the same launch.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import gcd, prod
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from mumoe_fast.kernels._common import (
    alignment,
    dot,
    dot_precision,
    launch,
    load,
    load_operand,
    round_to,
    store,
)
from mumoe_fast.kernels._tiles import activation_pass, contract, distance, grouped_blocks, matrix, offsets
from mumoe_fast.kernels.configs import FEW_TOKENS, bilinear_config, core_gradient_config, few_tokens_config

# Entries of the float32 buffer (blocks of K, M, tokens) that dv is summed from: 64 MiB. Tokens are taken in turns of as
# many as it holds, or of one block where M alone is larger.
_DV_BUFFER = 2**24

_JOINT = 128  # v_m of a token that a program with few tokens holds: of twice as many it spills


def _stack(x: Tensor) -> tuple[Any, ...]:
    """A 3-D tensor as one kernel argument: its first `matrix`, and the distance to the next one likewise."""
    power = gcd(16, x.stride(0))
    return matrix(x[0]), x.stride(0) // power, tl.constexpr(power)


@triton.jit
def _from_stack(x, m):
    """The m-th `matrix` of a `_stack`."""
    first = x[0]
    return first[0] + m * x[1] * x[2], first[1], first[2], first[3], first[4]


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
        product = contract(x, _from_stack(C, m), K, offs_t, offs_r, mask_t, mask_r, ACTIVATION, BLOCK_K, PRECISION)
        if dots_ptr is not None:
            tl.store(dots_ptr + m * T, tl.sum(product * other_tile, axis=1), mask=mask_t)
        if bias is not None:
            product += load(bias[0] + distance(bias, m, offs_r), mask_r)[None, :]
        if sum_ptr is not None:
            total += _joint(levels, m, offs_t, mask_t)[:, None] * product
    if sum_ptr is not None:
        store(sum_ptr + offs_t[:, None] * R + offs_r[None, :], total, mask)


@triton.jit
def _whole_joint(levels, experts, offs_t, offs_m, mask_t, mask_m, BLOCK_N: tl.constexpr, PRECISION: tl.constexpr):
    """The tile of v at (offs_t, offs_m), in float32: the product of the levels' v_e, or of their a_e U_e."""
    v = tl.full((offs_t.shape[0], offs_m.shape[0]), 1.0, tl.float32)
    for e in tl.static_range(len(experts) - 1, -1, -1):
        level, digits = levels[e], offs_m % levels[e][1]
        if level[2] is None:
            mask = mask_t[:, None] & mask_m[None, :]
            v *= load(level[0][0] + distance(level[0], offs_t[:, None], digits[None, :]), mask)
        else:
            v *= contract(level[0], level[2], experts[e], offs_t, digits, mask_t, mask_m, "none", BLOCK_N, PRECISION)
        offs_m = offs_m // level[1]
    return v


@triton.jit(do_not_specialize=["T"])
def _few_tokens_kernel(
    x,
    C,
    bias,
    levels,
    experts,
    c_ptr,
    T,
    M,
    K,
    R,
    K_ALIGN: tl.constexpr,
    R_ALIGN: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    K, R = K * K_ALIGN, R * R_ALIGN
    blocks_r, steps = tl.cdiv(R, BLOCK_R), tl.cdiv(K, BLOCK_K)
    offs_t, offs_r = offsets(tl.program_id(0) // blocks_r, BLOCK_T), offsets(tl.program_id(0) % blocks_r, BLOCK_R)
    offs_m, mask_t, mask_r = tl.arange(0, BLOCK_M).to(tl.int64), offs_t < T, offs_r < R
    v = _whole_joint(levels, experts, offs_t, offs_m, mask_t, offs_m < M, BLOCK_N, PRECISION)
    total = tl.zeros((BLOCK_T, BLOCK_R), tl.float32)
    for index in range(M * steps):
        step = tl.cast(index, tl.int32)
        m, offs_k = (step // steps).to(tl.int64), offsets(step % steps, BLOCK_K)
        mask_k, matrix_m = offs_k < K, _from_stack(C, m)
        x_tile = load_operand(x[0] + distance(x, offs_t[:, None], offs_k[None, :]), mask_t[:, None] & mask_k[None, :])
        C_tile = load_operand(
            matrix_m[0] + distance(matrix_m, offs_k[:, None], offs_r[None, :]), mask_k[:, None] & mask_r[None, :]
        )
        product = dot(x_tile, C_tile, tl.zeros((BLOCK_T, BLOCK_R), tl.float32), PRECISION)
        if bias is not None:
            product += load(bias[0] + distance(bias, m, offs_r), offs_r < tl.where(step % steps == 0, R, 0))[None, :]
        total += tl.sum(tl.where(offs_m[None, :] == m, v, 0.0), axis=1)[:, None] * product
    store(c_ptr + offs_t[:, None] * R + offs_r[None, :], total, mask_t[:, None] & mask_r[None, :])


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
        C=_stack(C),
        bias=None if bias is None else matrix(bias),
        levels=_levels(v),
        other=None if other is None else matrix(other),
        sum_ptr=total,
        dots_ptr=dots,
        T=T,
        M=M,
        K=K // alignment(K),
        R=R // alignment(R),
        K_ALIGN=alignment(K),
        R_ALIGN=alignment(R),
        ACTIVATION=activation,
        PRECISION=dot_precision(x.dtype),
    )
    return None if dots is None else dots.sum(0)


def activated(x: Tensor, activation: str) -> Tensor:
    """act(x), or x itself."""
    if activation == "none":
        return x
    out = x.new_empty(x.shape)
    activation_pass(x, activation, None, out)
    return out


def are_few(x: Tensor, C: Tensor) -> bool:
    """Whether the tokens are so few that they only stream C, and v_m of all m fits in registers."""
    return len(x) <= FEW_TOKENS and len(C) <= _JOINT


def few_tokens_forward(
    v: Sequence[Tensor],
    factors: Sequence[Tensor | None],
    x: Tensor,
    C: Tensor,
    bias: Tensor | None = None,
) -> Tensor:
    """As `bilinear_forward` where `are_few`; a level with a factor U_e (N_e, M_e) has a_e (T, N_e) in v_e's place."""
    T, (M, K, R) = len(x), C.shape
    c = x.new_empty(T, R)
    config = few_tokens_config(x.device, x.dtype)
    levels = [
        (matrix(v_e), (v_e if factor is None else factor).shape[1], None if factor is None else matrix(factor))
        for v_e, factor in zip(v, factors, strict=True)
    ]
    launch(
        _few_tokens_kernel,
        (triton.cdiv(T, config.blocks["BLOCK_T"]) * triton.cdiv(R, config.blocks["BLOCK_R"]),),
        config,
        x.device,
        x=matrix(x),
        C=_stack(C),
        bias=None if bias is None else matrix(bias),
        levels=tuple(levels),
        experts=tuple(v_e.shape[1] for v_e in v),
        c_ptr=c,
        T=T,
        M=M,
        K=K // alignment(K),
        R=R // alignment(R),
        K_ALIGN=alignment(K),
        R_ALIGN=alignment(R),
        PRECISION=dot_precision(x.dtype),
        BLOCK_M=max(triton.next_power_of_2(M), 16),
    )
    return c


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
    config = core_gradient_config(x.device, x.dtype, alignment(K, R) >= 8)
    launch(
        _core_gradient_kernel,
        (M * triton.cdiv(K, config.blocks["BLOCK_K"]) * triton.cdiv(R, config.blocks["BLOCK_R"]),),
        config,
        x.device,
        x=matrix(x),
        dc=matrix(dc),
        levels=_levels(v),
        dC_ptr=dC,
        T=T,
        K=K // alignment(K),
        R=R // alignment(R),
        K_ALIGN=alignment(K),
        R_ALIGN=alignment(R),
        PRECISION=dot_precision(x.dtype),
    )
    return dC

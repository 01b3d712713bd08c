"""The bilinear contraction of few tokens, forward.

With v (T, M), x (T, K), C (M, K, R), and one row of b (M, R) for each m where there is a bias:

    c_tr = Σ_m v_tm (Σ_k x_tk C_mkr + b_mr),  v_m = Π_e v_e[m_e]

as `bilinear` has it. Few tokens only stream C: one loop over all of m and k, so that the loads of the next m are under
way while this one is multiplied. A level's v_e (T, M_e) may come as the product of a_e (T, N_e) with U_e (N_e, M_e),
which is then a contraction in the same launch.
"""

from __future__ import annotations

from collections.abc import Sequence

import triton
import triton.language as tl
from torch import Tensor

from mumoe_fast.kernels._common import aligned, dot, dot_precision, launch, load, load_operand, store, tiles
from mumoe_fast.kernels._tiles import contract, distance, from_stack, matrix, offsets, stack
from mumoe_fast.kernels.configs import FEW_TOKENS, few_tokens_config

_JOINT = 128  # v_m of a token that a program holds: of twice as many it spills


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
        mask_k, matrix_m = offs_k < K, from_stack(C, m)
        x_tile = load_operand(x[0] + distance(x, offs_t[:, None], offs_k[None, :]), mask_t[:, None] & mask_k[None, :])
        C_tile = load_operand(
            matrix_m[0] + distance(matrix_m, offs_k[:, None], offs_r[None, :]), mask_k[:, None] & mask_r[None, :]
        )
        product = dot(x_tile, C_tile, tl.zeros((BLOCK_T, BLOCK_R), tl.float32), PRECISION)
        if bias is not None:
            product += load(bias[0] + distance(bias, m, offs_r), offs_r < tl.where(step % steps == 0, R, 0))[None, :]
        total += tl.sum(tl.where(offs_m[None, :] == m, v, 0.0), axis=1)[:, None] * product
    store(c_ptr + offs_t[:, None] * R + offs_r[None, :], total, mask_t[:, None] & mask_r[None, :])


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
        (tiles(config, T=T, R=R),),
        config,
        x.device,
        x=matrix(x),
        C=stack(C),
        bias=None if bias is None else matrix(bias),
        levels=tuple(levels),
        experts=tuple(v_e.shape[1] for v_e in v),
        c_ptr=c,
        T=T,
        M=M,
        **aligned(K=K, R=R),
        PRECISION=dot_precision(x.dtype),
        BLOCK_M=max(triton.next_power_of_2(M), 16),
    )
    return c

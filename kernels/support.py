"""Products with a sparse coefficient matrix that is kept as its support: K values and expert indices for each token.

With values v (T, K), indices i (T, K) and a table (N, R) of one row per expert:

    gather_sum    s_t = Σ_k v_tk table[i_tk]             (T, R)   the matrix times the table
    gather_dot    d_tk = x_t · table[i_tk]               (T, K)   backward of it to the values, for x = ds
    segment_sum   w_n = Σ over (t, k) with i_tk = n of v_tk x_t   (N, R)   backward of it to the table

A value that is exactly zero contributes nothing and its row is never read into a sum: not even NaN or inf comes through
it, and a support may be padded with zeros at any valid index. Everything is summed in float32 and in a fixed order. The
pairs (t, k) are sorted by expert with a stable sort, so that each expert's sum belongs to one program and needs no
atomics.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from mumoe_fast.kernels._common import aligned, launch, load, store
from mumoe_fast.kernels._tiles import distance, matrix, offsets
from mumoe_fast.kernels.configs import gather_config, segment_config


class Segments(NamedTuple):
    """The pairs (t, k) of a support by expert: those of n are ``order[bounds[n]:bounds[n + 1]]``, as t K + k."""

    order: Tensor
    bounds: Tensor


def segments(values: Tensor, indices: Tensor, N: int) -> Segments:
    """The pairs of values and indices (T, K) by expert, tokens in their order, without those whose value is zero."""
    keys = torch.where(values == 0, N, indices).flatten().to(torch.int32)
    keys, order = keys.sort(stable=True)
    experts = torch.arange(N + 1, dtype=torch.int32, device=keys.device)
    return Segments(order, torch.searchsorted(keys, experts))


@triton.jit
def _weighted_rows(v, table, rows, offs_r, mask_r):
    """The float32 tile ``v_p table[rows_p]`` over pairs and columns; a row whose v is zero is not read."""
    mask = (v != 0.0)[:, None] & mask_r[None, :]
    return v[:, None] * load(table[0] + distance(table, rows[:, None], offs_r[None, :]), mask)


@triton.jit
def _gather_sum_kernel(
    values_ptr,
    indices_ptr,
    table,
    factor,
    sum_ptr,
    product_ptr,
    K,
    R,
    R_ALIGN: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    R = R * R_ALIGN
    t = tl.program_id(0).to(tl.int64)
    offs_r = offsets(tl.program_id(1), BLOCK_R)
    mask_r = offs_r < R
    acc = tl.zeros((BLOCK_K, BLOCK_R), tl.float32)  # reduced once: a tile of loads in flight and no sum to wait for
    for k in range(0, K, BLOCK_K):
        offs_k = k + tl.arange(0, BLOCK_K)
        v = load(values_ptr + t * K + offs_k, offs_k < K)
        rows = tl.load(indices_ptr + t * K + offs_k, mask=offs_k < K, other=0).to(tl.int64)
        acc += _weighted_rows(v, table, rows, offs_r, mask_r)
    total = tl.sum(acc, axis=0)
    if sum_ptr is not None:
        store(sum_ptr + t * R + offs_r, total, mask_r)
    if product_ptr is not None:
        store(product_ptr + t * R + offs_r, total * load(factor[0] + distance(factor, t, offs_r), mask_r), mask_r)


@triton.jit
def _gather_dot_kernel(
    x,
    indices_ptr,
    table,
    out_ptr,
    K,
    R,
    R_ALIGN: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    R = R * R_ALIGN
    t = tl.program_id(0).to(tl.int64)
    offs_k = offsets(tl.program_id(1), BLOCK_K)
    mask_k = offs_k < K
    rows = tl.load(indices_ptr + t * K + offs_k, mask=mask_k, other=0).to(tl.int64)
    acc = tl.zeros((BLOCK_K, BLOCK_R), tl.float32)
    for r in range(0, R, BLOCK_R):
        offs_r = r + tl.arange(0, BLOCK_R).to(tl.int64)
        mask_r = offs_r < R
        x_row = load(x[0] + distance(x, t, offs_r), mask_r)
        tile = load(table[0] + distance(table, rows[:, None], offs_r[None, :]), mask_k[:, None] & mask_r[None, :])
        acc += x_row[None, :] * tile
    store(out_ptr + t * K + offs_k, tl.sum(acc, axis=1), mask_k)


@triton.jit
def _segment_sum_kernel(
    values_ptr,
    order_ptr,
    bounds_ptr,
    x,
    out_ptr,
    K,
    R,
    R_ALIGN: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    R = R * R_ALIGN
    n = tl.program_id(0).to(tl.int64)
    offs_r = offsets(tl.program_id(1), BLOCK_R)
    mask_r = offs_r < R
    end = tl.load(bounds_ptr + n + 1)
    acc = tl.zeros((BLOCK_P, BLOCK_R), tl.float32)
    for p in range(tl.load(bounds_ptr + n), end, BLOCK_P):
        offs_p = p + tl.arange(0, BLOCK_P)
        pairs = tl.load(order_ptr + offs_p, mask=offs_p < end, other=0)
        v = load(values_ptr + pairs, offs_p < end)
        acc += _weighted_rows(v, x, pairs // K, offs_r, mask_r)
    store(out_ptr + n * R + offs_r, tl.sum(acc, axis=0), mask_r)


def _gather_sum(
    values: Tensor, indices: Tensor, table: Tensor, total: Tensor | None, factor: Tensor | None, product: Tensor | None
) -> None:
    (T, K), R = values.shape, table.shape[1]
    config = gather_config(values.device)
    launch(
        _gather_sum_kernel,
        (T, triton.cdiv(R, config.blocks["BLOCK_R"])),
        config,
        values.device,
        values_ptr=values.contiguous(),
        indices_ptr=indices.contiguous(),
        table=matrix(table),
        factor=None if factor is None else matrix(factor),
        sum_ptr=total,
        product_ptr=product,
        K=K,
        **aligned(R=R),
    )


def gather_sum(values: Tensor, indices: Tensor, table: Tensor) -> Tensor:
    """``s_t = Σ_k v_tk table[i_tk]`` (T, R) in values' dtype, of values and indices (T, K) and table (N, R)."""
    total = values.new_empty(len(values), table.shape[1])
    _gather_sum(values, indices, table, total, None, None)
    return total


def gather_sum_times(
    values: Tensor, indices: Tensor, table: Tensor, factor: Tensor, save: bool
) -> tuple[Tensor, Tensor]:
    """``s ⊙ factor`` (T, R) with s of `gather_sum`, kept in float32 until then; and s itself, empty unless `save`."""
    product = values.new_empty(len(values), table.shape[1])
    total = torch.empty_like(product) if save else None
    _gather_sum(values, indices, table, total, factor, product)
    return product, values.new_empty(0) if total is None else total


def gather_dot(x: Tensor, indices: Tensor, table: Tensor) -> Tensor:
    """``d_tk = x_t · table[i_tk]`` (T, K) in x's dtype, of x (T, R), indices (T, K) and table (N, R)."""
    (T, K), R = indices.shape, x.shape[1]
    out = x.new_empty(T, K)
    config = gather_config(x.device)
    launch(
        _gather_dot_kernel,
        (T, triton.cdiv(K, config.blocks["BLOCK_K"])),
        config,
        x.device,
        x=matrix(x),
        indices_ptr=indices.contiguous(),
        table=matrix(table),
        out_ptr=out,
        K=K,
        **aligned(R=R),
    )
    return out


def segment_sum(values: Tensor, by_expert: Segments, x: Tensor, dtype: torch.dtype) -> Tensor:
    """``w_n = Σ v_tk x_t`` (N, R) over n's pairs, in `dtype`, of values (T, K), their `segments` and x (T, R).

    One program walks through an expert's pairs: an expert that every token chooses takes as long as there are tokens.
    """
    N, R = len(by_expert.bounds) - 1, x.shape[1]
    out = x.new_empty(N, R, dtype=dtype)
    config = segment_config(x.device)
    launch(
        _segment_sum_kernel,
        (N, triton.cdiv(R, config.blocks["BLOCK_R"])),
        config,
        x.device,
        values_ptr=values.contiguous(),
        order_ptr=by_expert.order,
        bounds_ptr=by_expert.bounds,
        x=matrix(x),
        out_ptr=out,
        K=values.shape[1],
        **aligned(R=R),
    )
    return out

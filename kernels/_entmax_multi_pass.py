"""Rows of entmax that are longer than registers hold: read in chunks, and again at every step of the solver.

The formulas are those of `entmax`, whose kernels these replace from some length on.
"""

from __future__ import annotations

import triton
import triton.language as tl

from mumoe_fast.kernels._common import load, store
from mumoe_fast.kernels._entmax_solver import (
    MAX_STEPS,
    advance,
    coefficients,
    guess,
    merge_moments,
    poison_and_top,
    power_of_coefficients,
    shifted,
    start,
    two_sums,
    weighted_mean,
)
from mumoe_fast.kernels._tiles import distance, offsets


@triton.jit
def load_tile(x, offs_t, offs_n, mask_t, mask_n):
    """A matrix's float32 tile, zero where masked."""
    return load(x[0] + distance(x, offs_t[:, None], offs_n[None, :]), mask_t[:, None] & mask_n[None, :])


@triton.jit
def normalised(source, offs_t, offs_n, mask_t, mask_n, mean, rstd, NORM: tl.constexpr):
    """The tile of x at (offs_t, offs_n), zero where masked, from source = (s, the columns' mean and σ⁻¹ for "batch").

    For "layer", mean and rstd are the rows'.
    """
    x = load_tile(source[0], offs_t, offs_n, mask_t, mask_n)
    if NORM == "layer":
        x = (x - mean[:, None]) * rstd[:, None]
    elif NORM == "batch":
        x = (x - load(source[1] + offs_n, mask_n)[None, :]) * load(source[2] + offs_n, mask_n)[None, :]
    return tl.where(mask_n[None, :], x, 0.0)


@triton.jit
def _row_moments(s, offs_t, mask_t, N, eps, BLOCK_N: tl.constexpr):
    """Mean and σ⁻¹ of rows read in chunks: each chunk's variance by two passes, merged by Chan's formula."""
    mean, m2 = tl.zeros((offs_t.shape[0],), tl.float32), tl.zeros((offs_t.shape[0],), tl.float32)
    for n in range(0, N, BLOCK_N):
        offs_n = n + tl.arange(0, BLOCK_N).to(tl.int64)
        x = load_tile(s, offs_t, offs_n, mask_t, offs_n < N)
        width = tl.minimum(N - n, BLOCK_N).to(tl.float32)
        chunk_mean = tl.sum(x, axis=1) / width
        centred = tl.where((offs_n < N)[None, :], x - chunk_mean[:, None], 0.0)
        mean, m2 = merge_moments(n, mean, m2, width, chunk_mean, tl.sum(centred * centred, axis=1))
    return mean, tl.rsqrt(m2 / N + eps)


@triton.jit
def _shifted(source, offs_t, offs_n, mask_t, mask_n, mean, rstd, top, NORM: tl.constexpr, FAMILY: tl.constexpr):
    """The tile that the solver works on: `shifted` x, −inf where there is no column."""
    x = shifted(normalised(source, offs_t, offs_n, mask_t, mask_n, mean, rstd, NORM), top, FAMILY)
    return tl.where(mask_n[None, :], x, float("-inf"))


@triton.jit
def _rows_multi_pass_kernel(
    s,
    mean_ptr,
    rstd_ptr,
    a_ptr,
    T,
    N,
    solver,
    eps,
    NORM: tl.constexpr,
    FAMILY: tl.constexpr,
    LEARNED: tl.constexpr,
    GUESSES: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    source = s, mean_ptr, rstd_ptr
    if LEARNED:
        solver = tl.load(solver), tl.load(solver + 1), tl.load(solver + 2)
    offs_t, columns = offsets(tl.program_id(0), BLOCK_T), tl.arange(0, BLOCK_N).to(tl.int64)
    mask_t = offs_t < T
    zeros = tl.zeros((BLOCK_T,), tl.float32)
    mean, rstd = zeros, zeros
    if NORM == "layer":
        mean, rstd = _row_moments(source[0], offs_t, mask_t, N, eps, BLOCK_N)

    # As in `entmax_tile`, every thread keeps the maxima of what it reads, and they are solved first.
    tile = tl.zeros((BLOCK_T, BLOCK_N), tl.float32)
    tainted, maxima = tile, tile + float("-inf")
    for n in range(0, N, BLOCK_N):
        mask_n = n + columns < N
        x = normalised(source, offs_t, n + columns, mask_t, mask_n, mean, rstd, NORM)
        tainted += x * 0.0
        maxima = tl.maximum(maxima, tl.where(mask_n[None, :], x, float("-inf")))
    poison, top = poison_and_top(tainted, maxima)

    if FAMILY == "softmax":
        total = tile
        for n in range(0, N, BLOCK_N):
            total += tl.exp(
                _shifted(source, offs_t, n + columns, mask_t, n + columns < N, mean, rstd, top, NORM, FAMILY)
            )
        t = tl.sum(total, axis=1)
    else:
        t = guess(shifted(maxima, top, FAMILY), solver, GUESSES, FAMILY)
        low, high, moving = start(poison, solver)
        steps_left = tl.full((), MAX_STEPS, tl.int32)
        while steps_left > 0:
            a, g = tile, tile
            for n in range(0, N, BLOCK_N):
                x = _shifted(source, offs_t, n + columns, mask_t, n + columns < N, mean, rstd, top, NORM, FAMILY)
                in_chunk = coefficients(x, t, solver[2], FAMILY)
                a, g = a + in_chunk[0], g + in_chunk[1]
            total, slope = two_sums(a, g)
            t, low, high, moving = advance(t, low, high, moving, total, slope, N, solver[2], FAMILY)
            steps_left = (steps_left - 1) * tl.max(moving, axis=0)

    for n in range(0, N, BLOCK_N):
        offs_n = n + columns
        x = _shifted(source, offs_t, offs_n, mask_t, offs_n < N, mean, rstd, top, NORM, FAMILY)
        a, _ = coefficients(x, t, solver[2], FAMILY)
        mask = mask_t[:, None] & (offs_n < N)[None, :]
        store(a_ptr + offs_t[:, None] * N + offs_n[None, :], a + poison[:, None], mask)


@triton.jit
def _centred_gradient(da, a, centre, offs_t, offs_n, mask_t, mask_n, beta, FAMILY: tl.constexpr):
    """dx at (offs_t, offs_n), where centre = Σ g·da / Σ g is known."""
    g = power_of_coefficients(load_tile(a, offs_t, offs_n, mask_t, mask_n), beta, FAMILY)
    return g * (load_tile(da, offs_t, offs_n, mask_t, mask_n) - centre[:, None])


@triton.jit
def _rows_backward_multi_pass_kernel(
    da,
    a,
    s,
    mean_ptr,
    rstd_ptr,
    ds_ptr,
    T,
    N,
    beta,
    eps,
    NORM: tl.constexpr,
    FAMILY: tl.constexpr,
    LEARNED: tl.constexpr,
    GUESSES: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    source = s, mean_ptr, rstd_ptr
    if LEARNED:
        beta = tl.load(beta)
    offs_t, columns = offsets(tl.program_id(0), BLOCK_T), tl.arange(0, BLOCK_N).to(tl.int64)
    mask_t = offs_t < T
    zeros = tl.zeros((BLOCK_T,), tl.float32)
    weighted, weight = zeros, zeros
    for n in range(0, N, BLOCK_N):
        offs_n = n + columns
        g = power_of_coefficients(load_tile(a, offs_t, offs_n, mask_t, offs_n < N), beta, FAMILY)
        # One reduction of both, and here: softmax's two fail in Triton 3.6, and one after the loop kills LLVM in 3.9.
        in_chunk = two_sums(g * load_tile(da, offs_t, offs_n, mask_t, offs_n < N), g)
        weighted, weight = weighted + in_chunk[0], weight + in_chunk[1]
    centre = weighted_mean(weighted, weight)

    mean, rstd, correlation = zeros, zeros, zeros
    if NORM == "layer":
        mean, rstd = _row_moments(source[0], offs_t, mask_t, N, eps, BLOCK_N)
        for n in range(0, N, BLOCK_N):
            offs_n = n + columns
            x = normalised(source, offs_t, offs_n, mask_t, offs_n < N, mean, rstd, NORM)
            dx = _centred_gradient(da, a, centre, offs_t, offs_n, mask_t, offs_n < N, beta, FAMILY)
            correlation += tl.sum(dx * x, axis=1) / N

    for n in range(0, N, BLOCK_N):
        offs_n = n + columns
        mask_n = offs_n < N
        ds = _centred_gradient(da, a, centre, offs_t, offs_n, mask_t, mask_n, beta, FAMILY)
        if NORM == "layer":
            x = normalised(source, offs_t, offs_n, mask_t, mask_n, mean, rstd, NORM)
            ds = rstd[:, None] * (ds - x * correlation[:, None])
        elif NORM == "batch":
            ds *= load(source[2] + offs_n, mask_n)[None, :]
        store(ds_ptr + offs_t[:, None] * N + offs_n[None, :], ds, mask_t[:, None] & mask_n[None, :])

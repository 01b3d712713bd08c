"""α-entmax over rows of any length, after layer norm, batch norm or no norm, forward and backward.

Forward, with x = norm(s) over the N entries of a row ("layer": with the row's own mean and σ⁻¹ = 1/√(var + eps);
"batch": with a mean and a σ⁻¹ for every column):

    a_n = [1 + (α−1)(x_n − v)]₊^{1/(α−1)},  Σ a = 1

Backward, from the saved a, with g = a^{2−α} on the support:

    dx = g ⊙ (da − Σ g·da / Σ g)
    dα = Σ da ⊙ [(a − g/Σ g)/β² + (h − g/Σ g · Σ h)/β],  h = −a log a,  β = α − 1 (where α is learned)
    ds = dx (none),  σ⁻¹ (dx − x·mean(dx ⊙ x)) (layer; mean(dx) is 0),  σ_n⁻¹ dx (batch; the rest is in batch_norm)

A row that fits in registers is read once. A longer one is read again, mostly from the caches, at every step of the
solver: its kernels have the suffix `multi_pass` and differ in nothing else.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from mumoe_fast.kernels._common import Launch, load, perform, store
from mumoe_fast.kernels._entmax_solver import (
    MAX_STEPS,
    advance,
    coefficients,
    entmax_gradient_tile,
    entmax_tile,
    family,
    layer_norm_gradient_tile,
    layer_norm_tile,
    merge_moments,
    power_of_coefficients,
    solver_arguments,
    start,
    totals,
    weighted_mean,
)
from mumoe_fast.kernels._plans import planned
from mumoe_fast.kernels._tiles import distance, matrix, offsets
from mumoe_fast.kernels.configs import entmax_rows_config


@triton.jit
def _load_tile(x, offs_t, offs_n, mask_t, mask_n):
    """A matrix's float32 tile, zero where masked."""
    return load(x[0] + distance(x, offs_t[:, None], offs_n[None, :]), mask_t[:, None] & mask_n[None, :])


@triton.jit
def _normalised(source, offs_t, offs_n, mask_t, mask_n, mean, rstd, NORM: tl.constexpr):
    """The tile of x at (offs_t, offs_n), zero where masked, from source = (s, the columns' mean and σ⁻¹ for "batch").

    For "layer", mean and rstd are the rows'.
    """
    x = _load_tile(source[0], offs_t, offs_n, mask_t, mask_n)
    if NORM == "layer":
        x = (x - mean[:, None]) * rstd[:, None]
    elif NORM == "batch":
        x = (x - load(source[1] + offs_n, mask_n)[None, :]) * load(source[2] + offs_n, mask_n)[None, :]
    return tl.where(mask_n[None, :], x, 0.0)


@triton.jit
def _rows_kernel(
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
    BLOCK_T: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    source = s, mean_ptr, rstd_ptr
    if LEARNED:
        solver = tl.load(solver), tl.load(solver + 1), tl.load(solver + 2)
    offs_t, offs_n = offsets(tl.program_id(0), BLOCK_T), tl.arange(0, BLOCK_N).to(tl.int64)
    mask_t, mask_n = offs_t < T, offs_n < N
    if NORM == "layer":
        x, _ = layer_norm_tile(_load_tile(source[0], offs_t, offs_n, mask_t, mask_n), mask_n, N, eps)
    else:
        x = _normalised(source, offs_t, offs_n, mask_t, mask_n, None, None, NORM)
    a = entmax_tile(x, mask_n, solver, FAMILY)
    store(a_ptr + offs_t[:, None] * N + offs_n[None, :], a, mask_t[:, None] & mask_n[None, :])


@triton.jit
def _rows_backward_kernel(
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
    BLOCK_T: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    source = s, mean_ptr, rstd_ptr
    if LEARNED:
        beta = tl.load(beta)
    offs_t, offs_n = offsets(tl.program_id(0), BLOCK_T), tl.arange(0, BLOCK_N).to(tl.int64)
    mask_t, mask_n = offs_t < T, offs_n < N
    da_tile, a_tile = _load_tile(da, offs_t, offs_n, mask_t, mask_n), _load_tile(a, offs_t, offs_n, mask_t, mask_n)
    ds = entmax_gradient_tile(da_tile, a_tile, beta, FAMILY)
    if NORM == "layer":
        x, rstd = layer_norm_tile(_load_tile(source[0], offs_t, offs_n, mask_t, mask_n), mask_n, N, eps)
        ds = layer_norm_gradient_tile(ds, x, rstd, N)
    elif NORM == "batch":
        ds *= load(source[2] + offs_n, mask_n)[None, :]
    store(ds_ptr + offs_t[:, None] * N + offs_n[None, :], ds, mask_t[:, None] & mask_n[None, :])


@triton.jit
def _row_moments(s, offs_t, mask_t, N, eps, BLOCK_N: tl.constexpr):
    """Mean and σ⁻¹ of rows read in chunks: each chunk's variance by two passes, merged by Chan's formula."""
    mean, m2 = tl.zeros((offs_t.shape[0],), tl.float32), tl.zeros((offs_t.shape[0],), tl.float32)
    for n in range(0, N, BLOCK_N):
        offs_n = n + tl.arange(0, BLOCK_N).to(tl.int64)
        x = _load_tile(s, offs_t, offs_n, mask_t, offs_n < N)
        width = tl.minimum(N - n, BLOCK_N).to(tl.float32)
        chunk_mean = tl.sum(x, axis=1) / width
        centred = tl.where((offs_n < N)[None, :], x - chunk_mean[:, None], 0.0)
        mean, m2 = merge_moments(n, mean, m2, width, chunk_mean, tl.sum(centred * centred, axis=1))
    return mean, tl.rsqrt(m2 / N + eps)


@triton.jit
def _shifted(source, offs_t, offs_n, mask_t, mask_n, mean, rstd, top, NORM: tl.constexpr):
    """x minus its row's maximum, −inf where there is no column; flat where that is NaN, for the solver to end."""
    x = _normalised(source, offs_t, offs_n, mask_t, mask_n, mean, rstd, NORM)
    x = tl.where((top == top)[:, None], x - top[:, None], 0.0)
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

    top, poison = zeros + float("-inf"), zeros
    for n in range(0, N, BLOCK_N):
        mask_n = n + columns < N
        x = _normalised(source, offs_t, n + columns, mask_t, mask_n, mean, rstd, NORM)
        top = tl.maximum(top, tl.max(tl.where(mask_n[None, :], x, float("-inf")), axis=1))
        poison += tl.sum(x * 0.0, axis=1)
    top += poison

    if FAMILY == "softmax":
        t = zeros
        for n in range(0, N, BLOCK_N):
            x = _shifted(source, offs_t, n + columns, mask_t, n + columns < N, mean, rstd, top, NORM)
            t += tl.sum(tl.exp(x), axis=1)
    else:
        t, low, high, moving = start(zeros, solver)
        steps_left = tl.full((), MAX_STEPS, tl.int32)
        while steps_left > 0:
            total, slope, support = zeros, zeros, zeros
            for n in range(0, N, BLOCK_N):
                x = _shifted(source, offs_t, n + columns, mask_t, n + columns < N, mean, rstd, top, NORM)
                in_chunk = totals(x, t, solver[2], FAMILY)
                total, slope, support = total + in_chunk[0], slope + in_chunk[1], support + in_chunk[2]
            t, low, high, moving = advance(t, low, high, moving, total, slope, support, solver[2], FAMILY)
            steps_left = (steps_left - 1) * tl.max(moving, axis=0)

    for n in range(0, N, BLOCK_N):
        offs_n = n + columns
        x = _shifted(source, offs_t, offs_n, mask_t, offs_n < N, mean, rstd, top, NORM)
        a, _ = coefficients(x, t, solver[2], FAMILY)
        mask = mask_t[:, None] & (offs_n < N)[None, :]
        store(a_ptr + offs_t[:, None] * N + offs_n[None, :], a + poison[:, None], mask)


@triton.jit
def _centred_gradient(da, a, centre, offs_t, offs_n, mask_t, mask_n, beta, FAMILY: tl.constexpr):
    """dx at (offs_t, offs_n), where centre = Σ g·da / Σ g is known."""
    g = power_of_coefficients(_load_tile(a, offs_t, offs_n, mask_t, mask_n), beta, FAMILY)
    return g * (_load_tile(da, offs_t, offs_n, mask_t, mask_n) - centre[:, None])


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
        g = power_of_coefficients(_load_tile(a, offs_t, offs_n, mask_t, offs_n < N), beta, FAMILY)
        weighted += tl.sum(g * _load_tile(da, offs_t, offs_n, mask_t, offs_n < N), axis=1)
        weight += tl.sum(g, axis=1)
    centre = weighted_mean(weighted, weight)

    mean, rstd, correlation = zeros, zeros, zeros
    if NORM == "layer":
        mean, rstd = _row_moments(source[0], offs_t, mask_t, N, eps, BLOCK_N)
        for n in range(0, N, BLOCK_N):
            offs_n = n + columns
            x = _normalised(source, offs_t, offs_n, mask_t, offs_n < N, mean, rstd, NORM)
            dx = _centred_gradient(da, a, centre, offs_t, offs_n, mask_t, offs_n < N, beta, FAMILY)
            correlation += tl.sum(dx * x, axis=1) / N

    for n in range(0, N, BLOCK_N):
        offs_n = n + columns
        mask_n = offs_n < N
        ds = _centred_gradient(da, a, centre, offs_t, offs_n, mask_t, mask_n, beta, FAMILY)
        if NORM == "layer":
            x = _normalised(source, offs_t, offs_n, mask_t, mask_n, mean, rstd, NORM)
            ds = rstd[:, None] * (ds - x * correlation[:, None])
        elif NORM == "batch":
            ds *= load(source[2] + offs_n, mask_n)[None, :]
        store(ds_ptr + offs_t[:, None] * N + offs_n[None, :], ds, mask_t[:, None] & mask_n[None, :])


def rows_forward(
    s: Tensor,
    a: Tensor,
    *,
    norm: str,
    alpha: float,
    eps: float = 0.0,
    mean: Tensor | None = None,
    rstd: Tensor | None = None,
) -> None:
    """Write ``entmax(norm(s))`` of s (T, N) into the contiguous a (T, N); mean and rstd (N,) are batch norm's."""
    _launch_rows_forward(s, a, mean, rstd, norm=norm, alpha=alpha, eps=eps)


@planned
def _launch_rows_forward(
    s: Tensor,
    a: Tensor,
    mean: Tensor | None,
    rstd: Tensor | None,
    *,
    device: torch.device,
    norm: str,
    alpha: float,
    eps: float,
) -> Launch:
    arguments = {
        "s": matrix(s),
        "mean_ptr": mean,
        "rstd_ptr": rstd,
        "a_ptr": a,
        "eps": eps,
        "NORM": norm,
        "LEARNED": False,
        **solver_arguments(alpha, max(s.shape[1], 1)),
    }
    return _rows_launch((_rows_kernel, _rows_multi_pass_kernel), s, device, arguments)


def rows_backward(
    da: Tensor,
    a: Tensor,
    ds: Tensor,
    *,
    norm: str,
    alpha: float,
    eps: float = 0.0,
    s: Tensor | None = None,
    rstd: Tensor | None = None,
) -> None:
    """Write the gradient of `rows_forward` by s into the contiguous ds; s is layer norm's, rstd batch norm's."""
    _launch_rows(
        (_rows_backward_kernel, _rows_backward_multi_pass_kernel),
        a,
        da=matrix(da),
        a=matrix(a),
        s=None if s is None else matrix(s),
        mean_ptr=None,
        rstd_ptr=rstd,
        ds_ptr=ds,
        beta=alpha - 1,
        eps=eps,
        NORM=norm,
        FAMILY=family(alpha),
        LEARNED=False,
    )


def _rows_launch(kernels: tuple[Any, Any], rows: Tensor, device: torch.device, arguments: Mapping[str, Any]) -> Launch:
    """That of the first kernel if rows of this length fit in registers, else of the second."""
    T, N = rows.shape
    config, in_registers = entmax_rows_config(device, N)
    grid = (triton.cdiv(T, config.blocks["BLOCK_T"]) if N else 0,)
    return Launch(kernels[0] if in_registers else kernels[1], grid, config, {"T": T, "N": N, **arguments})


def _launch_rows(kernels: tuple[Any, Any], rows: Tensor, **arguments: Any) -> None:
    perform(_rows_launch(kernels, rows, rows.device, arguments), rows.device)


def entmax_forward(x: Tensor, alpha: float) -> Tensor:
    """α-entmax of the rows of x (T, N), any strides, contiguous and in x's dtype."""
    a = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    rows_forward(x, a, norm="none", alpha=alpha)
    return a


def entmax_backward(da: Tensor, a: Tensor, alpha: float) -> Tensor:
    """dx (T, N) in a's dtype from the upstream gradient da and the result a, of any strides."""
    dx = torch.empty(a.shape, dtype=a.dtype, device=a.device)
    rows_backward(da, a, dx, norm="none", alpha=alpha)
    return dx


def _learned_beta(alpha: Tensor) -> Tensor:
    """β = α − 1 in double precision, kept off 0, where the general form has no meaning."""
    return (alpha.detach().double() - 1).clamp(min=1e-6)


def learned_entmax_forward(x: Tensor, alpha: Tensor) -> Tensor:
    """`entmax_forward` for an α that lives on the device: nothing waits for its value."""
    a = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    beta = _learned_beta(alpha)
    high = -torch.expm1(-beta * math.log(max(x.shape[1], 1))) / beta * (1 + 1e-6)
    _launch_rows(
        (_rows_kernel, _rows_multi_pass_kernel),
        x,
        s=matrix(x),
        mean_ptr=None,
        rstd_ptr=None,
        a_ptr=a,
        solver=torch.stack([torch.zeros_like(beta), high, beta]).float(),
        eps=0.0,
        NORM="none",
        FAMILY="entmax",
        LEARNED=True,
    )
    return a


def learned_entmax_backward(da: Tensor, a: Tensor, alpha: Tensor) -> tuple[Tensor, Tensor]:
    """dx (T, N) in a's dtype, and dα (a float32 scalar), the gradient of Correia et al. (2019)."""
    dx = torch.empty(a.shape, dtype=a.dtype, device=a.device)
    beta = _learned_beta(alpha)
    _launch_rows(
        (_rows_backward_kernel, _rows_backward_multi_pass_kernel),
        a,
        da=matrix(da),
        a=matrix(a),
        s=None,
        mean_ptr=None,
        rstd_ptr=None,
        ds_ptr=dx,
        beta=beta.float(),
        eps=0.0,
        NORM="none",
        FAMILY="entmax",
        LEARNED=True,
    )
    p, dp, beta = a.float(), da.float(), beta.float()
    log = torch.where(p > 0, p, 1).log()
    excess = torch.expm1(-beta * log) * p  # g − a: the difference that (a − g/Σg)/β² divides twice by β
    total = excess.sum(-1, keepdim=True)
    share = (p + excess) / (1 + total)
    entropy = -p * log
    first = (p * total - excess) / (1 + total) / beta.square()
    slope = first + (entropy - share * entropy.sum(-1, keepdim=True)) / beta
    return dx, (dp * slope).sum()

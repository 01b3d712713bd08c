"""α-entmax over rows of any length, after layer norm, batch norm or no norm, forward and backward.

Forward, with x = norm(s) over the N entries of a row ("layer": with the row's own mean and σ⁻¹ = 1/√(var + eps);
"batch": with a mean and a σ⁻¹ for every column):

    a_n = [1 + (α−1)(x_n − v)]₊^{1/(α−1)},  Σ a = 1

Backward, from the saved a, with g = a^{2−α} on the support:

    dx = g ⊙ (da − Σ g·da / Σ g)
    dα = Σ da ⊙ [(a − g/Σ g)/β² + (h − g/Σ g · Σ h)/β],  h = −a log a,  β = α − 1 (where α is learned)
    ds = dx (none),  σ⁻¹ (dx − x·mean(dx ⊙ x)) (layer; mean(dx) is 0),  σ_n⁻¹ dx (batch; the rest is in batch_norm)

A row that fits in registers is read once, by the kernels here. Going forward it is a tuple of tiles, the row's chunks:
neighbouring threads share the columns of one chunk, and a thread has its columns of all of them. So a row belongs to
few threads, which exchange little for its sums, and what happens once a row happens for several rows at a time: the
time goes into instructions, of which a copy of bfloat16 leaves a GPU room for 27 an entry. A longer row is read again,
mostly from the caches, at every step of the solver: see `_entmax_multi_pass`.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from mumoe_fast.kernels._common import append, launch, load, store
from mumoe_fast.kernels._entmax_multi_pass import (
    _rows_backward_multi_pass_kernel,
    _rows_multi_pass_kernel,
    load_tile,
    normalised,
)
from mumoe_fast.kernels._entmax_solver import (
    entmax_chunks,
    entmax_gradient_tile,
    family,
    layer_norm_chunks,
    layer_norm_gradient_tile,
    layer_norm_tile,
    solver_arguments,
)
from mumoe_fast.kernels._plans import planned
from mumoe_fast.kernels._tiles import matrix, offsets
from mumoe_fast.kernels.configs import entmax_rows_config


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
    FULL: tl.constexpr,
    GUESSES: tl.constexpr,
    CHUNKS: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    if FULL:
        N = BLOCK_N  # a constant, and every mask of columns is known to hold
    if LEARNED:
        solver = tl.load(solver), tl.load(solver + 1), tl.load(solver + 2)
    source = s, mean_ptr, rstd_ptr
    offs_t = offsets(tl.program_id(0), BLOCK_T)
    mask_t = offs_t < T
    columns, masks, x = (), (), ()
    for i in tl.static_range(CHUNKS):
        offs_n = i * (BLOCK_N // CHUNKS) + tl.arange(0, BLOCK_N // CHUNKS).to(tl.int64)
        columns, masks = append(columns, offs_n), append(masks, offs_n < N)
        if NORM == "batch":
            x = append(x, normalised(source, offs_t, offs_n, mask_t, offs_n < N, None, None, NORM))
        else:
            x = append(x, load_tile(s, offs_t, offs_n, mask_t, offs_n < N))
    if NORM == "layer":
        x, _ = layer_norm_chunks(x, masks, N, eps)
    a = entmax_chunks(x, masks, solver, FAMILY, GUESSES)
    for i in tl.static_range(CHUNKS):
        mask = mask_t[:, None] & masks[i][None, :]
        store(a_ptr + offs_t[:, None] * N + columns[i][None, :], a[i], mask)


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
    FULL: tl.constexpr,
    GUESSES: tl.constexpr,
    CHUNKS: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    if FULL:
        N = BLOCK_N
    if LEARNED:
        beta = tl.load(beta)
    offs_t, offs_n = offsets(tl.program_id(0), BLOCK_T), tl.arange(0, BLOCK_N).to(tl.int64)
    mask_t, mask_n = offs_t < T, offs_n < N
    da_tile, a_tile = load_tile(da, offs_t, offs_n, mask_t, mask_n), load_tile(a, offs_t, offs_n, mask_t, mask_n)
    ds = entmax_gradient_tile(da_tile, a_tile, beta, FAMILY)
    if NORM == "layer":
        x, rstd = layer_norm_tile(load_tile(s, offs_t, offs_n, mask_t, mask_n), mask_n, N, eps)
        ds = layer_norm_gradient_tile(ds, x, rstd, N)
    elif NORM == "batch":
        ds *= load(rstd_ptr + offs_n, mask_n)[None, :]
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
    _launch_rows(
        (_rows_kernel, _rows_multi_pass_kernel),
        s,
        s=matrix(s),
        mean_ptr=mean,
        rstd_ptr=rstd,
        a_ptr=a,
        eps=eps,
        NORM=norm,
        LEARNED=False,
        **solver_arguments(alpha, max(s.shape[1], 1)),
    )


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


def _launch_rows(kernels: tuple[Any, Any], rows: Tensor, **arguments: Any) -> None:
    """Launch the first kernel if rows of this length fit in registers, else the second."""
    T, N = rows.shape
    config, in_registers = entmax_rows_config(rows.device, N)
    grid = (triton.cdiv(T, config.blocks["BLOCK_T"]) if N else 0,)
    if in_registers:
        arguments["FULL"] = config.blocks["BLOCK_N"] == N
    launch(kernels[not in_registers], grid, config, rows.device, T=T, N=N, **arguments)


@planned
def entmax_forward(x: Tensor, alpha: float) -> Tensor:
    """α-entmax of the rows of x (T, N), any strides, contiguous and in x's dtype."""
    a = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    rows_forward(x, a, norm="none", alpha=alpha)
    return a


@planned
def entmax_backward(da: Tensor, a: Tensor, alpha: float) -> Tensor:
    """dx (T, N) in a's dtype from the upstream gradient da and the result a, of any strides."""
    dx = torch.empty(a.shape, dtype=a.dtype, device=a.device)
    rows_backward(da, a, dx, norm="none", alpha=alpha)
    return dx


def _learned_beta(alpha: Tensor) -> Tensor:
    """β = α − 1 in double precision, kept off 0, where the general form has no meaning."""
    return (alpha.detach().double() - 1).clamp(min=1e-6)


@planned
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


@planned
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

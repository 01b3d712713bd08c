"""The gate with batch norm over tokens, split where data-parallel training all-reduces, and what the split needs.

    s = z Gᵀ
    mean_n = Σ_t s_tn / T,  var_n = Σ_t (s_tn − mean_n)² / T
    a = entmax(x),  x = (s − mean) ⊙ rstd,  with rstd = 1/√(var + eps) formed in between

Backward, the same steps in reverse:

    ds = rstd ⊙ dx,  dmean = −Σ_t rstd ⊙ dx,  drstd = Σ_t dx ⊙ (s − mean)
    ds = dmean/T + 2 dvar ⊙ (s − mean)/T
    dz = ds G,  dG = dsᵀ z

Sums over tokens are taken by slabs of consecutive tokens, whose partial results are combined in their order: two runs
give the same bits. A slab's moments come tile by tile, each tile's by two passes in registers, and are merged by Chan's
formula: s is read once, and no mean is ever squared and subtracted.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from mumoe_fast.kernels import _tiles
from mumoe_fast.kernels._common import launch, load, matmul_float32
from mumoe_fast.kernels._entmax_solver import merge_moments
from mumoe_fast.kernels._logits import logit_gradient_dtype, logits
from mumoe_fast.kernels._plans import planned
from mumoe_fast.kernels._tiles import distance, matrix, offsets
from mumoe_fast.kernels.configs import Config, columns_config, merge_config
from mumoe_fast.kernels.entmax import rows_backward, rows_forward

MAX_SLABS = 64  # with 4 blocks of 64 experts (N = 256) twice as many programs as a large GPU has processors


@triton.jit
def _column_moments_kernel(s, mean_ptr, m2_ptr, T, N, slab_t, BLOCK_T: tl.constexpr, BLOCK_N: tl.constexpr):
    slab = tl.program_id(0).to(tl.int64)
    offs_n = offsets(tl.program_id(1), BLOCK_N)
    mask_n = offs_n < N
    first, end = slab * slab_t, tl.minimum((slab + 1) * slab_t, T)
    mean, m2 = tl.zeros((BLOCK_N,), tl.float32), tl.zeros((BLOCK_N,), tl.float32)
    for t in range(first, end, BLOCK_T):
        offs_t = t + tl.arange(0, BLOCK_T)
        mask = (offs_t < end)[:, None] & mask_n[None, :]
        x = load(s[0] + distance(s, offs_t[:, None], offs_n[None, :]), mask)
        height = tl.minimum(end - t, BLOCK_T).to(tl.float32)
        tile_mean = tl.sum(x, axis=0) / height
        centred = tl.where(mask, x - tile_mean[None, :], 0.0)
        tile_m2 = tl.sum(centred * centred, axis=0)
        mean, m2 = merge_moments((t - first).to(tl.float32), mean, m2, height, tile_mean, tile_m2)
    tl.store(mean_ptr + slab * N + offs_n, mean, mask=mask_n)
    tl.store(m2_ptr + slab * N + offs_n, m2, mask=mask_n)


@triton.jit
def _merge_moments_kernel(means_ptr, m2s_ptr, mean_ptr, var_ptr, T, N, slab_t, BLOCK_N: tl.constexpr):
    offs_n = offsets(tl.program_id(0), BLOCK_N)
    mask_n = offs_n < N
    mean, m2 = tl.zeros((BLOCK_N,), tl.float32), tl.zeros((BLOCK_N,), tl.float32)
    for slab in range(tl.cdiv(T, slab_t)):
        height = tl.minimum(T - slab * slab_t, slab_t).to(tl.float32)
        slab_mean = load(means_ptr + slab * N + offs_n, mask_n)
        slab_m2 = load(m2s_ptr + slab * N + offs_n, mask_n)
        mean, m2 = merge_moments((slab * slab_t).to(tl.float32), mean, m2, height, slab_mean, slab_m2)
    tl.store(mean_ptr + offs_n, mean, mask=mask_n)
    tl.store(var_ptr + offs_n, m2 / T, mask=mask_n)


@triton.jit
def _column_sums_kernel(
    x, s, mean_ptr, partial_ptr, weighted_ptr, T, N, slab_t, BLOCK_T: tl.constexpr, BLOCK_N: tl.constexpr
):
    slab = tl.program_id(0).to(tl.int64)
    offs_n = offsets(tl.program_id(1), BLOCK_N)
    mask_n = offs_n < N
    total, weighted = tl.zeros((BLOCK_T, BLOCK_N), tl.float32), tl.zeros((BLOCK_T, BLOCK_N), tl.float32)
    for t in range(slab * slab_t, tl.minimum((slab + 1) * slab_t, T), BLOCK_T):
        offs_t = t + tl.arange(0, BLOCK_T)
        mask = (offs_t < tl.minimum((slab + 1) * slab_t, T))[:, None] & mask_n[None, :]
        x_tile = load(x[0] + distance(x, offs_t[:, None], offs_n[None, :]), mask)
        total += x_tile
        if weighted_ptr is not None:
            s_tile = load(s[0] + distance(s, offs_t[:, None], offs_n[None, :]), mask)
            weighted += x_tile * (s_tile - load(mean_ptr + offs_n, mask_n)[None, :])
    _tiles.column_sums(total, partial_ptr, slab, offs_n, N, mask_n)
    if weighted_ptr is not None:
        _tiles.column_sums(weighted, weighted_ptr, slab, offs_n, N, mask_n)


@triton.jit
def _statistics_backward_kernel(
    dmean_ptr, dvar_ptr, s, mean_ptr, ds_ptr, T, N, BLOCK_T: tl.constexpr, BLOCK_N: tl.constexpr
):
    offs_t, offs_n = offsets(tl.program_id(0), BLOCK_T), offsets(tl.program_id(1), BLOCK_N)
    mask_n = offs_n < N
    mask = (offs_t < T)[:, None] & mask_n[None, :]
    dmean, dvar, mean = (
        load(dmean_ptr + offs_n, mask_n),
        load(dvar_ptr + offs_n, mask_n),
        load(mean_ptr + offs_n, mask_n),
    )
    x = load(s[0] + distance(s, offs_t[:, None], offs_n[None, :]), mask)
    ds = (dmean[None, :] + 2.0 * dvar[None, :] * (x - mean[None, :])) / T
    tl.store(ds_ptr + offs_t[:, None] * N + offs_n[None, :], ds, mask=mask)


def _slabs(T: int, config: Config) -> tuple[int, int]:
    """How many slabs T tokens are cut into, and the tokens of each but the last."""
    slab_t = max(triton.cdiv(T, MAX_SLABS), 4 * config.blocks["BLOCK_T"])
    return triton.cdiv(T, slab_t), slab_t


def gate_logits_forward(z: Tensor, weight: Tensor) -> Tensor:
    """s (T, N) in float32 of z (T, I) and weight (N, I), which is cast to z's dtype."""
    return logits(z, weight.to(z.dtype), None)


def gate_logits_backward(
    ds: Tensor, z: Tensor, weight: Tensor, needs: tuple[bool, bool] = (True, True)
) -> tuple[Tensor | None, Tensor | None]:
    """dz (T, I) in z's dtype and dG (N, I) in float32, each None where `needs` says so."""
    ds = ds.to(logit_gradient_dtype(z.dtype))
    dz = torch.mm(ds, weight.to(z.dtype).to(ds.dtype)).to(z.dtype) if needs[0] else None
    return dz, matmul_float32(ds.t(), z.to(ds.dtype)) if needs[1] else None


@planned
def batch_norm_statistics(s: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and biased variance (N,) of the logits s (T, N) over the tokens, in float32; of no token they are NaN."""
    T, N = s.shape
    if T == 0:
        return s.new_full((N,), float("nan"), dtype=torch.float32), s.new_full((N,), float("nan"), dtype=torch.float32)
    config = columns_config(s.device)
    slabs, slab_t = _slabs(T, config)
    means, m2s = s.new_empty(2, slabs, N, dtype=torch.float32).unbind()
    mean, var = s.new_empty(N, dtype=torch.float32), s.new_empty(N, dtype=torch.float32)
    sizes = {"T": T, "N": N, "slab_t": slab_t}
    launch(
        _column_moments_kernel,
        (slabs, triton.cdiv(N, config.blocks["BLOCK_N"])),
        config,
        s.device,
        s=matrix(s),
        mean_ptr=means,
        m2_ptr=m2s,
        **sizes,
    )
    merging = merge_config(s.device)
    launch(
        _merge_moments_kernel,
        (triton.cdiv(N, merging.blocks["BLOCK_N"]),),
        merging,
        s.device,
        means_ptr=means,
        m2s_ptr=m2s,
        mean_ptr=mean,
        var_ptr=var,
        **sizes,
    )
    return mean, var


@planned
def batch_norm_statistics_backward(dmean: Tensor, dvar: Tensor, s: Tensor, mean: Tensor) -> Tensor:
    """ds (T, N) in float32 from the gradients (N,) of `batch_norm_statistics`, s and its mean."""
    T, N = s.shape
    ds = s.new_empty(T, N, dtype=torch.float32)
    config = columns_config(s.device)
    launch(
        _statistics_backward_kernel,
        (triton.cdiv(T, config.blocks["BLOCK_T"]), triton.cdiv(N, config.blocks["BLOCK_N"])),
        config,
        s.device,
        dmean_ptr=dmean.contiguous(),
        dvar_ptr=dvar.contiguous(),
        s=matrix(s),
        mean_ptr=mean.contiguous(),
        ds_ptr=ds,
        T=T,
        N=N,
    )
    return ds


def column_sums(x: Tensor, s: Tensor | None = None, mean: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
    """``Σ_t x`` (N,) of x (T, N) in float32, and with s (T, N) and mean (N,) also ``Σ_t x ⊙ (s − mean)``."""
    T, N = x.shape
    config = columns_config(x.device)
    slabs, slab_t = _slabs(T, config)
    partial = x.new_empty(slabs, N, dtype=torch.float32)
    weighted = None if s is None else torch.empty_like(partial)
    launch(
        _column_sums_kernel,
        (slabs, triton.cdiv(N, config.blocks["BLOCK_N"])),
        config,
        x.device,
        x=matrix(x),
        s=None if s is None else matrix(s),
        mean_ptr=mean,
        partial_ptr=partial,
        weighted_ptr=weighted,
        T=T,
        N=N,
        slab_t=slab_t,
    )
    return partial.sum(0), None if weighted is None else weighted.sum(0)


@planned
def batch_entmax_forward(s: Tensor, mean: Tensor, rstd: Tensor, alpha: float, dtype: torch.dtype) -> Tensor:
    """``entmax((s − mean) ⊙ rstd)`` of the logits s (T, N) with mean and rstd (N,), contiguous and in `dtype`."""
    a = torch.empty(s.shape, dtype=dtype, device=s.device)
    rows_forward(s, a, norm="batch", alpha=alpha, mean=mean.contiguous(), rstd=rstd.contiguous())
    return a


@planned
def batch_entmax_backward(
    da: Tensor, a: Tensor, s: Tensor, mean: Tensor, rstd: Tensor, alpha: float
) -> tuple[Tensor, Tensor, Tensor]:
    """ds (T, N), dmean and drstd (N,) in float32 of `batch_entmax_forward`, from its result a."""
    ds = torch.empty(s.shape, dtype=torch.float32, device=s.device)
    rows_backward(da, a, ds, norm="batch", alpha=alpha, rstd=rstd.contiguous())
    total, weighted = column_sums(ds, s, mean.contiguous())
    assert weighted is not None
    return ds, -total, weighted / rstd

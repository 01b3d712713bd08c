"""The gate: logits, norm over the experts and α-entmax in one kernel while a row of experts fits in registers.

All levels of a hierarchy whose rows fit are one launch, the level being the part of the grid that varies fastest: the
programs that read the same rows of z run side by side. A token's row belongs to one program, which streams the level's
whole G. More programs to a row would have to meet before its norm, by another launch or by a counter that outlives
the call, which two streams or graphs could then share.

Forward, with b = 0 where there is no bias; logits and everything after them stay in float32:

    s = z Gᵀ + b,  x = (s − mean)·σ⁻¹ over the N experts ("layer") or s ("none"),  a = entmax(x)

Backward; only z and a are kept, the logits are computed again:

    dx = g ⊙ (da − Σ g·da / Σ g),  g = a^{2−α} on the support
    ds = σ⁻¹ (dx − x·mean(dx ⊙ x))  ("layer"; mean(dx) is 0),  dx  ("none")
    dz = Σ_e ds_e G_e,  dG = dsᵀ z,  db = Σ_t ds

z (T, I), G (N, I) as `nn.Linear` keeps it, b (N), a (T, N), each but z one per level. A wider level goes through
memory: float32 logits by the vendor's GEMM and the row kernels of `entmax`, some tokens at a time.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from mumoe_fast.kernels._common import Launch, aligned, dot_precision, load, matmul_float32, perform, round_to, store
from mumoe_fast.kernels._entmax_solver import (
    entmax_gradient_tile,
    entmax_tile,
    family,
    layer_norm_gradient_tile,
    layer_norm_tile,
    solver_arguments,
)
from mumoe_fast.kernels._logits import chunks_of_tokens, logit_gradient_dtype, logits
from mumoe_fast.kernels._plans import planned
from mumoe_fast.kernels._tiles import contract, distance, matrix, offsets
from mumoe_fast.kernels.batch_norm import column_sums
from mumoe_fast.kernels.configs import Config, gate_backward_config, gate_forward_config
from mumoe_fast.kernels.entmax import rows_backward, rows_forward

SMALLEST_DOT = 16  # experts: a level of fewer is padded

Needs = tuple[bool, bool, bool]  # which gradients: of z, of the weights, of the biases


@triton.jit
def _logits(z, level, I, offs_t, offs_n, mask_t, mask_n, BLOCK_I: tl.constexpr, PRECISION: tl.constexpr):
    """The float32 tile of a level's s at (offs_t, offs_n), zero where mask_n is not."""
    s = contract(z, level[0], I, offs_t, offs_n, mask_t, mask_n, "none", BLOCK_I, PRECISION)
    if level[1] is not None:
        s += round_to(load(level[1] + offs_n, mask_n), z[0].dtype.element_ty).to(tl.float32)[None, :]
    return s


@triton.jit
def _level_forward(
    z,
    level,
    solver,
    a_ptr,
    T,
    I,
    eps,
    block_t,
    NORM: tl.constexpr,
    FAMILY: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_I: tl.constexpr,
):
    N = level[2]
    BLOCK_N: tl.constexpr = level[3]
    offs_t, offs_n = offsets(block_t, BLOCK_T), tl.arange(0, BLOCK_N).to(tl.int64)
    mask_t, mask_n = offs_t < T, offs_n < N
    x = _logits(z, level, I, offs_t, offs_n, mask_t, mask_n, BLOCK_I, PRECISION)
    if NORM == "layer":
        x, _ = layer_norm_tile(x, mask_n, N, eps)
    a = entmax_tile(x, mask_n, solver, FAMILY)
    store(a_ptr + offs_t[:, None] * N + offs_n[None, :], a, mask_t[:, None] & mask_n[None, :])


@triton.jit
def _gate_kernel(
    z,
    levels,
    solvers,
    a_ptrs,
    T,
    I,
    eps,
    I_ALIGN: tl.constexpr,
    NORM: tl.constexpr,
    FAMILY: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_I: tl.constexpr,
):
    block_t, I = tl.program_id(0) // len(a_ptrs), I * I_ALIGN
    for e in tl.static_range(len(a_ptrs)):
        if tl.program_id(0) % len(a_ptrs) == e:
            _level_forward(
                z, levels[e], solvers[e], a_ptrs[e], T, I, eps, block_t, NORM, FAMILY, PRECISION, BLOCK_T, BLOCK_I
            )


@triton.jit
def _level_backward(
    da,
    a,
    z,
    level,
    ds_ptr,
    T,
    I,
    beta,
    eps,
    block_t,
    FAMILY: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_I: tl.constexpr,
):
    N = level[2]
    BLOCK_N: tl.constexpr = level[3]
    offs_t, offs_n = offsets(block_t, BLOCK_T), tl.arange(0, BLOCK_N).to(tl.int64)
    mask_t, mask_n = offs_t < T, offs_n < N
    mask = mask_t[:, None] & mask_n[None, :]
    s = _logits(z, level, I, offs_t, offs_n, mask_t, mask_n, BLOCK_I, PRECISION)
    x, rstd = layer_norm_tile(s, mask_n, N, eps)
    da_tile = load(da[0] + distance(da, offs_t[:, None], offs_n[None, :]), mask)
    a_tile = load(a[0] + distance(a, offs_t[:, None], offs_n[None, :]), mask)
    ds = layer_norm_gradient_tile(entmax_gradient_tile(da_tile, a_tile, beta, FAMILY), x, rstd, N)
    store(ds_ptr + offs_t[:, None] * N + offs_n[None, :], ds, mask)


@triton.jit
def _gate_backward_kernel(
    da,
    a,
    z,
    levels,
    ds_ptrs,
    T,
    I,
    beta,
    eps,
    I_ALIGN: tl.constexpr,
    FAMILY: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_I: tl.constexpr,
):
    block_t, I = tl.program_id(0) // len(ds_ptrs), I * I_ALIGN
    for e in tl.static_range(len(ds_ptrs)):
        if tl.program_id(0) % len(ds_ptrs) == e:
            _level_backward(
                da[e], a[e], z, levels[e], ds_ptrs[e], T, I, beta, eps, block_t, FAMILY, PRECISION, BLOCK_T, BLOCK_I
            )


def _every_bias(weights: Sequence[Tensor], biases: Sequence[Tensor]) -> Sequence[Tensor | None]:
    return biases or [None] * len(weights)


def _is_fused(z: Tensor, weight: Tensor) -> bool:
    """Whether a row of the level's experts fits in registers."""
    return gate_backward_config(z.device, z.dtype, weight.shape[0], z.shape[0]) is not None


def _dense(bias: Tensor | None) -> Tensor | None:
    return None if bias is None else bias.contiguous()


def _launch_of_levels(
    kernel: Any,
    config: Config | None,
    z: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    **arguments: Any,
) -> Launch:
    """One launch for all the levels given, by the configuration of the widest, each with its own block of experts."""
    assert config is not None
    levels = tuple(
        (
            matrix(weight.t()),
            bias,
            len(weight),
            tl.constexpr(max(triton.next_power_of_2(len(weight)), SMALLEST_DOT)),
        )
        for weight, bias in zip(weights, biases, strict=True)
    )
    (T, I), blocks = z.shape, {name: block for name, block in config.blocks.items() if name != "BLOCK_N"}
    sizes = {"T": T, **aligned(I=I), "PRECISION": dot_precision(z.dtype)}
    grid = (triton.cdiv(T, blocks["BLOCK_T"]) * len(levels),)
    return Launch(
        kernel, grid, replace(config, blocks=blocks), {"z": matrix(z), "levels": levels, **sizes, **arguments}
    )


def _launch_forward(
    z: Tensor,
    levels: Sequence[tuple[Tensor, Tensor | None, Tensor]],
    *,
    norm: str,
    alpha: float,
    eps: float,
) -> None:
    """`levels` are every level's weight, bias and coefficients."""
    weights, biases, outputs = zip(*levels, strict=True)
    widest, weight_dtype = max(map(len, weights)), max((x.dtype for x in weights), key=lambda dtype: dtype.itemsize)
    described = _launch_of_levels(
        _gate_kernel,
        gate_forward_config(z.device, z.dtype, weight_dtype, widest, len(z)),
        z,
        weights,
        list(map(_dense, biases)),
        solvers=tuple(solver_arguments(alpha, len(weight))["solver"] for weight in weights),
        a_ptrs=outputs,
        eps=eps,
        NORM=norm,
        FAMILY=family(alpha),
    )
    perform(described, z.device)


@planned
def gate_forward(z: Tensor, weight: Tensor, bias: Tensor | None, *, norm: str, alpha: float, eps: float) -> Tensor:
    """a (T, N) of one level: see `gate_hierarchy_forward`."""
    return gate_hierarchy_forward(z, [weight], [] if bias is None else [bias], norm=norm, alpha=alpha, eps=eps)[0]


@planned
def gate_hierarchy_forward(
    z: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor], *, norm: str, alpha: float, eps: float
) -> list[Tensor]:
    """[a_e (T, N_e)], contiguous and in z's dtype, of z (T, I), weights (N_e, I) and biases (N_e,), empty without.

    norm is "layer" or "none". Where z is of a half type, weights and biases may be float32, autocast's master copies:
    they are cast when read.
    """
    T = z.shape[0]
    a = [z.new_empty(T, weight.shape[0]) for weight in weights]
    fused = []
    for level in zip(weights, _every_bias(weights, biases), a, strict=True):
        weight, bias, a_e = level
        if _is_fused(z, weight):
            fused.append(level)
            continue
        weight, bias = weight.to(z.dtype), None if bias is None else bias.to(z.dtype)
        for tokens in chunks_of_tokens(T, len(weight)):
            rows_forward(logits(z[tokens], weight, bias), a_e[tokens], norm=norm, alpha=alpha, eps=eps)
    if fused:
        _launch_forward(z, fused, norm=norm, alpha=alpha, eps=eps)
    return a


def _logit_gradients(
    da: Sequence[Tensor],
    a: Sequence[Tensor],
    z: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor],
    *,
    norm: str,
    alpha: float,
    eps: float,
) -> list[Tensor]:
    """[ds_e (T, N_e)] in `logit_gradient_dtype`."""
    ds = [z.new_empty(x.shape, dtype=logit_gradient_dtype(z.dtype)) for x in a]
    levels = list(zip(da, a, ds, weights, _every_bias(weights, biases), strict=True))
    if norm == "none":  # the logits are not needed
        for da_e, a_e, ds_e, _, _ in levels:
            rows_backward(da_e, a_e, ds_e, norm=norm, alpha=alpha)
        return ds
    for da_e, a_e, ds_e, weight, bias in levels:
        if not _is_fused(z, weight):
            rows_backward(da_e, a_e, ds_e, norm=norm, alpha=alpha, eps=eps, s=logits(z, weight, bias))
    fused = [level for level in levels if _is_fused(z, level[3])]
    if fused:
        upstream, forward, outputs, weights, fused_biases = zip(*fused, strict=True)
        described = _launch_of_levels(
            _gate_backward_kernel,
            gate_backward_config(z.device, z.dtype, max(map(len, weights)), len(z)),
            z,
            weights,
            list(map(_dense, fused_biases)),
            da=tuple(map(matrix, upstream)),
            a=tuple(map(matrix, forward)),
            ds_ptrs=outputs,
            beta=alpha - 1,
            eps=eps,
            FAMILY=family(alpha),
        )
        perform(described, z.device)
    return ds


def _sum_of_products(ds: Sequence[Tensor], weights: Sequence[Tensor]) -> Tensor:
    """Σ_e ds_e G_e (T, I) in ds's dtype, every level added by its own product."""
    total = torch.mm(ds[0], weights[0].to(ds[0].dtype))
    for ds_e, weight in zip(ds[1:], weights[1:], strict=True):
        total.addmm_(ds_e, weight.to(ds_e.dtype))
    return total


def _added(totals: list[Tensor], parts: list[Tensor]) -> list[Tensor]:
    """The totals with the parts added to them in place; the parts where there are no totals yet."""
    return [total.add_(part) for total, part in zip(totals, parts, strict=True)] if totals else parts


@planned
def gate_backward(
    da: Tensor,
    a: Tensor,
    z: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    *,
    norm: str,
    alpha: float,
    eps: float,
    needs: Needs = (True, True, True),
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """dz, dG and db of one level: see `gate_hierarchy_backward`."""
    options: dict[str, Any] = {"norm": norm, "alpha": alpha, "eps": eps, "needs": needs}
    dz, d_weights, d_biases = gate_hierarchy_backward([da], [a], z, [weight], [] if bias is None else [bias], **options)
    return dz, d_weights[0] if d_weights else None, d_biases[0] if d_biases else None


@planned
def gate_hierarchy_backward(
    da: Sequence[Tensor],
    a: Sequence[Tensor],
    z: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor],
    *,
    norm: str,
    alpha: float,
    eps: float,
    needs: Needs = (True, True, True),
) -> tuple[Tensor | None, list[Tensor], list[Tensor]]:
    """dz (T, I) in z's dtype, [dG_e (N_e, I)] and [db_e (N_e,)] in float32, None or empty where `needs` says so.

    Levels too wide to be fused are worked through in chunks of tokens, as in forward: alive at most are a chunk's
    logits and their gradients.
    """
    weights, biases = [weight.to(z.dtype) for weight in weights], [bias.to(z.dtype) for bias in biases]
    needs_z, needs_weights, needs_biases = needs
    wide = sum(len(weight) for weight in weights if not _is_fused(z, weight))
    chunks = list(chunks_of_tokens(len(z), wide)) if wide and len(z) else [slice(None)]
    dz = z.new_empty(z.shape) if needs_z and len(chunks) > 1 else None
    d_weights: list[Tensor] = []
    d_biases: list[Tensor] = []
    for tokens in chunks:
        upstream, forward, part = [x[tokens] for x in da], [x[tokens] for x in a], z[tokens]
        ds = _logit_gradients(upstream, forward, part, weights, biases, norm=norm, alpha=alpha, eps=eps)
        part = part.to(ds[0].dtype)
        if dz is not None:
            dz[tokens] = _sum_of_products(ds, weights)
        elif needs_z:
            dz = _sum_of_products(ds, weights).to(z.dtype)
        if needs_weights:
            d_weights = _added(d_weights, [matmul_float32(ds_e.t(), part) for ds_e in ds])
        if needs_biases and biases:
            d_biases = _added(d_biases, [column_sums(ds_e)[0] for ds_e in ds])
    return dz, d_weights, d_biases

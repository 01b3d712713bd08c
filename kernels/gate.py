"""The gate: logits, norm over the experts and α-entmax in one kernel while a row of experts fits in registers.

Forward, with b = 0 where there is no bias; logits and everything after them stay in float32:

    s = z Gᵀ + b,  x = (s − mean)·σ⁻¹ over the N experts ("layer") or s ("none"),  a = entmax(x)

Backward; only z and a are kept, the logits are computed again:

    dx = g ⊙ (da − Σ g·da / Σ g),  g = a^{2−α} on the support
    ds = σ⁻¹ (dx − x·mean(dx ⊙ x))  ("layer"; mean(dx) is 0),  dx  ("none")
    dz = ds G,  dG = dsᵀ z,  db = Σ_t ds

z (T, I), G (N, I) as `nn.Linear` keeps it, b (N), a (T, N). A wider gate goes through memory: float32 logits by the
vendor's GEMM and the row kernels of `entmax`, some tokens at a time.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from mumoe_fast.kernels._common import Launch, alignment, dot_precision, launch, load, round_to, store
from mumoe_fast.kernels._entmax_solver import (
    entmax_gradient_tile,
    entmax_tile,
    family,
    layer_norm_gradient_tile,
    layer_norm_tile,
    solver_arguments,
)
from mumoe_fast.kernels._plans import planned
from mumoe_fast.kernels._tiles import contract, distance, matrix, offsets
from mumoe_fast.kernels.batch_norm import (
    column_sums,
    gate_logits_backward,
    gate_logits_forward,
    logit_gradient_dtype,
)
from mumoe_fast.kernels.configs import gate_backward_config, gate_forward_config
from mumoe_fast.kernels.entmax import rows_backward, rows_forward

# The float32 logits alive at a time: about a large GPU's L2, and still 256 tokens, enough for a GEMM, at N = 65,536.
LOGITS_BYTES = 64 * 2**20


@triton.jit
def _logits(z, weight, bias_ptr, I, offs_t, offs_n, mask_t, mask_n, BLOCK_I: tl.constexpr, PRECISION: tl.constexpr):
    """The float32 tile of s at (offs_t, offs_n), zero where mask_n is not; weight is (I, N)."""
    s = contract(z, weight, I, offs_t, offs_n, mask_t, mask_n, "none", BLOCK_I, PRECISION)
    if bias_ptr is not None:
        s += round_to(load(bias_ptr + offs_n, mask_n), z[0].dtype.element_ty).to(tl.float32)[None, :]
    return s


@triton.jit
def _gate_kernel(
    z,
    weight,
    bias_ptr,
    a_ptr,
    T,
    N,
    I,
    solver,
    eps,
    I_ALIGN: tl.constexpr,
    NORM: tl.constexpr,
    FAMILY: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_I: tl.constexpr,
):
    offs_t, offs_n = offsets(tl.program_id(0), BLOCK_T), tl.arange(0, BLOCK_N).to(tl.int64)
    mask_t, mask_n = offs_t < T, offs_n < N
    x = _logits(z, weight, bias_ptr, I * I_ALIGN, offs_t, offs_n, mask_t, mask_n, BLOCK_I, PRECISION)
    if NORM == "layer":
        x, _ = layer_norm_tile(x, mask_n, N, eps)
    a = entmax_tile(x, mask_n, solver, FAMILY)
    store(a_ptr + offs_t[:, None] * N + offs_n[None, :], a, mask_t[:, None] & mask_n[None, :])


@triton.jit
def _gate_backward_kernel(
    da,
    a,
    z,
    weight,
    bias_ptr,
    ds_ptr,
    T,
    N,
    I,
    beta,
    eps,
    I_ALIGN: tl.constexpr,
    FAMILY: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_I: tl.constexpr,
):
    offs_t, offs_n = offsets(tl.program_id(0), BLOCK_T), tl.arange(0, BLOCK_N).to(tl.int64)
    mask_t, mask_n = offs_t < T, offs_n < N
    mask = mask_t[:, None] & mask_n[None, :]
    s = _logits(z, weight, bias_ptr, I * I_ALIGN, offs_t, offs_n, mask_t, mask_n, BLOCK_I, PRECISION)
    x, rstd = layer_norm_tile(s, mask_n, N, eps)
    da_tile = load(da[0] + distance(da, offs_t[:, None], offs_n[None, :]), mask)
    a_tile = load(a[0] + distance(a, offs_t[:, None], offs_n[None, :]), mask)
    ds = layer_norm_gradient_tile(entmax_gradient_tile(da_tile, a_tile, beta, FAMILY), x, rstd, N)
    store(ds_ptr + offs_t[:, None] * N + offs_n[None, :], ds, mask)


def _chunks(T: int, N: int) -> Iterator[slice]:
    """The tokens in chunks whose logits over N experts take at most LOGITS_BYTES."""
    chunk_t = max(LOGITS_BYTES // (4 * max(N, 1)), 1)
    return (slice(t, t + chunk_t) for t in range(0, T, chunk_t))


def _logits_by_gemm(z: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """s (T, N) in float32 through memory, for weight and bias in z's dtype."""
    s = gate_logits_forward(z, weight)
    return s if bias is None else s.add_(bias)


@planned
def _launch_gate(
    z: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    a: Tensor,
    *,
    device: torch.device,
    norm: str,
    alpha: float,
    eps: float,
    precision: str,
) -> Launch:
    (T, I), N = z.shape, len(weight)
    config = gate_forward_config(device, z.dtype, weight.dtype, N)
    assert config is not None
    arguments = {
        "z": matrix(z),
        "weight": matrix(weight.t()),
        "bias_ptr": bias,
        "a_ptr": a,
        "T": T,
        "N": N,
        "I": I // alignment(I),
        "eps": eps,
        "I_ALIGN": alignment(I),
        "NORM": norm,
        "PRECISION": precision,
        **solver_arguments(alpha, N),
    }
    return Launch(_gate_kernel, (triton.cdiv(T, config.blocks["BLOCK_T"]),), config, arguments)


def gate_forward(z: Tensor, weight: Tensor, bias: Tensor | None, *, norm: str, alpha: float, eps: float) -> Tensor:
    """a (T, N), contiguous and in z's dtype, of z (T, I), weight (N, I) and bias (N,) or None; norm "layer" or "none".

    Where z is of a half type, weight and bias may be float32, autocast's master copies: they are cast when read.
    """
    T, N = len(z), len(weight)
    a = torch.empty((T, N), dtype=z.dtype, device=z.device)
    config = gate_forward_config(z.device, z.dtype, weight.dtype, N)
    if config is None:
        weight, bias = weight.to(z.dtype), None if bias is None else bias.to(z.dtype)
        for tokens in _chunks(T, N):
            rows_forward(_logits_by_gemm(z[tokens], weight, bias), a[tokens], norm=norm, alpha=alpha, eps=eps)
        return a
    bias = None if bias is None else bias.contiguous()
    _launch_gate(z, weight, bias, a, norm=norm, alpha=alpha, eps=eps, precision=dot_precision(z.dtype))
    return a


def _logit_gradient(
    da: Tensor, a: Tensor, z: Tensor, weight: Tensor, bias: Tensor | None, *, norm: str, alpha: float, eps: float
) -> Tensor:
    """ds (T, N) in `logit_gradient_dtype`."""
    (T, I), N = z.shape, len(weight)
    ds = torch.empty((T, N), dtype=logit_gradient_dtype(z.dtype), device=z.device)
    config = gate_backward_config(z.device, z.dtype, N)
    if norm == "none":  # the logits are not needed
        rows_backward(da, a, ds, norm=norm, alpha=alpha)
    elif config is None:
        rows_backward(da, a, ds, norm=norm, alpha=alpha, eps=eps, s=_logits_by_gemm(z, weight, bias))
    else:
        launch(
            _gate_backward_kernel,
            (triton.cdiv(T, config.blocks["BLOCK_T"]),),
            config,
            z.device,
            da=matrix(da),
            a=matrix(a),
            z=matrix(z),
            weight=matrix(weight.t()),
            bias_ptr=None if bias is None else bias.contiguous(),
            ds_ptr=ds,
            T=T,
            N=N,
            I=I // alignment(I),
            beta=alpha - 1,
            eps=eps,
            I_ALIGN=alignment(I),
            FAMILY=family(alpha),
            PRECISION=dot_precision(z.dtype),
        )
    return ds


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
    needs: tuple[bool, bool, bool] = (True, True, True),
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """dz (T, I) in z's dtype, dG (N, I) and db (N,) in float32, each None where `needs` says so, db where bias is None.

    A gate too wide to be fused is worked through in chunks of tokens, as in forward: alive at most are a chunk's logits
    and their gradient.
    """
    (T, I), N = z.shape, len(weight)
    weight, bias = weight.to(z.dtype), None if bias is None else bias.to(z.dtype)
    options: dict[str, Any] = {"norm": norm, "alpha": alpha, "eps": eps}
    needs_bias = needs[2] and bias is not None
    chunks = list(_chunks(T, N))
    if gate_backward_config(z.device, z.dtype, N) is not None or len(chunks) <= 1:
        ds = _logit_gradient(da, a, z, weight, bias, **options)
        return *gate_logits_backward(ds, z, weight, needs[:2]), column_sums(ds)[0] if needs_bias else None
    dz = torch.empty((T, I), dtype=z.dtype, device=z.device) if needs[0] else None
    d_weight = torch.zeros((N, I), dtype=torch.float32, device=z.device) if needs[1] else None
    d_bias = torch.zeros(N, dtype=torch.float32, device=z.device) if needs_bias else None
    for tokens in chunks:
        ds = _logit_gradient(da[tokens], a[tokens], z[tokens], weight, bias, **options)
        dz_chunk, d_weight_chunk = gate_logits_backward(ds, z[tokens], weight, needs[:2])
        if dz is not None and dz_chunk is not None:
            dz[tokens] = dz_chunk
        if d_weight is not None and d_weight_chunk is not None:
            d_weight += d_weight_chunk
        if d_bias is not None:
            d_bias += column_sums(ds)[0]
    return dz, d_weight, d_bias

"""Tiles that the factorisations share: strided matrices, the contraction of a tile, and the gradients around it.

Every factorisation contracts z with its input mode, every level's coefficients with an expert mode, and the result
with its output mode; they differ in what happens to the tile in between. So a kernel is a few products, each contracted
there or made by the vendor's GEMM and read, and an epilogue, and a gradient is one such kernel followed by the vendor's
GEMMs. With ``B = act(z) U_inᵀ`` and ``A_e = a_e U_e``:

    dz = (dB U_in) ⊙ act'(z),  dU_in = dBᵀ act(z),  da_e = dA_e U_eᵀ,  dU_e = a_eᵀ dA_e
"""

from __future__ import annotations

from functools import lru_cache
from math import gcd
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from mumoe_fast.kernels._common import (
    activate,
    activation_slope,
    aligned,
    alignment,
    dot,
    launch,
    load,
    load_operand,
    round_to,
    store,
    tiles,
)
from mumoe_fast.kernels.configs import activation_backward_config

Product = tuple[Any, ...]  # a product of two matrices as one kernel argument: see `product_tile`


def matrix(x: Tensor) -> tuple[Any, ...]:
    """A 2-D tensor as one kernel argument, whatever its strides: see `distance` for how a kernel reads it.

    The JIT only notices strides that divide by 16. A stride of 552 is passed as 69 · 8, its power of two as a constant,
    so that the compiler knows that rows start on 16 bytes and loads them that wide.
    """
    return (x, *_strides(x.stride()))


@lru_cache(maxsize=1024)
def _strides(strides: tuple[int, ...]) -> tuple[Any, ...]:
    """Remembered: making the constants anew for every matrix of every launch takes the host longer than launching."""
    powers = [gcd(16, stride) for stride in strides]
    return (*(stride // power for stride, power in zip(strides, powers, strict=True)), *map(tl.constexpr, powers))


def stack(x: Tensor) -> tuple[Any, ...]:
    """A 3-D tensor as one kernel argument: its first `matrix`, and the distance to the next one likewise."""
    power = gcd(16, x.stride(0))
    return matrix(x[0]), x.stride(0) // power, tl.constexpr(power)


@lru_cache(maxsize=1024)
def aligned_size(n: int) -> tuple[int, Any]:
    """A size inside a tuple of kernel arguments: without its power of two, and that as a constant. See `alignment`."""
    return n // alignment(n), tl.constexpr(alignment(n))


def contracted(x: Tensor, w: Tensor, activation: str = "none") -> Product:
    """``act(x) w`` for x (T, K) and w (K, R), whose tiles the kernel contracts."""
    return matrix(x), matrix(w), *aligned_size(len(w)), tl.constexpr(activation)


def made(product: Tensor) -> Product:
    """A product (T, R) that the vendor's GEMM has made, whose tiles the kernel reads."""
    return matrix(product), None


def is_made(product: Product) -> bool:
    """Whether the kernel reads it."""
    return product[1] is None


def activated(x: Tensor, activation: str) -> Tensor:
    """act(x), or x itself."""
    if activation == "none":
        return x
    out = x.new_empty(x.shape)
    activation_pass(x, activation, None, out)
    return out


def vendor_product(x: Tensor, w: Tensor, bias: Tensor | None = None, activation: str = "none") -> Tensor:
    """``act(x) w + bias`` (T, R) by the vendor's GEMM; act(x), a transient as large as x, by one pass before it."""
    x = activated(x, activation)
    return torch.mm(x, w) if bias is None else torch.addmm(bias, x, w)


@triton.jit
def distance(x, rows, columns):
    """How many elements lie between a `matrix`'s start and the given rows and columns (int64, like them)."""
    return rows * x[1] * x[3] + columns * x[2] * x[4]


@triton.jit
def from_stack(x, m):
    """The m-th `matrix` of a `stack`."""
    first = x[0]
    return first[0] + m * x[1] * x[2], first[1], first[2], first[3], first[4]


@triton.jit
def grouped_blocks(T, R, BLOCK_T: tl.constexpr, BLOCK_R: tl.constexpr, GROUP_T: tl.constexpr):
    """This program's block of tokens and of ranks.

    Programs that run together cover GROUP_T blocks of tokens and every block of ranks, tokens fastest: the group's rows
    of z come from memory once and stay in L2 while all ranks pass over them, and a factor's tile serves GROUP_T
    programs in a row. Tokens alone fastest would stream all of z once per block of ranks.
    """
    program = tl.program_id(0)
    blocks_t, blocks_r = tl.cdiv(T, BLOCK_T), tl.cdiv(R, BLOCK_R)
    first_t = program // (GROUP_T * blocks_r) * GROUP_T
    in_group = program % (GROUP_T * blocks_r)
    height = tl.minimum(blocks_t - first_t, GROUP_T)
    return first_t + in_group % height, in_group // height


@triton.jit
def offsets(block, BLOCK: tl.constexpr):
    """The int64 offsets that a block covers."""
    return block.to(tl.int64) * BLOCK + tl.arange(0, BLOCK)


@triton.jit
def contract(
    x, w, K, offs_t, offs_r, mask_t, mask_r, ACTIVATION: tl.constexpr, BLOCK_K: tl.constexpr, PRECISION: tl.constexpr
):
    """The float32 tile act(x) w at (offs_t, offs_r), for the matrices x (T, K) and w (K, R).

    The activation is computed in float32 and rounded to x's dtype, since that is what the tensor cores take. One token
    is added up without them: in a tile of 16 rows for them 15 would be empty, but activated all the same.
    """
    one_token: tl.constexpr = offs_t.shape[0] == 1
    acc = tl.zeros((BLOCK_K if one_token else offs_t.shape[0], offs_r.shape[0]), tl.float32)
    offs_k = tl.arange(0, BLOCK_K).to(tl.int64)
    x_ptrs = x[0] + distance(x, offs_t[:, None], offs_k[None, :])
    w_ptrs = w[0] + distance(w, offs_k[:, None], offs_r[None, :])
    step = tl.full((), BLOCK_K, tl.int64)
    x_step, w_step = distance(x, 0, step), distance(w, step, 0)
    for k in range(0, K, BLOCK_K):
        mask_k = offs_k < K - k
        x_tile = load_operand(x_ptrs, mask_t[:, None] & mask_k[None, :])
        if ACTIVATION != "none":
            x_tile = round_to(activate(x_tile.to(tl.float32), ACTIVATION), x[0].dtype.element_ty)
        w_tile = load_operand(w_ptrs, mask_k[:, None] & mask_r[None, :])
        if w[0].dtype.element_ty != x[0].dtype.element_ty:  # autocast's float32 master weight
            w_tile = round_to(w_tile.to(tl.float32), x[0].dtype.element_ty)
        if one_token:
            acc += tl.trans(x_tile).to(tl.float32) * w_tile.to(tl.float32)
        else:
            acc = dot(x_tile, w_tile, acc, PRECISION)
        x_ptrs += x_step
        w_ptrs += w_step
    if one_token:
        acc = tl.sum(acc, axis=0)[None, :]
    return acc


@triton.jit
def product_tile(product, offs_t, offs_r, mask_t, mask_r, BLOCK_K: tl.constexpr, PRECISION: tl.constexpr):
    """The float32 tile of a product: read where it is `made`, and contracted where it is `contracted`."""
    if product[1] is None:  # Triton 3.6 takes no len of a tuple that holds a name or None
        x = product[0]
        return load(x[0] + distance(x, offs_t[:, None], offs_r[None, :]), mask_t[:, None] & mask_r[None, :])
    else:
        K = product[2] * product[3]
        return contract(product[0], product[1], K, offs_t, offs_r, mask_t, mask_r, product[4], BLOCK_K, PRECISION)


@triton.jit
def times_product(x, product, T, offs_t, offs_r, mask_t, mask_r, BLOCK_K: tl.constexpr, PRECISION: tl.constexpr):
    """The tile x times that of a product.

    In a loop of one round, whose length the compiler cannot know (T is not specialised): else it sinks the products of
    all levels to their last use, keeps every factor in registers until then, and spills.
    """
    for _ in range(tl.minimum(T, 1)):
        x *= product_tile(product, offs_t, offs_r, mask_t, mask_r, BLOCK_K, PRECISION)
    return x


@triton.jit
def column_sums(x, partial_ptr, block_t, offs_r, R, mask_r):
    """Write a tile's sums over its tokens to its own row of partial (blocks of T, R), to be added up afterwards.

    No atomics: whoever comes first, the sum is the same to the bit.
    """
    tl.store(partial_ptr + block_t.to(tl.int64) * R + offs_r, tl.sum(x, axis=0), mask=mask_r)


@triton.jit(do_not_specialize=["T"])
def _activation_backward_kernel(
    z,
    dz_ptr,
    activated_ptr,
    T,
    I,
    I_ALIGN: tl.constexpr,
    ACTIVATION: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_I: tl.constexpr,
):
    I = I * I_ALIGN
    block_t, block_i = tl.program_id(0) // tl.cdiv(I, BLOCK_I), tl.program_id(0) % tl.cdiv(I, BLOCK_I)
    offs_t, offs_i = offsets(block_t, BLOCK_T), offsets(block_i, BLOCK_I)
    mask = (offs_t < T)[:, None] & (offs_i < I)[None, :]
    offs = offs_t[:, None] * I + offs_i[None, :]
    x = load(z[0] + distance(z, offs_t[:, None], offs_i[None, :]), mask)
    if dz_ptr is not None:
        store(dz_ptr + offs, load(dz_ptr + offs, mask) * activation_slope(x, ACTIVATION), mask)
    if activated_ptr is not None:
        store(activated_ptr + offs, activate(x, ACTIVATION), mask)


def activation_pass(z: Tensor, activation: str, dz: Tensor | None, activated: Tensor | None) -> None:
    """One pass over z (T, I): dz, if any, is multiplied by act'(z) in place, and `activated` is filled with act(z)."""
    T, I = z.shape
    config = activation_backward_config(z.device)
    launch(
        _activation_backward_kernel,
        (tiles(config, T=T, I=I),),
        config,
        z.device,
        z=matrix(z),
        dz_ptr=dz,
        activated_ptr=activated,
        T=T,
        **aligned(I=I),
        ACTIVATION=activation,
    )


def input_mode_gradients(
    dB: Tensor, z: Tensor, in_factor: Tensor, activation: str, needs_z: bool, needs_in_factor: bool
) -> tuple[Tensor | None, Tensor | None]:
    """dz (T, I) and dU_in (R, I) of ``B = act(z) U_inᵀ``, from dB (T, R).

    With an activation act(z) is recomputed, and dz takes its place once dU_in has read it: one T×I is alive, where a
    single pass over z for both would need two (and read z once less).
    """
    if activation == "none":
        dz = torch.mm(dB, in_factor) if needs_z else None
        return dz, torch.mm(dB.t(), z) if needs_in_factor else None
    buffer, d_in_factor = z.new_empty(z.shape), None
    if needs_in_factor:
        activation_pass(z, activation, dz=None, activated=buffer)
        d_in_factor = torch.mm(dB.t(), buffer)
    if not needs_z:
        return None, d_in_factor
    dz = torch.mm(dB, in_factor, out=buffer)
    activation_pass(z, activation, dz=dz, activated=None)
    return dz, d_in_factor


def expert_mode_gradients(
    dA: Tensor, a: Tensor, factor: Tensor, needs_a: bool, needs_factor: bool
) -> tuple[Tensor | None, Tensor | None]:
    """da (T, N) and dU (N, R) of one level's ``A_e = a U``, from dA_e (T, R)."""
    return torch.mm(dA, factor.t()) if needs_a else None, torch.mm(a.t(), dA) if needs_factor else None

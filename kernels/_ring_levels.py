"""A token's small matrices in the tensor ring: every level's A_e, their product A, and what dA is to every level.

`tensor_ring` has the formulas: a_e (T, N_e), U_e (N_e, R_e, R_{e+1}), A (T, P, M). Small matrices are contracted in the
tile of the kernel that needs them, padded to powers of two; larger ones, and those of backward, are the vendor's GEMMs.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from itertools import accumulate
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from mumoe_fast.kernels._tiles import aligned_size, contract, expert_mode_gradients, matrix

_IN_TILE = 64  # entries of a padded A that a program may hold; larger ones are the vendor's GEMMs


@triton.jit
def level_matrix(level, offs_t, mask_t, BLOCK_K: tl.constexpr, PRECISION: tl.constexpr):
    """A tile's ``A_e`` as (BLOCK_T, rows, columns), zero where padded: one contraction over the level's experts."""
    ROWS: tl.constexpr = level[4]
    COLUMNS: tl.constexpr = level[5]
    BLOCK_ROWS: tl.constexpr = level[6]
    BLOCK_COLUMNS: tl.constexpr = level[7]
    flat = tl.arange(0, BLOCK_ROWS * BLOCK_COLUMNS)
    row, column = flat // BLOCK_COLUMNS, flat % BLOCK_COLUMNS
    if COLUMNS == BLOCK_COLUMNS:  # they lie side by side, which the compiler sees in terms of `flat` alone
        entries, mask = flat, flat < ROWS * COLUMNS
    else:
        entries, mask = row * COLUMNS + column, (row < ROWS) & (column < COLUMNS)
    N = level[2] * level[3]
    A = contract(level[0], level[1], N, offs_t, entries.to(tl.int64), mask_t, mask, "none", BLOCK_K, PRECISION)
    return tl.reshape(A, (offs_t.shape[0], BLOCK_ROWS, BLOCK_COLUMNS))


def ring_levels(coefficients: Sequence[Tensor], cores: Sequence[Tensor]) -> tuple[Any, ...]:
    """Every level's a_e (T, N_e) and U_e (N_e, R_e R_{e+1}), and its matrix's size, plain and padded."""
    levels = []
    for a, core in zip(coefficients, cores, strict=True):
        N, rows, columns = core.shape
        sizes = rows, columns, triton.next_power_of_2(rows), triton.next_power_of_2(columns)
        flat = matrix(core.contiguous().flatten(1))
        levels.append((matrix(a), flat, *aligned_size(N), *map(tl.constexpr, sizes)))
    return tuple(levels)


def fit_in_a_tile(cores: Sequence[Tensor], block_p: int) -> bool:
    """Whether a program can hold a token's A_e: all of them small, and A's rows in one block."""
    return _ranks_fit(tuple(rank for core in cores for rank in core.shape[1:]), block_p)


@lru_cache(maxsize=1024)
def _ranks_fit(ranks: tuple[int, ...], block_p: int) -> bool:
    padded = [triton.next_power_of_2(rank) for rank in ranks]
    entries = [rows * columns for rows, columns in zip(padded[::2], padded[1::2], strict=True)]
    return bool(padded[0] == block_p) and max(entries) * (max(padded) if len(entries) > 1 else 1) <= _IN_TILE


def _level_matrices(coefficients: Sequence[Tensor], cores: Sequence[Tensor]) -> list[Tensor]:
    """Every level's A_e as (T, R_e, R_{e+1}), by the vendor's GEMM."""
    pairs = zip(coefficients, cores, strict=True)
    return [torch.mm(a, core.flatten(1)).unflatten(1, core.shape[1:]) for a, core in pairs]


def product_of_levels(coefficients: Sequence[Tensor], cores: Sequence[Tensor]) -> Tensor:
    """A (T, P, M), by the vendor's GEMMs."""
    *_, A = accumulate(_level_matrices(coefficients, cores), torch.bmm)
    return A


def expert_gradients(
    dA: Tensor, coefficients: Sequence[Tensor], cores: Sequence[Tensor], needs_a: bool, needs_core: bool
) -> tuple[list[Tensor | None], list[Tensor | None]]:
    """[da_e] and [dU_e] of ``A = A_1 ⋯ A_E`` from dA (T, P, M): each level's between the products on its two sides."""
    matrices = _level_matrices(coefficients, cores) if len(cores) > 1 else []
    before = [None, *accumulate(matrices[:-1], torch.bmm)]
    after = [None, *accumulate(reversed(matrices[1:]), lambda right, left: torch.bmm(left, right))][::-1]
    das: list[Tensor | None] = []
    d_cores: list[Tensor | None] = []
    for a, core, left, right in zip(coefficients, cores, before, after, strict=True):
        dA_e = dA if left is None else torch.bmm(left.mT, dA)
        dA_e = dA_e if right is None else torch.bmm(dA_e, right.mT)
        da, d_core = expert_mode_gradients(dA_e.flatten(1), a, core.flatten(1), needs_a, needs_core)
        das.append(da)
        d_cores.append(None if d_core is None else d_core.view(core.shape))
    return das, d_cores

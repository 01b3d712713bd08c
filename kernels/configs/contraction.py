"""Tiles of CP's and the ring's kernels, and which products are not theirs but the vendor's GEMM's."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Literal, NamedTuple

import torch

from mumoe_fast.kernels.configs._base import FEW_TOKENS, Config, architecture, by_architecture, contraction

# --- CP ---------------------------------------------------------------------------------------------------------------
# BLOCK_K runs over whatever is contracted: I, N_e or O. GROUP_T blocks of tokens share their rows of z in L2.

# Few tokens take as long as their weights, of which a multiprocessor streams some 50 KB/µs. One token is multiplied
# without tensor cores, so tiles can be narrow: 8 ranks spread a rank of 352 over 44 multiprocessors, where 128 used 3,
# and all of 1,024 features are on their way at once. Up to 16 tokens, the least that tensor cores take, 16 ranks are 22
# programs, and six stages have 640 of 768 features on their way.
ONE = by_architecture(
    contraction(1, 8, 1024, 4, 1), gfx942=contraction(1, 8, 1024, 4, 1), interpreter=contraction(1, 8, 32, 1, 1)
)
ONE_FLOAT32 = by_architecture(
    contraction(1, 8, 512, 4, 1), gfx942=contraction(1, 8, 512, 4, 1), interpreter=contraction(1, 8, 32, 1, 1)
)
FEW = by_architecture(
    contraction(16, 16, 128, 4, 6), gfx942=contraction(16, 16, 256, 4, 2), interpreter=contraction(16, 16, 32, 1, 1)
)
FEW_FLOAT32 = by_architecture(
    contraction(16, 16, 32, 2, 6), gfx942=contraction(16, 16, 64, 4, 2), interpreter=contraction(16, 16, 32, 1, 1)
)


def _few(dtype: torch.dtype, T: int) -> Mapping[str, Config] | None:
    """The table for T tokens, if they are few."""
    if T > FEW_TOKENS:
        return None
    if dtype == torch.float32:
        return ONE_FLOAT32 if T == 1 else FEW_FLOAT32
    return ONE if T == 1 else FEW


# Some tokens: at 1,024 and a rank of 552, tiles of 128 × 128 are 40 blocks for 132 multiprocessors, of 64 × 64 144.
SOME_TOKENS = 1024
# On sm_100 four warps spill with several levels.
CP_SOME = by_architecture(
    contraction(64, 64, 64, 4, 4), sm_100=contraction(64, 64, 64, 8, 4), gfx942=contraction(64, 64, 64, 4, 2)
)
# Small tiles, for float32, whose exact dots keep their operands in registers for want of tensor cores, and for sizes
# that allow no 16-byte loads: every narrow load has a pointer and a mask of its own.
CP_SMALL = by_architecture(contraction(64, 64, 32, 8, 3), gfx942=contraction(64, 64, 32, 4, 2))
# Two accumulators, and an activation on the way in: on sm_80 and gfx942 a BLOCK_K of 64 spills.
CP_FORWARD = by_architecture(
    contraction(128, 128, 64, 8, 3), sm_80=contraction(128, 128, 32, 8, 4), gfx942=contraction(128, 128, 32, 8, 2)
)
# B is read, and only N_e contracted: a few steps between waiting for loads and for stores, which other blocks fill.
CP_FORWARD_READ = by_architecture(contraction(64, 128, 64, 4, 3), gfx942=contraction(64, 64, 64, 4, 2))
# One level needs an accumulator for dh and, of few experts, one for A, with which sm_100 spills. More levels need
# dh ⊙ B, the product so far and the next level's: half the tile.
CP_BACKWARD_BOTH = by_architecture(
    contraction(128, 128, 64, 8, 3), sm_100=contraction(128, 64, 64, 8, 3), gfx942=contraction(128, 128, 64, 8, 2)
)
CP_BACKWARD = by_architecture(contraction(128, 128, 64, 8, 3), gfx942=contraction(128, 128, 64, 8, 2))
CP_BACKWARD_LEVELS = by_architecture(contraction(128, 64, 64, 8, 3), gfx942=contraction(128, 64, 64, 8, 2))
CP_BACKWARD_LEVELS_SMALL = by_architecture(contraction(64, 32, 32, 8, 3), gfx942=contraction(64, 32, 32, 4, 2))
# Nothing is contracted: an elementwise pass over T×R, as many loads in flight as there are blocks.
CP_READ = by_architecture(contraction(32, 64, 16, 4, 1), gfx942=contraction(32, 64, 16, 4, 1))


def _cp_contracting(
    dtype: torch.dtype, T: int, wide: bool, many: Mapping[str, Config], small: Mapping[str, Config]
) -> Mapping[str, Config]:
    """The table for T tokens: `many` where they are and loads are wide, `small` for exact dots and narrow loads."""
    few = _few(dtype, T)
    if few is not None:
        return few
    if dtype == torch.float32 or not wide:
        return small
    return CP_SOME if T <= SOME_TOKENS else many


def cp_forward_config(
    device: torch.device, dtype: torch.dtype, T: int, *, wide: bool, reads_A: bool = False, reads_B: bool = False
) -> Config:
    """For the kernel that computes h, from what it contracts or reads; `wide` is whether the sizes allow wide loads."""
    if reads_A and reads_B:
        return CP_READ[architecture(device)]
    many = CP_FORWARD_READ if reads_B else CP_FORWARD
    return _cp_contracting(dtype, T, wide, many, CP_SMALL)[architecture(device)]


def cp_backward_config(
    device: torch.device,
    dtype: torch.dtype,
    T: int,
    *,
    levels: int,
    wide: bool,
    reads_A: bool = False,
    reads_dh: bool = False,
) -> Config:
    """For the kernel that computes dB and every level's dA; `levels` is how many dA take, none if there is one dA."""
    if levels:
        return _cp_contracting(dtype, T, wide, CP_BACKWARD_LEVELS, CP_BACKWARD_LEVELS_SMALL)[architecture(device)]
    if reads_A and reads_dh:
        return CP_READ[architecture(device)]
    many = CP_FORWARD_READ if reads_dh else CP_BACKWARD if reads_A else CP_BACKWARD_BOTH
    return _cp_contracting(dtype, T, wide, many, CP_SMALL)[architecture(device)]


def activation_backward_config(device: torch.device) -> Config:
    """For the elementwise pass over T×I."""
    if architecture(device) == "interpreter":
        return Config({"BLOCK_T": 16, "BLOCK_I": 32}, 1, 1)
    return Config({"BLOCK_T": 4, "BLOCK_I": 512}, 4, 1)


# --- Tensor ring ------------------------------------------------------------------------------------------------------
# BLOCK_P rows of every token's small matrix (4 is the paper's rank) times BLOCK_R columns stay in registers: one such
# tile going forward, two (B and dB) going back.

RING_FORWARD_FLOAT32 = by_architecture(contraction(32, 32, 16, 4, 3), gfx942=contraction(32, 32, 32, 4, 2))
RING_FORWARD = by_architecture(contraction(64, 32, 64, 8, 3), gfx942=contraction(64, 32, 64, 4, 2))
# Ranks that allow no wide loads need a pointer and a mask for every element: fewer tokens, so that a
# multiprocessor has two or three blocks of half the warps, where it had one.
RING_FORWARD_NARROW = by_architecture(contraction(32, 32, 64, 4, 3), gfx942=contraction(64, 32, 64, 4, 2))
# B is read: as wide as registers allow, since every block of ranks contracts A of its own.
RING_FORWARD_READ = by_architecture(contraction(32, 64, 64, 4, 3), gfx942=contraction(32, 64, 128, 4, 2))
RING_BACKWARD = by_architecture(contraction(64, 32, 64, 8, 3), gfx942=contraction(64, 32, 64, 4, 2))
RING_BACKWARD_NARROW = by_architecture(contraction(32, 16, 64, 4, 3), gfx942=contraction(64, 16, 32, 8, 2))
RING_BACKWARD_FLOAT32 = by_architecture(contraction(16, 16, 32, 4, 3), gfx942=contraction(32, 16, 32, 4, 2))
# dh is read, and dA is a sum over ranks of which every block of them writes a part of its own.
RING_BACKWARD_READ = by_architecture(contraction(32, 32, 16, 4, 2), gfx942=contraction(32, 32, 16, 4, 2))
RING_BACKWARD_READ_SMALL = by_architecture(contraction(8, 32, 16, 4, 2), gfx942=contraction(8, 32, 16, 4, 2))


def _with_blocks(config: Config, **blocks: int) -> Config:
    return replace(config, blocks={**config.blocks, **blocks})


def _rows_at_once(rows: int) -> int:
    return 1 if rows == 1 else 2 if rows == 2 else 4


def tr_forward_config(
    device: torch.device, dtype: torch.dtype, T: int, *, rows: tuple[int, int], wide: bool, reads_B: bool = False
) -> Config:
    """For the kernel that computes h, for an A and a B of so many rows, from a B that it contracts or reads.

    `wide` is whether R allows wide loads.
    A program walks over B's rows, but for few tokens: there, if they are at most 4, its tile's columns are fewer ranks
    of all rows, so that a row's loads do not wait for the row before.
    """
    P, M = rows
    few, at_once = _few(dtype, T), 1
    half = RING_FORWARD if wide else RING_FORWARD_NARROW
    table: Mapping[str, Config] = RING_FORWARD_FLOAT32 if dtype == torch.float32 else half
    if reads_B:
        table = RING_FORWARD_READ
    elif few is not None:
        table, at_once = few, _rows_at_once(M) if M <= 4 else 1
    config = table[architecture(device)]
    blocks = {"BLOCK_P": _rows_at_once(P), "BLOCK_M": at_once, "BLOCK_R": config.blocks["BLOCK_R"] // at_once}
    return _with_blocks(config, **blocks)


def tr_backward_config(
    device: torch.device, dtype: torch.dtype, T: int, *, rows: int, wide: bool, reads_dh: bool = False
) -> Config:
    """For the kernel that computes dB and dA, for a B of so many rows; `wide` is whether R allows wide loads."""
    few, wide = _few(dtype, T), wide and dtype != torch.float32
    narrow = RING_BACKWARD_FLOAT32 if dtype == torch.float32 else RING_BACKWARD_NARROW
    table: Mapping[str, Config] = RING_BACKWARD if wide else narrow
    if reads_dh:
        table = RING_BACKWARD_READ if wide else RING_BACKWARD_READ_SMALL
    elif few is not None and few is not FEW_FLOAT32:  # which has no registers for B and dB
        table = few
    return _with_blocks(table[architecture(device)], BLOCK_P=_rows_at_once(rows))


# --- Who contracts ----------------------------------------------------------------------------------------------------
# The vendor's GEMM makes a product of many tokens, which CP's or the ring's kernel then reads, where the GEMM's speed
# is worth the bytes. Per token a product of R columns costs 2 R s bytes for its way to memory and back, and saves
# (1/e − 1) of 2 K R operations, e being the kernel's speed over the GEMM's: with s = 2, 4.3 TB/s and 780 TFLOP/s (an
# H200's) that breaks even at K = 850 for e = 0.7, CP's tile with its two accumulators, and at 2,000 for 0.85; later
# where operations are dearer beside bytes (sm_80, gfx942). The ring's tile of 64 × 32 asks L2 for a byte every 21
# operations, which is e = 0.15: K = 64. Exact float32 dots have no tensor cores in Triton.
# Through an activation the vendor moves 2 K s bytes more, but the kernel activates again in each of R / 128 blocks of
# ranks: 38 instructions an element (GELU on sm_90, the loop's own few included), of which a multiprocessor issues 128 a
# cycle and an H200 2.9e13 a second. So a block takes 1.3 ps an element, as long as the GEMM with 500 ranks; a pass over
# all of act(z) takes 1.4 ps, longer than its bytes: a gain from two blocks on. MxD's decoder contracts likewise, but
# its product goes to memory either way.
# Few tokens are one launch's latency whatever K is, and another launch is 1.5 to 5 µs. But a tile of tensor cores
# activates 16 rows however few are tokens, a warp all of its K: 20 µs at K = 3,072, where one token's tile takes 1.


class From(NamedTuple):
    """The fewest tokens, and the shortest contraction, that the vendor's GEMM makes."""

    tokens: int
    contracted: int


class Crossover(NamedTuple):
    """From where on the vendor contracts, plainly and through an activation."""

    plain: From
    activated: From


CROSSOVER_INTERPRETER = Crossover(From(17, 32), From(17, 24))
CP_VENDOR = {
    "interpreter": CROSSOVER_INTERPRETER,
    "sm_80": Crossover(From(128, 1536), From(2, 512)),
    "sm_90": Crossover(From(128, 1024), From(2, 512)),
    "sm_100": Crossover(From(128, 1024), From(2, 512)),
    "gfx942": Crossover(From(128, 1536), From(2, 512)),
}
RING_VENDOR = {
    "interpreter": CROSSOVER_INTERPRETER,
    **dict.fromkeys(("sm_80", "sm_90", "sm_100", "gfx942"), Crossover(From(32, 128), From(2, 128))),
}
VENDOR_FLOAT32 = {
    "interpreter": CROSSOVER_INTERPRETER,
    **dict.fromkeys(("sm_80", "sm_90", "sm_100", "gfx942"), Crossover(From(17, 32), From(2, 128))),
}


def vendor_contracts(
    factorization: Literal["cp", "tr"], device: torch.device, dtype: torch.dtype, T: int, K: int, activation: str
) -> bool:
    """Whether the vendor's GEMM makes ``act(x) w`` for x (T, K), to be read by the kernel of a factorisation."""
    half = CP_VENDOR if factorization == "cp" else RING_VENDOR
    crossover = (VENDOR_FLOAT32 if dtype == torch.float32 else half)[architecture(device)]
    tokens, contracted = crossover.plain if activation == "none" else crossover.activated
    return tokens <= T and contracted <= K

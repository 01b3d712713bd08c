"""One fixed default configuration per kernel and architecture; nothing is tuned at run time unless it is asked for.

The blocks are named by dimension (BLOCK_T, BLOCK_N, BLOCK_R, …). `python -m mumoe_fast.bench static` compiles every
entry for every architecture and shows its registers, shared memory and occupancy.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field, replace
from functools import cache
from typing import Literal, NamedTuple

import torch

_GPUS = ("sm_80", "sm_90", "sm_100", "gfx942")
FEW_TOKENS = 16  # tokens of one small tile: where launches and the latency of memory are the cost, not throughput


@dataclass(frozen=True)
class Config:
    """Block sizes by their kernel argument, and the launch options."""

    blocks: Mapping[str, int] = field(default_factory=dict)
    num_warps: int = 4
    num_stages: int = 3


_target: ContextVar[str | None] = ContextVar("mumoe_target_architecture", default=None)


@contextmanager
def target_architecture(name: str) -> Iterator[None]:
    """Choose configurations for this architecture, whatever device the tensors are on."""
    token = _target.set(name)
    try:
        yield
    finally:
        _target.reset(token)


def architecture(device: torch.device) -> str:
    """The table's name for a device: sm_80, sm_90, sm_100, gfx942, or "interpreter" for CPU tensors."""
    return _target.get() or _device_architecture(device)


@cache
def _device_architecture(device: torch.device) -> str:
    if device.type != "cuda":
        return "interpreter"
    if torch.version.hip is not None:
        return "gfx942"
    major = torch.cuda.get_device_properties(device).major
    return f"sm_{10 * min(max(major, 8), 10)}"


# --- CP ---------------------------------------------------------------------------------------------------------------
# BLOCK_K runs over whatever is contracted: I, N_e or O. GROUP_T blocks of tokens share their rows of z in L2.


def _contraction(block_t: int, block_r: int, block_k: int, num_warps: int, num_stages: int, group_t: int = 8) -> Config:
    blocks = {"BLOCK_T": block_t, "BLOCK_R": block_r, "BLOCK_K": block_k, "GROUP_T": group_t}
    return Config(blocks, num_warps, num_stages)


_CP_INTERPRETER = _contraction(16, 16, 16, 1, 1, group_t=2)


def _by_architecture(nvidia: Config, gfx942: Config, **others: Config) -> dict[str, Config]:
    """A table: `nvidia` where `others` names none, and small tiles for the interpreter."""
    known = dict.fromkeys(("sm_80", "sm_90", "sm_100"), nvidia)
    return {"interpreter": _CP_INTERPRETER, **known, "gfx942": gfx942, **others}


# Few tokens take as long as their weights, of which a multiprocessor streams some 50 KB/µs. One token is multiplied
# without tensor cores, so tiles can be narrow: 8 ranks spread a rank of 352 over 44 multiprocessors, where 128 used 3,
# and all of 1,024 features are on their way at once. Up to 16 tokens, the least that tensor cores take, 16 ranks are 22
# programs, and six stages have 640 of 768 features on their way.
_ONE = _by_architecture(
    _contraction(1, 8, 1024, 4, 1), gfx942=_contraction(1, 8, 1024, 4, 1), interpreter=_contraction(1, 8, 32, 1, 1)
)
_ONE_FLOAT32 = _by_architecture(
    _contraction(1, 8, 512, 4, 1), gfx942=_contraction(1, 8, 512, 4, 1), interpreter=_contraction(1, 8, 32, 1, 1)
)
_FEW_TOKENS = 16
_FEW = _by_architecture(
    _contraction(16, 16, 128, 4, 6), gfx942=_contraction(16, 16, 256, 4, 2), interpreter=_contraction(16, 16, 32, 1, 1)
)
_FEW_FLOAT32 = _by_architecture(
    _contraction(16, 16, 32, 2, 6), gfx942=_contraction(16, 16, 64, 4, 2), interpreter=_contraction(16, 16, 32, 1, 1)
)


def _few(dtype: torch.dtype, T: int) -> Mapping[str, Config] | None:
    """The table for T tokens, if they are few."""
    if T > _FEW_TOKENS:
        return None
    if dtype == torch.float32:
        return _ONE_FLOAT32 if T == 1 else _FEW_FLOAT32
    return _ONE if T == 1 else _FEW


# Some tokens: at 1,024 and a rank of 552, tiles of 128 × 128 are 40 blocks for 132 multiprocessors, of 64 × 64 144.
_SOME_TOKENS = 1024
_CP_SOME = _by_architecture(_contraction(64, 64, 64, 4, 4), gfx942=_contraction(64, 64, 64, 4, 2))
# Small tiles, for float32, whose exact dots keep their operands in registers for want of tensor cores, and for sizes
# that allow no 16-byte loads: every narrow load has a pointer and a mask of its own.
_CP_SMALL = _by_architecture(_contraction(64, 64, 32, 8, 3), gfx942=_contraction(64, 64, 32, 4, 2))
# Two accumulators, and an activation on the way in: on sm_80 and gfx942 a BLOCK_K of 64 spills.
_CP_FORWARD = _by_architecture(
    _contraction(128, 128, 64, 8, 3), sm_80=_contraction(128, 128, 32, 8, 4), gfx942=_contraction(128, 128, 32, 8, 2)
)
# B is read, and only N_e contracted: a few steps between waiting for loads and for stores, which other blocks fill.
_CP_FORWARD_READ = _by_architecture(_contraction(64, 128, 64, 4, 3), gfx942=_contraction(64, 64, 64, 4, 2))
# One level needs one accumulator. More need dh ⊙ B, the product so far and the next level's: half the tile.
_CP_BACKWARD = _by_architecture(_contraction(128, 128, 64, 8, 3), gfx942=_contraction(128, 128, 64, 8, 2))
_CP_BACKWARD_LEVELS = _by_architecture(_contraction(128, 64, 64, 8, 3), gfx942=_contraction(128, 64, 64, 8, 2))
_CP_BACKWARD_LEVELS_SMALL = _by_architecture(_contraction(64, 32, 32, 8, 3), gfx942=_contraction(64, 32, 32, 4, 2))
# Nothing is contracted: an elementwise pass over T×R, as many loads in flight as there are blocks.
_CP_READ = _by_architecture(_contraction(32, 64, 16, 4, 1), gfx942=_contraction(32, 64, 16, 4, 1))


def _cp_contracting(
    dtype: torch.dtype, T: int, wide: bool, many: Mapping[str, Config], small: Mapping[str, Config]
) -> Mapping[str, Config]:
    """The table for T tokens: `many` where they are and loads are wide, `small` for exact dots and narrow loads."""
    few = _few(dtype, T)
    if few is not None:
        return few
    if dtype == torch.float32 or not wide:
        return small
    return _CP_SOME if T <= _SOME_TOKENS else many


def cp_forward_config(
    device: torch.device, dtype: torch.dtype, T: int, *, wide: bool, reads_A: bool = False, reads_B: bool = False
) -> Config:
    """For the kernel that computes h, from what it contracts or reads; `wide` is whether the sizes allow wide loads."""
    if reads_A and reads_B:
        return _CP_READ[architecture(device)]
    many = _CP_FORWARD_READ if reads_B else _CP_FORWARD
    return _cp_contracting(dtype, T, wide, many, _CP_SMALL)[architecture(device)]


def cp_backward_config(
    device: torch.device, dtype: torch.dtype, T: int, *, levels: int, wide: bool, reads_dh: bool = False
) -> Config:
    """For the kernel that computes dB and every level's dA; `levels` is how many dA take, none if there is one dA."""
    if reads_dh and levels == 0:
        return _CP_READ[architecture(device)]
    many, small = (_CP_BACKWARD_LEVELS, _CP_BACKWARD_LEVELS_SMALL) if levels else (_CP_BACKWARD, _CP_SMALL)
    return _cp_contracting(dtype, T, wide, many, small)[architecture(device)]


def activation_backward_config(device: torch.device) -> Config:
    """For the elementwise pass over T×I."""
    if architecture(device) == "interpreter":
        return Config({"BLOCK_T": 16, "BLOCK_I": 32}, 1, 1)
    return Config({"BLOCK_T": 4, "BLOCK_I": 512}, 4, 1)


# --- Tensor ring ------------------------------------------------------------------------------------------------------
# BLOCK_P rows of every token's small matrix (4 is the paper's rank) times BLOCK_R columns stay in registers: one such
# tile going forward, two (B and dB) going back.

_RING_FORWARD_FLOAT32 = _by_architecture(_contraction(32, 32, 16, 4, 3), gfx942=_contraction(32, 32, 32, 4, 2))
_RING_FORWARD = _by_architecture(_contraction(64, 32, 64, 8, 3), gfx942=_contraction(64, 32, 64, 4, 2))
# B is read: as wide as registers allow, since every block of ranks contracts A of its own.
_RING_FORWARD_READ = _by_architecture(_contraction(32, 64, 64, 4, 3), gfx942=_contraction(32, 64, 128, 4, 2))
_RING_BACKWARD = _by_architecture(_contraction(64, 32, 64, 8, 3), gfx942=_contraction(64, 32, 64, 4, 2))
# Ranks that allow no wide loads need a pointer and a mask for every element: a narrower tile.
_RING_BACKWARD_NARROW = _by_architecture(_contraction(64, 16, 64, 8, 3), gfx942=_contraction(64, 16, 32, 8, 2))
_RING_BACKWARD_FLOAT32 = _by_architecture(_contraction(16, 16, 32, 4, 3), gfx942=_contraction(32, 16, 32, 4, 2))
# dh is read, and dA is a sum over ranks of which every block of them writes a part of its own.
_RING_BACKWARD_READ = _by_architecture(_contraction(32, 32, 16, 4, 2), gfx942=_contraction(32, 32, 16, 4, 2))
_RING_BACKWARD_READ_SMALL = _by_architecture(_contraction(8, 32, 16, 4, 2), gfx942=_contraction(8, 32, 16, 4, 2))


def _with_blocks(config: Config, **blocks: int) -> Config:
    return replace(config, blocks={**config.blocks, **blocks})


def _rows_at_once(rows: int) -> int:
    return 1 if rows == 1 else 2 if rows == 2 else 4


def tr_forward_config(
    device: torch.device, dtype: torch.dtype, T: int, *, rows: tuple[int, int], reads_B: bool = False
) -> Config:
    """For the kernel that computes h, for an A and a B of so many rows, from a B that it contracts or reads.

    A program walks over B's rows, but for few tokens: there, if they are at most 4, its tile's columns are fewer ranks
    of all rows, so that a row's loads do not wait for the row before.
    """
    P, M = rows
    few, at_once = _few(dtype, T), 1
    table: Mapping[str, Config] = _RING_FORWARD_FLOAT32 if dtype == torch.float32 else _RING_FORWARD
    if reads_B:
        table = _RING_FORWARD_READ
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
    narrow = _RING_BACKWARD_FLOAT32 if dtype == torch.float32 else _RING_BACKWARD_NARROW
    table: Mapping[str, Config] = _RING_BACKWARD if wide else narrow
    if reads_dh:
        table = _RING_BACKWARD_READ if wide else _RING_BACKWARD_READ_SMALL
    elif few is not None and few is not _FEW_FLOAT32:  # which has no registers for B and dB
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
# ranks, with 2 special functions an element of which 3.6e12 a second are done: a gain from K = 500 on for two blocks.
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


_CROSSOVER_INTERPRETER = Crossover(From(17, 32), From(17, 24))
_CP_VENDOR = {
    "interpreter": _CROSSOVER_INTERPRETER,
    "sm_80": Crossover(From(128, 1536), From(2, 512)),
    "sm_90": Crossover(From(128, 1024), From(2, 512)),
    "sm_100": Crossover(From(128, 1024), From(2, 512)),
    "gfx942": Crossover(From(128, 1536), From(2, 512)),
}
_RING_VENDOR = {
    "interpreter": _CROSSOVER_INTERPRETER,
    **dict.fromkeys(("sm_80", "sm_90", "sm_100", "gfx942"), Crossover(From(32, 128), From(2, 128))),
}
_VENDOR_FLOAT32 = {
    "interpreter": _CROSSOVER_INTERPRETER,
    **dict.fromkeys(("sm_80", "sm_90", "sm_100", "gfx942"), Crossover(From(17, 32), From(2, 128))),
}


def vendor_contracts(
    factorization: Literal["cp", "tr"], device: torch.device, dtype: torch.dtype, T: int, K: int, activation: str
) -> bool:
    """Whether the vendor's GEMM makes ``act(x) w`` for x (T, K), to be read by the kernel of a factorisation."""
    half = _CP_VENDOR if factorization == "cp" else _RING_VENDOR
    crossover = (_VENDOR_FLOAT32 if dtype == torch.float32 else half)[architecture(device)]
    tokens, contracted = crossover.plain if activation == "none" else crossover.activated
    return tokens <= T and contracted <= K


# --- Bilinear contraction: Tucker's core and the full layer -----------------------------------------------------------
# A GEMM tile and the sum that it is added to stay in registers, and going back the tile that it is multiplied with.

_BILINEAR_FLOAT32 = {
    "interpreter": _CP_INTERPRETER,
    "sm_80": _contraction(32, 32, 16, 4, 3),
    "sm_90": _contraction(64, 32, 16, 8, 3),
    "sm_100": _contraction(32, 32, 32, 8, 3),
    "gfx942": _contraction(64, 32, 32, 4, 2),
}
_BILINEAR_NARROW = {
    "interpreter": _CP_INTERPRETER,
    "sm_80": _contraction(64, 64, 32, 8, 3),
    "sm_90": _contraction(64, 64, 32, 8, 3),
    "sm_100": _contraction(64, 64, 32, 8, 3),
    "gfx942": _contraction(64, 64, 32, 8, 2),
}
_BILINEAR = {
    "interpreter": _CP_INTERPRETER,
    "sm_80": _contraction(128, 64, 64, 8, 3),
    "sm_90": _contraction(128, 64, 64, 8, 3),
    "sm_100": _contraction(64, 64, 64, 4, 3),
    "gfx942": _contraction(128, 64, 64, 8, 2),
}


# The way back of few tokens.
_BILINEAR_FEW_TOKENS = {
    "interpreter": _CP_INTERPRETER,
    **dict.fromkeys(_GPUS, _contraction(16, 32, 64, 4, 4)),
    "gfx942": _contraction(16, 32, 64, 4, 2),
}
_BILINEAR_FEW_TOKENS_FLOAT32 = {
    "interpreter": _CP_INTERPRETER,
    "sm_80": _contraction(16, 32, 32, 4, 4),
    "sm_90": _contraction(16, 32, 64, 4, 4),
    "sm_100": _contraction(16, 32, 64, 4, 4),
    "gfx942": _contraction(16, 32, 32, 4, 2),
}


def bilinear_config(device: torch.device, dtype: torch.dtype, wide: bool, T: int) -> Config:
    """For a sum of scaled products; `wide` is whether the sizes allow wide loads."""
    if T <= FEW_TOKENS:
        half, single = _BILINEAR_FEW_TOKENS, _BILINEAR_FEW_TOKENS_FLOAT32
    else:
        half, single = _BILINEAR if wide else _BILINEAR_NARROW, _BILINEAR_FLOAT32
    return (single if dtype == torch.float32 else half)[architecture(device)]


# Few tokens: a narrow strip of C for each of many programs, BLOCK_K of it at a time and several such on the way.
# BLOCK_N runs over the experts of a level.


def _strip(block_t: int, block_k: int, num_warps: int, num_stages: int) -> Config:
    blocks = {"BLOCK_T": block_t, "BLOCK_R": 16, "BLOCK_K": block_k, "BLOCK_N": 32}
    return Config(blocks, num_warps, num_stages)


_STRIP = {
    "interpreter": _strip(16, 32, 1, 1),
    **dict.fromkeys(_GPUS, _strip(16, 256, 2, 6)),
    "gfx942": _strip(16, 256, 2, 2),
}
_STRIP_FLOAT32 = {
    "interpreter": _strip(4, 32, 1, 1),
    **dict.fromkeys(_GPUS, _strip(4, 128, 2, 6)),
    "gfx942": _strip(4, 128, 2, 2),
}


def few_tokens_config(device: torch.device, dtype: torch.dtype) -> Config:
    """For a sum of scaled products with few tokens."""
    return (_STRIP_FLOAT32 if dtype == torch.float32 else _STRIP)[architecture(device)]


def _core_gradient(block_t: int, block_k: int, block_r: int, num_warps: int, num_stages: int) -> Config:
    return Config({"BLOCK_T": block_t, "BLOCK_K": block_k, "BLOCK_R": block_r}, num_warps, num_stages)


def core_gradient_config(device: torch.device, dtype: torch.dtype, wide: bool) -> Config:
    """For the sum over tokens, one tile of one matrix of the core; `wide` as above."""
    if architecture(device) == "interpreter":
        return _core_gradient(16, 16, 16, 1, 1)
    stages = 2 if architecture(device) == "gfx942" else 3
    if wide and dtype != torch.float32:
        return _core_gradient(64, 128, 64, 8, stages)
    return _core_gradient(32, 64, 64, 8, stages)


# --- Gate: rows of entmax, the fused gate, batch norm's columns -------------------------------------------------------
# Size classes by the row length N that a tile holds, ascending: the first that holds a row is used. A row longer than
# the last class of `_ROWS` is read in chunks of `_MULTI_PASS`, a gate wider than the last of its classes is not fused.


def _rows(block_t: int, block_n: int, num_warps: int, chunks: int, guesses: int) -> Config:
    """CHUNKS parts of a row, of which a thread has an equal share each; GUESSES steps on their maxima come first."""
    blocks = {"BLOCK_T": block_t, "BLOCK_N": block_n, "CHUNKS": chunks, "GUESSES": guesses}
    return Config(blocks, num_warps, num_stages=1)


def _long_rows(block_n: int, num_warps: int) -> Config:
    return Config({"BLOCK_T": 1, "BLOCK_N": block_n, "GUESSES": 5}, num_warps, num_stages=1)


def _gate(block_t: int, block_n: int, block_i: int, num_warps: int, num_stages: int) -> Config:
    return Config({"BLOCK_T": block_t, "BLOCK_N": block_n, "BLOCK_I": block_i}, num_warps, num_stages)


# While a copy moves an entry of bfloat16, a multiprocessor of an H200 issues 27 instructions for it (4 a cycle for 32
# lanes, 4.3 TB/s over 132 of them): a row's time is its instructions. So few threads have a row, 32 entries each (64
# from 2,048 on): less to exchange, and what happens once a row costs an entry less. A guess is one such exchange, and
# saves steps over all entries where rows are long. One warp needs no barrier and waits for no other. On sm_90 in
# bfloat16, forward, with two steps over all entries (normal rows take one to three):
#
#     N                              64    256  1,024  2,048  8,192  16,384
#     registers                      64     64     64     96     96     128
#     resident warps                 32     32     32     20     20      16    at most 32 blocks
#     KiB in flight                  64     64     64     80     80      64    26 cover the memory's latency
#     instructions an entry          21     26     25     19     25      27
#
# Rows of 8,192 take 35 an entry with eight warps, and 21 with two, of which only 12 are resident.
_NVIDIA_ROWS = (
    _rows(64, 16, 1, 2, 0),
    _rows(32, 32, 1, 2, 0),
    _rows(16, 64, 1, 4, 0),
    _rows(8, 128, 1, 4, 0),
    _rows(4, 256, 1, 4, 2),
    _rows(2, 512, 1, 4, 3),
    _rows(1, 1024, 1, 4, 3),
    _rows(1, 2048, 1, 8, 3),
    _rows(1, 4096, 2, 8, 4),
    _rows(1, 8192, 4, 8, 4),
    _rows(1, 16384, 8, 8, 5),
)
# The same for warps of 64: 32 entries for each thread, and 16 bytes of every chunk.
_AMD_ROWS = (
    _rows(128, 16, 1, 2, 0),
    _rows(64, 32, 1, 2, 0),
    _rows(32, 64, 1, 4, 0),
    _rows(16, 128, 1, 4, 0),
    _rows(8, 256, 1, 4, 2),
    _rows(4, 512, 1, 4, 3),
    _rows(2, 1024, 1, 4, 3),
    _rows(1, 2048, 1, 4, 3),
    _rows(1, 4096, 2, 4, 4),
    _rows(1, 8192, 4, 4, 4),
    _rows(1, 16384, 8, 4, 5),
)
_ROWS = {
    "interpreter": (_rows(4, 16, 1, 2, 0), _rows(2, 64, 1, 4, 2)),
    **dict.fromkeys(_GPUS, _NVIDIA_ROWS),
    "gfx942": _AMD_ROWS,
}
_MULTI_PASS = {
    "interpreter": Config({"BLOCK_T": 2, "BLOCK_N": 32, "GUESSES": 2}, 1, 1),
    **dict.fromkeys(_GPUS, _long_rows(4096, 8)),  # 16 warps spill with batch norm's columns
}

_SMALL_GATE = (_gate(16, 16, 16, 1, 1), _gate(16, 32, 16, 1, 1))
_NARROW_GATE = (_gate(64, 16, 64, 4, 3), _gate(64, 32, 64, 4, 3), _gate(64, 64, 64, 4, 3), _gate(64, 128, 64, 4, 3))
_WIDE_GATE = (_gate(16, 512, 32, 8, 3), _gate(16, 1024, 32, 8, 3))
_GATE = {
    "interpreter": _SMALL_GATE,
    "sm_80": (*_NARROW_GATE, _gate(32, 256, 64, 8, 3), *_WIDE_GATE),
    "sm_90": (*_NARROW_GATE, _gate(64, 256, 64, 8, 3), *_WIDE_GATE),
    "sm_100": (*_NARROW_GATE, _gate(64, 256, 64, 8, 3), *_WIDE_GATE),
    "gfx942": (*_NARROW_GATE, _gate(64, 256, 32, 8, 2), _gate(32, 512, 16, 8, 2)),  # 64 KiB, master weights too
}
# Exact float32 dots keep their operands in registers: the next class spills, and the vendor has better GEMMs.
_GPU_GATE_FLOAT32 = (
    _gate(64, 16, 32, 4, 3),
    _gate(64, 32, 32, 4, 3),
    _gate(64, 64, 32, 4, 3),
    _gate(32, 128, 32, 4, 3),
    _gate(16, 256, 32, 8, 3),
)
_GATE_FLOAT32 = {
    "interpreter": _SMALL_GATE,
    **dict.fromkeys(_GPUS, _GPU_GATE_FLOAT32),
    "gfx942": (*_GPU_GATE_FLOAT32[:-1], _gate(16, 256, 32, 8, 2)),  # 64 KiB of shared memory
}


# Few tokens: one program streams all of a level's G, 50-60 KB a µs at best, as long as enough of it is on the way. A
# gate wider than 256 is quicker by a GEMM of many programs and the row kernel, although that is a launch more.
_STAGE_BYTES = 2**15


def _few_tokens_gate(block_t: int, weight_bytes: int, num_stages: int) -> tuple[Config, ...]:
    """Classes whose every stage holds _STAGE_BYTES of G."""
    return tuple(
        _gate(block_t, block_n, _STAGE_BYTES // (block_n * weight_bytes), 4, num_stages) for block_n in (64, 128, 256)
    )


_FEW_TOKENS_GATE = {
    "interpreter": (_gate(16, 16, 32, 1, 1), _gate(16, 32, 32, 1, 1)),
    **dict.fromkeys(_GPUS, _few_tokens_gate(16, 2, 5)),
    "gfx942": _few_tokens_gate(16, 2, 2),
}
# Autocast's master weights, and float32 tokens, whose dots have no tensor cores that would want 16 rows at a time.
_FEW_TOKENS_GATE_MASTER = {
    **_FEW_TOKENS_GATE,
    **dict.fromkeys(_GPUS, _few_tokens_gate(16, 4, 5)),
    "gfx942": _few_tokens_gate(16, 4, 2),
}
_FEW_TOKENS_GATE_FLOAT32 = {
    "interpreter": (_gate(4, 16, 32, 1, 1), _gate(4, 32, 32, 1, 1)),
    **dict.fromkeys(_GPUS, _few_tokens_gate(4, 4, 5)),
    "gfx942": _few_tokens_gate(4, 4, 2),
}


def _holding(configs: tuple[Config, ...], N: int) -> Config | None:
    return next((config for config in configs if config.blocks["BLOCK_N"] >= N), None)


def entmax_rows_config(device: torch.device, N: int) -> tuple[Config, bool]:
    """The configuration for rows of N, and whether they fit in registers."""
    config = _holding(_ROWS[architecture(device)], N)
    return config or _MULTI_PASS[architecture(device)], config is not None


def gate_forward_config(
    device: torch.device, dtype: torch.dtype, weight_dtype: torch.dtype, N: int, T: int
) -> Config | None:
    """The configuration of the fused gate, or None where a row of N experts does not fit in registers."""
    config = gate_backward_config(device, dtype, N, T)
    if config is None or weight_dtype == dtype:
        return config
    if T <= FEW_TOKENS:
        return _holding(_FEW_TOKENS_GATE_MASTER[architecture(device)], N)
    return replace(config, num_stages=min(config.num_stages, 2))  # float32 master weights: tiles of twice the bytes


def gate_backward_config(device: torch.device, dtype: torch.dtype, N: int, T: int) -> Config | None:
    """As `gate_forward_config`, for backward, where the weight has z's dtype."""
    if T <= FEW_TOKENS:
        table = _FEW_TOKENS_GATE_FLOAT32 if dtype == torch.float32 else _FEW_TOKENS_GATE
    else:
        table = _GATE_FLOAT32 if dtype == torch.float32 else _GATE
    return _holding(table[architecture(device)], N)


def columns_config(device: torch.device) -> Config:
    """Tiles of what is summed over tokens, and of the elementwise kernel beside it."""
    if architecture(device) == "interpreter":
        return Config({"BLOCK_T": 8, "BLOCK_N": 16}, 1, 1)
    return Config({"BLOCK_T": 32, "BLOCK_N": 64}, 4, 2)


def merge_config(device: torch.device) -> Config:
    """Columns whose partial results one program combines."""
    return Config({"BLOCK_N": 16 if architecture(device) == "interpreter" else 256}, num_warps=1, num_stages=1)


# --- Supports: sums and dot products over the K experts of a token, and over the tokens of an expert ------------------
# One program for each token (or expert) and block of columns, whose tile of gathered rows is all in flight at once.


def _gathered(device: torch.device, block: str) -> Config:
    if architecture(device) == "interpreter":
        return Config({block: 4, "BLOCK_R": 16}, 1, 1)
    return Config({block: 16, "BLOCK_R": 256}, 4, 1)


def gather_config(device: torch.device) -> Config:
    """For a token's sum of rows, where 768 columns are three programs, and for its dot products with rows."""
    return _gathered(device, "BLOCK_K")


def segment_config(device: torch.device) -> Config:
    """For an expert's sum over the pairs of tokens and values that chose it."""
    return _gathered(device, "BLOCK_P")


def product_backward_config(device: torch.device) -> Config:
    """For the elementwise pass that turns dy into the gradients of both factors of y."""
    if architecture(device) == "interpreter":
        return Config({"BLOCK_T": 8, "BLOCK_R": 16}, 1, 1)
    return Config({"BLOCK_T": 4, "BLOCK_R": 512}, 4, 1)

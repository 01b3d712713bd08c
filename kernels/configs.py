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
from typing import Literal

import torch


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


# Few tokens take as long as their weights, of which a multiprocessor streams some 50 KB/µs: tiles of 16 ranks spread a
# rank of 352 over 22 multiprocessors, of 128 over 3. With four stages of 256 all of 768 features are on their way at
# once, in place of one wave of loads for each 64.
FEW_TOKENS = 16
_CP_FEW = _by_architecture(
    _contraction(16, 16, 256, 4, 4),
    gfx942=_contraction(16, 16, 256, 4, 2),
    interpreter=_contraction(16, 16, 32, 1, 1),
)
_CP_FEW_FLOAT32 = _by_architecture(
    _contraction(16, 16, 64, 4, 4),
    gfx942=_contraction(16, 16, 64, 4, 2),
    interpreter=_contraction(16, 16, 32, 1, 1),
)
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
    """The table for T tokens: `many` where they are many and loads are wide, `small` for exact dots and narrow loads."""
    if T <= FEW_TOKENS:
        return _CP_FEW_FLOAT32 if dtype == torch.float32 else _CP_FEW
    if dtype == torch.float32 or not wide:
        return small
    return _CP_SOME if T <= _SOME_TOKENS and many is not _CP_BACKWARD_LEVELS else many


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
    """For the kernel that computes dB and every level's dA; `levels` is how many of them that takes, none for one dA."""
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

_RING_FEW = _by_architecture(
    _contraction(16, 16, 128, 4, 3), gfx942=_contraction(16, 16, 128, 4, 2), interpreter=_contraction(16, 16, 32, 1, 1)
)
_RING_FORWARD_FLOAT32 = _by_architecture(_contraction(32, 32, 16, 4, 3), gfx942=_contraction(32, 32, 32, 4, 2))
_RING_FORWARD = _by_architecture(_contraction(64, 32, 64, 8, 3), gfx942=_contraction(64, 32, 64, 4, 2))
# B is read: as wide as registers allow, since every block of ranks contracts A of its own.
_RING_FORWARD_READ = _by_architecture(_contraction(32, 64, 64, 4, 3), gfx942=_contraction(32, 64, 64, 4, 2))
_RING_BACKWARD = _by_architecture(_contraction(64, 32, 64, 8, 3), gfx942=_contraction(64, 32, 64, 4, 2))
# Ranks that allow no wide loads need a pointer and a mask for every element: a narrower tile.
_RING_BACKWARD_NARROW = _by_architecture(_contraction(64, 16, 64, 8, 3), gfx942=_contraction(64, 16, 32, 8, 2))
_RING_BACKWARD_FLOAT32 = _by_architecture(_contraction(32, 16, 32, 8, 3), gfx942=_contraction(32, 16, 32, 4, 2))
# dh is read, and dA is a sum over ranks of which every block of them writes a part of its own.
_RING_BACKWARD_READ = _by_architecture(_contraction(16, 64, 16, 4, 2), gfx942=_contraction(16, 64, 16, 4, 2))


def _with_rows(config: Config, rows: int) -> Config:
    return replace(config, blocks={**config.blocks, "BLOCK_P": 1 if rows == 1 else 2 if rows == 2 else 4})


def tr_forward_config(device: torch.device, dtype: torch.dtype, T: int, *, rows: int, reads_B: bool = False) -> Config:
    """For the kernel that computes h, for an A of so many rows, from a B that it contracts or reads."""
    if reads_B:
        table = _RING_FORWARD_READ
    elif dtype == torch.float32:
        table = _RING_FORWARD_FLOAT32
    else:
        table = _RING_FEW if T <= FEW_TOKENS else _RING_FORWARD
    return _with_rows(table[architecture(device)], rows)


def tr_backward_config(
    device: torch.device, dtype: torch.dtype, T: int, *, rows: int, wide: bool, reads_dh: bool = False
) -> Config:
    """For the kernel that computes dB and dA, for a B of so many rows; `wide` is whether R allows wide loads."""
    if reads_dh:
        table = _RING_BACKWARD_READ
    elif dtype == torch.float32:
        table = _RING_BACKWARD_FLOAT32
    elif T <= FEW_TOKENS:
        table = _RING_FEW
    else:
        table = _RING_BACKWARD if wide else _RING_BACKWARD_NARROW
    return _with_rows(table[architecture(device)], rows)


# --- Who contracts ----------------------------------------------------------------------------------------------------
# The vendor's GEMM makes a product of many tokens, which CP's or the ring's kernel then reads, where the GEMM's speed is
# worth the bytes. Per token a product of R columns costs 2 R s bytes for its way to memory and back, and saves (1/e − 1)
# of 2 K R operations, e being the kernel's speed over the GEMM's: with s = 2, 4.3 TB/s and 780 TFLOP/s (an H200's) that
# breaks even at K = 850 for e = 0.7, CP's tile with its two accumulators, and at 2,000 for 0.85; where operations are
# dearer beside bytes (sm_80, gfx942) later. The ring's tile of 64 × 32 asks L2 for a byte every 21 operations, which is
# e = 0.15: K = 64. Exact float32 dots have no tensor cores in Triton.
# Through an activation the vendor moves 2 K s bytes more, but the kernel activates again in each of R / 128 blocks of
# ranks, with 2 special functions an element of which 3.6e12 a second are done: a gain from K = 500 on for two blocks.
# Few tokens are one launch's latency whatever K is, and another launch is 1.5 to 5 µs.


@dataclass(frozen=True)
class Crossover:
    """The fewest tokens, and the shortest contraction, plain or through an activation, that the vendor's GEMM makes."""

    tokens: int
    contracted: int
    activated: int


_CP_VENDOR = {
    "interpreter": Crossover(tokens=17, contracted=32, activated=24),
    "sm_80": Crossover(tokens=128, contracted=1536, activated=512),
    "sm_90": Crossover(tokens=128, contracted=1024, activated=512),
    "sm_100": Crossover(tokens=128, contracted=1024, activated=512),
    "gfx942": Crossover(tokens=128, contracted=1536, activated=512),
}
_RING_VENDOR = {
    "interpreter": Crossover(tokens=17, contracted=32, activated=24),
    **dict.fromkeys(("sm_80", "sm_90", "sm_100", "gfx942"), Crossover(tokens=64, contracted=128, activated=64)),
}
_VENDOR_FLOAT32 = {
    "interpreter": Crossover(tokens=17, contracted=32, activated=24),
    **dict.fromkeys(("sm_80", "sm_90", "sm_100", "gfx942"), Crossover(tokens=32, contracted=32, activated=32)),
}


def vendor_contracts(
    factorization: Literal["cp", "tr"], device: torch.device, dtype: torch.dtype, T: int, K: int, activation: str
) -> bool:
    """Whether the vendor's GEMM makes ``act(x) w`` for x (T, K), to be read by the kernel of a factorisation."""
    half = _CP_VENDOR if factorization == "cp" else _RING_VENDOR
    crossover = (_VENDOR_FLOAT32 if dtype == torch.float32 else half)[architecture(device)]
    return T >= crossover.tokens and K >= (crossover.contracted if activation == "none" else crossover.activated)


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


def bilinear_config(device: torch.device, dtype: torch.dtype, wide: bool) -> Config:
    """For a sum of scaled products; `wide` is whether the sizes allow wide loads."""
    half = _BILINEAR if wide else _BILINEAR_NARROW
    return (_BILINEAR_FLOAT32 if dtype == torch.float32 else half)[architecture(device)]


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


def _rows(block_t: int, block_n: int, num_warps: int) -> Config:
    return Config({"BLOCK_T": block_t, "BLOCK_N": block_n}, num_warps, num_stages=1)


def _gate(block_t: int, block_n: int, block_i: int, num_warps: int, num_stages: int) -> Config:
    return Config({"BLOCK_T": block_t, "BLOCK_N": block_n, "BLOCK_I": block_i}, num_warps, num_stages)


_GPU_ROWS = (
    _rows(64, 16, 4),
    _rows(32, 32, 4),
    _rows(32, 64, 4),
    _rows(16, 128, 4),
    _rows(8, 256, 4),
    _rows(4, 512, 4),
    _rows(2, 1024, 4),
    _rows(1, 2048, 4),
    _rows(1, 4096, 8),
    _rows(1, 8192, 16),
    _rows(1, 16384, 16),
)
_GPUS = ("sm_80", "sm_90", "sm_100", "gfx942")
_ROWS = {"interpreter": (_rows(4, 16, 1), _rows(2, 64, 1)), **dict.fromkeys(_GPUS, _GPU_ROWS)}
_MULTI_PASS = {"interpreter": _rows(2, 32, 1), **dict.fromkeys(_GPUS, _rows(1, 4096, 16)), "gfx942": _rows(1, 4096, 8)}

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


def _holding(configs: tuple[Config, ...], N: int) -> Config | None:
    return next((config for config in configs if config.blocks["BLOCK_N"] >= N), None)


def entmax_rows_config(device: torch.device, N: int) -> tuple[Config, bool]:
    """The configuration for rows of N, and whether they fit in registers."""
    config = _holding(_ROWS[architecture(device)], N)
    return config or _MULTI_PASS[architecture(device)], config is not None


def gate_forward_config(device: torch.device, dtype: torch.dtype, weight_dtype: torch.dtype, N: int) -> Config | None:
    """The configuration of the fused gate, or None where a row of N experts does not fit in registers."""
    config = gate_backward_config(device, dtype, N)
    if config is not None and weight_dtype != dtype:  # float32 master weights: tiles of twice the bytes, fewer of them
        return replace(config, num_stages=min(config.num_stages, 2))
    return config


def gate_backward_config(device: torch.device, dtype: torch.dtype, N: int) -> Config | None:
    """As `gate_forward_config`, for backward, where the weight has z's dtype."""
    return _holding((_GATE_FLOAT32 if dtype == torch.float32 else _GATE)[architecture(device)], N)


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

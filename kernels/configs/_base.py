"""What a configuration is, and for which architecture one is chosen."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from functools import cache

import torch

GPUS = ("sm_80", "sm_90", "sm_100", "gfx942")
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


def contraction(block_t: int, block_r: int, block_k: int, num_warps: int, num_stages: int, group_t: int = 8) -> Config:
    """A GEMM's tile. BLOCK_K runs over whatever is contracted; GROUP_T blocks of tokens share their rows of z in L2."""
    blocks = {"BLOCK_T": block_t, "BLOCK_R": block_r, "BLOCK_K": block_k, "GROUP_T": group_t}
    return Config(blocks, num_warps, num_stages)


INTERPRETER_TILE = contraction(16, 16, 16, 1, 1, group_t=2)


def by_architecture(nvidia: Config, gfx942: Config, **others: Config) -> dict[str, Config]:
    """A table: `nvidia` where `others` names none, and small tiles for the interpreter."""
    known = dict.fromkeys(("sm_80", "sm_90", "sm_100"), nvidia)
    return {"interpreter": INTERPRETER_TILE, **known, "gfx942": gfx942, **others}


def holding(configs: tuple[Config, ...], N: int) -> Config | None:
    """The first of ascending size classes that holds a row of N."""
    return next((config for config in configs if config.blocks["BLOCK_N"] >= N), None)

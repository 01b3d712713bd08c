"""One fixed default configuration per kernel and architecture; nothing is tuned at run time unless it is asked for.

The blocks are named by dimension (BLOCK_T, BLOCK_N, BLOCK_R, …). `python -m mumoe_fast.bench static` compiles every
entry for every architecture and shows its registers, shared memory and occupancy.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from functools import cache

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

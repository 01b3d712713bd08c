"""Bytes that a kernel moves, counted in the interpreter, against the least that it must.

Every load and store of every program is seen with its addresses; lanes that are masked out do not count. Three numbers
per launch, reads and writes together:

requested    what the programs ask for;
per program  each byte once in every program that touches it: what the tiling needs, since programs share no registers;
distinct     each byte once: the least that must come from and go to memory.

A kernel without a dot streams, so `requested / distinct` is its excess. In a kernel with a dot every operand tile
serves several programs (all but the first find it in L2), so its excess is `requested / per program`: no program may
load a byte twice.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import torch
import triton
from torch import Tensor
from typing_extensions import override

from mumoe_fast.bench.static.cases import cases
from mumoe_fast.kernels.configs import target_architecture
from mumoe_fast.testing.interpreter import Addresses, Observer, observed
from mumoe_fast.testing.races import no_races

ARCHITECTURE = "sm_90"


@dataclass
class Traffic:
    """The bytes of one launch."""

    kernel: str
    case: str = ""
    dtype: str = ""
    has_dot: bool = False
    requested: int = 0
    per_program: int = 0
    distinct: int = 0

    @property
    def excess(self) -> float:
        """How many times the least that it must; see the module's text."""
        least = self.per_program if self.has_dot else self.distinct
        return self.requested / least if least else 1.0


@dataclass
class _Access:
    """Addresses touched in one way (read or written), by element size."""

    program: list[Addresses] = field(default_factory=list)
    launch: list[Addresses] = field(default_factory=list)

    def close_program(self) -> int:
        """Forget the program's repeats; returns how many distinct elements it touched."""
        if not self.program:
            return 0
        distinct = np.unique(np.concatenate(self.program))
        self.program = []
        self.launch.append(distinct)
        return distinct.size


class ByteCounter(Observer):
    """`launches` holds one `Traffic` per launch that it was told of."""

    def __init__(self) -> None:
        self.launches: list[Traffic] = []
        self._accesses: dict[tuple[str, int], _Access] = {}

    @override
    def launch_begins(self, kernel: str, tensors: Mapping[str, Tensor]) -> None:
        self.launches.append(Traffic(kernel))

    @override
    def launch_ends(self) -> None:
        self._close_program()
        for (_, width), access in self._accesses.items():
            if access.launch:
                self.launches[-1].distinct += np.unique(np.concatenate(access.launch)).size * width
        self._accesses.clear()

    @override
    def program_begins(self, program: int) -> None:
        self._close_program()

    @override
    def loads(self, addresses: Addresses, size: int) -> None:
        self._touch("read", addresses, size)

    @override
    def stores(self, addresses: Addresses, size: int) -> None:
        self._touch("write", addresses, size)

    @override
    def multiplies(self) -> None:
        self.launches[-1].has_dot = True

    def _touch(self, way: str, addresses: Addresses, size: int) -> None:
        self.launches[-1].requested += addresses.size * size
        self._accesses.setdefault((way, size), _Access()).program.append(addresses)

    def _close_program(self) -> None:
        for (_, width), access in self._accesses.items():
            self.launches[-1].per_program += access.close_program() * width


def count_here(dtype: torch.dtype) -> list[Traffic]:
    """Run every case on few tiles in this process, which must interpret."""
    if not triton.knobs.runtime.interpret:
        raise RuntimeError("bytes are counted in the interpreter: set TRITON_INTERPRET=1")
    counted = []
    for case in cases([dtype], small=True):
        counter = ByteCounter()
        with observed(counter), no_races(), target_architecture(ARCHITECTURE):
            case.launch("cpu")
        for traffic in counter.launches:
            traffic.case, traffic.dtype = case.name, str(dtype).removeprefix("torch.")
        counted += counter.launches
    return counted


def count(dtype: torch.dtype, *, run: Callable[..., Any] = subprocess.run) -> list[Traffic]:
    """Count in a process of its own that interprets, whatever this one does."""
    program = f"from mumoe_fast.bench.static.bytes import main; import torch; main({dtype})"
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    done = run([sys.executable, "-c", program], env=environment, check=True, stdout=subprocess.PIPE, text=True)
    return [Traffic(**row) for row in json.loads(done.stdout)]


def worst_excess(traffics: Iterable[Traffic]) -> dict[str, float]:
    """Of every kernel the largest excess of its launches."""
    worst: dict[str, float] = {}
    for traffic in traffics:
        worst[traffic.kernel] = max(worst.get(traffic.kernel, 1.0), round(traffic.excess, 3))
    return dict(sorted(worst.items()))


def main(dtype: torch.dtype) -> None:
    """Print the counts as JSON, for `count`."""
    json.dump([asdict(traffic) for traffic in count_here(dtype)], sys.stdout)

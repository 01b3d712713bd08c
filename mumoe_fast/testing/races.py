"""Races and accesses out of bounds, found in Triton's interpreter.

The programs of a grid run one after the other there, and side by side on a GPU, in any order. So within one launch no
program may touch what another one stores, however right the results of the interpreter are. Within a program Triton
orders a block's threads for shared memory only: what was stored may be loaded, or stored again, only behind a barrier,
and no two entries of one store may go to the same place. Storing over what the program itself has loaded is allowed,
since every kernel here stores what it has computed from it. None of them uses atomics, for which the rules are others.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from torch import Tensor
from typing_extensions import override

from mumoe_fast.testing.interpreter import Addresses, Observer, observed

NOBODY, SEVERAL = -1, -2
LARGEST = 2**28  # bytes of an allocation that are kept book of; of a larger one (a test's, far apart) only the bounds


class MemoryAccessError(AssertionError):
    """What a kernel must not do to memory: the kernel, the program, the tensors and the kernel's line."""


@dataclass
class _Allocation:
    """The memory of some arguments while a kernel runs: who has touched each of its bytes."""

    names: list[str]
    start: int
    bytes: int
    writer: NDArray[np.int64] = field(init=False)
    reader: NDArray[np.int64] = field(init=False)
    written_at: NDArray[np.int64] = field(init=False)  # how many barriers the writer had passed

    def __post_init__(self) -> None:
        tracked = self.bytes if self.bytes <= LARGEST else 0
        self.writer, self.reader, self.written_at = (np.full(tracked, NOBODY) for _ in range(3))


class RaceDetector(Observer):
    """Raises `MemoryAccessError` at the access that breaks one of this module's rules; counts what it has seen.

    Attributes:
        launches: how many, by kernel.
        in_place: the arguments over which a kernel has stored after loading them, by kernel.
    """

    def __init__(self) -> None:
        self.launches: Counter[str] = Counter()
        self.in_place: dict[str, set[str]] = {}
        self._kernel = ""
        self._program = self._barriers = 0
        self._allocations: list[_Allocation] = []

    @override
    def launch_begins(self, kernel: str, tensors: Mapping[str, Tensor]) -> None:
        by_start: dict[int, _Allocation] = {}
        for name, x in tensors.items():
            storage = x.untyped_storage()
            start = storage.data_ptr()
            if start not in by_start:
                by_start[start] = _Allocation([], start, storage.nbytes())
            by_start[start].names.append(name)
        self._kernel, self._allocations = kernel, list(by_start.values())

    @override
    def launch_ends(self) -> None:
        self.launches[self._kernel] += 1

    @override
    def program_begins(self, program: int) -> None:
        self._program, self._barriers = program, 0

    @override
    def synchronises(self) -> None:
        self._barriers += 1

    @override
    def loads(self, addresses: Addresses, size: int) -> None:
        for memory, place in self._places(addresses, size, "loads"):
            writer, reader = memory.writer[place], memory.reader[place]
            self._refuse(memory, self._others(writer), "loads what another program stores")
            self._refuse(memory, self._unordered(memory, place), "loads what it has stored with no barrier between")
            memory.reader[place] = np.where(self._others(reader), SEVERAL, self._program)

    @override
    def stores(self, addresses: Addresses, size: int) -> None:
        if np.unique(addresses).size < addresses.size:
            self._fail("stores several entries of one tile to one place")
        for memory, place in self._places(addresses, size, "stores"):
            writer, reader = memory.writer[place], memory.reader[place]
            self._refuse(memory, self._others(writer), "stores where another program stores")
            self._refuse(memory, self._others(reader), "stores where another program loads")
            self._refuse(memory, self._unordered(memory, place), "stores twice with no barrier between")
            memory.writer[place], memory.written_at[place] = self._program, self._barriers
            if (reader == self._program).any():
                self.in_place.setdefault(self._kernel, set()).update(memory.names)

    def _places(self, addresses: Addresses, size: int, does: str) -> Iterator[tuple[_Allocation, NDArray[np.int64]]]:
        """The bytes that are touched, by allocation."""
        inside = np.zeros(len(addresses), dtype=bool)
        for memory in self._allocations:
            here = (addresses >= memory.start) & (addresses + size <= memory.start + memory.bytes)
            inside |= here
            if here.any() and memory.writer.size:
                yield memory, (addresses[here, None] - memory.start + np.arange(size)).reshape(-1)
        if not inside.all():
            self._fail(f"{does} {int((~inside).sum())} entries outside its arguments' memory")

    def _others(self, who: NDArray[np.int64]) -> NDArray[np.bool_]:
        others: NDArray[np.bool_] = (who != NOBODY) & (who != self._program)
        return others

    def _unordered(self, memory: _Allocation, place: NDArray[np.int64]) -> NDArray[np.bool_]:
        """What this program has stored since its last barrier."""
        writer, since = memory.writer[place], memory.written_at[place]
        unordered: NDArray[np.bool_] = (writer == self._program) & (since == self._barriers)
        return unordered

    def _refuse(self, memory: _Allocation, bad: NDArray[np.bool_], what: str) -> None:
        if bad.any():
            self._fail(f"{what}: {int(bad.sum())} bytes of {', '.join(memory.names)}")

    def _fail(self, what: str) -> None:
        raise MemoryAccessError(f"program {self._program} of {self._kernel} {what} ({_line()})")


def _line() -> str:
    """Which line of a kernel is being run: of the innermost function that is neither the interpreter's nor a helper."""
    frame = sys._getframe()
    while frame.f_back is not None:
        frame = frame.f_back
        path = Path(frame.f_code.co_filename)
        if not {"triton", "testing"} & set(path.parts) and path.name != "_common.py":
            return f"{path.name}, line {frame.f_lineno}"
    return "line unknown"


@contextmanager
def no_races() -> Iterator[RaceDetector]:
    """Under it every interpreted launch of this process is checked."""
    detector = RaceDetector()
    with observed(detector):
        yield detector

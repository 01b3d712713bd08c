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
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
import triton
from numpy.typing import NDArray

from mumoe_fast.bench.static.cases import cases
from mumoe_fast.kernels.configs import target_architecture

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

    program: list[NDArray[np.uint64]] = field(default_factory=list)
    launch: list[NDArray[np.uint64]] = field(default_factory=list)

    def close_program(self) -> int:
        """Forget the program's repeats; returns how many distinct elements it touched."""
        if not self.program:
            return 0
        distinct = np.unique(np.concatenate(self.program))
        self.program = []
        self.launch.append(distinct)
        return distinct.size


class ByteCounter:
    """Watches the interpreter; `launches` holds one `Traffic` per launch."""

    def __init__(self) -> None:
        self.launches: list[Traffic] = []
        self._accesses: dict[tuple[str, int], _Access] = {}

    def _touch(self, way: str, pointers: Any, mask: Any) -> None:
        width = pointers.get_element_ty().primitive_bitwidth // 8
        data, active = np.broadcast_arrays(pointers.data, mask.data)
        addresses = data[active.astype(bool)].ravel()
        self.launches[-1].requested += addresses.size * width
        self._accesses.setdefault((way, width), _Access()).program.append(addresses)

    def _close_program(self) -> None:
        for (_, width), access in self._accesses.items():
            self.launches[-1].per_program += access.close_program() * width

    def _close_launch(self) -> None:
        self._close_program()
        for (_, width), access in self._accesses.items():
            if access.launch:
                self.launches[-1].distinct += np.unique(np.concatenate(access.launch)).size * width
        self._accesses.clear()

    @contextmanager
    def watch(self) -> Iterator[None]:
        """Count every interpreted launch inside."""
        from triton.runtime import interpreter

        builder = interpreter.interpreter_builder
        load, store, dot, enter = (
            builder.create_masked_load,
            builder.create_masked_store,
            builder.create_dot,
            builder.set_grid_idx,
        )
        execute = interpreter.GridExecutor.__call__

        def counted_load(pointers: Any, mask: Any, *rest: Any, **named: Any) -> Any:
            self._touch("read", pointers, mask)
            return load(pointers, mask, *rest, **named)

        def counted_store(pointers: Any, value: Any, mask: Any, *rest: Any, **named: Any) -> Any:
            self._touch("write", pointers, mask)
            return store(pointers, value, mask, *rest, **named)

        def noticed_dot(*arguments: Any, **named: Any) -> Any:
            self.launches[-1].has_dot = True
            return dot(*arguments, **named)

        def new_program(*index: int) -> None:
            self._close_program()
            enter(*index)

        def new_launch(executor: Any, *arguments: Any, **named: Any) -> Any:
            self.launches.append(Traffic(executor.fn.__name__))
            result = execute(executor, *arguments, **named)
            self._close_launch()
            return result

        with (
            patch.object(builder, "create_masked_load", counted_load),
            patch.object(builder, "create_masked_store", counted_store),
            patch.object(builder, "create_dot", noticed_dot),
            patch.object(builder, "set_grid_idx", new_program),
            patch.object(interpreter.GridExecutor, "__call__", new_launch),
        ):
            yield


def count_here(dtype: torch.dtype) -> list[Traffic]:
    """Run every case on few tiles in this process, which must interpret."""
    if not triton.knobs.runtime.interpret:
        raise RuntimeError("bytes are counted in the interpreter: set TRITON_INTERPRET=1")
    counted = []
    for case in cases([dtype], small=True):
        counter = ByteCounter()
        with counter.watch(), target_architecture(ARCHITECTURE):
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

"""Watching kernels in Triton's interpreter, where each program's loads and stores are seen with their addresses."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest.mock import patch

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

Addresses = NDArray[np.int64]


class Observer:
    """What is told of interpreted launches, in their order; each of these does nothing unless overridden.

    Addresses are those of the entries that are not masked out, in bytes, and `size` is an entry's bytes.
    """

    def launch_begins(self, kernel: str, tensors: Mapping[str, Tensor]) -> None:
        """A kernel by its function's name, and all tensors among its arguments, those in tuples as name[0], name[1]."""

    def launch_ends(self) -> None:
        """Every program has run."""

    def program_begins(self, program: int) -> None:
        """One of the grid's programs, by its place among them."""

    def loads(self, addresses: Addresses, size: int) -> None:
        """The program loads a tile."""

    def stores(self, addresses: Addresses, size: int) -> None:
        """The program stores a tile."""

    def synchronises(self) -> None:
        """The program waits for all its threads."""

    def multiplies(self) -> None:
        """The program takes a product of two tiles."""


@contextmanager
def observed(observer: Observer) -> Iterator[None]:
    """Tell `observer` of every launch in this process, which must interpret."""
    from triton.runtime import interpreter

    builder, executor = interpreter.interpreter_builder, interpreter.GridExecutor
    replaced = {
        name: getattr(builder, name)
        for name in ("set_grid_idx", "create_masked_load", "create_masked_store", "create_barrier", "create_dot")
    }
    execute = executor.__call__

    def enter(x: int, y: int, z: int) -> None:
        _, height, depth = builder.grid_dim
        observer.program_begins((x * height + y) * depth + z)
        replaced["set_grid_idx"](x, y, z)

    def load(pointers: Any, mask: Any, *rest: Any, **named: Any) -> Any:
        observer.loads(*_touched(pointers, mask))
        return replaced["create_masked_load"](pointers, mask, *rest, **named)

    def store(pointers: Any, value: Any, mask: Any, *rest: Any, **named: Any) -> Any:
        observer.stores(*_touched(pointers, mask))
        return replaced["create_masked_store"](pointers, value, mask, *rest, **named)

    def barrier() -> Any:
        observer.synchronises()
        return replaced["create_barrier"]()

    def dot(*arguments: Any, **named: Any) -> Any:
        observer.multiplies()
        return replaced["create_dot"](*arguments, **named)

    def launch(self: Any, *arguments: Any, **named: Any) -> Any:
        given = dict(zip(self.arg_names, arguments, strict=False)) | named
        observer.launch_begins(self.fn.__name__, dict(_tensors(given)))
        result = execute(self, *arguments, **named)
        observer.launch_ends()
        return result

    with ExitStack() as patches:
        for name, instead in zip(replaced, (enter, load, store, barrier, dot), strict=True):
            patches.enter_context(patch.object(builder, name, instead))
        patches.enter_context(patch.object(executor, "__call__", launch))
        yield


def _touched(pointers: Any, mask: Any) -> tuple[Addresses, int]:
    data, active = np.broadcast_arrays(pointers.data, mask.data)
    return data[active.astype(bool)].astype(np.int64), pointers.get_element_ty().primitive_bitwidth // 8


def _tensors(arguments: Mapping[str, Any]) -> Iterator[tuple[str, Tensor]]:
    for name, x in arguments.items():
        if isinstance(x, Tensor):
            yield name, x
        elif isinstance(x, tuple):
            yield from _tensors({f"{name}[{place}]": item for place, item in enumerate(x)})

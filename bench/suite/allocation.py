"""The most memory that a call would hold at once on a GPU that is not there: counted, not estimated.

What a call allocates does not depend on the device, only on sizes and on when each tensor is let go. So it is run
without data, what our operators allocate inside included, and every storage is counted from its birth to its end. Left
out are what the allocator rounds up and the workspaces of the vendor's GEMMs.
"""

from __future__ import annotations

import weakref
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from mumoe_fast.bench.suite.dataless import call_of, is_cast_to_float32, opened, run_inside, storage, tensors
from mumoe_fast.bench.suite.implementations import Case
from mumoe_fast.kernels._common import Launch


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of every storage made under it while it lives; `peak` is the most at any time."""

    def __init__(self, architecture: str) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.peak = 0
        self._live = 0
        self._architecture = architecture
        self._sizes: dict[int, int] = {}  # by storage

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run the operator without data and count what it makes; of one of ours also what it makes inside."""
        kwargs = kwargs or {}
        if func.namespace == "mumoe":
            self.peak = max(self.peak, self._live + self._inside(func, args, kwargs))
        result = func(*args, **kwargs)
        given = {storage(tensor) for tensor in tensors((args, kwargs))}
        for tensor in tensors(result):
            if storage(tensor) not in given and not self._is_free(func, tensor):
                self._count(tensor)
        self.peak = max(self.peak, self._live)
        return result

    def _is_free(self, func: Any, result: Tensor) -> bool:
        return False

    def _count(self, tensor: Tensor) -> None:
        key, kept = storage(tensor), tensor.untyped_storage()
        if key not in self._sizes:
            self._sizes[key] = kept.nbytes()
            self._live += kept.nbytes()
            weakref.finalize(kept, self._forget, key)

    def _forget(self, key: int) -> None:
        self._live -= self._sizes.pop(key)

    def _inside(self, func: Any, args: Any, kwargs: Any) -> int:
        """The most that one of our operators holds at once beyond its arguments, its results included."""
        with opened(self._architecture, args, kwargs) as (args, kwargs, launches):
            inner = _InsideBytes(self._architecture, launches)
            with inner:
                run_inside(func, args, kwargs)
        return inner.peak


class _InsideBytes(LiveBytes):
    """Inside an operator of ours, where the record of launches must keep no tensor alive."""

    def __init__(self, architecture: str, launches: list[Launch]) -> None:
        super().__init__(architecture)
        self._launches = launches

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """As outside."""
        self._launches.clear()
        return super().__torch_dispatch__(func, types, args, kwargs)

    def _is_free(self, func: Any, result: Tensor) -> bool:
        return is_cast_to_float32(func, result)


def peak_bytes(case: Case, architecture: str) -> int:
    """What one call of the case would hold beyond parameters and input, as `measure.peak_bytes` measures it."""
    counted = LiveBytes(architecture)
    with call_of(case) as call, counted:
        call()
    return counted.peak

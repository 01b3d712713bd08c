"""A GPU that is not there: Triton's JIT binds, specialises and launches as ever, but compiles nothing and runs nothing.

What would be launched arrives at `StubGpu.launches`. For a process of its own, in which Triton does not interpret.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import CompiledKernel
from triton.runtime import driver


@dataclass(frozen=True)
class Launched:
    """What a GPU's driver would be given."""

    compiled: str  # the source, all that it was specialised on, and the options
    function: str
    grid: tuple[int, int, int]
    stream: int
    arguments: tuple[Any, ...]


class StubKernel(CompiledKernel):
    """A kernel that was not compiled."""

    def __init__(self, src: Any, target: Any, options: Any) -> None:
        self.src, self.name, self.hash, self.kernel, self.metadata_group = src, src.name, "", b"", {}
        self.metadata = SimpleNamespace(
            shared=0, num_warps=options["num_warps"], warp_size=32, target=target, options=repr(options)
        )
        self.packed_metadata = (options["num_warps"], 1, 0)
        self.module = self.function = self._run = None


class StubGpu:
    """Triton's driver of that GPU, an sm_90; device and stream are the current ones."""

    def __init__(self, *, notes: bool) -> None:
        self.notes, self.device, self.stream = notes, 0, 0
        self.launches: list[Launched] = []
        self.utils = self

    def get_current_device(self) -> int:
        return self.device

    def get_current_stream(self, device: int) -> int:
        return self.stream

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)

    def get_device_properties(self, device: int) -> dict[str, int]:
        return {"max_shared_mem": 227 * 1024}

    def load_binary(self, name: str, binary: bytes, shared: int, device: int) -> tuple[object, str, int, int, int]:
        return object(), f"{name} on device {device}", 32, 0, 1024

    def unload_module(self, module: object) -> None:
        """There is none."""

    def launcher_cls(self, src: Any, metadata: Any) -> Callable[..., None]:
        """What launches kernels of this source, as Triton calls it."""
        if not self.notes:
            return lambda *arguments: None

        compiled = repr((src.name, src.signature, src.constants, src.attrs, metadata.options))

        def launch(x: int, y: int, z: int, stream: int, function: str, packed: Any, about: Any, *rest: Any) -> None:
            enter, leave, *arguments = rest
            enter(about)
            self.launches.append(Launched(compiled, function, (x, y, z), stream, tuple(map(_plain, arguments))))
            leave(about)

        return launch


class Address(int):
    """Where a tensor starts."""


def _plain(argument: Any) -> Any:
    """An argument that compares: a tensor by its address."""
    if isinstance(argument, tuple):
        return tuple(map(_plain, argument))
    if isinstance(argument, triton.language.constexpr):
        return argument.value
    return Address(argument.data_ptr()) if isinstance(argument, Tensor) else argument


def install(*, notes: bool = True) -> StubGpu:
    """Make it the GPU of this process; without notes its launcher returns at once, for who measures what is before."""
    gpu = StubGpu(notes=notes)
    driver.set_active(gpu)
    triton.compiler.compile = StubKernel
    return gpu

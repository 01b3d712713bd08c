"""What ours would take on GPUs that are not there: predictions, and named so wherever they are shown.

Ours by the Triton kernels is traced at full size without computing anything, which gives every operator that would run,
every kernel that it would launch, and their tensors. An operator then takes as long as the longest of three: its
operations at the data sheet's rate, the bytes of its launches at the data sheet's bandwidth, and its launches one after
the other. Bytes are those of each launch's tensors, times the excess that the interpreter counted for the kernel
(`bench.static`), and a launch of few programs draws no more than they can together: for few tokens that is what counts.
Nothing reaches its data sheet, so a GPU is slower than this. The peak of memory is no prediction but a count
(`allocation`).
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from importlib.resources import files
from math import prod
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from mumoe_fast.bench.suite.allocation import peak_bytes
from mumoe_fast.bench.suite.dataless import call_of, is_cast_to_float32, opened, run_inside, storage, tensors
from mumoe_fast.bench.suite.flops import floor
from mumoe_fast.bench.suite.implementations import Case
from mumoe_fast.bench.suite.records import Ceilings, Record, Run
from mumoe_fast.bench.suite.roofline import floor_at
from mumoe_fast.bench.suite.run import blank
from mumoe_fast.kernels._common import Launch


@dataclass(frozen=True)
class Gpu:
    """A GPU's data sheet: dense rates without sparsity; float32 without TF32, as the kernels compute."""

    name: str
    architecture: str  # the static table's
    bytes_per_second: float
    flops_per_second: Mapping[torch.dtype, float]
    source: str

    def ceilings(self, dtype: torch.dtype) -> Ceilings:
        """The data sheet as ceilings."""
        return Ceilings(self.bytes_per_second, self.flops_per_second[dtype])


def _rates(half: float, single: float) -> dict[torch.dtype, float]:
    return {torch.float32: single, torch.bfloat16: half, torch.float16: half}


GPUS = (
    Gpu("NVIDIA A100 SXM 80GB", "sm_80", 2.039e12, _rates(312e12, 19.5e12), "NVIDIA A100 data sheet, June 2021"),
    Gpu("NVIDIA H100 SXM", "sm_90", 3.35e12, _rates(989e12, 67e12), "NVIDIA H100 data sheet"),
    Gpu("NVIDIA H200 SXM", "sm_90", 4.8e12, _rates(989e12, 67e12), "NVIDIA H200 data sheet"),
)
LAUNCH_SECONDS = 5e-6  # of a launch from eager PyTorch, about what its boundary of an operator costs on a server
# An assumption, on no data sheet: 40 KB of loads in flight on a multiprocessor, each 0.7 µs on its way from memory.
# It is 1.6 times a multiprocessor's share of an H200's bandwidth: from 84 programs on memory is the limit there.
PROGRAM_BYTES_PER_SECOND = 40e3 / 0.7e-6


def absent(device: torch.device) -> list[Gpu]:
    """The GPUs that are not the one that is measured."""
    here = torch.cuda.get_device_name(device) if device.type == "cuda" else ""
    return [gpu for gpu in GPUS if gpu.name.split()[1] not in here]


@dataclass(frozen=True)
class Kernel:
    """A launch of ours: the bytes that it moves, and the programs that move them."""

    bytes: float
    programs: int

    def seconds(self, bytes_per_second: float) -> float:
        """At the machine's bandwidth, or at that of its programs, each on a multiprocessor of its own."""
        return self.bytes / min(bytes_per_second, self.programs * PROGRAM_BYTES_PER_SECOND)


@dataclass(frozen=True)
class Operation:
    """One operator of the trace: operations, bytes and launches; of the bytes and launches some are our `kernels`."""

    name: str
    flops: int
    bytes: float
    launches: int
    kernels: tuple[Kernel, ...] = ()

    def seconds(self, ceilings: Ceilings) -> float:
        """The longest of arithmetic, memory and launches."""
        others = self.bytes - sum(kernel.bytes for kernel in self.kernels)
        memory = sum(kernel.seconds(ceilings.bytes_per_second) for kernel in self.kernels)
        return max(
            self.flops / ceilings.flops_per_second,
            memory + others / ceilings.bytes_per_second,
            self.launches * LAUNCH_SECONDS,
        )


@cache
def excess() -> Mapping[str, float]:
    """How many times the bytes that it must a kernel moves, as the interpreter counted (`bench static --excess`)."""
    counted: dict[str, float] = json.loads((files("mumoe_fast.bench.static") / "excess.json").read_text())
    return counted


class Trace(TorchDispatchMode):
    """Notes every operator that runs on tensors without data, and what the library's own would launch."""

    def __init__(self, architecture: str) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.operations: list[Operation] = []
        self._architecture = architecture
        self._inside = False
        self._casts: dict[int, Tensor] = {}  # by storage: half tensors of which an operator made a float32 copy

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run the operator without data, and note it."""
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        inputs, outputs = tensors((args, kwargs)), tensors(result)
        if func.namespace == "mumoe":
            self.operations.append(self._opened(func, args, kwargs, result))
        elif not self._is_free(func, inputs, outputs):
            size = float(sum(self._bytes(tensor) for tensor in (*inputs, *outputs)))
            self.operations.append(Operation(str(func), self._flops(func, args, kwargs, result), size, 1))
        return result

    def _opened(self, func: Any, args: Any, kwargs: Any, result: Any) -> Operation:
        """An operator of ours, with the bytes and launches of what happens inside."""
        inner = Trace(self._architecture)
        inner._inside = True
        with opened(self._architecture, args, kwargs) as (args, kwargs, launches), inner:
            run_inside(func, args, kwargs)
        kernels = tuple(map(_kernel, launches))
        size = sum(operation.bytes for operation in inner.operations) + sum(kernel.bytes for kernel in kernels)
        flops = self._flops(func, args, kwargs, result)
        return Operation(str(func), flops, size, len(inner.operations) + len(launches), kernels)

    def _is_free(self, func: Any, inputs: list[Tensor], outputs: list[Tensor]) -> bool:
        """Whether nothing is launched: views, empty tensors, and the copies to float32 that a GPU's GEMM saves."""
        if self._inside and is_cast_to_float32(func, outputs[0]):
            if inputs[0].dtype != torch.float32:
                self._casts[storage(outputs[0])] = inputs[0]
            return True
        known = {storage(tensor) for tensor in inputs}
        view = not func._schema.is_mutable and all(storage(tensor) in known for tensor in outputs)
        return view or func._overloadpacket in _EMPTY

    def _bytes(self, tensor: Tensor) -> int:
        return self._casts.get(storage(tensor), tensor).nbytes

    @staticmethod
    def _flops(func: Any, args: Any, kwargs: Any, result: Any) -> int:
        formula = flop_registry.get(func._overloadpacket)
        return 0 if formula is None else int(formula(*args, **kwargs, out_val=result))


_EMPTY = (
    *(torch.ops.aten.empty, torch.ops.aten.empty_like, torch.ops.aten.empty_strided),
    *(torch.ops.aten.new_empty, torch.ops.aten.new_empty_strided),
)


def _kernel(launch: Launch) -> Kernel:
    times = excess().get(launch.kernel.fn.__name__, 1.0)
    return Kernel(times * sum(tensor.nbytes for tensor in tensors(dict(launch.arguments))), prod(launch.grid))


def trace(case: Case, architecture: str) -> list[Operation]:
    """Every operator of one call of the case on an architecture, with what it would launch; nothing is computed."""
    found = Trace(architecture)
    with call_of(case) as call, found:
        call()
    return found.operations


def predict(cases: Iterable[Case], run: Run, gpus: Sequence[Gpu] = GPUS) -> Iterator[Record]:
    """Predictions for the cases of ours by the Triton kernels on every GPU; `run` says who predicted."""
    for case in cases:
        if case.implementation.impl != "triton" or case.workload.obstacle() is not None:
            continue
        record = blank(case.workload, case.implementation, case.dtype, case.direction, run)
        need = floor(case.workload, case.implementation, case.dtype, case.direction)
        architectures = dict.fromkeys(gpu.architecture for gpu in gpus)
        operations = {name: trace(case, name) for name in architectures}
        peaks = {name: peak_bytes(case, name) for name in architectures}
        for gpu in gpus:
            ceilings = gpu.ceilings(case.dtype)
            yield replace(
                record,
                predicted_for=gpu.name,
                predicted_seconds=sum(operation.seconds(ceilings) for operation in operations[gpu.architecture]),
                peak_bytes=peaks[gpu.architecture],
                floor=floor_at(need, ceilings),
                ceilings=ceilings,
            )

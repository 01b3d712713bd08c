"""Compile what the launchers would launch, with the arguments' attributes that the JIT would set, for GPUs not here.

Each case runs its launcher on meta tensors while launches are recorded; Triton's own binder turns the recorded
arguments into signature, constants and attributes. Equal specialisations are compiled once, in worker processes.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass, field
from importlib import import_module
from multiprocessing import get_context
from typing import Any

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, make_backend
from triton.runtime.jit import create_function_from_signature

from mumoe_fast.bench.static.cases import Case
from mumoe_fast.bench.static.occupancy import ARCHITECTURES, Architecture, resident_blocks
from mumoe_fast.bench.static.sass import Binary, inspect
from mumoe_fast.kernels._common import Launch, record_launches

SHORT_ROW = 16  # a tensor whose rows have fewer elements (a small expert level) is no tile of its own


@dataclass(frozen=True)
class Use:
    """Where a specialisation occurs; `aligned`: every row of every tensor starts and ends on 16 bytes."""

    case: str
    dtype: str
    grid: tuple[int, ...]
    aligned: bool


@dataclass
class Job:
    """One compilation: a kernel and everything on which its code depends. Plain data, so that it travels."""

    module: str
    kernel: str
    architecture: str
    signature: Mapping[str, Any]
    constants: Mapping[tuple[int, ...], Any]
    attributes: Mapping[tuple[int, ...], Any]
    options: Mapping[str, Any]
    blocks: Mapping[str, int]
    uses: list[Use] = field(default_factory=list)

    @property
    def key(self) -> str:
        """Equal for equal code."""
        return repr(
            (self.module, self.kernel, self.architecture, self.signature, self.constants, self.attributes, self.options)
        )

    @property
    def warps(self) -> int:
        """Warps per block."""
        return int(self.options["num_warps"])


@dataclass(frozen=True)
class Result:
    """A job's binary, or why there is none."""

    job: Job
    binary: Binary | None
    error: str | None = None


def blocks_of(job: Job, binary: Binary) -> int:
    """Resident blocks per multiprocessor."""
    return resident_blocks(
        ARCHITECTURES[job.architecture],
        registers=binary.registers,
        shared=binary.shared,
        warps=job.warps,
        tensor_memory_columns=binary.tensor_memory_columns,
    )


def _gpu_target(architecture: Architecture) -> GPUTarget:
    return GPUTarget(architecture.backend, architecture.target, architecture.warp_size)


def specialise(launch: Launch, architecture: str) -> Job:
    """The compilation that Triton's JIT would start for this launch."""
    kernel = launch.kernel
    backend = make_backend(_gpu_target(ARCHITECTURES[architecture]))
    options = {"num_warps": launch.config.num_warps, "num_stages": launch.config.num_stages, "enable_fp_fusion": True}
    arguments = {**launch.arguments, **launch.config.blocks, **options}
    bind = create_function_from_signature(kernel.signature, kernel.params, backend)
    bound, specialisation, extra = bind(**arguments)
    _, signature, constants, attributes = kernel._pack_args(backend, arguments, bound, specialisation, extra)
    return Job(
        module=kernel.fn.__module__,
        kernel=kernel.fn.__name__,
        architecture=architecture,
        signature=signature,
        constants=constants,
        attributes=attributes,
        options=options,
        blocks=dict(launch.config.blocks),
    )


def _tensors(arguments: Iterable[Any]) -> Iterable[Tensor]:
    for argument in arguments:
        if isinstance(argument, Tensor):
            yield argument
        elif isinstance(argument, (tuple, list)):
            yield from _tensors(argument)


def _row_length(tensor: Tensor) -> int:
    """How many elements lie side by side; 0 if none do."""
    return max((size for size, stride in zip(tensor.shape, tensor.stride(), strict=True) if stride == 1), default=0)


def is_aligned(tensors: Iterable[Tensor]) -> bool:
    """Whether there are tensors with rows, and every row of every one of them starts and ends on 16 bytes."""
    tiles = [tensor for tensor in tensors if _row_length(tensor) >= SHORT_ROW]
    return bool(tiles) and all(
        number * tensor.element_size() % 16 == 0
        for tensor in tiles
        for number in (_row_length(tensor), *(stride for stride in tensor.stride() if stride > 1))
    )


def collect(cases: Iterable[Case], architectures: Sequence[str]) -> list[Job]:
    """Every distinct compilation that the cases need, each with the cases that need it."""
    if triton.knobs.runtime.interpret:
        raise RuntimeError("kernels cannot be compiled in a process with TRITON_INTERPRET=1: unset it")
    jobs: dict[str, Job] = {}
    for case in cases:
        for architecture in architectures:
            with record_launches(architecture) as launches:
                case.launch("meta")
            for launch in launches:
                job = specialise(launch, architecture)
                aligned = is_aligned(_tensors(launch.arguments.values()))
                dtype = str(case.dtype).removeprefix("torch.")
                use = Use(case.name, dtype, launch.grid, aligned)
                jobs.setdefault(job.key, job).uses.append(use)
    return list(jobs.values())


def compile_one(job: Job) -> Result:
    """Compile and inspect in this process. Whatever the compiler raises is the finding."""
    kernel = getattr(import_module(job.module), job.kernel)
    source = ASTSource(kernel, job.signature, job.constants, job.attributes)
    target = _gpu_target(ARCHITECTURES[job.architecture])
    try:
        return Result(job, inspect(triton.compile(source, target=target, options=dict(job.options))))
    except Exception as error:
        message = " ".join(str(error).split())[:300]
        return Result(job, None, f"{type(error).__name__}: {message}")


def compile_all(
    jobs: Sequence[Job], *, processes: int | None = None, on_done: Callable[[], None] = lambda: None
) -> list[Result]:
    """Compile in worker processes, in the jobs' order; a worker that dies is reported as its jobs' error."""
    workers = processes or os.cpu_count() or 1
    with ProcessPoolExecutor(
        workers, mp_context=get_context("spawn"), initializer=torch.set_num_threads, initargs=(1,)
    ) as pool:
        futures = {pool.submit(compile_one, job): job for job in jobs}
        for _ in as_completed(futures):
            on_done()
    return [
        future.result()
        if (error := future.exception()) is None
        else Result(job, None, f"{type(error).__name__}: {error}")
        for future, job in futures.items()
    ]

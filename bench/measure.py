"""What is measured about a training step: floating-point operations, time beside its rivals, and peak memory."""

from __future__ import annotations

import gc
import math
import os
import platform
import random
import sys
import time
import timeit
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from itertools import accumulate
from multiprocessing import get_all_start_methods, get_context
from pathlib import Path
from typing import ParamSpec, TypeVar

import torch
import torch.utils.benchmark
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from mumoe_fast._version import __version__

P = ParamSpec("P")
Result = TypeVar("Result")
Clock = Callable[[Callable[[], object], int], float]  # (action, repeats) → seconds of one call


def count_flops(forward: Callable[[], object]) -> int:
    """Floating-point operations of the matrix products in `forward`, a multiply-add counted as 2, as torch counts.

    Attention is counted on its plain form, without the half that a causal mask could save: torch knows no formula for
    the fused one on a CPU.
    """
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        forward()
    return int(counter.get_total_flops())


def wall_clock(action: Callable[[], object], repeats: int) -> float:
    """Seconds of one of `repeats` calls, by torch's benchmark timer: it waits for an accelerator, and nothing collects
    garbage meanwhile.
    """
    return timeit.Timer(action, timer=torch.utils.benchmark.timer).timeit(repeats) / repeats


def interleaved_seconds(
    actions: Mapping[str, Callable[[], object]],
    *,
    bursts: int,
    repeats: int | Callable[[float], int],
    limit: float = math.inf,
    seed: int = 0,
    clock: Clock = wall_clock,
) -> dict[str, list[float]]:
    """Seconds per call of each action, one figure per burst of `repeats` calls.

    The actions take turns in an order drawn anew each time, so that a slow phase of the machine meets all of them; one
    call of each goes ahead uncounted, whose seconds a function `repeats` is given. Once `limit` seconds have passed,
    three bursts are enough.
    """
    order, shuffle, started = list(actions), random.Random(seed), time.perf_counter()
    ahead = {name: clock(actions[name], 1) for name in order}
    calls = {name: repeats if isinstance(repeats, int) else repeats(ahead[name]) for name in order}
    seconds: dict[str, list[float]] = {name: [] for name in order}
    for burst in range(bursts):
        if burst >= 3 and time.perf_counter() - started > limit:
            break
        shuffle.shuffle(order)
        for name in order:
            seconds[name].append(clock(actions[name], calls[name]))
    return seconds


def quantile(values: Sequence[float], q: float) -> float:
    """A quantile of the values, between neighbours linearly."""
    return float(torch.tensor(values, dtype=torch.float64).quantile(q))


def in_fresh_process(function: Callable[P, Result], *args: P.args, **kwargs: P.kwargs) -> Result:
    """What the function returns in a process that has done nothing else; it and its arguments must pickle.

    Where the system can, the process is forked from one that has imported this package and nothing more, which is
    many times quicker than importing torch anew.
    """
    context = get_context("forkserver" if "forkserver" in get_all_start_methods() else "spawn")
    if hasattr(context, "set_forkserver_preload"):
        context.set_forkserver_preload(["mumoe_fast.bench.cli"])
    with ProcessPoolExecutor(1, mp_context=context) as process:
        return process.submit(function, *args, **kwargs).result()


def peak_bytes(action: Callable[[], object], device: torch.device) -> int:
    """The most memory that `action` holds at once beyond what was there when it began.

    On a CPU: the running sum of the allocations and releases that the profiler saw.
    """
    gc.collect()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        action()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    with _silent_standard_error(), torch.autograd.profiler.profile(profile_memory=True) as recorded:
        action()
    events = [event for event in recorded.kineto_results.events() if event.name() == "[memory]"]
    events.sort(key=lambda event: event.start_ns())
    return max(accumulate((int(event.nbytes()) for event in events), initial=0))


@contextmanager
def _silent_standard_error() -> Iterator[None]:
    """Nothing on file descriptor 2: some builds of the profiler announce each start and stop there, from C++."""
    sys.stderr.flush()
    kept, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(nowhere, 2)
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nowhere)


def describe_machine(device: torch.device) -> list[tuple[str, str]]:
    """What the numbers were measured on and with."""
    facts = [("device", torch.cuda.get_device_name(device))] if device.type == "cuda" else []
    return [
        *facts,
        ("CPU", f"{_cpu_name()}, {torch.get_num_threads()} threads used"),
        ("system", f"{platform.system()} {platform.release()}"),
        ("software", f"mumoe-fast {__version__}, PyTorch {torch.__version__}, Python {platform.python_version()}"),
    ]


def _cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()

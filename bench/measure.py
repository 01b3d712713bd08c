"""What is measured about a training step: floating-point operations, time beside its rivals, and peak memory."""

from __future__ import annotations

import gc
import math
import os
import platform
import random
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from itertools import accumulate
from pathlib import Path

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from mumoe_fast._version import __version__


def count_flops(forward: Callable[[], object]) -> int:
    """Floating-point operations of the matrix products in `forward`, a multiply-add counted as 2, as torch counts.

    Attention is counted on its plain form, without the half that a causal mask could save: torch knows no formula for
    the fused one on a CPU.
    """
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        forward()
    return int(counter.get_total_flops())


def interleaved_seconds(
    actions: Mapping[str, Callable[[], object]], *, bursts: int, repeats: int, limit: float = math.inf, seed: int = 0
) -> dict[str, list[float]]:
    """Seconds per call of each action, one figure per burst of `repeats` calls.

    The actions take turns in an order drawn anew each time, so that a slow phase of the machine meets all of them; one
    call of each goes ahead uncounted. An action must wait for its device before it returns. Once `limit` seconds have
    passed, three bursts are enough.
    """
    order, shuffle, started = list(actions), random.Random(seed), time.perf_counter()
    for name in order:
        actions[name]()
    seconds: dict[str, list[float]] = {name: [] for name in order}
    for burst in range(bursts):
        if burst >= 3 and time.perf_counter() - started > limit:
            break
        shuffle.shuffle(order)
        for name in order:
            start = time.perf_counter()
            for _ in range(repeats):
                actions[name]()
            seconds[name].append((time.perf_counter() - start) / repeats)
    return seconds


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

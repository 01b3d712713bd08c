"""Latency of several sides of one comparison: in turns, by a clock that waits for the device, as quantiles.

On CUDA a call is timed by events, each time with the L2 cache full of something else, and beside the eager call also
its replay from a CUDA graph, which costs no launches.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from mumoe_fast.bench.measure import Clock, interleaved_seconds, quantile, wall_clock
from mumoe_fast.bench.suite.records import Latency

Action = Callable[[], object]

BURST_SECONDS = 0.005  # a burst lasts at least so long: far beyond the clock's resolution and the cost of a turn
MOST_REPEATS = 1000
BURSTS = 20  # at most; at least three
WARM_UPS = 3  # before a capture, as CUDA graphs ask for


def latencies(
    actions: Mapping[str, Action], clock: Clock = wall_clock, *, seconds: float, seed: int = 0
) -> dict[str, Latency]:
    """The latency of every action, in turns that take about `seconds` in all unless three of each take longer."""
    taken = interleaved_seconds(actions, bursts=BURSTS, repeats=_repeats, limit=seconds, seed=seed, clock=clock)
    return {name: summary(values) for name, values in taken.items()}


def _repeats(once: float) -> int:
    """Calls to a burst, of an action that takes so many seconds once."""
    return min(MOST_REPEATS, max(1, math.ceil(BURST_SECONDS / once)))


def summary(values: list[float]) -> Latency:
    """Quantiles over the bursts."""
    p20, p50, p80 = (quantile(values, q) for q in (0.2, 0.5, 0.8))
    return Latency(p20=p20, p50=p50, p80=p80, minimum=min(values), bursts=len(values))


def clock_of(device: torch.device) -> Clock:
    """The clock for a device."""
    return EventClock(device) if device.type == "cuda" else wall_clock


class EventClock:
    """Seconds of a call by CUDA events around it alone, after its data was driven out of the L2 cache."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        cache = torch.cuda.get_device_properties(device).L2_cache_size
        self._other_data = torch.empty(2 * cache, dtype=torch.int8, device=device)

    def __call__(self, action: Action, repeats: int) -> float:
        """The mean of `repeats` calls."""
        spans = []
        for _ in range(repeats):
            self._other_data.zero_()
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            action()
            end.record()
            spans.append((start, end))
        torch.cuda.synchronize(self._device)
        return sum(float(start.elapsed_time(end)) for start, end in spans) / repeats / 1e3


def captured(action: Action) -> Action:
    """The replay of an action that was captured in a CUDA graph.

    Raises:
        RuntimeError: it cannot be captured, as what waits for the device cannot.
    """
    warm_up = torch.cuda.Stream()
    warm_up.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(warm_up):
        for _ in range(WARM_UPS):
            action()
        with _refusing_to_wait():
            action()
    torch.cuda.current_stream().wait_stream(warm_up)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        action()
    return _Replay(graph, action)


@contextmanager
def _refusing_to_wait() -> Iterator[None]:
    """What waits for the device raises: a capture that fails would leave allocator and random numbers unusable."""
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode(before)


@dataclass(frozen=True)
class _Replay:
    """A captured action, and the action itself for the tensors that it reads: a graph knows them by address alone."""

    graph: torch.cuda.CUDAGraph
    action: Action

    def __call__(self) -> None:
        self.graph.replay()

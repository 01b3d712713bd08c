"""Latencies are of the calls that were made; CUDA's clock and graphs are tried on a stand-in for the device."""

from __future__ import annotations

import gc
import time
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace

import pytest
import torch

from mumoe_fast.bench.measure import wall_clock
from mumoe_fast.bench.suite.timing import BURST_SECONDS, BURSTS, EventClock, captured, clock_of, latencies, summary


def test_quantiles_and_the_minimum_are_of_the_bursts() -> None:
    latency = summary([5.0, 1.0, 3.0, 2.0, 4.0, 6.0])
    assert (latency.p20, latency.p50, latency.p80) == pytest.approx((2.0, 3.5, 5.0))
    assert (latency.minimum, latency.bursts) == (1.0, 6)


class Simulation:
    """A clock that knows what every action takes, and notes what was asked of it."""

    def __init__(self, seconds: dict[str, float]) -> None:
        self.seconds, self.asked = seconds, []  # type: ignore[var-annotated]

    def actions(self) -> dict[str, object]:
        return {name: SimpleNamespace(name=name) for name in self.seconds}

    def __call__(self, action: object, repeats: int) -> float:
        self.asked.append((action.name, repeats))  # type: ignore[attr-defined]
        return self.seconds[action.name]  # type: ignore[attr-defined]


def test_a_short_call_is_repeated_until_a_burst_is_long_enough() -> None:
    clock = Simulation({"short": BURST_SECONDS / 12, "tiny": 1e-9, "long": 3.0})
    taken = latencies(clock.actions(), clock, seconds=1e9)  # type: ignore[arg-type]
    assert {name: latency.p50 for name, latency in taken.items()} == clock.seconds
    assert all(latency.bursts == BURSTS for latency in taken.values())
    bursts = dict(clock.asked)  # the last that was asked of each
    assert bursts == {"short": 12, "tiny": 1000, "long": 1}
    turns = [name for name, _ in clock.asked[-3 * BURSTS :]]
    orders = {tuple(turns[i : i + 3]) for i in range(0, len(turns), 3)}
    assert all(set(order) == {"short", "tiny", "long"} for order in orders)
    assert len(orders) > 1, "the order is drawn anew"


def test_when_time_is_up_three_bursts_are_enough() -> None:
    taken = latencies({"slow": lambda: time.sleep(0.01)}, seconds=0.001)
    assert taken["slow"].bursts == 3
    assert taken["slow"].minimum >= 0.01


def test_the_clock_of_a_cpu_is_the_walls() -> None:
    assert clock_of(torch.device("cpu")) is wall_clock
    calls: list[int] = []
    assert wall_clock(lambda: (calls.append(1), time.sleep(0.002)), 3) >= 0.002
    assert len(calls) == 3


class FakeCuda:
    """Events that read a clock, which only the actions and the filling of the cache move."""

    def __init__(self) -> None:
        self.now, self.filled, self.waited, self.log = 0.0, 0, 0, []  # type: ignore[var-annotated]
        cuda = self

        class Event:
            def __init__(self, *, enable_timing: bool) -> None:
                assert enable_timing

            def record(self) -> None:
                self.at = cuda.now

            def elapsed_time(self, end: Event) -> float:
                assert cuda.waited, "read before the device was waited for"
                return (end.at - self.at) * 1e3

        class Graph:
            def replay(self) -> None:
                cuda.log.append("replay")

        self.Event, self.CUDAGraph = Event, Graph
        self.stream_object = SimpleNamespace(wait_stream=lambda other: cuda.log.append("wait"))

    @contextmanager
    def inside(self, what: str) -> Iterator[None]:
        self.log.append(f"{what} begins")
        yield
        self.log.append(f"{what} ends")


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> FakeCuda:
    fake = FakeCuda()
    properties = SimpleNamespace(L2_cache_size=64)

    def wait(device: torch.device) -> None:
        fake.waited += 1

    def empty(size: int, **_: object) -> SimpleNamespace:
        assert size == 128, "twice the cache"

        def fill() -> None:
            fake.now += 100
            fake.filled += 1

        return SimpleNamespace(zero_=fill)

    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    monkeypatch.setattr(torch.cuda, "synchronize", wait)
    monkeypatch.setattr(torch.cuda, "Event", fake.Event)
    monkeypatch.setattr(torch.cuda, "Stream", lambda: fake.stream_object)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: fake.stream_object)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: fake.inside("stream"))
    monkeypatch.setattr(torch.cuda, "CUDAGraph", fake.CUDAGraph)
    monkeypatch.setattr(torch.cuda, "graph", lambda graph: fake.inside("capture"))
    monkeypatch.setattr(torch.cuda, "get_sync_debug_mode", lambda: "as it was")
    monkeypatch.setattr(torch.cuda, "set_sync_debug_mode", lambda mode: fake.log.append(f"waiting: {mode}"))
    monkeypatch.setattr(torch, "empty", empty)
    return fake


def test_on_cuda_only_the_call_counts_and_every_call_finds_the_cache_cold(cuda: FakeCuda) -> None:
    clock = clock_of(torch.device("cuda"))
    assert isinstance(clock, EventClock)
    durations = iter((1.0, 2.0, 6.0))

    def act() -> None:
        cuda.now += next(durations)

    assert clock(act, 3) == pytest.approx(3.0)
    assert cuda.filled == 3
    assert cuda.waited == 1


def test_a_capture_is_warmed_up_on_a_stream_of_its_own(cuda: FakeCuda) -> None:
    replay = captured(lambda: cuda.log.append("call"))
    trial = ["waiting: error", "call", "waiting: as it was"]
    warm_up = ["wait", "stream begins", "call", "call", "call", *trial, "stream ends", "wait"]
    assert cuda.log == [*warm_up, "capture begins", "call", "capture ends"]
    replay()
    assert cuda.log[-1] == "replay"


def test_nothing_is_captured_of_what_waits_for_the_device(cuda: FakeCuda) -> None:
    """A capture that fails spoils what comes after it: the allocator and the random numbers go on capturing."""

    def waits() -> None:
        if cuda.log[-1] == "waiting: error":
            raise RuntimeError("called a synchronizing CUDA operation")

    with pytest.raises(RuntimeError, match="synchronizing"):
        captured(waits)
    assert "capture begins" not in cuda.log
    assert "waiting: as it was" in cuda.log


def test_what_a_graph_reads_lives_as_long_as_its_replay(cuda: FakeCuda) -> None:
    """A graph knows tensors by their addresses, and the next capture gives unused memory back to the driver."""
    x = torch.zeros(2)
    read = weakref.ref(x)
    replay = captured(x.sum)
    del x
    gc.collect()
    assert read() is not None
    replay()
    del replay
    gc.collect()
    assert read() is None

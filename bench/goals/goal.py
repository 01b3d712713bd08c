"""What a table of goals is made of: workloads, the sides of each, and what is asked of ours.

A side is a factory of a module, called after the same seed as all the others, so that ours, the reference and the exact
one have the same parameters.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch
from torch import nn

from mumoe_fast.bench.report import quantity

# Beside the directions of `bench.step`:
REPLAY = "forward, CUDA graph"  # the same call, captured and replayed
MEMORY = "peak memory"  # of a step
PARAMETERS = "parameters"
SIZES = {
    MEMORY: "peak_bytes",
    PARAMETERS: "parameter_bytes",
}  # directions of bytes and their names in a record; no time

Factory = Callable[[], nn.Module]


@dataclass(frozen=True)
class Goal:
    """What is asked of ours, beside a peer or alone; a limit of None asks nothing.

    Attributes:
        kind: "faster": at least `limit` times faster than the peer; "within": at most `limit` times its cost; "at
            most": `limit` seconds, whatever others take.
        peer: the side that it is about; ours for "at most".
        gemm: asked only where the native kernels use this GEMM.
    """

    kind: Literal["faster", "within", "at most"]
    peer: str
    limit: float | None
    gemm: str | None = None

    def figure(self, ours: float, theirs: float) -> float:
        """What the limit is held against."""
        return {"faster": theirs / ours, "within": ours / theirs, "at most": ours}[self.kind]

    def met(self, figure: float) -> bool | None:
        """Whether that is enough; None where nothing is asked."""
        if self.limit is None:
            return None
        return figure >= self.limit if self.kind == "faster" else figure <= self.limit

    def written(self, figure: float) -> str:
        """A figure with its unit: a ratio, or seconds."""
        return quantity(figure, "s") if self.kind == "at most" else f"{figure:.3g}×"

    def __str__(self) -> str:
        if self.limit is None:
            return ""
        return f"{'≥' if self.kind == 'faster' else '≤'} {self.written(self.limit)}"


def faster(peer: str, limit: float | None, gemm: str | None = None) -> Goal:
    """At least `limit` times faster than a peer."""
    return Goal("faster", peer, limit, gemm)


def within(peer: str, limit: float | None, gemm: str | None = None) -> Goal:
    """At most `limit` times a peer's time or memory."""
    return Goal("within", peer, limit, gemm)


def at_most(ours: str, seconds: float) -> Goal:
    """At most so many seconds a call."""
    return Goal("at most", ours, seconds)


@dataclass(frozen=True)
class Workload:
    """Our side, its peers and its exact counterpart on one input, and the goals of each direction.

    Attributes:
        name: unique with the dtype.
        dtype: of parameters and input.
        input_size: (T, I).
        impl: the implementation that ours is, by which it is called in tables and records.
        ours: our side.
        exact: the same by the reference, which is evaluated in float64.
        peers: the others by name.
        goals: by direction.
        gemm: of the native kernels in float32; None: as chosen by the library.
        calls: timed together, where one is too short for the clock.
        inputs: that a call is repeated on, one after the other, so that none is found in a cache; the time is one's.
        host_clock: on a GPU, time calls as the host sees them, launches and all, and not what the device does alone.
    """

    name: str
    dtype: torch.dtype
    input_size: tuple[int, int]
    impl: str
    ours: Factory
    exact: Factory
    peers: Mapping[str, Factory]
    goals: Mapping[str, tuple[Goal, ...]]
    gemm: str | None = None
    calls: int = 1
    inputs: int = 1
    host_clock: bool = False

    def asked(self, direction: str, gemm: str | None) -> tuple[Goal, ...]:
        """The goals of a direction, on the GEMM that the native kernels use."""
        return tuple(goal for goal in self.goals[direction] if goal.gemm in (None, gemm))

    @property
    def dtype_name(self) -> str:
        """The dtype without torch's prefix."""
        return str(self.dtype).removeprefix("torch.")


def compiled(factory: Factory) -> Factory:
    """A side under torch.compile."""
    return partial(_compiled, factory)


def _compiled(factory: Factory) -> nn.Module:
    module: nn.Module = torch.compile(factory())  # type: ignore[assignment]
    return module

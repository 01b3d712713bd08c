"""Crossovers: from which size on the vendor's GEMM contracts faster than our kernel does on the way."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from typing import Any

import torch

from mumoe_fast.bench.measure import Clock, interleaved_seconds, quantile
from mumoe_fast.bench.report import quantity
from mumoe_fast.bench.suite.timing import Action
from mumoe_fast.bench.tune.entries import KERNEL, NEVER, contracting, replaced, table
from mumoe_fast.bench.tune.search import JUDGED_TOKENS, judged
from mumoe_fast.kernels.configs import Crossover, From, architecture
from mumoe_fast.testing import trials
from mumoe_fast.testing.trials import Trial

CALLS, BURSTS = 5, 7
N = 64  # experts, whose contraction stays in the kernel on either side
BY_VENDOR = Crossover(From(1, 2 * N), From(1, 2 * N))


@dataclass(frozen=True)
class Contest:
    """A field of a crossover, and forward passes of several sizes that show where it lies.

    Attributes:
        table: a mapping of crossovers by architecture in a module of `kernels.configs`.
        way: "plain" or "activated".
        field: which of its two, "tokens" or "contracted".
        sizes: ascending.
        make: one of `testing.trials`.
        option: what has the size.
        options: the other sizes.
    """

    table: str
    way: str
    field: str
    sizes: tuple[int, ...]
    make: Callable[..., Trial]
    option: str
    options: Mapping[str, Any]

    @property
    def name(self) -> str:
        """The table and the field."""
        return f"{self.table} {self.way}.{self.field}"

    def trial(self, size: int, device: torch.device, tokens: int | None = None) -> Trial:
        """The work of a size, on fewer tokens if told so."""
        options = {**self.options, self.option: size}
        if tokens is not None:
            options["T"] = min(tokens, options["T"])
        torch.manual_seed(0)
        return replace(self.make(torch.bfloat16, device, **options), backward=False)

    def current(self, architecture: str) -> Crossover:
        """What the library uses."""
        found: Crossover = table(self.table)[architecture]
        return found

    def using(self, architecture: str, crossover: Crossover) -> AbstractContextManager[None]:
        """The library with another crossover in this place."""
        return replaced(self.table, architecture, crossover)


@dataclass(frozen=True)
class Crossing:
    """What came of a contest: the seconds of the kernel and of the vendor at every size."""

    contest: Contest
    kernel: tuple[float, ...]
    vendor: tuple[float, ...]

    @property
    def size(self) -> int:
        """The least size from which on the vendor was faster at all."""
        least = NEVER
        for size, kernel, vendor in zip(reversed(self.contest.sizes), reversed(self.kernel), reversed(self.vendor)):
            if vendor >= kernel:
                break
            least = size
        return least

    def after(self, before: Crossover) -> Crossover:
        """The crossover with what was found."""
        one: From = getattr(before, self.contest.way)
        return before._replace(**{self.contest.way: one._replace(**{self.contest.field: self.size})})

    def __str__(self) -> str:
        """For the terminal."""
        times = ", ".join(
            f"{size}: {quantity(kernel, 's')} / {quantity(vendor, 's')}"
            for size, kernel, vendor in zip(self.contest.sizes, self.kernel, self.vendor)
        )
        return f"{self.contest.name}: {'never' if self.size == NEVER else self.size} (kernel / vendor: {times})"

    def record(self, architecture: str) -> dict[str, object]:
        """Plain data."""
        return {
            "table": self.contest.table,
            "field": f"{self.contest.way}.{self.contest.field}",
            "architecture": architecture,
            "sizes": list(self.contest.sizes),
            "before": getattr(getattr(self.contest.current(architecture), self.contest.way), self.contest.field),
            "after": self.size,
            "seconds": {"kernel": list(self.kernel), "vendor": list(self.vendor)},
        }


def contest(each: Contest, device: torch.device, clock: Clock) -> Crossing:
    """Time both sides in turns at every size; a side that is wrong or does not run counts as endless."""
    rows = [_both(each, size, device, clock) for size in each.sizes]
    kernel, vendor = zip(*rows)
    return Crossing(each, tuple(kernel), tuple(vendor))


def _both(each: Contest, size: int, device: torch.device, clock: Clock) -> tuple[float, float]:
    """Seconds by the kernel and by the vendor."""
    actions: dict[str, Action] = {}
    for side, crossover in (("kernel", KERNEL), ("vendor", BY_VENDOR)):
        with contracting(architecture(device), crossover):
            try:
                few, many = each.trial(size, device, JUDGED_TOKENS), each.trial(size, device)
                actions[side] = _placed(judged(few, many, replay=device.type == "cuda"), crossover, device)
            except Exception:  # of the compiler, of the driver, or of the rule
                continue
    taken = interleaved_seconds(actions, bursts=BURSTS, repeats=CALLS, clock=clock)
    kernel, vendor = (quantile(taken[side], 0.5) if side in taken else float("inf") for side in ("kernel", "vendor"))
    return kernel, vendor


def _placed(action: Action, crossover: Crossover, device: torch.device) -> Action:
    """The action, with every contraction in its place also when it runs; a replay has it there already."""

    def run() -> object:
        with contracting(architecture(device), crossover):
            return action()

    return action if device.type == "cuda" else run


_MANY: dict[str, Any] = {"T": 24_576, "I": 768, "O": 768, "N": (N,), "share": 0.05}
_LONG = (*(256, 512, 768, 1024), *(1536, 2048, 3072))
_TOKENS = (16, 32, 64, 128, 256, 512, 1024, 4096)
CONTESTS = tuple(
    Contest(name, way, field, sizes, make, option, _MANY | {"R": R, "activation": activation} | longer)
    for name, make, R in (
        ("contraction.CP_VENDOR", trials.cp, 552),
        ("contraction.RING_VENDOR", trials.tensor_ring, (4, 4, 144)),
    )
    for way, activation in (("plain", "none"), ("activated", "gelu"))
    for field, sizes, option, longer in (
        ("contracted", _LONG, "I", {}),
        ("tokens", _TOKENS, "T", {"I": 3072}),
    )
)

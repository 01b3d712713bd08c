"""What moved between two runs: further than the spread of the bursts, and further than a threshold.

A latency moved if the spans from p20 to p80 do not overlap and the medians differ by more than the threshold; a peak of
memory, which has no spread, if it differs by more than that. Slower or larger is a regression, and so is an
implementation that was measured and now is refused. What only one of the two files has is named and not judged: the
runs may have been of different rows.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from mumoe_fast.bench.suite.records import Latency, Record

Key = tuple[str, ...]


@dataclass(frozen=True)
class Change:
    """One figure of one row that moved; without figures, the row was refused."""

    key: Key
    metric: str
    before: float | None
    after: float | None
    reason: str = ""

    @property
    def ratio(self) -> float:
        """After by before; infinite where there is no figure any more."""
        if self.before is None or self.after is None:
            return float("inf")
        return self.after / self.before

    @property
    def regression(self) -> bool:
        """Whether it got worse."""
        return self.ratio > 1


@dataclass(frozen=True)
class Comparison:
    """Two runs: the changes, worst first, and what keeps the runs from being alike."""

    changes: Sequence[Change]
    compared: int
    only_before: Sequence[Key]
    only_after: Sequence[Key]
    differences: Sequence[str]

    @property
    def regressions(self) -> list[Change]:
        """What got worse."""
        return [change for change in self.changes if change.regression]


def compare(before: Sequence[Record], after: Sequence[Record], threshold: float) -> Comparison:
    """Hold one run against another; `threshold` is the share by which a figure may move (0.05 for 5 %).

    Predictions are left out: nothing in them was measured.
    """
    old, new = ({record.key: record for record in run if not record.predicted} for run in (before, after))
    both = [key for key in old if key in new]
    changes = [change for key in both for change in _changes(old[key], new[key], threshold)]
    return Comparison(
        changes=sorted(changes, key=lambda change: -change.ratio),
        compared=len(both),
        only_before=[key for key in old if key not in new],
        only_after=[key for key in new if key not in old],
        differences=_differences(before[0], after[0]) if before and after else [],
    )


def _changes(old: Record, new: Record, threshold: float) -> Iterator[Change]:
    if old.refused is None and new.refused is not None:
        yield Change(old.key, "refused", None, None, new.refused)
    for metric, latency_of in LATENCIES.items():
        was, now = latency_of(old), latency_of(new)
        if was is not None and now is not None and _apart(was, now) and _far(was.p50, now.p50, threshold):
            yield Change(old.key, metric, was.p50, now.p50)
    if old.peak_bytes and new.peak_bytes and _far(old.peak_bytes, new.peak_bytes, threshold):
        yield Change(old.key, PEAK, old.peak_bytes, new.peak_bytes)


LATENCIES: Mapping[str, Callable[[Record], Latency | None]] = {
    "latency": lambda record: record.latency,
    "CUDA graph": lambda record: record.graph_latency,
}
PEAK = "peak memory"


def _apart(a: Latency, b: Latency) -> bool:
    return a.p80 < b.p20 or b.p80 < a.p20


def _far(before: float, after: float, threshold: float) -> bool:
    """Whether either is more than the threshold above the other."""
    return max(before, after) > (1 + threshold) * min(before, after)


def _differences(before: Record, after: Record) -> list[str]:
    """What of machine and versions differs, a sentence each."""
    found = []
    for old, new in ((before.run.machine, after.run.machine), (before.run.versions, after.run.versions)):
        for name in sorted(old.keys() | new.keys()):
            was, now = old.get(name, "none"), new.get(name, "none")
            if was != now:
                found.append(f"{name}: {was}, then {now}")
    return found

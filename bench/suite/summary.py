"""The run in one table, to be pasted into a README or an issue: ours beside the best of every rival, and the ratio."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import groupby
from pathlib import Path

from mumoe_fast.bench import markdown
from mumoe_fast.bench.report import quantity
from mumoe_fast.bench.suite.records import Record, measured
from mumoe_fast.bench.suite.rivals import Rivals, fastest

RIVALS = ("dense", "reference", "dense MoE", "sparse MoE")
COLUMNS = ("workload", "ours", *RIVALS, "time × dense", "time × reference", "memory × dense")


def write_summary(records: Sequence[Record], path: Path) -> None:
    """Write the table and what it was measured on."""
    path.write_text(summary(records), encoding="utf-8")


def summary(records: Sequence[Record]) -> str:
    """A row per workload, dtype, direction and factorisation that ours was measured on."""
    here = measured(records)
    if not here:
        return "Nothing was measured.\n"
    run = here[0].run
    where = [run.machine.get("device", ""), *(f"{name} {version}" for name, version in run.versions.items())]
    return f"{', '.join(filter(None, where))}; {run.date[:10]}\n\n" + markdown.table(COLUMNS, _rows(here))


def _rows(records: Sequence[Record]) -> Iterator[tuple[str, ...]]:
    rivals = Rivals(records)
    for place, group in groupby(records, key=lambda record: (record.workload, record.dtype, record.direction)):
        rows = list(group)
        dense = fastest(rows, "dense")
        for factorization in dict.fromkeys(row.factorization for row in rows if row.kind == "ours"):
            alike = [row for row in rows if row.factorization in (factorization, None)]
            ours = fastest(alike, "ours")
            if ours is None:
                continue
            best = (fastest(alike, kind) for kind in RIVALS)
            memory = None if dense is None or not dense.peak_bytes else (ours.peak_bytes or 0) / dense.peak_bytes
            yield (
                ", ".join(place),
                f"{ours.implementation} {_seconds(ours)}",
                *map(_seconds, best),
                *map(_times, (rivals.times_dense(ours), rivals.times_reference(ours), memory)),
            )


def _seconds(record: Record | None) -> str:
    return "" if record is None or record.seconds is None else quantity(record.seconds, "s")


def _times(ratio: float | None) -> str:
    return "" if ratio is None else f"{ratio:.2f}"

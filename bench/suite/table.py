"""The records as tables for people, and below them what was left out and why."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from itertools import groupby

from rich import box
from rich.console import Console
from rich.table import Table

from mumoe_fast.bench.report import quantity
from mumoe_fast.bench.suite.compare import PEAK, Change, Comparison
from mumoe_fast.bench.suite.records import Record, measured

COLUMNS = ("implementation", "median", "spread", "× dense", "× floor", "memory")
LEGEND = (
    "Medians of calls in turns, on the same input and in random order; spread: from the 20th to the 80th percentile of "
    "their bursts, as a share of the median; × dense: by the dense layer's median; × floor: by the least time that the "
    "machine's copy bandwidth and GEMM rate allow; memory: the most that one call holds beyond parameters and input. "
    "forward: without gradients; forward+backward: with those of the input and of every parameter."
)


def show(records: Sequence[Record], console: Console) -> None:
    """Print a table per comparison, then the reasons."""
    for title, rows in _comparisons(measured(records)):
        table = Table(
            *COLUMNS, title=title, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD, pad_edge=False
        )
        for column in table.columns:
            column.no_wrap = True
        for column in table.columns[1:]:
            column.justify = "right"
        for row in rows:
            table.add_row(*row)
        console.print(table)
    console.print(LEGEND, style="dim", highlight=False)
    for (name, reason), workloads in left_out(records).items():
        console.print(f"left out: {name}: {reason} ({'; '.join(workloads)})", style="yellow", markup=False)
    for record in records:
        if record.wrong:
            where = f"{record.workload}, {record.dtype}, {record.direction}"
            console.print(f"WRONG {record.implementation}: {record.refused} ({where})", style="bold red", markup=False)


def _comparisons(records: Sequence[Record]) -> Iterator[tuple[str, list[tuple[str, ...]]]]:
    """A title and rows for every workload, dtype and direction."""
    for (workload, dtype, direction), group in groupby(records, key=lambda r: (r.workload, r.dtype, r.direction)):
        rows = list(group)
        dense = next((row.seconds for row in rows if row.kind == "dense"), None)
        yield f"{workload}, {dtype}, {direction}", [_cells(row, dense) for row in rows]


def _cells(record: Record, dense: float | None) -> tuple[str, ...]:
    latency = record.latency
    assert latency is not None
    return (
        record.implementation,
        quantity(latency.p50, "s"),
        f"{(latency.p80 - latency.p20) / latency.p50:.0%}",
        _times(None if dense is None else latency.p50 / dense),
        _times(record.over_floor),
        _if(record.peak_bytes, lambda peak: quantity(peak, "B")),
    )


def left_out(records: Sequence[Record]) -> dict[tuple[str, str], list[str]]:
    """What cannot run here: implementation and reason, with the workloads."""
    found: dict[tuple[str, str], list[str]] = defaultdict(list)
    for record in records:
        if record.refused is not None and not record.wrong:
            workloads = found[record.implementation, record.refused]
            if record.workload not in workloads:
                workloads.append(record.workload)
    return found


def _times(ratio: float | None) -> str:
    return _if(ratio, lambda value: f"{value:.3g}×")


def _if(value: float | None, text: Callable[[float], str]) -> str:
    return "" if value is None else text(value)


def show_comparison(comparison: Comparison, console: Console) -> None:
    """Print what moved, worst first, and what is to be known about it."""
    for difference in comparison.differences:
        console.print(f"The runs differ in {difference}", style="yellow", markup=False, highlight=False)
    if comparison.changes:
        table = Table("", "figure", "before", "after", "ratio", box=box.SIMPLE_HEAD, pad_edge=False)
        for change in comparison.changes:
            table.add_row(*_change_cells(change), style="red" if change.regression else "green")
        console.print(table)
    for what, keys in (("first", comparison.only_before), ("second", comparison.only_after)):
        if keys:
            console.print(f"{len(keys)} rows are in the {what} run only, e.g. {_row_name(keys[0])}", style="dim")
    better = len(comparison.changes) - len(comparison.regressions)
    console.print(f"{comparison.compared} rows compared: {len(comparison.regressions)} worse, {better} better")


def _change_cells(change: Change) -> tuple[str, ...]:
    if change.before is None or change.after is None:
        return _row_name(change.key), change.metric, "measured", change.reason, ""
    before, after = (quantity(value, "B" if change.metric == PEAK else "s") for value in (change.before, change.after))
    return _row_name(change.key), change.metric, before, after, f"{change.ratio:.2f}×"


def _row_name(key: Sequence[str]) -> str:
    return ", ".join(part for part in key if part)

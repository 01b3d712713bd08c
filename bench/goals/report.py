"""What was measured, as a table for people and as JSON lines for programs."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping

from rich import box
from rich.console import Console
from rich.table import Table

from mumoe_fast.bench.goals.goal import SIZES
from mumoe_fast.bench.goals.measure import Comparison, Measurement, Outcome
from mumoe_fast.bench.report import quantity

HEADERS = ("workload, against", "direction", "each", "ratio", "goal", "met")
MET = {True: "yes", False: "no", None: ""}
LEGEND = (
    "Medians of calls in turns, on the same inputs and in random order, and their ratio; in brackets quartiles of the "
    "ratio turn by turn. forward: without gradients; forward+backward: gradients of the input and of every parameter; "
    "CUDA graph: the same call captured and replayed; peak memory: what one such step holds beyond parameters and "
    "input, on a CPU in a process of its own; its matrix products alone: linear layers of the sizes that ours "
    "multiplies, by torch's GEMM, without gate, experts or activation. ≥: how many times faster; ≤: our share of their "
    "time or memory, or seconds."
)


def table_rows(outcome: Outcome) -> Iterator[tuple[str, ...]]:
    """The table's rows of one outcome: our side, then every goal, most of them beside a peer."""
    workload, direction = outcome.workload, outcome.direction
    name = f"{workload.name}, {workload.dtype_name}"
    unit = "B" if direction in SIZES else "s"
    if outcome.refused is not None:
        yield name, direction, "refused", "", "", ""
        return

    def median(side: str) -> str:
        return quantity(outcome.measurements[side].quantile(0.5), unit)

    yield name, direction, median(workload.impl), "", "", ""
    compared = {comparison.goal: comparison for comparison in outcome.comparisons}
    for goal in outcome.goals:
        if goal not in compared:
            yield f"  {goal.peer}", "", "cannot run", "", str(goal), ""
        elif goal.peer == workload.impl:
            yield "  alone", "", "", "", str(goal), MET[compared[goal].met]
        else:
            figures = ratio(compared[goal], with_spread=direction not in SIZES)
            yield f"  {goal.peer}", "", median(goal.peer), figures, str(goal), MET[compared[goal].met]


def ratio(comparison: Comparison, with_spread: bool) -> str:
    """The figure that the goal is about, with its quartiles where it has any."""
    spread = f" [{comparison.low:.3g}–{comparison.high:.3g}]" if with_spread else ""
    return comparison.goal.written(comparison.figure) + spread


def show(outcomes: list[Outcome], console: Console) -> None:
    """The table, and below it what was refused or is missing and why."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, collapse_padding=True)
    for header in HEADERS:
        first = header == HEADERS[0]
        table.add_column(header, justify="left" if first or header == "direction" else "right", no_wrap=not first)
    for outcome in outcomes:
        for place, row in enumerate(table_rows(outcome)):
            table.add_row(*row, style="bold" if place == 0 else None)
        table.add_section()
    console.print(table)
    console.print(LEGEND, style="dim", highlight=False)
    for outcome in outcomes:
        where = f"{outcome.workload.name}, {outcome.workload.dtype_name}, {outcome.direction}"
        if outcome.refused is not None:
            console.print(f"{where}: {outcome.refused}", style="bold red", markup=False, highlight=False)
        for peer, reason in (outcome.missing or {}).items():
            console.print(f"{where}: {peer} cannot run: {reason}", style="yellow", markup=False, highlight=False)


def records(outcome: Outcome, facts: Mapping[str, str]) -> Iterator[dict[str, object]]:
    """One record per measurement, or one that says why there is none; goals go with our side."""
    common: dict[str, object] = {
        "workload": outcome.workload.name,
        "direction": outcome.direction,
        "dtype": outcome.workload.dtype_name,
        "gemm": outcome.gemm,
    }
    if outcome.refused is not None:
        yield common | {"implementation": outcome.workload.impl, "refused": outcome.refused, **facts}
    for measurement in outcome.measurements.values():
        ours = {"error_of_allowance": max(v.of_allowance for v in outcome.verdicts), "goals": goals(outcome)}
        yield (
            common
            | {"implementation": measurement.implementation}
            | figures(measurement, outcome.direction)
            | (ours if measurement.implementation == outcome.workload.impl else {})
            | dict(facts)
        )
    for peer, reason in (outcome.missing or {}).items():
        yield common | {"implementation": peer, "refused": f"cannot run: {reason}", **facts}


def figures(measurement: Measurement, direction: str) -> dict[str, object]:
    """Seconds a call, or bytes."""
    if direction in SIZES:
        return {SIZES[direction]: int(measurement.values[0])}
    seconds = {f"p{round(q * 100)}": measurement.quantile(q) for q in (0.2, 0.5, 0.8)}
    return {**seconds, "minimum": min(measurement.values), "bursts": len(measurement.values), "unit": "s"}


def goals(outcome: Outcome) -> list[dict[str, object]]:
    """Every goal beside its figure."""
    return [
        {
            "peer": one.goal.peer,
            "goal": str(one.goal),
            "ratio": one.figure,
            "quartiles": [one.low, one.high],
            "met": one.met,
        }
        for one in outcome.comparisons
    ]


def json_lines(outcomes: list[Outcome], facts: Mapping[str, str]) -> str:
    """All records, one a line."""
    return "".join(
        json.dumps(record, ensure_ascii=False) + "\n" for outcome in outcomes for record in records(outcome, facts)
    )

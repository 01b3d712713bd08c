"""What was measured, as a table for people and as JSON lines for programs."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping

from rich import box
from rich.console import Console
from rich.table import Table

from mumoe_fast.bench.cpu.measure import Measurement, Outcome
from mumoe_fast.bench.cpu.workloads import MEMORY, OURS
from mumoe_fast.bench.report import quantity

HEADERS = ("workload, against", "direction", "each", "ratio", "goal", "met")
MET = {True: "yes", False: "no", None: ""}
LEGEND = (
    "Medians of calls in turns, on the same inputs and in random order, and their ratio; in brackets quartiles of the "
    "ratio turn by turn. forward: without gradients; forward+backward: gradients of the input and of every parameter; "
    "peak memory: what one such step holds beyond parameters and input, in a process of its own; its matrix products "
    "alone: linear layers of the sizes that ours multiplies, by torch's GEMM, without gate, experts or activation. ≥: "
    "how many times faster; ≤: our share of their time or memory."
)


def dtype_name(outcome: Outcome) -> str:
    """The workload's dtype without torch's prefix."""
    return str(outcome.workload.dtype).removeprefix("torch.")


def table_rows(outcome: Outcome) -> Iterator[tuple[str, ...]]:
    """The table's rows of one outcome: our side, then every goal's peer."""
    name, direction = f"{outcome.workload.name}, {dtype_name(outcome)}", outcome.direction
    unit = "B" if direction == MEMORY else "s"
    if outcome.refused is not None:
        yield name, direction, "refused", "", "", ""
        return
    yield name, direction, quantity(outcome.measurements[OURS].quantile(0.5), unit), "", "", ""
    compared = {comparison.goal: comparison for comparison in outcome.comparisons}
    for goal in outcome.goals:
        peer = f"  {goal.peer}"
        if goal not in compared:
            yield peer, "", "cannot run", "", str(goal), ""
            continue
        one = compared[goal]
        theirs = quantity(outcome.measurements[goal.peer].quantile(0.5), unit)
        spread = "" if direction == MEMORY else f" [{one.low:.3g}–{one.high:.3g}]"
        yield peer, "", theirs, f"{one.ratio:.3g}×{spread}", str(goal), MET[one.met]


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
        where = f"{outcome.workload.name}, {dtype_name(outcome)}, {outcome.direction}"
        if outcome.refused is not None:
            console.print(f"{where}: {outcome.refused}", style="bold red", markup=False, highlight=False)
        for peer, reason in (outcome.missing or {}).items():
            console.print(f"{where}: {peer} cannot run: {reason}", style="yellow", markup=False, highlight=False)


def records(outcome: Outcome, facts: Mapping[str, str]) -> Iterator[dict[str, object]]:
    """One record per measurement, or one that says why there is none; goals go with our side."""
    common: dict[str, object] = {
        "workload": outcome.workload.name,
        "direction": outcome.direction,
        "dtype": dtype_name(outcome),
        "gemm": outcome.gemm,
    }
    if outcome.refused is not None:
        yield common | {"implementation": OURS, "refused": outcome.refused, **facts}
    for measurement in outcome.measurements.values():
        ours = {"error_of_allowance": max(v.of_allowance for v in outcome.verdicts), "goals": goals(outcome)}
        yield (
            common
            | {"implementation": measurement.implementation}
            | figures(measurement, outcome.direction)
            | (ours if measurement.implementation == OURS else {})
            | dict(facts)
        )
    for peer, reason in (outcome.missing or {}).items():
        yield common | {"implementation": peer, "refused": f"cannot run: {reason}", **facts}


def figures(measurement: Measurement, direction: str) -> dict[str, object]:
    """Seconds a call, or bytes."""
    if direction == MEMORY:
        return {"peak_bytes": int(measurement.values[0])}
    seconds = {f"p{round(q * 100)}": measurement.quantile(q) for q in (0.2, 0.5, 0.8)}
    return {**seconds, "minimum": min(measurement.values), "bursts": len(measurement.values), "unit": "s"}


def goals(outcome: Outcome) -> list[dict[str, object]]:
    """Every goal beside its figure."""
    return [
        {
            "peer": one.goal.peer,
            "goal": str(one.goal),
            "ratio": one.ratio,
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

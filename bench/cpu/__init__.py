"""How fast the native CPU kernels are here: each workload beside its peers, in turns, after a check of its results.

    python -m mumoe_fast.bench cpu                      # the whole table
    python -m mumoe_fast.bench cpu --only entmax        # the workloads whose name, dtype or direction matches
    python -m mumoe_fast.bench cpu --json cpu.jsonl     # and one record per measurement

`workloads` is the table as data, `measure` how it is filled in, `report` how it is shown.
"""

from __future__ import annotations

import os
import re
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import torch
import typer

if TYPE_CHECKING:
    from mumoe_fast.bench.cpu.measure import Outcome
    from mumoe_fast.bench.cpu.workloads import Workload


def matching(pattern: str, workloads: list[Workload]) -> list[Workload]:
    """The workloads with the directions that a regular expression finds in "name, dtype, direction", any case."""
    chosen = []
    for workload in workloads:
        dtype = str(workload.dtype).removeprefix("torch.")
        goals = {
            direction: goals
            for direction, goals in workload.goals.items()
            if re.search(pattern, f"{workload.name}, {dtype}, {direction}", re.IGNORECASE)
        }
        if goals:
            chosen.append(replace(workload, goals=goals))
    return chosen


def cpu(
    only: Annotated[str, typer.Option(help='A regular expression searched in "workload, dtype, direction".')] = "",
    repeats: Annotated[int, typer.Option(min=1, help="Turns of every side, at most.")] = 30,
    seconds: Annotated[float, typer.Option(min=0, help="After so long three turns are enough for a row.")] = 10.0,
    threads: Annotated[int | None, typer.Option(min=1, help="Threads of PyTorch; as PyTorch chooses.")] = None,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write one JSON record per measurement.")] = None,
) -> None:
    """Time the native CPU kernels against their peers and goals, after checking their results."""
    from rich.console import Console
    from rich.progress import MofNCompleteColumn, Progress, TimeElapsedColumn

    from mumoe_fast.bench.cpu.measure import measure
    from mumoe_fast.bench.cpu.report import json_lines, show
    from mumoe_fast.bench.cpu.workloads import WORKLOADS
    from mumoe_fast.bench.measure import describe_machine

    try:
        workloads = matching(only, WORKLOADS)
    except re.error as error:
        raise typer.BadParameter(f"--only: expected a regular expression, got {only!r}: {error}") from error
    if not workloads:
        raise typer.BadParameter(f"--only: no workload matches {only!r}")
    if threads is not None:
        torch.set_num_threads(threads)
    facts = {
        **dict(describe_machine(torch.device("cpu"))),
        "load before": f"{os.getloadavg()[0]:.1f} processes" if hasattr(os, "getloadavg") else "unknown",
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
    }
    console = Console()
    outcomes: list[Outcome] = []
    with Progress(*Progress.get_default_columns(), MofNCompleteColumn(), TimeElapsedColumn(), console=console) as bar:
        task = bar.add_task("", total=sum(len(workload.goals) for workload in workloads))
        for workload in workloads:

            def begin(what: str, name: str = workload.name) -> None:
                bar.update(task, description=f"{name}: {what}")

            for outcome in measure(workload, repeats=repeats, seconds=seconds, on_start=begin):
                outcomes.append(outcome)
                bar.advance(task)
    show(outcomes, console)
    for name, value in facts.items():
        console.print(f"{name}: {value}", style="dim", markup=False, highlight=False)
    if json_file is not None:
        json_file.write_text(json_lines(outcomes, facts), encoding="utf-8")
    if any(outcome.refused for outcome in outcomes):
        raise typer.Exit(1)

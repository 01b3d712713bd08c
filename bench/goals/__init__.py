"""The tables of goals: each workload beside its peers, in turns, after a check of its results.

    mumoe cpu                      # how fast the native kernels are here: the whole table
    mumoe gpu                      # the same of the Triton kernels, on a GPU
    mumoe cpu --only entmax        # the workloads whose name, dtype or direction matches
    mumoe cpu --json cpu.jsonl     # and one record per measurement

`cpu` and `gpu` are the tables as data, of what `goal` and `sides` have; `measure` is how they are filled in, `report`
how they are shown.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import torch
import typer

if TYPE_CHECKING:
    from rich.console import Console

    from mumoe_fast.bench.goals.goal import Workload
    from mumoe_fast.bench.goals.measure import Outcome

INTERRUPTED = 130  # what a shell says of a command that Ctrl-C ended

Only = Annotated[str, typer.Option(help='A regular expression searched in "workload, dtype, direction".')]
Repeats = Annotated[int, typer.Option(min=1, help="Turns of every side, at most.")]
Seconds = Annotated[float, typer.Option(min=0, help="After so long three turns are enough for a row.")]
JsonFile = Annotated[Path | None, typer.Option("--json", help="Write one JSON record per measurement.")]


def on_cpu(
    only: Only = "",
    repeats: Repeats = 30,
    seconds: Seconds = 10.0,
    threads: Annotated[int | None, typer.Option(min=1, help="Threads of PyTorch; as PyTorch chooses.")] = None,
    json_file: JsonFile = None,
) -> None:
    """Time the native CPU kernels against their peers and goals, after checking their results."""
    from mumoe_fast.bench.goals import cpu

    chosen = _chosen(only, cpu.WORKLOADS)
    if threads is not None:
        torch.set_num_threads(threads)
    _run(chosen, torch.device("cpu"), repeats, seconds, json_file)


def on_gpu(only: Only = "", repeats: Repeats = 30, seconds: Seconds = 5.0, json_file: JsonFile = None) -> None:
    """Time the Triton kernels on the current GPU against their peers and goals, after checking their results."""
    from mumoe_fast.bench.goals import gpu

    chosen = _chosen(only, gpu.WORKLOADS)
    if not torch.cuda.is_available():
        raise typer.BadParameter("expected a GPU, and PyTorch finds none: mumoe cpu has the table of a CPU")
    _run(chosen, torch.device("cuda"), repeats, seconds, json_file)


def matching(pattern: str, workloads: list[Workload]) -> list[Workload]:
    """The workloads with the directions that a regular expression finds in "name, dtype, direction", any case."""
    chosen = []
    for workload in workloads:
        goals = {
            direction: goals
            for direction, goals in workload.goals.items()
            if re.search(pattern, f"{workload.name}, {workload.dtype_name}, {direction}", re.IGNORECASE)
        }
        if goals:
            chosen.append(replace(workload, goals=goals))
    return chosen


def _chosen(only: str, workloads: list[Workload]) -> list[Workload]:
    try:
        chosen = matching(only, workloads)
    except re.error as error:
        raise typer.BadParameter(f"--only: expected a regular expression, got {only!r}: {error}") from error
    if not chosen:
        raise typer.BadParameter(f"--only: no workload matches {only!r}")
    return chosen


def _run(workloads: list[Workload], device: torch.device, repeats: int, seconds: float, json_file: Path | None) -> None:
    """Measure, show and write; the file grows with every outcome, so that an end before the last keeps the others."""
    from rich.console import Console

    from mumoe_fast.bench.goals.report import json_lines, show

    facts = _facts(device)
    console, interrupted = Console(), False
    outcomes: list[Outcome] = []
    try:
        for outcome in _measure(workloads, device, repeats, seconds, console):
            outcomes.append(outcome)
            if json_file is not None:
                json_file.write_text(json_lines(outcomes, facts), encoding="utf-8")
    except KeyboardInterrupt:
        interrupted = True
        console.print("Interrupted: what follows was measured until then", style="yellow")
    show(outcomes, console)
    for name, value in facts.items():
        console.print(f"{name}: {value}", style="dim", markup=False, highlight=False)
    if any(outcome.refused for outcome in outcomes):
        raise typer.Exit(1)
    if interrupted:
        raise typer.Exit(INTERRUPTED)


def _measure(
    workloads: list[Workload], device: torch.device, repeats: int, seconds: float, console: Console
) -> Iterator[Outcome]:
    """Outcomes one by one, beside a progress bar."""
    from rich.progress import MofNCompleteColumn, Progress, TimeElapsedColumn

    from mumoe_fast.bench.goals.measure import measure

    with Progress(*Progress.get_default_columns(), MofNCompleteColumn(), TimeElapsedColumn(), console=console) as bar:
        task = bar.add_task("", total=sum(len(workload.goals) for workload in workloads))
        for workload in workloads:

            def begin(what: str, name: str = workload.name) -> None:
                bar.update(task, description=f"{name}: {what}")

            for outcome in measure(workload, repeats=repeats, seconds=seconds, device=device, on_start=begin):
                bar.advance(task)
                yield outcome


def _facts(device: torch.device) -> dict[str, str]:
    """What the numbers were measured on, with and when."""
    from mumoe_fast.bench.measure import describe_machine
    from mumoe_fast.ops.dispatch import triton_version

    facts = dict(describe_machine(device))
    if device.type == "cuda":
        facts |= {"CUDA": str(torch.version.cuda), "triton": str(triton_version())}
    facts["load before"] = f"{os.getloadavg()[0]:.1f} processes" if hasattr(os, "getloadavg") else "unknown"
    facts["date"] = datetime.now(UTC).isoformat(timespec="seconds")
    return facts

"""Whole training steps and whole runs, dense beside μMoE.

    mumoe bench training speed       # GPT-2's steps: tokens per second and memory
    mumoe bench training losses      # a small GPT's losses at equal steps, on real text

`workloads` says what is trained, `steps` and `runs` measure, `report` shows.
"""

from __future__ import annotations

import os
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import torch
import typer

from mumoe_fast.bench.training.workloads import Precision, Shape, sides

if TYPE_CHECKING:
    from mumoe_fast.bench.training.steps import Result

training = typer.Typer(no_args_is_help=True, help="Training steps and runs, dense beside μMoE.")


def facts() -> dict[str, str]:
    """What the figures were measured on, with and when."""
    from mumoe_fast.bench.measure import describe_machine

    return {
        **dict(describe_machine(torch.device("cpu"))),
        "load before": f"{os.getloadavg()[0]:.1f} processes" if hasattr(os, "getloadavg") else "unknown",
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
    }


@training.command()
def speed(
    precision: Annotated[
        list[Precision] | None, typer.Option(help="autocast or bfloat16 (parameters too); repeatable; both.")
    ] = None,
    context: Annotated[int, typer.Option(min=2, help="Tokens of a step.")] = Shape.context,
    turns: Annotated[int, typer.Option(min=1, help="Steps of every model, at most.")] = 20,
    seconds: Annotated[
        float, typer.Option(min=0, help="For the steps of one model; after so long three turns are enough.")
    ] = 60.0,
    threads: Annotated[int | None, typer.Option(min=1, help="Threads of PyTorch; as PyTorch chooses.")] = None,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write one JSON record per model.")] = None,
) -> None:
    """Time whole training steps of GPT-2 124M on the CPU: dense, CP and TR, natively and by the reference.

    All models are in memory at once: 12 GB with float32 parameters.
    """
    from rich.console import Console
    from rich.progress import Progress, TimeElapsedColumn

    from mumoe_fast.bench.training.report import json_lines, show
    from mumoe_fast.bench.training.steps import measure

    if threads is not None:
        torch.set_num_threads(threads)
    machine, console = facts(), Console()
    results: list[Result] = []
    with Progress(*Progress.get_default_columns(), TimeElapsedColumn(), console=console) as bar:
        task = bar.add_task("", total=None)
        for one in dict.fromkeys(precision or list(Precision)):
            results += measure(
                sides(),
                Shape(context=context),
                one,
                turns=turns,
                seconds=seconds,
                on_start=lambda what: bar.update(task, description=what),
            )
            if json_file is not None:
                json_file.write_text(json_lines(results, machine), encoding="utf-8")
    show(results, console)
    for name, value in machine.items():
        console.print(f"{name}: {value}", style="dim", markup=False, highlight=False)
    if any(result.refused for result in results):
        raise typer.Exit(1)

"""Whole training steps and whole runs, dense beside μMoE.

    mumoe bench training speed       # GPT-2's steps: tokens per second and memory
    mumoe bench training losses      # a small GPT's losses at equal steps, on real text

`workloads` says whose steps are timed, `steps` times them and `report` shows them; `runs` is about losses.
"""

from __future__ import annotations

import json
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

    All five models are in memory at once, with their optimisers: 1.5 GB each where parameters are float32.
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


@training.command()
def losses(
    minutes: Annotated[float, typer.Option(min=0.01, help="Of training, all models together.")] = 10.0,
    steps: Annotated[int | None, typer.Option(min=1, help="Steps of each model, in place of --minutes.")] = None,
    text: Annotated[
        Path | None, typer.Option(exists=True, dir_okay=False, help="A text; without it CPython's own reference.")
    ] = None,
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    out: Annotated[
        Path, typer.Option(file_okay=False, help="Where losses.jsonl, losses.svg and report.html go.")
    ] = Path("runs/losses"),
) -> None:
    """Train small GPTs with dense, CP and TR MLPs side by side on real text; Ctrl-C keeps what was measured."""
    from rich.console import Console

    from mumoe_fast.bench.charts import standalone
    from mumoe_fast.bench.training.runs import compare_losses, curves, page, record, show

    machine, console = facts(), Console()
    found = compare_losses(minutes=minutes, steps=steps, device=device, text=text, console=console)
    show(found, console)
    out.mkdir(parents=True, exist_ok=True)
    lines = [json.dumps(record(run, found, machine), ensure_ascii=False) + "\n" for run in found.runs]
    (out / "losses.jsonl").write_text("".join(lines), encoding="utf-8")
    (out / "report.html").write_text(page(found, machine), encoding="utf-8")
    drawn = standalone(curves(found))
    if drawn is not None:
        (out / "losses.svg").write_text(drawn, encoding="utf-8")
    console.print(f"Written: {', '.join(map(str, sorted(out.glob('*.*'))))}", markup=False, highlight=False)

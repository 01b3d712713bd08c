"""The benchmark suite: μMoE layers beside everything that could stand in their place, on this machine.

    mumoe bench                       # the quick suite: minutes
    mumoe bench --suite full          # everything, for a GPU or a patient CPU
    mumoe bench compare OLD NEW       # what moved between two runs
    mumoe bench paper                 # the paper's tables by this library's counts
    mumoe bench training              # training steps and runs, dense beside μMoE

`workloads` and `implementations` say what is compared, as data; `check` refuses what is wrong, `run` measures,
`records` is what it writes, and `table`, `summary` and `html` show it.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from enum import StrEnum
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import torch
import typer

from mumoe_fast.bench.paper import paper
from mumoe_fast.bench.training import training

if TYPE_CHECKING:
    from rich.console import Console

    from mumoe_fast.bench.suite.implementations import Case
    from mumoe_fast.bench.suite.records import Record

bench = typer.Typer(invoke_without_command=True, help="Time μMoE layers beside everything that could replace them.")


bench.command("paper")(paper)
bench.add_typer(training, name="training")


class SuiteName(StrEnum):
    """How much is measured."""

    QUICK = "quick"
    FULL = "full"


INTERRUPTED = 130  # what a shell says of a command that Ctrl-C ended
SECONDS = {SuiteName.QUICK: 0.5, SuiteName.FULL: 10.0}  # of calls, for all sides of one comparison


@bench.callback()
def run_suite(
    context: typer.Context,
    suite: Annotated[SuiteName, typer.Option(help="quick takes minutes; full is for a GPU or a patient CPU.")] = (
        SuiteName.QUICK
    ),
    device: Annotated[str | None, typer.Option(help="cpu or cuda; the GPU if there is one.")] = None,
    only: Annotated[
        str, typer.Option(help='A regular expression searched in "workload, implementation, dtype, direction".')
    ] = "",
    impl: Annotated[list[str] | None, typer.Option(help="Ours only by this implementation; repeatable.")] = None,
    seconds: Annotated[
        float | None, typer.Option(min=0, help="Of calls, for all sides of a comparison; as the suite says.")
    ] = None,
    out: Annotated[Path, typer.Option(file_okay=False, help="Where results, summary and report go.")] = Path(
        "runs/bench"
    ),
) -> None:
    """Check, time and weigh the implementations; write results.jsonl, summary.md and report.html."""
    if context.invoked_subcommand is not None:
        return
    from rich.console import Console

    from mumoe_fast.bench.suite.html import write_report
    from mumoe_fast.bench.suite.implementations import cases
    from mumoe_fast.bench.suite.records import write_records
    from mumoe_fast.bench.suite.run import select
    from mumoe_fast.bench.suite.summary import write_summary
    from mumoe_fast.bench.suite.table import show

    place = _device(device)
    try:
        chosen = select(list(cases(suite)), only, _impls(impl))
    except re.error as error:
        raise typer.BadParameter(f"--only: expected a regular expression, got {only!r}: {error}") from error
    if not chosen:
        raise typer.BadParameter(f"--only, --impl: nothing in the {suite} suite matches")
    console, interrupted = Console(), False
    records: list[Record] = []
    out.mkdir(parents=True, exist_ok=True)
    measured = _measure(chosen, place, SECONDS[suite] if seconds is None else seconds, console)
    try:
        for record in write_records(measured, out / "results.jsonl"):
            records.append(record)
    except KeyboardInterrupt:
        interrupted = True
        console.print("Interrupted: what follows was measured until then", style="yellow")
        if not records:
            raise typer.Exit(INTERRUPTED) from None
    show(records, console)
    write_summary(records, out / "summary.md")
    write_report(records, out / "report.html")
    written = ", ".join(str(out / name) for name in ("results.jsonl", "summary.md", "report.html"))
    console.print(f"Written: {written}", markup=False, highlight=False)
    if any(record.wrong for record in records):
        raise typer.Exit(1)
    if interrupted:
        raise typer.Exit(INTERRUPTED)


def _measure(cases: list[Case], device: torch.device, seconds: float, console: Console) -> Iterator[Record]:
    """Measurements, then predictions, one by one, beside a progress bar."""
    from rich.progress import MofNCompleteColumn, Progress, TimeElapsedColumn

    from mumoe_fast.bench.suite.run import run

    def begin(what: str) -> None:
        bar.update(task, description=what)

    with Progress(*Progress.get_default_columns(), MofNCompleteColumn(), TimeElapsedColumn(), console=console) as bar:
        task = bar.add_task("", total=len(cases))
        for record in run(cases, device, seconds=seconds, on_start=begin):
            bar.advance(task)
            yield record
        if find_spec("triton") is None:
            console.print("No predictions for GPUs: Triton is not installed", style="yellow")
            return
        from mumoe_fast.bench.suite.prediction import absent, predict

        begin("predictions for GPUs that are not here")
        yield from predict(cases, record.run, absent(device))


def _device(name: str | None) -> torch.device:
    """The device of that name; without one the GPU, if there is one."""
    if name is None:
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise typer.BadParameter(f"--device: expected cpu or cuda, got {name!r}") from error
    if device.type not in ("cpu", "cuda"):
        raise typer.BadParameter(f"--device: expected cpu or cuda, got {name!r}")
    if device.type == "cuda" and not torch.cuda.is_available():
        raise typer.BadParameter("--device: expected a device that is here, got cuda, and PyTorch finds no GPU")
    return device


def _impls(names: list[str] | None) -> list[str]:
    from mumoe_fast.ops.dispatch import IMPLEMENTATIONS

    known = [name for name in IMPLEMENTATIONS if name not in ("auto", "reference")]  # neither is a side of ours
    for name in names or ():
        if name not in known:
            raise typer.BadParameter(f"--impl: expected {' or '.join(known)}, got {name}")
    return names or []


@bench.command("compare")
def compare_runs(
    before: Annotated[Path, typer.Argument(metavar="A", help="The older results.jsonl, or its directory.")],
    after: Annotated[Path, typer.Argument(metavar="B", help="The newer one.")],
    threshold: Annotated[float, typer.Option(min=0, help="By how much a figure may move: 0.05 is 5 %.")] = 0.05,
) -> None:
    """Show what moved beyond the spread; exit with 1 if anything got worse by more than the threshold."""
    from rich.console import Console

    from mumoe_fast.bench.suite.compare import compare
    from mumoe_fast.bench.suite.records import RecordError, read_records
    from mumoe_fast.bench.suite.table import show_comparison

    try:
        old, new = (read_records(path / "results.jsonl" if path.is_dir() else path) for path in (before, after))
    except RecordError as error:
        raise typer.BadParameter(str(error)) from error
    comparison = compare(old, new, threshold)
    show_comparison(comparison, Console())
    if comparison.regressions:
        raise typer.Exit(1)

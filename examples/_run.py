"""A run from its start, or from where it was killed, to its end: the progress bar, the log, the checkpoints, Ctrl-C."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from threading import Event
from types import FrameType
from typing import TYPE_CHECKING, Any, TypeVar

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from mumoe_fast.examples._checkpoints import Checkpoints, write_through
from mumoe_fast.examples._training import Record, Trainer

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

LOG = "log.jsonl"
C = TypeVar("C", bound="DataclassInstance")


def fit(
    trainer: Trainer[Any], *, out: Path | None = None, settings: Mapping[str, Any] | None = None, console: Console
) -> Mapping[str, float]:
    """Train to the end of the schedule or to Ctrl-C, and show how it goes.

    Args:
        trainer: what to train; every process calls this with its own.
        out: the run's folder, for checkpoints and `log.jsonl`, one record a line. A run that has a checkpoint there
            goes on from it. None: nothing is kept.
        settings: configurations beside the trainer's own, frozen dataclasses by name, that must be the same then.
        console: to print to, in the first process.

    Returns:
        The task's figures on all of what is held out.

    Raises:
        OtherRunError: the folder has a run with another configuration.
    """
    processes, steps = trainer.processes, trainer.config.steps
    console = console if processes.first else Console(quiet=True)
    checkpoints = None if out is None else Checkpoints(out, {"training": trainer.config, **(settings or {})})
    if checkpoints is not None and checkpoints.resume(trainer):
        console.print(f"going on after step {trainer.done} from {out}", markup=False)
    log = Log(out if processes.first else None, trainer.done)
    with catch_interrupt() as interrupted, progress_bar(console) as bar:
        task = bar.add_task("training", total=steps, completed=trainer.done, note="")
        for record in trainer:
            log.write(record)
            bar.update(task, completed=record.step, note=note(record, trainer.task.unit))
            if record.figures:
                bar.console.print(f"step {record.step}: {named(record.figures)}", highlight=False)
            stop = processes.any(interrupted.is_set())
            due = trainer.done % trainer.config.checkpoint_every == 0 or trainer.done == steps
            if checkpoints is not None and (due or stop):
                checkpoints.save(trainer)
            if stop:
                break
    figures = trainer.evaluate(complete=True)
    console.print(f"after {trainer.done} of {steps} steps, on all that is held out: {named(figures)}", highlight=False)
    if out is not None:
        console.print(f"checkpoints and {LOG} are in {out}", markup=False)
    return figures


class Log:
    """The records of a run, one line of JSON each, those of `done` steps kept; without a folder it keeps nothing."""

    def __init__(self, folder: Path | None, done: int) -> None:
        self._path = None if folder is None else folder / LOG
        if self._path is None:
            return
        self._path.parent.mkdir(parents=True, exist_ok=True)
        # What a killed run wrote after its last checkpoint is trained again, and written again.
        lines = self._path.read_text(encoding="utf-8").splitlines(keepends=True) if self._path.exists() else []
        kept = [line for line in lines if line.endswith("\n") and json.loads(line)["step"] <= done]
        shortened = self._path.with_suffix(".unfinished")
        write_through(shortened, "".join(kept))
        os.replace(shortened, self._path)

    def write(self, record: Record) -> None:
        """Append a record."""
        if self._path is not None:
            with self._path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(asdict(record)) + "\n")


def read_log(folder: Path) -> list[Record]:
    """The records of a run."""
    return [Record(**json.loads(line)) for line in (folder / LOG).read_text(encoding="utf-8").splitlines()]


def note(record: Record, unit: str) -> str:
    """What stands beside the bar."""
    return f"loss {record.loss:.3f}  {record.units_per_second:,.0f} {unit}/s  {record.peak_bytes / 1e6:,.0f} MB"


def named(figures: Mapping[str, float]) -> str:
    """Figures in one line."""
    return ", ".join(f"{name} {value:.4f}" for name, value in figures.items())


def overridden(config: C, **given: Any) -> C:
    """The configuration with whatever was given: is not None."""
    return replace(config, **{name: value for name, value in given.items() if value is not None})


@contextmanager
def usage_errors(*kinds: type[Exception]) -> Iterator[None]:
    """End a command with the message of these exceptions, and without their traceback."""
    try:
        yield
    except kinds as error:
        Console(stderr=True).print(f"Error: {error}", style="red", markup=False, highlight=False)
        raise typer.Exit(2) from error


@contextmanager
def catch_interrupt() -> Iterator[Event]:
    """Inside, the first Ctrl-C (or SIGTERM, as launchers send) sets the event, to be looked at between two steps; the
    second Ctrl-C raises as usual.
    """
    asked = Event()

    def handle(signum: int, frame: FrameType | None) -> None:
        if asked.is_set() and signum == signal.SIGINT:
            raise KeyboardInterrupt
        asked.set()

    previous = {number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield asked
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def progress_bar(console: Console) -> Progress:
    """A bar with steps, times and whatever the task's `note` says."""
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}"),
        console=console,
    )

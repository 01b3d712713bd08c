"""Trains small GPTs with dense, CP and TR MLPs of as many parameters, step by step together on the same real text.

All have taken equally many steps whenever it ends, whether by itself or by Ctrl-C.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from rich import box
from rich.console import Console
from rich.table import Table

from mumoe_fast.bench import report as html
from mumoe_fast.bench.charts import Axis, Plot, chart
from mumoe_fast.bench.demo import affordable_steps, start_training, train_together
from mumoe_fast.bench.demo_result import loss_curves, running_mean
from mumoe_fast.bench.report import Markup
from mumoe_fast.examples._run import catch_interrupt
from mumoe_fast.examples._tokens import Corpus
from mumoe_fast.examples._training import Record, TrainConfig, count_parameters
from mumoe_fast.examples.train_gpt import MLP, SIZES, ModelConfig

KINDS: Mapping[str, MLP] = {"dense": "dense", "CP": "cp", "TR": "tr"}
PATIENCE = 1.2  # training ends early when it takes that many times longer than the trial promised
HEADERS = ("MLPs", "parameters", "steps", "tokens/s", "training loss", "held-out loss", "against dense")
LEGEND = (
    "Next-byte prediction on the same batches in the same order, from one seed; what another seed would change was not "
    "measured. Training loss: its running mean at the end. Held-out loss: nats per byte on all of the held-out text. "
    "tokens/s: the mean over the run, the models taking turns step by step."
)
CURVES = "Training loss is a running mean, drawn from a twentieth of the steps on."


@dataclass(frozen=True)
class Run:
    """What became of one model."""

    name: str
    model: ModelConfig
    parameters: int
    records: Sequence[Record]
    held_out: float  # nats per token, on all of it

    @property
    def training_loss(self) -> float:
        """Its running mean at the end."""
        return running_mean([record.loss for record in self.records])[-1]


@dataclass(frozen=True)
class Losses:
    """Runs of equal length side by side, of as many steps as were asked for unless it was stopped."""

    training: TrainConfig
    text: tuple[int, int]  # tokens to train on, and held out
    runs: Sequence[Run]

    @property
    def done(self) -> int:
        """Steps of every model."""
        return len(self.runs[0].records)

    @property
    def interruption(self) -> str | None:
        """What to say of a run that was stopped early."""
        if self.done == self.training.steps:
            return None
        return f"Training was stopped after {self.done} of {self.training.steps} steps; all that follows is for those."


def compare_losses(
    *,
    minutes: float,
    steps: int | None = None,
    device: str = "cpu",
    text: Path | None = None,
    console: Console,
    model: ModelConfig | None = None,
    training: TrainConfig | None = None,
) -> Losses:
    """Train all models together, to the end of the schedule, Ctrl-C or 1.2 times the minutes.

    Args:
        minutes: of training, all models together; ignored where `steps` is given.
        steps: of each model; None is as many as a short trial says fit into `minutes`.
        device: "cpu" or "cuda".
        text: a text file; None is the Python reference that CPython carries.
        console: to print to.
        model: the GPT's shape; its `mlp` is set here. None is the smallest of the example's.
        training: the optimiser and the batches; its `steps` and `evaluate_every` are set here.
    """
    tiny, short = SIZES["tiny"]
    shape, config = model or tiny, training or short
    corpus, place = Corpus.load(text), torch.device(device)
    shapes = {name: replace(shape, mlp=mlp) for name, mlp in KINDS.items()}
    timed = steps is None
    if steps is None:
        console.print("Timing a few steps …")
        trial = {name: start_training(one, corpus, config, place) for name, one in shapes.items()}
        steps = affordable_steps(trial, 60 * minutes)
    config = replace(config, steps=steps, evaluate_every=math.ceil(steps / 12))
    trainers = {name: start_training(one, corpus, config, place) for name, one in shapes.items()}
    console.print(f"{', '.join(KINDS)}: {steps} steps of {config.batch} × {shape.context} tokens. Ctrl-C stops early.")
    with catch_interrupt() as interrupted:
        limit = 60 * minutes * PATIENCE if timed else math.inf
        records = train_together(trainers, console, interrupted, limit)
    console.print("Evaluating on all of the held-out text …")
    runs = [
        Run(
            name,
            shapes[name],
            count_parameters(trainer.task.model),
            records[name],
            trainer.evaluate(complete=True)["held_out"],
        )
        for name, trainer in trainers.items()
    ]
    return Losses(config, (len(corpus.train), len(corpus.held_out)), runs)


def rows(losses: Losses) -> list[tuple[str, ...]]:
    """One line for each model."""
    dense = losses.runs[0].held_out
    return [
        (
            run.name,
            f"{run.parameters:,}",
            f"{len(run.records):,}",
            f"{run.records[-1].units_per_second:,.0f}",
            f"{run.training_loss:.4f}",
            f"{run.held_out:.4f}",
            "" if run is losses.runs[0] else f"{run.held_out / dense - 1:+.2%}",
        )
        for run in losses.runs
    ]


def show(losses: Losses, console: Console) -> None:
    """The table, on the console."""
    if losses.interruption:
        console.print(losses.interruption, style="bold yellow", highlight=False)
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, collapse_padding=True)
    for place, header in enumerate(HEADERS):
        table.add_column(header, justify="right" if place else "left")
    for row in rows(losses):
        table.add_row(*row)
    console.print(table)
    console.print(LEGEND, style="dim", highlight=False)


def curves(losses: Losses) -> Markup:
    """The losses over the steps."""
    plot = Plot(loss_curves({run.name: run.records for run in losses.runs}), Axis("step"), Axis("nats per byte"))
    return chart(plot, title="Loss curves")


def page(losses: Losses, facts: Mapping[str, str]) -> str:
    """The table and the curves, as a page of HTML."""
    model, training = losses.runs[0].model, losses.training
    lead = (
        f"GPTs of {model.layers} layers and width {model.width} with MLPs of as many parameters, μMoE ones of "
        f"{model.experts} experts, trained side by side: {losses.done} steps of {training.batch} × {model.context} "
        f"bytes; {losses.text[0]:,} bytes of text to train on and {losses.text[1]:,} held out."
    )
    return html.page(
        "Losses at equal steps",
        html.paragraph(lead, "lead"),
        *([html.paragraph(losses.interruption, "warning")] if losses.interruption else []),
        html.section("Results", html.card(html.table(HEADERS, rows(losses))), html.paragraph(LEGEND, "note")),
        html.section("Loss", html.card(curves(losses)), html.paragraph(CURVES, "note")),
        html.section("Machine", html.card(html.definitions(list(facts.items())))),
    )


def record(run: Run, losses: Losses, facts: Mapping[str, str]) -> dict[str, object]:
    """One model, with every step's loss."""
    return {
        "workload": "losses at equal steps",
        "model": run.name,
        "shape": asdict(run.model),
        "training": asdict(losses.training),
        "parameters": run.parameters,
        "steps": losses.done,
        "tokens_per_second": run.records[-1].units_per_second,
        "held_out": run.held_out,
        "training_losses": [record.loss for record in run.records],
        "held_out_losses": {record.step: record.figures["held_out"] for record in run.records if record.figures},
        **facts,
    }

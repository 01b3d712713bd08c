"""Options that the examples' commands share."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from mumoe_fast.examples._processes import Strategy
from mumoe_fast.examples._training import Precision

Accumulate = Annotated[int | None, typer.Option(help="Micro-batches that a step is computed in.")]
LearningRate = Annotated[float | None, typer.Option(help="The highest.")]
PrecisionOption = Annotated[Precision | None, typer.Option(help="auto: bfloat16 on a GPU that has it.")]
EvaluateEvery = Annotated[int | None, typer.Option(help="Steps between evaluations on what is held out.")]
CheckpointEvery = Annotated[int | None, typer.Option(help="Steps between checkpoints (with --out).")]
Parallel = Annotated[
    Strategy, typer.Option(help="Under torchrun: ddp copies the model, fsdp shards it over the samples' processes.")
]
TensorParallel = Annotated[int, typer.Option(help="Processes that share the rank of every expert layer.")]
Device = Annotated[str | None, typer.Option(help="cpu or cuda; without it, a GPU if there is one.")]
Out = Annotated[
    Path | None,
    typer.Option(help="The run's folder: checkpoints and log. A run that was stopped there goes on by itself."),
]

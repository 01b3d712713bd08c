"""A run that kills its own process, of which nothing is left but its files."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor
from toy_task import Regression

from mumoe_fast.examples import _checkpoints
from mumoe_fast.examples._run import fit
from mumoe_fast.examples._training import TrainConfig, Trainer

CONFIG = TrainConfig(steps=20, batch=4, accumulate=2, learning_rate=1e-2, evaluate_every=5, checkpoint_every=4)


class Killed(Regression):
    """Dies in the middle of the step that uses a given sample."""

    def __init__(self, sample: int | None) -> None:
        super().__init__(dropout=0.2)
        self.sample = sample

    def batch(self, samples: range) -> Tensor:
        if self.sample is not None and self.sample in samples:
            die()
        return super().batch(samples)


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def die_in_the_middle_of_a_file(state: dict[str, Any], *, checkpoint_id: Path, no_dist: bool) -> None:
    """A checkpoint of which a part is on the disk."""
    whole = checkpoint_id.with_name("whole")
    torch.distributed.checkpoint.save(state, checkpoint_id=whole, no_dist=no_dist)
    for file in whole.iterdir():
        (checkpoint_id / file.name).write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    die()


def main(folder: Path, place: str) -> None:
    """Train, and die at `place`: "writing" or "renaming" a checkpoint, in the step of that number, or nowhere."""
    torch.set_num_threads(1)
    if place == "writing":
        _checkpoints.save_state = die_in_the_middle_of_a_file  # type: ignore[assignment]
    if place == "renaming":
        Path.rename = lambda self, target: die()  # type: ignore[method-assign,assignment,return-value]
    task = Killed(CONFIG.batch * int(place) + 3 if place.isdigit() else None)
    fit(Trainer(task, CONFIG), out=folder, console=Console(quiet=True))

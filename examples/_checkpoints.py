"""Checkpoints of a run that may be killed at any moment: what is there under its own name is complete.

A checkpoint is a folder that `torch.distributed.checkpoint` has written, so that any number of processes can read it,
and `run.json` with the steps done and the configurations. It is written under another name beside its own, flushed to
the disk and renamed, which happens as a whole or not at all.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import warnings
from collections.abc import Mapping
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_state_dict,
    set_model_state_dict,
    set_state_dict,
)
from torch.distributed.checkpoint.state_dict_loader import load as load_state
from torch.distributed.checkpoint.state_dict_saver import save as save_state

from mumoe_fast.examples._training import Trainer

KEEP = 2  # complete checkpoints; an older one is of use only where the newest turns out to be a mistake
_COMPLETE = re.compile(r"step-(\d+)")
_OPTIONS = StateDictOptions(flatten_optimizer_state_dict=True)  # by name, however parameters are grouped


class OtherRunError(ValueError):
    """A folder has a run that was configured differently."""


class Checkpoints:
    """The checkpoints of one run.

    Args:
        folder: of the run; created where it is missing.
        settings: the run's configurations, frozen dataclasses by name; a run goes on with the same ones alone, but for
            fields with `compare=False`.
    """

    def __init__(self, folder: Path, settings: Mapping[str, Any]) -> None:
        self.folder, self.settings = folder, settings

    def save(self, trainer: Trainer[Any]) -> None:
        """Write one, together with the trainer's other processes, and drop those that are too old."""
        final = self.folder / f"step-{trainer.done:08d}"
        if final.exists():
            return
        unfinished = final.with_suffix(".unfinished")
        trainer.processes.first_does(lambda: _make_empty(unfinished))
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "torch.distributed is disabled")  # in one process it says so every time
            save_state(_state(trainer), checkpoint_id=unfinished, no_dist=trainer.processes.mesh is None)
        trainer.processes.first_does(lambda: self._finish(unfinished, final, trainer))

    def resume(self, trainer: Trainer[Any]) -> bool:
        """Bring the trainer to the newest complete checkpoint; False where there is none.

        Raises:
            OtherRunError: it is of another configuration.
        """
        newest = newest_checkpoint(self.folder)
        if newest is None:
            return False
        run = _read_run(newest)
        _check_same(self.settings, run["settings"], newest)
        state = _state(trainer)
        _read(newest, state, no_dist=trainer.processes.mesh is None)
        set_state_dict(
            trainer.model,
            trainer.optimizer,
            model_state_dict=state["model"],
            optim_state_dict=state["optimizer"],
            options=_OPTIONS,
        )
        trainer.done, trainer.seconds = run["done"], run["seconds"]
        return True

    def _finish(self, unfinished: Path, final: Path, trainer: Trainer[Any]) -> None:
        settings = {name: asdict(setting) for name, setting in self.settings.items()}
        run = {"done": trainer.done, "seconds": trainer.seconds, "settings": settings}
        write_through(unfinished / "run.json", json.dumps(run, indent=2))
        _flush(unfinished)
        unfinished.rename(final)
        _flush(self.folder)
        for old in complete_checkpoints(self.folder)[:-KEEP]:
            shutil.rmtree(old)
        for leftover in self.folder.glob("step-*.unfinished"):
            shutil.rmtree(leftover)


def complete_checkpoints(folder: Path) -> list[Path]:
    """Those in a run's folder, oldest first; what a killed process left unfinished is not among them."""
    return sorted(path for path in folder.glob("step-*") if _COMPLETE.fullmatch(path.name))


def newest_checkpoint(folder: Path) -> Path | None:
    """The newest complete checkpoint in a run's folder."""
    complete = complete_checkpoints(folder)
    return complete[-1] if complete else None


def read_settings(checkpoint: Path) -> dict[str, dict[str, Any]]:
    """The configurations that a checkpoint was saved with, by name."""
    settings: dict[str, dict[str, Any]] = _read_run(checkpoint)["settings"]
    return settings


def read_model(checkpoint: Path, model: nn.Module) -> None:
    """Give a model, whole and in one process, the parameters and buffers of a checkpoint."""
    state = {"model": get_model_state_dict(model)}
    _read(checkpoint, state, no_dist=True)
    set_model_state_dict(model, state["model"])


def write_through(path: Path, text: str) -> None:
    """Write a file and wait until the disk has it."""
    with path.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def _read_run(checkpoint: Path) -> dict[str, Any]:
    run: dict[str, Any] = json.loads((checkpoint / "run.json").read_text(encoding="utf-8"))
    return run


def _read(checkpoint: Path, state: dict[str, Any], *, no_dist: bool) -> None:
    """Fill the tensors of `state` with what a checkpoint holds, however many processes wrote it."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is disabled")
        load_state(state, checkpoint_id=checkpoint, no_dist=no_dist)


def _state(trainer: Trainer[Any]) -> dict[str, Any]:
    model, optimizer = get_state_dict(trainer.model, trainer.optimizer, options=_OPTIONS)
    return {"model": model, "optimizer": optimizer}


def _check_same(settings: Mapping[str, Any], saved: Mapping[str, Mapping[str, Any]], checkpoint: Path) -> None:
    for name, setting in settings.items():
        mine = json.loads(json.dumps(asdict(setting)))  # as it would be read
        theirs = saved.get(name, {})
        for compared in (f.name for f in fields(setting) if f.compare):
            if mine[compared] != theirs.get(compared):
                raise OtherRunError(
                    f"{name}.{compared}: expected {theirs.get(compared)!r} as in {checkpoint}, got {mine[compared]!r}; "
                    "another run needs another folder"
                )


def _make_empty(folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)


def _flush(folder: Path) -> None:
    """Wait until the disk has the folder's entries."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)

"""Checks of the trainer in four processes: what one process computes on all the samples."""

from __future__ import annotations

from dataclasses import replace
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from torch.distributed.device_mesh import init_device_mesh

from mumoe_fast.examples._checkpoints import Checkpoints
from mumoe_fast.examples._processes import Processes, Strategy
from mumoe_fast.examples._tokens import Corpus
from mumoe_fast.examples._training import TrainConfig, Trainer
from mumoe_fast.examples.train_gpt import ModelConfig, TextTask, build_model

SHAPE = ModelConfig(experts=6, impl="reference", layers=2, heads=2, width=32, context=16)
TRAINING = TrainConfig(steps=4, batch=8, learning_rate=3e-3, clip=0.5)
CORPUS = Corpus(np.random.default_rng(0).integers(0, 40, 4000, dtype=np.uint8))


def trainer(shape: ModelConfig, training: TrainConfig, processes: Processes | None = None) -> Trainer[TextTask]:
    return Trainer(TextTask(build_model(shape, "cpu", 0), shape, CORPUS), training, processes)


def arranged(strategy: Strategy, data: int, tensor: int) -> Processes:
    mesh = init_device_mesh("cpu", (data, tensor), mesh_dim_names=("data", "tp"))
    return Processes(torch.device("cpu"), strategy, mesh)


def losses(run: Trainer[TextTask], steps: int | None = None) -> torch.Tensor:
    return torch.tensor([record.loss for record in islice(run, steps)])


def trains_as_one_process(strategy: Strategy, data: int, tensor: int) -> None:
    # Batch norm's statistics are of a micro-batch, over all processes: without accumulation they are the whole batch's.
    for mlp, norm, accumulate in (("cp", "batch", 1), ("tr", "layer", 2)):
        shape = replace(SHAPE, mlp=mlp, norm=norm)  # type: ignore[arg-type]
        expected = losses(trainer(shape, TRAINING))
        run = trainer(shape, replace(TRAINING, accumulate=accumulate), arranged(strategy, data, tensor))
        torch.testing.assert_close(losses(run), expected, rtol=2e-5, atol=0)
        assert expected[-1] < expected[0] - 0.05


def copies_train_as_one_process(_: Path) -> None:
    trains_as_one_process("ddp", 4, 1)


def shards_train_as_one_process(_: Path) -> None:
    trains_as_one_process("fsdp", 4, 1)


def sharded_ranks_train_as_one_process(_: Path) -> None:
    trains_as_one_process("none", 1, 4)


def both_shardings_train_as_one_process(_: Path) -> None:
    trains_as_one_process("fsdp", 2, 2)


def bfloat16_shards_keep_float32(_: Path) -> None:
    run = trainer(SHAPE, replace(TRAINING, precision="bfloat16"), arranged("fsdp", 4, 1))
    expected = losses(trainer(SHAPE, TRAINING))
    found = losses(run)
    torch.testing.assert_close(found, expected, rtol=0.02, atol=0)  # bfloat16 has 8 bits
    assert not torch.equal(found, expected)
    assert {p.dtype for p in run.model.parameters()} == {torch.float32}


def checkpoint_is_written(folder: Path) -> None:
    for name, processes in (("fsdp", arranged("fsdp", 2, 2)), ("ddp", arranged("ddp", 4, 1))):
        run = trainer(SHAPE, TRAINING, processes)
        losses(run, steps=2)
        Checkpoints(folder / name, {"training": TRAINING, "model": SHAPE}).save(run)


def checkpoint_is_read(folder: Path, processes: Processes | None = None) -> None:
    """What four processes wrote goes on in any number of them."""
    expected = losses(trainer(SHAPE, TRAINING))
    for name in ("fsdp", "ddp"):
        run = trainer(SHAPE, TRAINING, processes)
        assert Checkpoints(folder / name, {"training": TRAINING, "model": SHAPE}).resume(run)
        assert run.done == 2
        torch.testing.assert_close(losses(run), expected[2:], rtol=2e-5, atol=0)


def checkpoint_is_read_by_four(folder: Path) -> None:
    checkpoint_is_read(folder, arranged("fsdp", 4, 1))


CHECKS = [
    copies_train_as_one_process,
    shards_train_as_one_process,
    sharded_ranks_train_as_one_process,
    both_shardings_train_as_one_process,
    bfloat16_shards_keep_float32,
    checkpoint_is_written,
    checkpoint_is_read_by_four,
]

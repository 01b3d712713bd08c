"""Training as every example does it: steps of micro-batches, a schedule, evaluations. What is trained is a `Task`.

Which samples a step sees follows from its number, and random numbers drawn in it (dropout) from its number and the
seed. So a run has no state but the model's, the optimiser's and the number of steps done: two models see the same
batches, and a run that stopped goes on as if it had not.
"""

from __future__ import annotations

import resource
import sys
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any, Generic, Literal, Protocol, TypeVar

import torch
from torch import Tensor, nn

from mumoe_fast.examples._optimizer import adamw, clip_gradients, warmed_cosine
from mumoe_fast.examples._processes import Processes

Precision = Literal["auto", "float32", "bfloat16"]
Batch = TypeVar("Batch")
T = TypeVar("T", bound="Task[Any]")


@dataclass(frozen=True)
class TrainConfig:
    """One training run: its length, its batches and its optimiser.

    What is not compared may differ where a run goes on: it changes when something happens, not what is trained.
    """

    steps: int = 300
    batch: int = 4  # samples of a step, over all processes and micro-batches
    accumulate: int = field(default=1, compare=False)  # micro-batches of a step
    learning_rate: float = 1e-3
    final_learning_rate: float = 0.1  # as a share of the highest
    warmup: float = 0.1  # as a share of the steps
    weight_decay: float = 0.1
    betas: tuple[float, float] = (0.9, 0.95)
    clip: float = 1.0
    seed: int = 0
    precision: Precision = "auto"
    evaluate_every: int = field(default=50, compare=False)
    checkpoint_every: int = field(default=100, compare=False)


class Task(Protocol[Batch]):
    """What is trained, and on what."""

    @property
    def model(self) -> nn.Module:
        """The model, on its device; the trainer shards it in place where it is to be sharded."""

    @property
    def blocks(self) -> Iterable[nn.Module]:
        """The parts of the model of which FSDP gathers one at a time."""

    @property
    def unit(self) -> str:
        """What throughput counts: tokens, images."""

    @property
    def units_per_sample(self) -> int:
        """How many of them a sample has."""

    def batch(self, samples: range) -> Batch:
        """The samples of these numbers, counted through the whole run: a function of the numbers (and a seed) alone."""

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        """The mean loss over a batch, computed by calling `model`: the task's own, or what wraps it."""

    def evaluate(self, model: nn.Module, complete: bool) -> Mapping[str, float]:
        """Figures by name, on data held out: all of them if `complete`, else what is worth the time during training.

        Every process calls it and computes the same.
        """


@dataclass(frozen=True)
class Record:
    """What one step reports; `figures` only where it was evaluated."""

    step: int  # steps done
    loss: float
    learning_rate: float
    seconds: float  # spent on steps since the start of the run, evaluation excluded
    units: int  # tokens or images seen since the start
    peak_bytes: int  # of memory held by this process so far
    figures: Mapping[str, float] = field(default_factory=dict)

    @property
    def units_per_second(self) -> float:
        """The mean so far."""
        return self.units / self.seconds


class Trainer(Generic[T]):
    """A task, its optimiser and the number of steps done: iterate to train, stop whenever, iterate again to go on.

    Args:
        task: what to train.
        config: how.
        processes: with whom; None is alone, on the model's device.

    Raises:
        ValueError: the batch cannot be divided evenly over processes and micro-batches.
    """

    def __init__(self, task: T, config: TrainConfig, processes: Processes | None = None) -> None:
        self.task, self.config = task, config
        self.processes = processes or Processes(next(task.model.parameters()).device)
        shares = config.accumulate * self.processes.data_size
        if config.batch % shares:
            raise ValueError(
                f"batch: expected a multiple of {shares}, {config.accumulate} micro-batches in each of "
                f"{self.processes.data_size} processes, got {config.batch}"
            )
        self._share = config.batch // shares
        bfloat16 = uses_bfloat16(config.precision, self.processes.device)
        self.model = self.processes.distribute(task.model, task.blocks, bfloat16=bfloat16)
        self._autocasts = bfloat16 and self.processes.strategy != "fsdp"  # which has a policy of its own
        self.optimizer = adamw(task.model, weight_decay=config.weight_decay, betas=config.betas)
        self.done = 0
        self.seconds = 0.0

    def __iter__(self) -> Iterator[Record]:
        """Train step by step to the end of the schedule, from wherever this trainer is."""
        while self.done < self.config.steps:
            yield self.advance()

    def learning_rate(self, step: int) -> float:
        """Of a step, counted from 0."""
        config = self.config
        return warmed_cosine(
            step, config.steps, highest=config.learning_rate, final=config.final_learning_rate, warmup=config.warmup
        )

    def batch(self, step: int, micro: int = 0) -> Any:
        """This process's share of a step: of its micro-batch `micro`."""
        place = micro * self.processes.data_size + self.processes.data_rank
        first = step * self.config.batch + place * self._share
        return self.task.batch(range(first, first + self._share))

    def loss(self, batch: Any) -> Tensor:
        """The mean loss over a batch, in the precision that was asked for."""
        with self._autocast():
            loss: Tensor = self.task.loss(self.model, batch)
            return loss

    def update(self) -> float:
        """One step: forward, backward, clip, update. Returns its loss, for which it waits for the device."""
        config = self.config
        for group in self.optimizer.param_groups:
            group["lr"] = self.learning_rate(self.done)
        torch.manual_seed((config.seed * 1_000_003 + self.done) * 65_537 + self.processes.data_rank)
        losses = []
        for micro in range(config.accumulate):
            with self.processes.accumulating(self.model, last=micro + 1 == config.accumulate):
                loss = self.loss(self.batch(self.done, micro)) / config.accumulate
                loss.backward()
            losses.append(loss.detach())
        clip_gradients(self.task.model.parameters(), config.clip, self.processes)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.done += 1
        return self.processes.mean(torch.stack(losses).sum()).item()

    def advance(self) -> Record:
        """One step with the clock running, then the evaluation if it is time for one."""
        config, learning_rate = self.config, self.learning_rate(self.done)
        start = time.perf_counter()
        loss = self.update()
        self.seconds += time.perf_counter() - start
        due = self.done % config.evaluate_every == 0 or self.done == config.steps
        return Record(
            step=self.done,
            loss=loss,
            learning_rate=learning_rate,
            seconds=self.seconds,
            units=self.done * config.batch * self.task.units_per_sample,
            peak_bytes=peak_bytes(self.processes.device),
            figures=self.evaluate() if due else {},
        )

    @torch.no_grad()
    def evaluate(self, complete: bool = False) -> Mapping[str, float]:
        """The task's figures, on all of what is held out if `complete`."""
        self.model.eval()
        try:
            with self._autocast():
                figures: Mapping[str, float] = self.task.evaluate(self.model, complete)
                return figures
        finally:
            self.model.train()

    def _autocast(self) -> AbstractContextManager[None]:
        return torch.autocast(self.processes.device.type, torch.bfloat16, enabled=self._autocasts)


def uses_bfloat16(precision: Precision, device: torch.device) -> bool:
    """Whether to compute in it: "auto" does where the hardware multiplies it and kernel launches are cheap (a GPU)."""
    if precision == "auto":
        return device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    return precision == "bfloat16"


def peak_bytes(device: torch.device) -> int:
    """The most memory that this process has held: on a GPU its tensors, on a CPU everything."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    used = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return used if sys.platform == "darwin" else used * 1024


def count_parameters(module: nn.Module) -> int:
    """All numbers that are trained."""
    return sum(p.numel() for p in module.parameters() if p.requires_grad)

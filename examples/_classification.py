"""What the image examples share: labelled data, the order in which a run sees them, the task of telling them apart."""

from __future__ import annotations

import random
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

HELD_OUT = 5  # one sample in so many of every class, where the data do not say which are held out
CHUNK = 250  # samples at a time in evaluation

Batch = tuple[Tensor, Tensor]


class Labelled(Protocol):
    """Samples with labels: `labelled[indices]` gives samples (B, …) in float32 and class numbers (B,)."""

    def __len__(self) -> int: ...

    def __getitem__(self, indices: Tensor) -> Batch: ...


@dataclass(frozen=True)
class Dataset:
    """What is trained on, what is held out, and what the labels mean."""

    train: Labelled
    held_out: Labelled
    classes: tuple[str, ...]

    def __post_init__(self) -> None:
        if not (len(self.train) and len(self.held_out)):
            raise ValueError(
                "data: expected samples to learn from and samples held out (two of a class at least), "
                f"got {len(self.train)} and {len(self.held_out)}"
            )

    @property
    def sample_shape(self) -> torch.Size:
        """Of one sample: (C, H, W) of images, (I,) of features."""
        return self.train[torch.tensor([0])][0].shape[1:]

    def __str__(self) -> str:
        shape = "×".join(map(str, self.sample_shape))
        sizes = f"{len(self.train):,} to learn from and {len(self.held_out):,} held out"
        return f"samples {shape} of {len(self.classes)} classes, {sizes}"


def check_labels(argument: str, labels: object, rows: int) -> Tensor:
    """The labels; ValueError unless they are class numbers for so many rows."""
    found = f"{tuple(labels.shape)} in {labels.dtype}" if isinstance(labels, Tensor) else type(labels).__name__
    if not isinstance(labels, Tensor) or labels.dtype != torch.int64 or labels.shape != (rows,) or not rows:
        raise ValueError(f"{argument}: expected labels ({rows},) in int64, of at least one row, got {found}")
    if labels.min() < 0:
        raise ValueError(f"{argument}: expected labels from 0 on, got {int(labels.min())}")
    return labels


def held_out_rows(labels: Tensor) -> Tensor:
    """A mask of the last fifth of every class: of two samples and more at least one, of one none."""
    mask = torch.zeros(len(labels), dtype=torch.bool)
    for label in labels.unique():
        rows = (labels == label).nonzero().flatten()
        if len(rows) > 1:
            mask[rows[-max(1, len(rows) // HELD_OUT) :]] = True
    return mask


class Order:
    """In which order a run sees `count` samples: every epoch is a new permutation, a function of seed and epoch."""

    def __init__(self, count: int, seed: int) -> None:
        self.count, self.seed = count, seed
        self._epoch, self._permutation = -1, torch.empty(0, dtype=torch.int64)

    def at(self, places: range) -> Tensor:
        """The samples at these places of a run that has no end."""
        found, start = [], places.start
        while start < places.stop:
            epoch, place = divmod(start, self.count)
            found.append(self._of(epoch)[place : place + places.stop - start])
            start += len(found[-1])
        return torch.cat(found)

    def _of(self, epoch: int) -> Tensor:
        if epoch != self._epoch:
            generator = torch.Generator().manual_seed(self.seed * 1_000_003 + epoch)
            self._epoch, self._permutation = epoch, torch.randperm(self.count, generator=generator)
        return self._permutation


@dataclass(frozen=True)
class Augmentation:
    """What is done to images while training. `shift`: in pixels, each way. `mixup`: both parameters of a Beta."""

    shift: int = 0
    mixup: float = 0.0

    def __call__(self, images: Tensor, targets: Tensor, samples: range, seed: int) -> Batch:
        """Images (B, C, H, W) and targets (B, classes): a function of the samples' numbers and the seed."""
        if self.shift:
            images = shifted(images, self.shift, samples, seed)
        if self.mixup:
            share = random.Random(seed * 1_000_003 + samples.start).betavariate(self.mixup, self.mixup)
            images, targets = images.lerp(images.flip(0), share), targets.lerp(targets.flip(0), share)
        return images, targets


def shifted(images: Tensor, pixels: int, samples: range, seed: int) -> Tensor:
    """Every image of (B, C, H, W) moved by up to so many pixels each way; its edge fills what is left free."""
    B, _, H, W = images.shape
    draws = [torch.Generator().manual_seed(seed * 1_000_003 + sample) for sample in samples]
    offsets = torch.stack([torch.randint(-pixels, pixels + 1, (2, 1), generator=draw) for draw in draws], 1)
    dy, dx = offsets  # (B, 1)
    rows, columns = (torch.arange(H) + dy).clamp(0, H - 1), (torch.arange(W) + dx).clamp(0, W - 1)
    moved = images.movedim(1, -1)[torch.arange(B)[:, None, None], rows[:, :, None], columns[:, None, :]]
    return moved.movedim(-1, 1)


class Classification:
    """A `Task` for the trainer: cross entropy on a data set's classes, judged by the accuracy on what is held out.

    Args:
        model: samples (B, …) to logits (B, classes), on its device.
        data: what to learn.
        blocks: the parts of the model of which FSDP gathers one at a time.
        augmentation: of what is trained on.
        seed: of the order of the samples and of the augmentation.
        evaluated: how many held-out samples are worth the time during training, evenly spread; the end takes all.
    """

    unit = "images"
    units_per_sample = 1

    def __init__(
        self,
        model: nn.Module,
        data: Dataset,
        *,
        blocks: Iterable[nn.Module] = (),
        augmentation: Augmentation | None = None,
        seed: int = 0,
        evaluated: int = 1_000,
    ) -> None:
        self.model, self.data, self.blocks = model, data, tuple(blocks)
        self.augmentation, self.seed, self.evaluated = augmentation or Augmentation(), seed, evaluated
        self.device = next(model.parameters()).device
        self._order = Order(len(data.train), seed)

    def batch(self, samples: range) -> Batch:
        """Samples and their targets (B, classes), a distribution over classes each."""
        x, labels = self.data.train[self._order.at(samples)]
        targets = F.one_hot(labels, len(self.data.classes)).float()
        return self.augmentation(x, targets, samples, self.seed)

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        """Cross entropy in nats."""
        x, targets = (part.to(self.device) for part in batch)
        return F.cross_entropy(model(x).float(), targets)

    def evaluate(self, model: nn.Module, complete: bool) -> Mapping[str, float]:
        """Accuracy and loss on what is held out, as it is."""
        total = len(self.data.held_out)
        chosen = torch.linspace(0, total - 1, total if complete else min(total, self.evaluated)).round().long()
        right = loss = torch.zeros((), device=self.device)
        for indices in chosen.split(CHUNK):
            x, labels = (part.to(self.device) for part in self.data.held_out[indices])
            logits = model(x).float()
            right = right + (logits.argmax(-1) == labels).sum()
            loss = loss + F.cross_entropy(logits, labels, reduction="sum")
        return {"accuracy": right.item() / len(chosen), "held-out loss": loss.item() / len(chosen)}

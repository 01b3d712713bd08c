"""The text that the examples learn from: any file, or the English that every CPython carries, as bytes."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor


@dataclass(frozen=True)
class Corpus:
    """A text as bytes (uint8): the last tenth is held out."""

    train: Tensor
    held_out: Tensor

    @classmethod
    def from_bytes(cls, text: bytes) -> Corpus:
        """Split the text."""
        tokens = torch.frombuffer(bytearray(text), dtype=torch.uint8)
        end = len(tokens) * 9 // 10
        return cls(tokens[:end], tokens[end:])

    @classmethod
    def load(cls, path: Path | None = None) -> Corpus:
        """Read a file, or the Python reference that CPython carries (English; it varies with the version)."""
        if path is not None:
            return cls.from_bytes(path.read_bytes())
        from pydoc_data.topics import topics

        return cls.from_bytes("\n\n".join(topics.values()).encode())

    def batch(self, step: int, size: int, context: int, seed: int) -> tuple[Tensor, Tensor]:
        """Inputs and targets (size, context) of one step: a function of seed and step alone."""
        generator = torch.Generator().manual_seed(seed * 1_000_003 + step)
        starts = torch.randint(len(self.train) - context, (size,), generator=generator)
        windows = self.train[starts[:, None] + torch.arange(context + 1)].long()
        return windows[:, :-1], windows[:, 1:]

    def held_out_windows(self, context: int, limit: int | None = None) -> tuple[Tensor, Tensor]:
        """Inputs and targets (windows, context) that tile the held-out text, or `limit` evenly spread ones of them."""
        count = (len(self.held_out) - 1) // context
        x = self.held_out[: count * context].view(count, context).long()
        y = self.held_out[1 : count * context + 1].view(count, context).long()
        if limit is None or limit >= count:
            return x, y
        chosen = torch.linspace(0, count - 1, limit).long()
        return x[chosen], y[chosen]

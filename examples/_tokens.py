"""The text that a language model learns from: a file of tokens, memory-mapped, so that its size does not matter.

Any file is one: its bytes are the tokens. `prepare` writes other tokens, with a description beside them.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from rich.console import Console
from rich.progress import Progress
from torch import Tensor

HELD_OUT_AT_MOST = 2**20  # tokens: enough to measure a loss on, whatever the text's size
CHUNK = 2**20  # bytes of text that are tokenised at once


@dataclass(frozen=True)
class Corpus:
    """Tokens (uint8 or uint16, in memory or mapped), of which the last tenth is held out."""

    tokens: NDArray[Any]
    vocabulary: int = 256

    @property
    def train(self) -> NDArray[Any]:
        """What is trained on."""
        return self.tokens[: len(self.tokens) - len(self.held_out)]

    @property
    def held_out(self) -> NDArray[Any]:
        """What is evaluated on."""
        return self.tokens[len(self.tokens) - min(-(-len(self.tokens) // 10), HELD_OUT_AT_MOST) :]

    @classmethod
    def from_bytes(cls, text: bytes) -> Corpus:
        """A text's bytes."""
        return cls(np.frombuffer(text, np.uint8))

    @classmethod
    def load(cls, path: Path | None = None) -> Corpus:
        """Map a file, or take the Python reference that CPython carries (English; it varies with the version)."""
        if path is None:
            from pydoc_data.topics import topics

            return cls.from_bytes("\n\n".join(topics.values()).encode())
        if not _description(path).exists():
            return cls(np.memmap(path, np.uint8, mode="r"))
        described = Description(**json.loads(_description(path).read_text(encoding="utf-8")))
        return cls(np.memmap(path, described.dtype, mode="r"), described.vocabulary)

    def require(self, context: int) -> None:
        """ValueError where the text is too short to fill a context."""
        if min(len(self.train), len(self.held_out)) <= context:
            raise ValueError(
                f"text: expected more than {10 * (context + 1)} tokens, so that the held-out tenth fills a context of "
                f"{context}, got {len(self.tokens)}"
            )

    def windows(self, samples: range, context: int, seed: int) -> tuple[Tensor, Tensor]:
        """Inputs and targets (samples, context) from anywhere in the text: where follows from seed and number alone."""
        # Philox is a function of a counter: a sample's random number is found without drawing those before it.
        draws = np.random.Philox(key=seed).advance(samples.start).random_raw(4 * len(samples))[::4]
        starts = (draws % np.uint64(len(self.train) - context)).astype(np.int64)
        return _inputs_and_targets(self.train[starts[:, None] + np.arange(context + 1)])

    def held_out_windows(self, context: int, limit: int | None = None) -> tuple[Tensor, Tensor]:
        """Inputs and targets (windows, context) that tile the held-out text, or `limit` evenly spread ones of them."""
        count = (len(self.held_out) - 1) // context
        chosen = np.arange(count) if limit is None or limit >= count else np.linspace(0, count - 1, limit).astype(int)
        return _inputs_and_targets(self.held_out[chosen[:, None] * context + np.arange(context + 1)])


@dataclass(frozen=True)
class Description:
    """What a file of tokens holds; it lies beside the file, with `.json` appended to the name."""

    dtype: str
    vocabulary: int
    tokens: int
    tokenizer: str | None


def prepare(text: Path, out: Path, tokenizer: str | None, console: Console) -> Description:
    """Write a text's tokens.

    Args:
        text: a file, UTF-8 where there is a tokenizer.
        out: overwritten; complete once its description is beside it.
        tokenizer: what `transformers.AutoTokenizer.from_pretrained` takes, such as a folder; None keeps the bytes. The
            text is tokenised in parts that end where lines do.
        console: for the progress bar.

    Raises:
        ValueError: the tokenizer has more tokens than two bytes can tell apart.
    """
    encode, vocabulary = (_bytes, 256) if tokenizer is None else _tokenizer(tokenizer)
    dtype, count = np.dtype("uint8" if vocabulary <= 256 else "uint16"), 0
    _description(out).unlink(missing_ok=True)
    with out.open("wb") as file, Progress(console=console) as bar:
        task = bar.add_task("tokens", total=text.stat().st_size)
        for chunk in _chunks(text):
            tokens = encode(chunk).astype(dtype)
            file.write(tokens.tobytes())
            count += len(tokens)
            bar.advance(task, len(chunk))
    description = Description(dtype.name, vocabulary, count, tokenizer)
    _description(out).write_text(json.dumps(asdict(description)), encoding="utf-8")
    return description


def _bytes(chunk: bytes) -> NDArray[Any]:
    return np.frombuffer(chunk, np.uint8)


def _tokenizer(name: str) -> tuple[Callable[[bytes], NDArray[Any]], int]:
    """What turns UTF-8 into tokens, and how many different ones there are."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(name)
    vocabulary = len(tokenizer)
    if vocabulary > 2**16:
        raise ValueError(f"tokenizer: expected at most {2**16:,} tokens, got {vocabulary:,} of {name}")

    def encode(chunk: bytes) -> NDArray[Any]:
        text = chunk.decode(errors="replace")
        return np.array(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])

    return encode, vocabulary


def _chunks(path: Path) -> Iterator[bytes]:
    """The file in parts of about `CHUNK` bytes that end where lines do."""
    with path.open("rb") as file:
        while chunk := file.read(CHUNK) + file.readline():
            yield chunk


def _description(path: Path) -> Path:
    return path.with_name(path.name + ".json")


def _inputs_and_targets(windows: NDArray[Any]) -> tuple[Tensor, Tensor]:
    tokens = torch.from_numpy(windows.astype(np.int64))
    return tokens[:, :-1], tokens[:, 1:]

"""Train a small GPT on any text, with dense MLPs or with μMoE MLPs of the same parameter count.

    python -m mumoe_fast.examples.train_gpt --mlp cp --experts 64 --steps 300

The swap itself is `make_mlp`. Everything else is an ordinary GPT: bytes as tokens, learned positions, pre-norm blocks,
a head tied to the embedding. A batch depends on the seed and the step alone, so two models see the same batches, and a
run that stopped at a step continues as if it had not.

The optimiser follows the paper's Table 7 (NanoGPT): AdamW with weight decay 0.1 on matrices, warm-up over a small share
of the steps, no dropout. The learning rate is higher and the batch smaller, as suits three million parameters.
"""

from __future__ import annotations

import math
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from threading import Event
from types import FrameType
from typing import Annotated, Literal

import torch
import torch.nn.functional as F
import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from torch import Tensor, nn

from mumoe_fast.examples._text import Corpus
from mumoe_fast.layers import MuMoEMLP

MLP = Literal["dense", "cp"]
Norm = Literal["batch", "layer", "none"]
Precision = Literal["auto", "float32", "bfloat16"]


@dataclass(frozen=True)
class ModelConfig:
    """The GPT's shape, and which MLP its blocks have; `rank=None` matches the dense MLP's parameters.

    The gate's batch norm keeps all experts in use and makes them more specialised (the paper's appendix H.3); in short
    runs a layer-normed gate sends most tokens to a few experts. Its statistics are the batch's while training, all
    positions together, and running ones in evaluation.
    """

    mlp: MLP = "cp"
    experts: int = 64
    rank: int | None = None
    norm: Norm = "batch"
    impl: str = "auto"
    layers: int = 4
    heads: int = 4
    width: int = 256
    context: int = 256
    vocabulary: int = 256


@dataclass(frozen=True)
class TrainConfig:
    """One training run: its length, its batches and its optimiser."""

    steps: int = 300
    batch: int = 4
    learning_rate: float = 1e-3
    final_learning_rate: float = 0.1  # as a share of the highest
    warmup: float = 0.1  # as a share of the steps
    weight_decay: float = 0.1
    betas: tuple[float, float] = (0.9, 0.95)
    clip: float = 1.0
    seed: int = 0
    evaluate_every: int = 50
    evaluate_windows: int = 32
    precision: Precision = "auto"


def make_mlp(config: ModelConfig) -> nn.Module:
    """A block's MLP: the one place where a dense GPT and a μMoE GPT differ."""
    if config.mlp == "dense":
        hidden = 4 * config.width
        return nn.Sequential(nn.Linear(config.width, hidden), nn.GELU(), nn.Linear(hidden, config.width))
    return MuMoEMLP(
        config.width,
        4 * config.width,
        num_experts=config.experts,
        factorization=config.mlp,
        rank=config.rank,
        norm=config.norm,
        impl=config.impl,
    )


class Attention(nn.Module):
    """Causal self-attention."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.heads = config.heads
        self.qkv = nn.Linear(config.width, 3 * config.width)
        self.proj = nn.Linear(config.width, config.width)

    def forward(self, x: Tensor) -> Tensor:
        """x (batch, context, width) to the same."""
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.proj(y.transpose(1, 2).flatten(-2))  # type: ignore[no-any-return]


class Block(nn.Module):
    """A pre-norm transformer block around an attention and an MLP."""

    def __init__(self, width: int, attention: nn.Module, mlp: nn.Module) -> None:
        super().__init__()
        self.attention_norm = nn.LayerNorm(width)
        self.attention = attention
        self.mlp_norm = nn.LayerNorm(width)
        self.mlp = mlp

    def forward(self, x: Tensor) -> Tensor:
        """x (batch, context, width) to the same."""
        x = x + self.attention(self.attention_norm(x))
        return x + self.mlp(self.mlp_norm(x))  # type: ignore[no-any-return]


class GPT(nn.Module):
    """Tokens (batch, context) to logits (batch, context, vocabulary)."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.embedding = nn.Embedding(config.vocabulary, config.width)
        self.positions = nn.Parameter(torch.empty(config.context, config.width))
        nn.init.normal_(self.embedding.weight, std=0.02)
        nn.init.normal_(self.positions, std=0.02)
        attentions = [Attention(config) for _ in range(config.layers)]
        mlps = [make_mlp(config) for _ in range(config.layers)]  # last: one seed gives all else the same start
        self.blocks = nn.ModuleList(
            Block(config.width, attention, mlp) for attention, mlp in zip(attentions, mlps, strict=True)
        )
        self.norm = nn.LayerNorm(config.width)

    def forward(self, tokens: Tensor) -> Tensor:
        """Logits for the byte after each one."""
        x = self.embedding(tokens) + self.positions[: tokens.shape[-1]]
        for block in self.blocks:
            x = block(x)
        return F.linear(self.norm(x), self.embedding.weight)

    @property
    def device(self) -> torch.device:
        """Where the parameters are."""
        return self.positions.device


def build_model(config: ModelConfig, device: torch.device | str, seed: int) -> GPT:
    """The model that `seed` starts with."""
    torch.manual_seed(seed)
    return GPT(config).to(device)


def count_parameters(module: nn.Module) -> int:
    """All trainable numbers."""
    return sum(p.numel() for p in module.parameters())


@dataclass(frozen=True)
class Record:
    """What one step reports; `held_out` only where it was evaluated."""

    step: int  # steps done
    loss: float
    learning_rate: float
    seconds: float  # spent on steps since the start, evaluation excluded
    tokens: int  # seen since the start
    held_out: float | None = None

    @property
    def tokens_per_second(self) -> float:
        """The mean so far."""
        return self.tokens / self.seconds


class Trainer:
    """A model, its optimiser and the number of steps done: iterate to train, stop whenever, iterate again to go on."""

    def __init__(self, model: GPT, corpus: Corpus, config: TrainConfig) -> None:
        shortest = min(len(corpus.train), len(corpus.held_out))
        if shortest <= model.config.context:
            raise ValueError(
                f"text: expected more than {10 * (model.config.context + 1)} bytes, so that the held-out tenth fills a "
                f"context of {model.config.context}, got {len(corpus.train) + len(corpus.held_out)}"
            )
        self.model, self.corpus, self.config = model, corpus, config
        matrices = [p for p in model.parameters() if p.ndim >= 2]
        vectors = [p for p in model.parameters() if p.ndim < 2]
        self.optimizer = torch.optim.AdamW(
            [
                {"params": matrices, "weight_decay": config.weight_decay},
                {"params": vectors, "weight_decay": 0.0},
            ],
            lr=config.learning_rate,
            betas=config.betas,
        )
        self.done = 0
        self.seconds = 0.0

    def __iter__(self) -> Iterator[Record]:
        """Train step by step to the end of the schedule, from wherever this trainer is."""
        while self.done < self.config.steps:
            yield self.advance()

    def learning_rate(self, step: int) -> float:
        """Linear warm-up, then a cosine down to `final_learning_rate`."""
        config = self.config
        warmup = max(1, round(config.warmup * config.steps))
        if step < warmup:
            return config.learning_rate * (step + 1) / warmup
        progress = (step - warmup) / max(1, config.steps - warmup)
        floor = config.final_learning_rate
        return config.learning_rate * (floor + (1 - floor) * (1 + math.cos(math.pi * progress)) / 2)

    def loss(self, x: Tensor, y: Tensor, reduction: str = "mean") -> Tensor:
        """Cross entropy in nats per byte."""
        device = self.model.device
        with torch.autocast(device.type, torch.bfloat16, enabled=uses_bfloat16(self.config.precision, device)):
            logits = self.model(x.to(device))
        return F.cross_entropy(logits.flatten(0, 1).float(), y.to(device).flatten(), reduction=reduction)

    def update(self) -> float:
        """One step: forward, backward, clip, update. Returns its loss, for which it waits for the device."""
        config = self.config
        for group in self.optimizer.param_groups:
            group["lr"] = self.learning_rate(self.done)
        loss = self.loss(*self.corpus.batch(self.done, config.batch, self.model.config.context, config.seed))
        loss.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), config.clip)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.done += 1
        return loss.item()

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
            tokens=self.done * config.batch * self.model.config.context,
            held_out=self.evaluate(config.evaluate_windows) if due else None,
        )

    @torch.no_grad()
    def evaluate(self, windows: int | None = None) -> float:
        """Held-out loss in nats per byte, on all of the held-out text or on that many windows spread over it."""
        self.model.eval()
        x, y = self.corpus.held_out_windows(self.model.config.context, windows)
        total = 0.0
        for chunk in torch.arange(len(x)).split(4 * self.config.batch):
            total += self.loss(x[chunk], y[chunk], reduction="sum").item()
        self.model.train()
        return total / y.numel()


def uses_bfloat16(precision: Precision, device: torch.device) -> bool:
    """Whether to autocast: "auto" does where the hardware multiplies bfloat16 and kernel launches are cheap (a GPU)."""
    if precision == "auto":
        return device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    return precision == "bfloat16"


@contextmanager
def catch_interrupt() -> Iterator[Event]:
    """Inside, the first Ctrl-C sets the event, to be looked at between two steps; the second raises as usual."""
    asked = Event()

    def handle(signum: int, frame: FrameType | None) -> None:
        if asked.is_set():
            raise KeyboardInterrupt
        asked.set()

    previous = signal.signal(signal.SIGINT, handle)
    try:
        yield asked
    finally:
        signal.signal(signal.SIGINT, previous)


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


def save(path: Path, trainer: Trainer, records: list[Record]) -> None:
    """Write what was trained: configurations, weights, optimiser, steps done and every record."""
    torch.save(
        {
            "model_config": asdict(trainer.model.config),
            "train_config": asdict(trainer.config),
            "model": trainer.model.state_dict(),
            "optimizer": trainer.optimizer.state_dict(),
            "done": trainer.done,
            "seconds": trainer.seconds,
            "records": [asdict(record) for record in records],
        },
        path,
    )


def default_device() -> str:
    """The GPU if there is one."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def main(
    text: Annotated[Path | None, typer.Option(help="A text file; without it, the reference CPython carries.")] = None,
    mlp: Annotated[MLP, typer.Option(help="The blocks' MLP.")] = "cp",
    experts: Annotated[int, typer.Option(help="Experts per MLP (μMoE).")] = 64,
    rank: Annotated[int | None, typer.Option(help="Rank (μMoE); without it, as many parameters as dense.")] = None,
    norm: Annotated[Norm, typer.Option(help="The gate's normalisation (μMoE).")] = "batch",
    impl: Annotated[str, typer.Option(help="auto, or an implementation by name (μMoE).")] = "auto",
    layers: int = 4,
    heads: int = 4,
    width: int = 256,
    context: int = 256,
    steps: int = 300,
    batch: int = 4,
    learning_rate: float = TrainConfig.learning_rate,
    evaluate_every: Annotated[int, typer.Option(help="Steps between evaluations on held-out text.")] = 50,
    precision: Annotated[Precision, typer.Option(help="auto: bfloat16 on a GPU that has it.")] = "auto",
    seed: int = 0,
    device: Annotated[str | None, typer.Option(help="cpu or cuda; without it, a GPU if there is one.")] = None,
    out: Annotated[Path | None, typer.Option(help="Where to save the weights, also after Ctrl-C.")] = None,
) -> None:
    """Train a small GPT on bytes, with dense or μMoE MLPs of the same size. Ctrl-C keeps what was trained."""
    console = Console()
    model = build_model(
        ModelConfig(mlp, experts, rank, norm, impl, layers, heads, width, context), device or default_device(), seed
    )
    config = TrainConfig(steps, batch, learning_rate, seed=seed, evaluate_every=evaluate_every, precision=precision)
    trainer = Trainer(model, Corpus.load(text), config)
    console.print(f"{mlp} MLPs, {count_parameters(model):,} parameters, on {model.device}")

    records: list[Record] = []
    with catch_interrupt() as interrupted, progress_bar(console) as bar:
        task = bar.add_task("training", total=steps, note="")
        for record in trainer:
            records.append(record)
            bar.update(task, advance=1, note=f"loss {record.loss:.3f}  {record.tokens_per_second:,.0f} tokens/s")
            if record.held_out is not None:
                bar.console.print(f"step {record.step}: held-out loss {record.held_out:.4f} nats per byte")
            if interrupted.is_set():
                break
    held_out = trainer.evaluate()
    console.print(f"after {trainer.done} of {steps} steps: {held_out:.4f} nats per byte on all of the held-out text")
    if out is not None:
        save(out, trainer, records)
        console.print(f"saved to {out}")


if __name__ == "__main__":
    typer.run(main)

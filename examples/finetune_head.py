"""Train a final layer on the features of a frozen backbone: `nn.Linear` beside μMoE layers, on the same batches.

    python -m mumoe_fast.examples.finetune_head

Without options the images are MNIST's digits and the backbone is a bank of fixed filters, which nobody trained: it is
there so that this runs offline in seconds. With `--backbone` it is a vision model of `transformers` (the paper's is
CLIP ViT-B/32, tuned along with its head, which this does not do), and with `--features` any other that has been run.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

import torch
import typer
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor, nn

from mumoe_fast import MuMoE
from mumoe_fast.examples._checkpoints import OtherRunError
from mumoe_fast.examples._classification import CHUNK, Classification, Dataset
from mumoe_fast.examples._features import Gabor, Pretrained, extract, from_file
from mumoe_fast.examples._images import load
from mumoe_fast.examples._options import Device
from mumoe_fast.examples._processes import default_device
from mumoe_fast.examples._run import fit, overridden, usage_errors
from mumoe_fast.examples._training import TrainConfig, Trainer, count_parameters
from mumoe_fast.rank import match_rank

Factorization = Literal["cp", "tr", "tt", "tucker"]
Settings = Literal["small", "paper"]

FACTORIZATIONS: tuple[Factorization, ...] = ("cp", "tr")
EXPERTS = (8, 64, 512)
EPOCH = 1_281_167 / 4096  # of ImageNet1k, in the paper's batches

SETTINGS: dict[Settings, TrainConfig] = {
    "small": TrainConfig(steps=300, batch=256, learning_rate=3e-3, betas=(0.9, 0.999), evaluate_every=100),
    "paper": TrainConfig(  # Table 7, CLIP; its float16 is bfloat16 here
        steps=round(10 * EPOCH),
        batch=4096,
        learning_rate=3e-5,
        final_learning_rate=0.0,
        warmup=500 / (10 * EPOCH),
        weight_decay=0.1,
        betas=(0.9, 0.999),
        evaluate_every=500,
    ),
}


@dataclass(frozen=True)
class HeadConfig:
    """A final layer: dense without a factorisation. A rank of None matches the dense layer's parameters."""

    factorization: Factorization | None = None
    experts: int = 0
    rank: int | None = None
    impl: str = field(default="auto", compare=False)

    @property
    def name(self) -> str:
        """For tables and folders."""
        return "dense" if self.factorization is None else f"{self.factorization}-{self.experts}"


@dataclass(frozen=True)
class Source:
    """Where the features come from: what a run must find again to go on."""

    data: str
    backbone: str
    features: str | None


@dataclass(frozen=True)
class Result:
    """A head that was trained, and how it does on what is held out."""

    config: HeadConfig
    head: nn.Module
    accuracy: float
    loss: float
    seconds: float


def make_head(config: HeadConfig, in_features: int, classes: int, seed: int) -> nn.Module:
    """The head that `seed` starts with, with batch norm in its gate as the paper has it for vision.

    Raises:
        ValueError: no rank fits the parameters of the dense layer.
    """
    torch.manual_seed(seed)
    if config.factorization is None:
        return nn.Linear(in_features, classes)
    return MuMoE(
        in_features,
        classes,
        config.experts,
        factorization=config.factorization,
        rank=config.rank,
        norm="batch",
        impl=config.impl,
    )


def mismatch(config: HeadConfig, in_features: int, classes: int) -> str | None:
    """Why no rank gives the parameters of the dense head; None where one does, or one was given."""
    if config.factorization is None or config.rank is not None:
        return None
    try:
        match_rank((in_features, classes), config.experts, config.factorization)
    except ValueError as error:
        return str(error)
    return None


def train_head(
    config: HeadConfig,
    head: nn.Module,
    data: Dataset,
    training: TrainConfig,
    *,
    source: Source,
    out: Path | None = None,
    console: Console,
) -> Result:
    """Train one head; every head sees the same batches. In `out` it has a folder of its own, and goes on from there."""
    trainer = Trainer(Classification(head, data, seed=training.seed), training)
    console.print(f"{config.name}: {count_parameters(head):,} parameters", highlight=False)
    settings = {"head": config, "source": source}
    figures = fit(trainer, out=None if out is None else out / config.name, settings=settings, console=console)
    return Result(config, head, figures["accuracy"], figures["held-out loss"], trainer.seconds)


@torch.no_grad()
def expert_use(head: MuMoE, data: Dataset) -> Tensor:
    """Mean coefficients (classes, N) of the held-out samples of every class; NaN for a class that has none."""
    weight = next(head.parameters())
    sums = torch.zeros(len(data.classes), head.gate.num_experts[0])
    counts = torch.zeros(len(data.classes))
    head.eval()
    for indices in torch.arange(len(data.held_out)).split(CHUNK):
        x, labels = data.held_out[indices]
        (coefficients,) = head.coefficients(x.to(weight.device))
        sums.index_add_(0, labels, coefficients.float().cpu())
        counts += labels.bincount(minlength=len(counts))
    return sums / counts[:, None]


def comparison(results: Iterable[Result]) -> Table:
    """The heads side by side."""
    table = Table("head", "rank", "parameters", "held-out accuracy", "held-out loss", "seconds of training")
    for column in table.columns[1:]:
        column.justify = "right"
    for result in results:
        rank = ", ".join(map(str, result.head.experts.rank)) if isinstance(result.head, MuMoE) else ""
        figures = f"{result.accuracy:.2%}", f"{result.loss:.4f}", f"{result.seconds:.1f}"
        table.add_row(result.config.name, rank, f"{count_parameters(result.head):,}", *figures)
    return table


def specialists(use: Tensor, classes: Sequence[str], name: str, experts: int = 3) -> Table:
    """Which experts serve which class most, and how much of an expert's work that class is."""
    table = Table(
        "class",
        "experts: mean coefficient in the class, share of the expert's whole",
        title=f"Who serves whom ({name})",
    )
    use = use.nan_to_num()
    shares = use / use.sum(0).clamp(min=1e-12)
    for label, row in zip(classes, range(len(use))):
        top = use[row].topk(min(experts, use.shape[1])).indices.tolist()
        table.add_row(label, "   ".join(f"#{n}: {use[row, n]:.2f}, {shares[row, n]:.0%}" for n in top))
    return table


def make_features(source: Source, device: torch.device | str, seed: int, console: Console) -> Dataset:
    """The features to learn from: read from a file, or of images by a backbone that runs once."""
    if source.features is not None:
        return from_file(Path(source.features))
    backbone = Gabor() if source.backbone == "gabor" else Pretrained(Path(source.backbone))
    images = load(source.data, backbone.image_size, seed)

    def shown(chunks: Sequence[Tensor]) -> Iterable[Tensor]:
        return track(chunks, description="features", console=console)

    return extract(images, backbone, device, shown)


def main(
    data: Annotated[
        str,
        typer.Option(help="Images: mnist, gratings, a folder with a sub-folder per class, or a file of torch.save."),
    ] = "mnist",
    backbone: Annotated[
        str, typer.Option(help="gabor (fixed filters, not trained), or a folder with a vision model of transformers.")
    ] = "gabor",
    features: Annotated[
        Path | None,
        typer.Option(exists=True, dir_okay=False, help="In place of both: a file of torch.save, {features, labels}."),
    ] = None,
    factorization: Annotated[
        Factorization | None, typer.Option(help="Of the μMoE heads; without it cp and tr, one after the other.")
    ] = None,
    experts: Annotated[
        list[int] | None, typer.Option(min=1, help="Of the μMoE heads, once for each: 8, 64, 512.")
    ] = None,
    rank: Annotated[
        int, typer.Option(min=0, help="Rank of the μMoE heads; 0: as many parameters as dense, where a rank fits.")
    ] = 64,
    impl: Annotated[str, typer.Option(help="auto, or an implementation by name (μMoE).")] = "auto",
    settings: Annotated[
        Settings,
        typer.Option(help="What the options below start from; paper: fine-tuning CLIP on ImageNet1k, Table 7."),
    ] = "small",
    steps: Annotated[int | None, typer.Option(min=1, help="Steps of every head; 300, the paper's 10 epochs.")] = None,
    batch: Annotated[int | None, typer.Option(min=1, help="Images per step; 256, the paper's 4,096.")] = None,
    learning_rate: Annotated[float | None, typer.Option(help="The highest; 0.003, the paper's 0.00003.")] = None,
    seed: int = 0,
    device: Device = None,
    out: Annotated[
        Path | None, typer.Option(help="A folder of runs, one for each head, from which they go on.")
    ] = None,
) -> None:
    """Train final layers on the features of a frozen backbone: a dense one and μMoE ones, side by side.

    All heads see the same batches in the same steps. The features are computed once and standardised.

    --features takes what torch.save wrote: features (n, I), labels (n,), perhaps held_out_features, held_out_labels.

    Where nothing says what is held out, the last fifth of every class is.

    --rank 512 is the paper's; at 10 classes few experts leave room for a matched rank (--rank 0), at 1,000 many do.
    """
    console = Console()
    place = device or default_device()
    source = Source(data, backbone, None if features is None else str(features))
    kinds = FACTORIZATIONS if factorization is None else (factorization,)
    configs = [HeadConfig(), *(HeadConfig(kind, N, rank or None, impl) for kind in kinds for N in experts or EXPERTS)]
    training = overridden(SETTINGS[settings], steps=steps, batch=batch, learning_rate=learning_rate, seed=seed)
    with usage_errors(ValueError, OSError, ImportError):
        learned = make_features(source, place, seed, console)
        sizes = learned.sample_shape[0], len(learned.classes)
        unmatched = {config.name: mismatch(config, *sizes) for config in configs}
        heads = {c: make_head(c, *sizes, seed).to(place) for c in configs if unmatched[c.name] is None}
    console.print(str(learned), highlight=False)
    with usage_errors(OtherRunError):
        results = [
            train_head(config, head, learned, training, source=source, out=out, console=console)
            for config, head in heads.items()
        ]
    console.print(comparison(results))
    for name, reason in unmatched.items():
        if reason is not None:
            console.print(f"{name}: {reason}", markup=False, highlight=False)
    trained = [result for result in results if isinstance(result.head, MuMoE)]
    if trained:
        best = min(trained, key=lambda result: result.loss)
        assert isinstance(best.head, MuMoE)
        console.print(specialists(expert_use(best.head, learned), learned.classes, best.config.name))


if __name__ == "__main__":
    typer.run(main)

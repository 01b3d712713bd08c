"""The demonstration: one small GPT with dense MLPs and one with μMoE MLPs, trained side by side on the same batches.

Both take each step together, so they have had equal steps whenever the run ends, whether by itself or by Ctrl-C. Then
come a table, the text that three experts respond to, and a report in HTML.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import chain
from pathlib import Path
from statistics import median, quantiles
from threading import Event

import torch
from rich.console import Console
from torch import Tensor

from mumoe_fast.bench.demo_checkpoint import CHECKPOINT, save_activations
from mumoe_fast.bench.demo_result import Demo, Row, page, show
from mumoe_fast.bench.experts import ExpertText, collect_coefficients, describe_expert, pick_experts
from mumoe_fast.bench.measure import count_flops, describe_machine, interleaved_seconds, peak_bytes
from mumoe_fast.examples._processes import default_device
from mumoe_fast.examples._run import catch_interrupt, progress_bar
from mumoe_fast.examples._tokens import Corpus
from mumoe_fast.examples._training import Record, TrainConfig, Trainer, count_parameters, uses_bfloat16
from mumoe_fast.examples.train_gpt import ModelConfig, TextTask, build_model
from mumoe_fast.ops.dispatch import best

SECONDS = 110.0  # of training, both models together
TextTrainer = Trainer[TextTask]
PATIENCE = 1.4  # training ends early when it takes that many times longer than the trial promised


def run(
    *,
    seconds: float = SECONDS,
    steps: int | None = None,
    impl: str = "auto",
    device: str | None = None,
    text: Path | None = None,
    output: Path = Path("report.html"),
    model: ModelConfig | None = None,
    training: TrainConfig | None = None,
    console: Console | None = None,
) -> Demo:
    """Train both models, measure, print, write the report.

    Args:
        seconds: how long training takes, both models together and within 40 %; ignored where `steps` is given.
        steps: of each model; None is as many as a short trial says fit into `seconds`.
        impl: of the μMoE layers that are trained, "auto" or one by name.
        device: "cpu" or "cuda"; None is the GPU if there is one.
        text: a text file; None is the Python reference that CPython carries.
        output: where the report goes.
        model: the GPT's shape; its `mlp` and `impl` are set here.
        training: the optimiser and the batches; its `steps` and `evaluate_every` are set here.
        console: to print to.
    """
    console = console or Console()
    model, training = model or ModelConfig(), training or TrainConfig()
    place, corpus = torch.device(device or default_device()), Corpus.load(text)
    choice = best(place, torch.bfloat16 if uses_bfloat16(training.precision, place) else torch.float32)
    chosen = choice.impl if impl == "auto" else impl
    reason = f"auto picks it: {choice.reason}" if impl == "auto" else "it was asked for"
    shapes = {"dense": replace(model, mlp="dense"), "μMoE": replace(model, mlp="cp", impl=chosen)}

    def start(training: TrainConfig) -> dict[str, TextTrainer]:
        return {name: start_training(shape, corpus, training, place) for name, shape in shapes.items()}

    timed = steps is None
    if steps is None:
        console.print("Timing a few steps …")
        steps = affordable_steps(start(training), seconds)
    training = replace(training, steps=steps, evaluate_every=math.ceil(steps / 8))
    trainers = start(training)
    tokens = training.batch * model.context
    console.print(
        f"Two GPTs ({model.layers} layers, width {model.width}), {steps} steps of {tokens:,} bytes each, on {place}.\n"
        f"μMoE: {model.experts} experts per MLP, implementation {chosen} ({reason}). Ctrl-C stops early."
    )
    limit = PATIENCE * seconds if timed else math.inf
    with catch_interrupt() as interrupted:
        records = train_together(trainers, console, interrupted, limit)

    console.print("Measuring …")
    rows, remarks = compare(trainers["dense"], trainers["μMoE"], chosen, reason)
    layer = model.layers // 2
    demo = Demo(
        model=model,
        training=training,
        text_bytes=(len(corpus.train), len(corpus.held_out)),
        done=trainers["μMoE"].done,
        records=records,
        rows=rows,
        remarks=remarks,
        layer=layer,
        experts=read_experts(trainers["μMoE"], layer),
        machine=describe_machine(place),
    )
    show(demo, console)
    output.write_text(page(demo), encoding="utf-8")
    windows, _ = corpus.held_out_windows(model.context)
    checkpoint = output.with_name(CHECKPOINT.name)
    save_activations(checkpoint, trainers["μMoE"].task.model, windows)
    console.print(f"The report is in {output}; what `mumoe bench` uses of the gates is in {checkpoint}", markup=False)
    return demo


def start_training(shape: ModelConfig, corpus: Corpus, training: TrainConfig, device: torch.device) -> TextTrainer:
    """A trainer of the model that the seed starts with."""
    model = build_model(shape, device, training.seed)
    return Trainer(TextTask(model, shape, corpus, seed=training.seed), training)


def affordable_steps(trainers: Mapping[str, TextTrainer], seconds: float) -> int:
    """How many steps of all trainers fit into `seconds`, to a multiple of ten, from a few steps of each."""
    trial = interleaved_seconds(
        {name: trainer.update for name, trainer in trainers.items()}, bursts=4, repeats=1, limit=5
    )
    per_round = sum(median(times) for times in trial.values())
    return min(max(10 * round(seconds / per_round / 10), 20), 1500)


def train_together(
    trainers: Mapping[str, TextTrainer], console: Console, interrupted: Event, limit: float = math.inf
) -> dict[str, list[Record]]:
    """Let all trainers take each step before any takes the next, to the end, an interrupt or `limit` seconds."""
    records: dict[str, list[Record]] = {name: [] for name in trainers}
    total, started = next(iter(trainers.values())).config.steps, time.perf_counter()
    with progress_bar(console) as bar:
        task = bar.add_task("training", total=total, note="")
        for together in zip(*trainers.values(), strict=True):
            for name, record in zip(trainers, together, strict=True):
                records[name].append(record)
            losses = [f"{name} {record.loss:.3f}" for name, record in zip(trainers, together, strict=True)]
            bar.update(task, advance=1, note="loss " + ", ".join(losses))
            if interrupted.is_set() or time.perf_counter() - started > limit:
                break
    return records


def twin(trainer: TextTrainer, impl: str) -> TextTrainer:
    """A copy with the same weights and optimiser state, whose μMoE layers run by `impl`."""
    task = trainer.task
    other = start_training(replace(task.config, impl=impl), task.corpus, trainer.config, task.device)
    other.model.load_state_dict(trainer.model.state_dict())
    other.optimizer.load_state_dict(trainer.optimizer.state_dict())
    other.done = trainer.done
    return other


def compare(dense: TextTrainer, mumoe: TextTrainer, chosen: str, reason: str) -> tuple[list[Row], list[str]]:
    """The table's rows and what to say about them; copies are measured, the trained models are left as they are."""
    contenders = {"dense": dense, "μMoE, reference": mumoe if chosen == "reference" else twin(mumoe, "reference")}
    if chosen != "reference":
        contenders[f"μMoE, {chosen}"] = mumoe
    held_out = {name: trainer.evaluate(complete=True)["held_out"] for name, trainer in contenders.items()}
    batch = mumoe.batch(mumoe.done)
    with torch.no_grad():
        losses = {name: trainer.loss(batch).item() for name, trainer in contenders.items()}
    copies = {name: twin(trainer, trainer.task.config.impl) for name, trainer in contenders.items()}
    seconds = interleaved_seconds({name: copy.update for name, copy in copies.items()}, bursts=7, repeats=2, limit=20)
    rows = [measure(name, copies[name], seconds[name], held_out[name]) for name in contenders]
    gap = held_out["μMoE, reference"] / held_out["dense"] - 1
    speed = median(seconds["dense"]) / median(seconds[rows[-1].name])
    remarks = [
        f"Held-out loss at equal steps: μMoE {gap:+.2%} against dense. Training speed of {rows[-1].name}: {speed:.2f} "
        "times the dense model's tokens per second."
    ]
    if chosen == "reference":
        rows.append(Row("μMoE, best here", rows[-1].parameters))
        remarks.append(f"The best implementation here is the reference itself ({reason}), which is measured once.")
    else:
        difference = abs(losses["μMoE, reference"] - losses[f"μMoE, {chosen}"])
        remarks.append(
            f"μMoE was trained by {chosen} ({reason}); the reference's row has the same weights. On one training batch "
            f"the two losses differ by {difference:.1e}."
        )
    return rows, remarks


def measure(name: str, trainer: TextTrainer, seconds: Sequence[float], held_out: float) -> Row:
    """One row, from a copy that may go on training and the seconds that its steps took."""
    x, _ = trainer.batch(0)
    fast, middle, slow = quantiles(seconds, n=4)
    transient = peak_bytes(trainer.update, trainer.task.device)
    return Row(
        name=name,
        parameters=count_parameters(trainer.model),
        flops_per_token=count_flops(lambda: trainer.model(x)) / x.numel(),
        tokens_per_second=(x.numel() / slow, x.numel() / middle, x.numel() / fast),
        peak_bytes=resident_bytes(trainer) + transient,
        held_out=held_out,
    )


def resident_bytes(trainer: TextTrainer) -> int:
    """What stays in memory between steps: parameters, buffers and the optimiser's state."""
    state = (value for values in trainer.optimizer.state.values() for value in values.values())
    tensors = chain(trainer.model.parameters(), trainer.model.buffers(), state)
    return sum(t.numel() * t.element_size() for t in tensors if isinstance(t, Tensor))


def read_experts(trainer: TextTrainer, layer: int) -> list[ExpertText]:
    """The three most specialised experts of one layer, on the held-out text."""
    task = trainer.task
    windows, _ = task.corpus.held_out_windows(task.config.context)
    coefficients = collect_coefficients(task.model, windows, layer)
    text = task.corpus.held_out.tobytes()
    return [describe_expert(coefficients, text, expert) for expert in pick_experts(coefficients)]

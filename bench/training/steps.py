"""Times whole training steps of all sides in turns, after a check that native and reference compute the same.

Loss and every gradient are held against the model in float64 on the same, identically quantised parameters, and may
err as the acceptance rule says (`testing.acceptance`; eager is the reference in the same precision). Of a side that is
wrong nothing is timed.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from mumoe_fast.bench.measure import in_fresh_process, interleaved_seconds, peak_bytes, quantile
from mumoe_fast.bench.training.workloads import (
    DENSE,
    GOAL,
    NATIVE,
    REFERENCE,
    Precision,
    Shape,
    Side,
    Training,
    build,
    loss,
    mlps,
    tokens,
)
from mumoe_fast.testing.acceptance import judge

CHECKED_TOKENS = 128  # of the context: float64 takes its time


@dataclass(frozen=True)
class Result:
    """One side in one precision: what it counts, takes and holds, or why it was refused."""

    side: Side
    precision: Precision
    shape: Shape
    mlp_parameters: int
    parameters: int
    seconds: tuple[float, ...] = ()  # of each step
    dense_seconds: tuple[float, ...] = ()  # of the dense model's step of the same turn
    peak_bytes: int | None = None
    error_of_allowance: float | None = None
    refused: str | None = None

    def tokens_per_second(self, q: float = 0.5) -> float:
        """A quantile of the steps' throughputs."""
        return quantile([self.shape.context / seconds for seconds in self.seconds], q)

    def of_dense(self, q: float = 0.5) -> float:
        """Tokens per second over the dense model's: a quantile of the turns' own ratios."""
        return quantile([dense / ours for ours, dense in zip(self.seconds, self.dense_seconds, strict=True)], q)

    @property
    def met(self) -> bool | None:
        """Whether it reaches the goal, which is asked of the native kernels."""
        return self.of_dense() >= GOAL if self.seconds and self.side.impl == NATIVE else None


def measure(
    wanted: Sequence[Side],
    shape: Shape,
    precision: Precision,
    *,
    turns: int,
    seconds: float,
    on_start: Callable[[str], None] = lambda what: None,
) -> Iterator[Result]:
    """Every side in one precision; the dense one must be among them.

    Args:
        wanted: the sides.
        shape: of the models.
        precision: of the training.
        turns: steps of every side, at most.
        seconds: for the steps of one side; after so long for each of them three turns are enough.
        on_start: called with what begins.
    """
    checked = {}
    for side in wanted:
        on_start(f"{side}: check")
        checked[side] = check(side, shape, precision)
    sound = [side for side in wanted if checked[side].problem is None]
    peaks = {}
    for side in sound:
        on_start(f"{side}: peak memory")
        peaks[side] = in_fresh_process(peak_of_step, side, shape, precision, torch.get_num_threads())
    on_start(f"{precision}: steps in turns")
    taken = step_seconds(sound, shape, precision, turns, seconds)
    dense = next(times for side, times in taken.items() if side.variant == DENSE)
    for side in wanted:
        yield Result(
            side,
            precision,
            shape,
            *count(side, shape),
            seconds=tuple(taken.get(side, ())),
            dense_seconds=tuple(dense),
            peak_bytes=peaks.get(side),
            error_of_allowance=checked[side].worst,
            refused=checked[side].problem,
        )


@dataclass(frozen=True)
class Checked:
    """The largest error as a share of what it may be, and a sentence if the side may not be timed."""

    worst: float | None = None
    problem: str | None = None


def check(side: Side, shape: Shape, precision: Precision) -> Checked:
    """Judge the loss and every gradient of a native side; others are what it is judged by."""
    if side.impl != NATIVE:
        return Checked()
    twin = replace(side, impl=REFERENCE)
    try:
        found = results(side, shape, precision)
    except (ImportError, RuntimeError) as error:
        return Checked(problem=f"cannot run: {str(error).splitlines()[0]}")
    eager, exact = results(twin, shape, precision), results(twin, shape, precision, exact=True)
    unknown = torch.zeros(())  # the rule's t̄, which only a kernel's own problem knows
    verdicts = [judge(name, found[name], eager[name], truth, unknown, torch.bfloat16) for name, truth in exact.items()]
    worst = max(verdicts, key=lambda verdict: verdict.of_allowance)
    return Checked(worst.of_allowance, None if worst.passed else f"wrong: {worst}")


def results(side: Side, shape: Shape, precision: Precision, exact: bool = False) -> Mapping[str, Tensor]:
    """The loss and every parameter's gradient; exact: in float64, from the parameters as they are quantised."""
    model = build(side, shape, precision.parameters).train()
    if exact:
        model = model.double()
    value = loss(model, tokens(shape, CHECKED_TOKENS), None if exact else precision)
    named = dict(model.named_parameters())
    gradients = torch.autograd.grad(value, list(named.values()))
    return {"loss": value.detach()} | dict(zip(named, gradients, strict=True))


def step_seconds(
    wanted: Sequence[Side], shape: Shape, precision: Precision, turns: int, seconds: float
) -> dict[Side, list[float]]:
    """Seconds of each step of every side, all in memory at once and taking turns."""
    training = {str(side): Training(side, shape, precision) for side in wanted}
    steps = {name: one.step for name, one in training.items()}
    taken = interleaved_seconds(steps, bursts=turns, repeats=1, limit=seconds * len(wanted))
    gc.collect()
    return {side: taken[str(side)] for side in wanted}


def peak_of_step(side: Side, shape: Shape, precision: Precision, threads: int) -> int:
    """The most that a step holds beyond parameters and the optimiser's state: activations and all gradients."""
    torch.set_num_threads(threads)
    training = Training(side, shape, precision)
    training.step()  # which makes the optimiser's state
    return peak_bytes(training.step, torch.device("cpu"))


def count(side: Side, shape: Shape) -> tuple[int, int]:
    """Parameters of all MLPs, and of the model as Hugging Face counts."""
    with torch.device("meta"):
        model = build(side, shape, torch.float32)
    return sum(p.numel() for mlp in mlps(model) for p in mlp.parameters()), model.num_parameters()

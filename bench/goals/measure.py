"""Measures a workload: first whether our side is right, then its time in turns with its peers', or its memory.

Our outputs and gradients are held against the reference in float64 on the same inputs, and may err as the acceptance
rule says (`testing.acceptance`; eager is the reference in the same dtype). Of a side that is wrong nothing is timed.
On a GPU a call is timed by events with the L2 cache cold (`suite.timing`), unless the workload wants the host's clock.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from statistics import median
from typing import TypeVar

import torch
from torch import Tensor, nn

from mumoe_fast.bench.goals.goal import PARAMETERS, REPLAY, SIZES, Factory, Goal, Workload
from mumoe_fast.bench.measure import Clock, in_fresh_process, interleaved_seconds, peak_bytes, quantile, wall_clock
from mumoe_fast.bench.step import FORWARD, action, random_tokens, results, truth, upstream
from mumoe_fast.bench.suite.timing import Action, captured, clock_of
from mumoe_fast.layers import MuMoE, MuMoEMLP
from mumoe_fast.ops import native_gemm
from mumoe_fast.ops.dispatch import NATIVE_READY
from mumoe_fast.testing.acceptance import Verdict, judge
from mumoe_fast.testing.magnitude import block_magnitudes

Result = TypeVar("Result")
CPU = torch.device("cpu")


@dataclass(frozen=True)
class Measurement:
    """One side in one direction: seconds a call, one figure per burst, or bytes."""

    implementation: str
    values: tuple[float, ...]

    def quantile(self, q: float) -> float:
        """A quantile of the values, between neighbours linearly."""
        return quantile(self.values, q)


@dataclass(frozen=True)
class Comparison:
    """A goal beside what was measured: the figure of the medians, and the quartiles of the bursts' own figures."""

    goal: Goal
    figure: float
    low: float
    high: float

    @property
    def met(self) -> bool | None:
        """Whether the median meets the goal; None where there is none."""
        return self.goal.met(self.figure)


@dataclass(frozen=True)
class Outcome:
    """What came of one direction of a workload; `refused` says why there are no measurements."""

    workload: Workload
    direction: str
    gemm: str | None
    goals: tuple[Goal, ...]
    measurements: Mapping[str, Measurement]
    verdicts: tuple[Verdict, ...] = ()
    refused: str | None = None
    missing: Mapping[str, str] | None = None  # peers that cannot run here, and why

    @property
    def comparisons(self) -> list[Comparison]:
        """Every goal whose peer was measured."""
        sides = self.measurements
        ours = self.workload.impl
        return [compare(goal, sides[ours], sides[goal.peer]) for goal in self.goals if goal.peer in sides]


def compare(goal: Goal, ours: Measurement, theirs: Measurement) -> Comparison:
    """Hold two sides that took turns against a goal."""
    figures = [goal.figure(a, b) for a, b in zip(ours.values, theirs.values, strict=True)]
    figure = goal.figure(median(ours.values), median(theirs.values))
    return Comparison(goal, figure, quantile(figures, 0.25), quantile(figures, 0.75))


def measure(
    workload: Workload,
    *,
    repeats: int,
    seconds: float,
    device: torch.device = CPU,
    on_start: Callable[[str], None] = lambda direction: None,
) -> Iterator[Outcome]:
    """Every direction of a workload; `on_start` is called before each with what begins."""
    torch.compiler.reset()  # nothing that was compiled for another workload counts or is kept
    with on_gemm(workload.gemm):
        on_start("check")
        verdicts: tuple[Verdict, ...] = ()
        problem: str | None
        try:
            verdicts, problem = check(workload, device)
        except torch.OutOfMemoryError as error:
            problem = f"cannot be checked: {_first_line(error)}"
        gemm = current_gemm() if device.type == "cpu" else None
        if workload.gemm is not None and gemm not in (None, workload.gemm):
            problem = f"asked for the GEMM {workload.gemm}, ran on {gemm}"
        for direction in workload.goals:
            goals = workload.asked(direction, gemm)
            hindrance = "CUDA graphs need a GPU" if direction == REPLAY and device.type != "cuda" else None
            if (refused := problem or hindrance) is not None:
                yield Outcome(workload, direction, gemm, goals, {}, verdicts, refused=refused)
                continue
            on_start(direction)
            sides = {workload.impl: workload.ours}
            sides |= {goal.peer: workload.peers[goal.peer] for goal in goals if goal.peer != workload.impl}
            try:
                taken, missing = _taken(workload, direction, sides, device, gemm, repeats, seconds)
            except Exception as error:  # likewise
                yield Outcome(
                    workload, direction, gemm, goals, {}, verdicts, refused=f"cannot run: {_first_line(error)}"
                )
            else:
                yield Outcome(workload, direction, gemm, goals, taken, verdicts, missing=missing)


def check(workload: Workload, device: torch.device = CPU) -> tuple[tuple[Verdict, ...], str | None]:
    """Judge our side's outputs, and its gradients if any direction needs them; a sentence if it may not be timed."""
    dtype, backward = workload.dtype, not set(workload.goals) <= {FORWARD, REPLAY}
    x, exact = tokens(workload, device), build(workload.exact, workload.dtype, device)
    dy = upstream(exact, x) if backward else None
    try:
        ours = results(build(workload.ours, dtype, device), x, dy)
    except Exception as error:  # of the compiler, of the driver or of ours: a finding, and other workloads go on
        return (), f"cannot run: {_first_line(error)}"
    eager = results(exact, x, dy)
    exact, x, dy = exact.double(), x.double(), None if dy is None else dy.double()
    by_truth, magnitude = truth(exact, x, dy)
    if dy is not None and isinstance(exact, MuMoE | MuMoEMLP):
        larger = block_magnitudes(exact, x, dy)
        magnitude |= {name: torch.maximum(magnitude[name], t) for name, t in larger.items()}
    verdicts = tuple(judge(name, ours[name], eager[name], y, magnitude[name], dtype) for name, y in by_truth.items())
    wrong = sorted((verdict for verdict in verdicts if not verdict.passed), key=lambda v: -v.of_allowance)
    return verdicts, f"wrong: {wrong[0]}" if wrong else None


def build(factory: Factory, dtype: torch.dtype, device: torch.device = CPU) -> nn.Module:
    """A side's module, with the parameters that every side of the same kind has; made where it is used."""
    torch.manual_seed(0)
    with device:
        module = factory()
    return module.to(dtype)


def tokens(workload: Workload, device: torch.device = CPU) -> Tensor:
    """The input that all sides share."""
    return random_tokens(*workload.input_size, dtype=workload.dtype, device=device)


def _taken(
    workload: Workload,
    direction: str,
    sides: Mapping[str, Factory],
    device: torch.device,
    gemm: str | None,
    repeats: int,
    seconds: float,
) -> tuple[dict[str, Measurement], dict[str, str]]:
    """What was measured of every side that can run, and of the others why not."""
    if direction in SIZES:
        size_of = _parameter_bytes if direction == PARAMETERS else partial(_peak, device=device, gemm=gemm)
        sizes, missing = _of_each(workload, sides, lambda side: size_of(workload, side))
        return {name: Measurement(name, (float(size),)) for name, size in sizes.items()}, missing
    x = tokens(workload, device)
    inputs = [x, *(x.clone() for _ in range(workload.inputs - 1))]
    actions, missing = _of_each(
        workload, sides, lambda side: _action(build(side, workload.dtype, device), inputs, direction)
    )
    by_host = workload.host_clock and direction != REPLAY
    clock: Clock = wall_clock if by_host else clock_of(device)
    bursts = interleaved_seconds(actions, bursts=repeats, repeats=workload.calls, limit=seconds, clock=clock)
    taken = {name: tuple(value / len(inputs) for value in values) for name, values in bursts.items()}
    return {name: Measurement(name, values) for name, values in taken.items()}, missing


def _action(module: nn.Module, inputs: list[Tensor], direction: str) -> Action:
    """What is timed, run once, which compiles what is compiled: a call on each of the inputs."""
    actions = [action(module, x, FORWARD if direction == REPLAY else direction) for x in inputs]

    def each() -> list[object]:
        return [act() for act in actions]

    whole: Action = each if len(actions) > 1 else actions[0]
    whole()
    return captured(whole) if direction == REPLAY else whole


def _of_each(
    workload: Workload, sides: Mapping[str, Factory], result: Callable[[Factory], Result]
) -> tuple[dict[str, Result], dict[str, str]]:
    """What comes of every side that can run, which ours must, and of the others why not."""
    found, missing = {}, {}
    for name, side in sides.items():
        try:
            found[name] = result(side)
        except Exception as error:  # a peer may fail in any way
            if name == workload.impl:
                raise
            missing[name] = _first_line(error)
    return found, missing


def _first_line(error: Exception) -> str:
    return (str(error) or type(error).__name__).splitlines()[0]


def _parameter_bytes(workload: Workload, side: Factory) -> int:
    module = build(side, workload.dtype, torch.device("meta"))
    return sum(parameter.nbytes for parameter in module.parameters())


def _peak(workload: Workload, side: Factory, device: torch.device, gemm: str | None) -> int:
    """The peak of a training step; on a CPU in a process that has done nothing else, and so has cached nothing."""
    if device.type == "cuda":
        return peak_of_step(workload, side, device)
    return in_fresh_process(peak_of_step, replace(workload, gemm=gemm), side, device, torch.get_num_threads())


def peak_of_step(workload: Workload, side: Factory, device: torch.device, threads: int | None = None) -> int:
    """The most that a step holds beyond parameters, input and upstream gradient: activations and all gradients."""
    if threads is not None:
        torch.set_num_threads(threads)
    module, x = build(side, workload.dtype, device), tokens(workload, device).requires_grad_()
    with on_gemm(workload.gemm):
        dy = upstream(module, x)
        module(x).backward(dy)
        module.zero_grad(set_to_none=True)
        x.grad = None
        return peak_bytes(lambda: module(x).backward(dy), x.device)


def current_gemm() -> str | None:
    """The GEMM that the native kernels use in float32; None without them."""
    return native_gemm.in_use().name if NATIVE_READY else None


@contextmanager
def on_gemm(name: str | None) -> Iterator[None]:
    """The native kernels on the named GEMM; with None, or without them, as they are."""
    if name is None or not NATIVE_READY:
        yield
        return
    before = native_gemm.in_use()
    if name != before.name:
        native_gemm.use(name)
    try:
        yield
    finally:
        native_gemm.use(before)

"""Measures a workload: first whether our side is right, then its time in turns with its peers', or its peak memory.

Our outputs and gradients are held against the reference in float64 on the same inputs, and may err as the acceptance
rule says (`testing.acceptance`; eager is the reference in the same dtype). Of a side that is wrong nothing is timed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from statistics import median

import torch
from torch import Tensor, nn

from mumoe_fast.bench.cpu.workloads import MEMORY, OURS, Factory, Goal, Workload
from mumoe_fast.bench.measure import in_fresh_process, interleaved_seconds, peak_bytes, quantile
from mumoe_fast.bench.step import FORWARD, action, random_tokens, results, truth, upstream
from mumoe_fast.layers import MuMoE, MuMoEMLP
from mumoe_fast.ops import native_gemm
from mumoe_fast.ops.dispatch import NATIVE_READY
from mumoe_fast.testing.acceptance import Verdict, judge
from mumoe_fast.testing.magnitude import block_magnitudes


@dataclass(frozen=True)
class Measurement:
    """One side in one direction: seconds a call, one figure per burst, or the peak in bytes."""

    implementation: str
    values: tuple[float, ...]

    def quantile(self, q: float) -> float:
        """A quantile of the values, between neighbours linearly."""
        return quantile(self.values, q)


@dataclass(frozen=True)
class Comparison:
    """A goal beside what was measured: the ratio of the medians, and the quartiles of the bursts' own ratios."""

    goal: Goal
    ratio: float
    low: float
    high: float

    @property
    def met(self) -> bool | None:
        """Whether the median meets the goal; None where there is none."""
        return self.goal.met(self.ratio)


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
        return [compare(goal, sides[OURS], sides[goal.peer]) for goal in self.goals if goal.peer in sides]


def compare(goal: Goal, ours: Measurement, theirs: Measurement) -> Comparison:
    """Hold two sides that took turns against a goal."""
    ratios = [goal.ratio(a, b) for a, b in zip(ours.values, theirs.values, strict=True)]
    ratio = goal.ratio(median(ours.values), median(theirs.values))
    return Comparison(goal, ratio, quantile(ratios, 0.25), quantile(ratios, 0.75))


def measure(
    workload: Workload, *, repeats: int, seconds: float, on_start: Callable[[str], None] = lambda direction: None
) -> Iterator[Outcome]:
    """Every direction of a workload; `on_start` is called before each with what begins."""
    torch.compiler.reset()  # nothing that was compiled for another workload counts or is kept
    with on_gemm(workload.gemm):
        on_start("check")
        verdicts, problem = check(workload)
        gemm = current_gemm()
        if workload.gemm is not None and gemm not in (None, workload.gemm):
            problem = f"asked for the GEMM {workload.gemm}, ran on {gemm}"
        for direction in workload.goals:
            goals = workload.asked(direction, gemm)
            if problem is not None:
                yield Outcome(workload, direction, gemm, goals, {}, verdicts, refused=problem)
                continue
            on_start(direction)
            wanted = {goal.peer: workload.peers[goal.peer] for goal in goals}
            sides = {OURS: workload.ours} | wanted
            if direction == MEMORY:
                taken = {name: Measurement(name, (_peak_apart(workload, side, gemm),)) for name, side in sides.items()}
                missing: dict[str, str] = {}
            else:
                taken, missing = _take_turns(workload, direction, sides, repeats, seconds)
            yield Outcome(workload, direction, gemm, goals, taken, verdicts, missing=missing)


def check(workload: Workload) -> tuple[tuple[Verdict, ...], str | None]:
    """Judge our side's outputs, and its gradients if any direction needs them; a sentence if it may not be timed."""
    dtype, backward = workload.dtype, set(workload.goals) != {FORWARD}
    x, exact = tokens(workload), build(workload.exact, workload.dtype)
    dy = upstream(exact, x) if backward else None
    try:
        ours = results(build(workload.ours, dtype), x, dy)
    except (RuntimeError, ImportError) as error:
        return (), f"cannot run: {error}"
    eager = results(exact, x, dy)
    exact, x, dy = exact.double(), x.double(), None if dy is None else dy.double()
    by_truth, magnitude = truth(exact, x, dy)
    if dy is not None and isinstance(exact, MuMoE | MuMoEMLP):
        larger = block_magnitudes(exact, x, dy)
        magnitude |= {name: torch.maximum(magnitude[name], t) for name, t in larger.items()}
    verdicts = tuple(judge(name, ours[name], eager[name], y, magnitude[name], dtype) for name, y in by_truth.items())
    wrong = sorted((verdict for verdict in verdicts if not verdict.passed), key=lambda v: -v.of_allowance)
    return verdicts, f"wrong: {wrong[0]}" if wrong else None


def build(factory: Factory, dtype: torch.dtype) -> nn.Module:
    """A side's module, with the parameters that every side of the same kind has."""
    torch.manual_seed(0)
    return factory().to(dtype)


def tokens(workload: Workload) -> Tensor:
    """The input that all sides share."""
    return random_tokens(*workload.input_size, dtype=workload.dtype)


def _take_turns(
    workload: Workload, direction: str, sides: Mapping[str, Factory], repeats: int, seconds: float
) -> tuple[dict[str, Measurement], dict[str, str]]:
    """Seconds of every side that can run, in turns, and of the others why not."""
    x = tokens(workload)
    actions: dict[str, Callable[[], object]] = {}
    missing = {}
    for name, side in sides.items():
        try:
            act = action(build(side, workload.dtype), x, direction)
            act()  # compiles what is compiled
        except (ImportError, RuntimeError) as error:
            if name == OURS:
                raise
            missing[name] = str(error).splitlines()[0]
        else:
            actions[name] = act
    taken = interleaved_seconds(actions, bursts=repeats, repeats=workload.calls, limit=seconds)
    return {name: Measurement(name, tuple(values)) for name, values in taken.items()}, missing


def _peak_apart(workload: Workload, side: Factory, gemm: str | None) -> float:
    """The peak of a training step in a process that has done nothing else."""
    return in_fresh_process(peak_of_step, replace(workload, gemm=gemm), side, torch.get_num_threads())


def peak_of_step(workload: Workload, side: Factory, threads: int) -> float:
    """The most that a step holds beyond parameters, input and upstream gradient: activations and all gradients."""
    torch.set_num_threads(threads)
    module, x = build(side, workload.dtype), tokens(workload).requires_grad_()
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

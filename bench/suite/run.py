"""Runs the suite: case by case a check, then latencies in turns, peak memory, FLOPs and the floor, as records.

Sides that are compared, those of one workload, dtype and direction, are timed together. Nothing is timed of a side
whose results are wrong, or of an implementation whose operators are outside the acceptance rule.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import groupby

import torch
from torch import nn

from mumoe_fast.bench.measure import Clock, in_fresh_process, peak_bytes
from mumoe_fast.bench.step import STEP, action
from mumoe_fast.bench.suite.check import Answer, check
from mumoe_fast.bench.suite.flops import count, floor
from mumoe_fast.bench.suite.implementations import Case, Implementation
from mumoe_fast.bench.suite.machine import describe_run, measure_ceilings
from mumoe_fast.bench.suite.records import Ceilings, Record, Run
from mumoe_fast.bench.suite.roofline import floor_at
from mumoe_fast.bench.suite.timing import Action, captured, clock_of, latencies
from mumoe_fast.bench.suite.workloads import Workload
from mumoe_fast.bench.verify import quick_verify

SEED = 0
WRONG = "wrong: "  # how a check's problem begins that is not that the side cannot run
REPLAYED = "CUDA graph of "  # before a side's name: its replay, which takes turns with the eager calls

Verify = Callable[[str, torch.device, Sequence[torch.dtype]], str | None]


def select(cases: Sequence[Case], only: str, impls: Sequence[str]) -> list[Case]:
    """The cases that a regular expression finds in "workload, implementation, dtype, direction", any case of letters.

    With `impls`, ours only by these implementations.
    """
    return [
        case
        for case in cases
        if re.search(
            only, f"{case.workload.name}, {case.implementation.name}, {dtype_name(case)}, {case.direction}", re.I
        )
        and (not impls or case.implementation.impl is None or case.implementation.impl in impls)
    ]


def dtype_name(case: Case) -> str:
    """The case's dtype without torch's prefix."""
    return str(case.dtype).removeprefix("torch.")


def unverified(impl: str, device: torch.device, dtypes: Sequence[torch.dtype]) -> str | None:
    """Why nothing of `impl` may be timed: its operators' numerics are outside the rule; None if they are not."""
    failures = quick_verify(impl, device, dtypes)
    return f"its quick verify fails: {failures[0]}" if failures else None


def run(
    cases: Sequence[Case],
    device: torch.device,
    *,
    seconds: float,
    verify: Verify = unverified,
    on_start: Callable[[str], None] = lambda what: None,
) -> Iterator[Record]:
    """Measure the cases, which come workload by workload; about `seconds` of calls for all sides of a comparison."""
    if not cases:
        return
    dtypes = list(dict.fromkeys(case.dtype for case in cases))
    on_start("the machine's ceilings")
    clock = clock_of(device)
    ceilings = measure_ceilings(device, dtypes, clock=clock)
    on_start("the operators' numerics")
    distrusted = _distrusted(cases, device, dtypes, verify)
    machine = describe_run(device, SEED)
    for (workload, dtype), group in groupby(cases, key=lambda case: (case.workload, case.dtype)):
        contest = Contest(workload, dtype, device, machine, ceilings[dtype], clock, seconds)
        yield from contest.run(list(group), distrusted, on_start)


def _distrusted(
    cases: Sequence[Case], device: torch.device, dtypes: Sequence[torch.dtype], verify: Verify
) -> dict[str, str]:
    """Why nothing is timed of some `impl`, by its name; only of those that can run at all."""
    problems = {}
    for impl in dict.fromkeys(case.implementation.impl for case in cases):
        own = (case for case in cases if case.implementation.impl == impl)
        if impl is not None and any(c.implementation.obstacle(c.workload, c.dtype, device) is None for c in own):
            problem = verify(impl, device, dtypes)
            if problem is not None:
                problems[impl] = problem
    return problems


@dataclass(frozen=True)
class Contest:
    """All sides of one workload in one dtype."""

    workload: Workload
    dtype: torch.dtype
    device: torch.device
    machine: Run
    ceilings: Ceilings
    clock: Clock
    seconds: float

    def run(
        self, cases: Sequence[Case], distrusted: Mapping[str, str], on_start: Callable[[str], None]
    ) -> Iterator[Record]:
        """One record per case, direction by direction."""
        torch.compiler.reset()  # nothing that was compiled for another workload counts or is kept
        directions = list(dict.fromkeys(case.direction for case in cases))
        deepest = STEP if STEP in directions else directions[0]
        modules: dict[str, nn.Module] = {}
        started: dict[str, Record] = {}
        answer: Answer | None = None  # of the side before, which often is of the same factorisation
        for side in dict.fromkeys(case.implementation for case in cases):
            on_start(f"{self.workload.name}: check of {side.name}")
            started[side.name], module, answer = self._admit(side, deepest, distrusted, answer)
            if module is not None:
                modules[side.name] = module
        for direction in directions:
            on_start(f"{self.workload.name}, {direction}")
            rows = {
                case.implementation.name: replace(started[case.implementation.name], direction=direction)
                for case in cases
                if case.direction == direction
            }
            sides = {case.implementation.name: case.implementation for case in cases if case.direction == direction}
            rows = self._timed(rows, modules, direction)
            for name, row in rows.items():
                yield row if row.refused is not None else self._weighed_if_possible(row, sides[name])

    def _admit(
        self, side: Implementation, direction: str, distrusted: Mapping[str, str], known: Answer | None
    ) -> tuple[Record, nn.Module | None, Answer | None]:
        """The side's record so far, its module if it may be timed, and what is known for the next check."""
        record = blank(self.workload, side, self.dtype, direction, self.machine)
        if side.impl is not None and side.impl in distrusted:
            return replace(record, refused=distrusted[side.impl], wrong=True), None, known
        try:
            reason = side.obstacle(self.workload, self.dtype, self.device)
            if reason is not None:
                return replace(record, refused=reason), None, known
            checked = check(self.workload, side, self.dtype, self.device, direction, known)
            if checked.problem is not None:
                refused = replace(record, refused=checked.problem, wrong=checked.problem.startswith(WRONG))
                return refused, None, checked.answer or known
            module = side.build(self.workload, self.dtype, self.device)
        except Exception as error:  # of a compiler, of the driver or of a package: the other sides go on
            return replace(record, refused=cannot_run(error)), None, known
        parameters = sum(parameter.numel() for parameter in module.parameters())
        return replace(record, error_of_allowance=checked.worst, parameters=parameters), module, checked.answer

    def _timed(self, rows: Mapping[str, Record], modules: Mapping[str, nn.Module], direction: str) -> dict[str, Record]:
        """The rows with latencies, of all sides in turns."""
        if not modules:  # the workload's own input may be what is missing
            return dict(rows)
        x = self.workload.input(self.dtype, self.device)
        found = dict(rows)
        actions: dict[str, Action] = {}
        for name, row in rows.items():
            if row.refused is not None:
                continue
            try:
                act = action(modules[name], x, direction)
                act()  # compiles what is compiled
            except Exception as error:  # likewise
                found[name] = replace(row, refused=cannot_run(error))
            else:
                actions[name] = act
        taken = latencies(actions | self._replays(actions), self.clock, seconds=self.seconds, seed=SEED)
        for name in actions:
            found[name] = replace(found[name], latency=taken[name], graph_latency=taken.get(REPLAYED + name))
        return found

    def _replays(self, actions: Mapping[str, Action]) -> dict[str, Action]:
        """The replays of the actions that can be captured; none without CUDA."""
        replays: dict[str, Action] = {}
        if self.device.type == "cuda":
            for name, act in actions.items():
                try:
                    replays[REPLAYED + name] = captured(act)
                except RuntimeError:  # it waits for the device: it has no replay, which is what the record will say
                    torch.cuda.synchronize(self.device)
        return replays

    def _weighed_if_possible(self, row: Record, side: Implementation) -> Record:
        try:
            return self._weighed(row, side)
        except Exception as error:  # counts are made in float32 on few tokens, which some side may not take
            return replace(row, refused=cannot_run(error))

    def _weighed(self, row: Record, side: Implementation) -> Record:
        """The row with everything that is not a latency."""
        need = floor(self.workload, side, self.dtype, row.direction)
        arguments = (self.workload, side, self.dtype, row.direction, self.device)
        if self.device.type == "cpu":  # what an earlier call left cached would count as there before
            peak = in_fresh_process(peak_of, *arguments, torch.get_num_threads())
        else:
            peak = peak_of(*arguments)
        return replace(
            row,
            peak_bytes=peak,
            flops=count(self.workload, side, row.direction),
            floor=floor_at(need, self.ceilings),
            ceilings=self.ceilings,
        )


def peak_of(
    workload: Workload,
    side: Implementation,
    dtype: torch.dtype,
    direction: str,
    device: torch.device,
    threads: int | None = None,
) -> int:
    """The most bytes that one call holds beyond parameters and input: activations, and with backward all gradients."""
    if threads is not None:
        torch.set_num_threads(threads)
    act = action(side.build(workload, dtype, device), workload.input(dtype, device), direction)
    act()
    return peak_bytes(act, device)


def blank(workload: Workload, side: Implementation, dtype: torch.dtype, direction: str, machine: Run) -> Record:
    """The record of a case of which nothing is known yet."""
    return Record(
        workload=workload.name,
        group=workload.group,
        tokens=workload.tokens,
        num_experts=workload.total_experts,
        implementation=side.name,
        kind=side.kind,
        factorization=side.factorization,
        dtype=str(dtype).removeprefix("torch."),
        direction=direction,
        run=machine,
    )


def cannot_run(error: Exception) -> str:
    """The first line of an error, as a reason."""
    return f"cannot run: {(str(error) or type(error).__name__).splitlines()[0]}"

"""Runs the cases: every implementation that can, on the same inputs, against the same truth."""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Iterator, Mapping, Sequence

import torch

from mumoe_fast.bench.verify.records import Row
from mumoe_fast.ops.dispatch import IMPLEMENTATIONS, obstacle
from mumoe_fast.testing.cases import Case, cases

Places = Mapping[str, torch.device]


def places(impls: Sequence[str] = (), device: torch.device | None = None) -> dict[str, torch.device]:
    """Where each implementation runs: those that are named, or all that can.

    The device is the GPU if there is one, if not said otherwise; native kernels are on the CPU always.

    Raises:
        ValueError: a name is unknown.
        RuntimeError: a named implementation cannot run here.
    """
    device = device or torch.device("cuda" if torch.cuda.is_available() else "cpu")
    known = IMPLEMENTATIONS[1:]
    found = {}
    for impl in impls or known:
        if impl not in known:
            raise ValueError(f"impl: expected one of {', '.join(known)}, got {impl!r}")
        place = torch.device("cpu") if impl == "native" else device
        hindrance = obstacle(impl, place, torch.float32)
        if hindrance is None:
            found[impl] = place
        elif impls:
            raise RuntimeError(f'impl="{impl}" cannot run here: {hindrance}')
    return found


def selected(only: str = "", quick: bool = False) -> list[tuple[Case, tuple[str, ...]]]:
    """The cases with the results whose row's name the regular expression finds; all, or the quick ones."""
    chosen = []
    for case in cases():
        if quick and not case.quick:
            continue
        names = case.build(torch.device("cpu")).names
        names = tuple(name for name in names if re.search(only, f"{case.name}/{name}"))
        if names:
            chosen.append((case, names))
    return chosen


def rows(case: Case, names: Collection[str], where: Places) -> Iterator[Row]:
    """The named results of a case by every implementation that can run it; where one raises, a row that says so."""
    able = {impl: device for impl, device in where.items() if case.obstacle(impl, device) is None}
    trials = {device: case.build(device) for device in set(able.values())}
    for impl, device in able.items():
        trial = trials[device]
        _ = trial.answer  # an error in what is expected is no finding about an implementation
        try:
            verdicts = trial.judge(impl, names)
        except Exception as error:  # whatever it raises is a finding, and the others go on
            failure = f"{type(error).__name__}: {error}".splitlines()[0]
            yield Row(case.name, "", impl, device.type, math.inf, failure=failure)
        else:
            yield from (Row.of(case, impl, device, verdict) for verdict in verdicts)

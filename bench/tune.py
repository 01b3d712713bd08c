"""Looks for faster tiles on this GPU: steps away from a kernel's configuration, as long as a step pays.

    mumoe tune --only CP --out configs.json

A candidate changes one block, the warps or the stages by a factor of two or by one. It is judged by the acceptance rule
on few tokens before it is timed on as many as the goals have, and one that does not compile, does not fit or is wrong
is passed over. What was found is printed in the form of `kernels.configs`, for a person to put there.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Annotated, Any
from unittest.mock import patch

import torch
import typer

from mumoe_fast.bench.measure import Clock
from mumoe_fast.testing import trials
from mumoe_fast.testing.acceptance import assert_accepted
from mumoe_fast.testing.trials import Trial

if TYPE_CHECKING:
    from mumoe_fast.kernels.configs import Config

JUDGED_TOKENS = 257
WORTH = 0.98  # of the time before: smaller gains are the clock's
ROUNDS = 3
CALLS, BURSTS = 5, 5
SMALLEST = {"GROUP_T": 1, "BLOCK_T": 1, "CHUNKS": 1, "GUESSES": 1}  # of a block; a dot takes no fewer than 16


@dataclass(frozen=True)
class Entry:
    """A configuration: its table in `kernels.configs`, and what shows how fast it is.

    Attributes:
        table: a mapping by architecture, of a configuration or of those of ascending BLOCK_N.
        make: one of `testing.trials`.
        options: its sizes.
        backward: whether the kernel is one of backward.
    """

    table: str
    make: Callable[..., Trial]
    options: Mapping[str, Any]
    backward: bool

    @property
    def name(self) -> str:
        """The table and the sizes."""
        return f"{self.table} {', '.join(f'{name} {value}' for name, value in self.options.items())}"

    def trial(self, device: torch.device, tokens: int | None = None) -> Trial:
        """The work in bfloat16, on fewer tokens if told so, and no more of it than the kernel is part of."""
        options = {**self.options, **({} if tokens is None else {"T": min(tokens, self.options["T"])})}
        torch.manual_seed(0)
        return replace(self.make(torch.bfloat16, device, **options), backward=self.backward)

    def current(self, architecture: str) -> Config:
        """What the library uses."""
        found = self._table()[architecture]
        config: Config = found[self._place(found)] if isinstance(found, tuple) else found
        return config

    @contextmanager
    def using(self, architecture: str, config: Config) -> Iterator[None]:
        """The library with another configuration in this place."""
        from mumoe_fast.kernels._plans import forget_plans

        table = self._table()
        found: Any = config
        if isinstance(table[architecture], tuple):
            place = self._place(table[architecture])
            found = (*table[architecture][:place], config, *table[architecture][place + 1 :])
        try:
            with patch.dict(table, {architecture: found}):
                forget_plans()
                yield
        finally:
            forget_plans()

    def _table(self) -> dict[str, Any]:
        from mumoe_fast.kernels import configs

        table: dict[str, Any] = getattr(configs, self.table)
        return table

    def _place(self, classes: tuple[Config, ...]) -> int:
        """The size class that holds a row of N."""
        return next(i for i, config in enumerate(classes) if config.blocks["BLOCK_N"] >= self.options["N"])


_CP = {"T": 24_576, "I": 768, "O": 3072, "N": (256,), "R": 552, "share": 0.05}
_RING = {**_CP, "R": (4, 4, 144)}
_GATE = {"T": 24_576, "I": 768, "N": 256}
ENTRIES = (
    Entry("_CP_FORWARD", trials.cp, _CP, backward=False),
    Entry("_CP_BACKWARD", trials.cp, _CP, backward=True),
    Entry("_RING_FORWARD", trials.tensor_ring, _RING, backward=False),
    Entry("_RING_BACKWARD", trials.tensor_ring, _RING, backward=True),
    Entry("_GATE", trials.gate, _GATE, backward=True),
    Entry("_ROWS", trials.entmax, {"T": 24_576, "N": 256, "alpha": 1.5}, backward=False),
    Entry("_ROWS", trials.entmax, {"T": 8192, "N": 8192, "alpha": 1.5}, backward=False),
)


@dataclass(frozen=True)
class Found:
    """The fastest configuration of an entry beside the library's own, with the seconds of both."""

    entry: Entry
    before: Config
    after: Config
    seconds_before: float
    seconds_after: float


def steps(config: Config) -> Iterator[Config]:
    """The configurations one step away; a row's BLOCK_N is its size class and stays."""
    for name, block in config.blocks.items():
        if name != "BLOCK_N":
            for other in (block // 2, 2 * block):
                if other >= SMALLEST.get(name, 16):
                    yield replace(config, blocks={**config.blocks, name: other})
    for warps in (config.num_warps // 2, 2 * config.num_warps):
        if 1 <= warps <= 16:
            yield replace(config, num_warps=warps)
    for stages in (config.num_stages - 1, config.num_stages + 1):
        if 1 <= stages <= 5:
            yield replace(config, num_stages=stages)


def tune(
    entry: Entry, device: torch.device, clock: Clock, on_step: Callable[[Config], None] = lambda config: None
) -> Found:
    """Take the fastest step while it pays.

    Raises:
        RuntimeError: the library's own configuration cannot be timed.
    """
    from mumoe_fast.kernels.configs import architecture

    name = architecture(device)
    few, many = entry.trial(device, JUDGED_TOKENS), entry.trial(device)
    known: dict[str, float] = {}

    def seconds(config: Config) -> float:
        if repr(config) not in known:
            on_step(config)
            with entry.using(name, config):
                known[repr(config)] = _seconds(few, many, clock)
        return known[repr(config)]

    before = best = entry.current(name)
    if seconds(before) == float("inf"):
        raise RuntimeError(f"{entry.name}: its own configuration does not run or is wrong")
    for _ in range(ROUNDS):
        candidate = min(steps(best), key=seconds)
        if seconds(candidate) > WORTH * seconds(best):
            break
        best = candidate
    return Found(entry, before, best, seconds(before), seconds(best))


def _seconds(few: Trial, many: Trial, clock: Clock) -> float:
    """Seconds of the work; infinite for what does not compile, does not fit or is outside the acceptance rule."""
    try:
        assert_accepted(few.judge("triton"))
        many.run("triton")
        return median(clock(lambda: many.run("triton"), CALLS) for _ in range(BURSTS))
    except Exception:  # of the compiler, of the driver, or of the rule: a candidate less
        return float("inf")


def records(found: list[Found], architecture: str) -> list[dict[str, object]]:
    """One record per entry, plain data."""
    return [
        {
            "table": one.entry.table,
            "sizes": dict(one.entry.options),
            "architecture": architecture,
            "before": asdict(one.before),
            "after": asdict(one.after),
            "seconds": [one.seconds_before, one.seconds_after],
        }
        for one in found
    ]


def command(
    only: Annotated[str, typer.Option(help='A regular expression searched in "table and sizes".')] = "",
    out: Annotated[Path | None, typer.Option(dir_okay=False, help="Write what was found as JSON.")] = None,
) -> None:
    """Look for faster tiles of the Triton kernels on the current GPU."""
    from rich.console import Console

    from mumoe_fast.bench.report import quantity
    from mumoe_fast.bench.suite.timing import clock_of
    from mumoe_fast.kernels.configs import architecture

    chosen = [entry for entry in ENTRIES if re.search(only, entry.name, re.IGNORECASE)]
    if not chosen:
        raise typer.BadParameter(f"--only: nothing matches {only!r}")
    if not torch.cuda.is_available():
        raise typer.BadParameter("expected a GPU, and PyTorch finds none")
    console, device, found = Console(), torch.device("cuda"), list[Found]()
    clock = clock_of(device)
    for entry in chosen:
        with console.status(entry.name) as status:

            def show(config: Config, name: str = entry.name) -> None:
                status.update(f"{name}: {config}")

            one = tune(entry, device, clock, show)
        found.append(one)
        times = f"{quantity(one.seconds_before, 's')} → {quantity(one.seconds_after, 's')}"
        console.print(f"{entry.name}: {times}, {one.after}", markup=False, highlight=False)
        if out is not None:  # after each, so that an end before the last keeps the others
            out.write_text(json.dumps(records(found, architecture(device)), indent=1), encoding="utf-8")

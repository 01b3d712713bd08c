"""Tiles: steps away from a configuration, as long as a step pays.

A candidate changes one block, the warps or the stages by a factor of two or by one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from statistics import median

import torch

from mumoe_fast.bench.measure import Clock
from mumoe_fast.bench.report import quantity
from mumoe_fast.bench.suite.timing import Action, captured
from mumoe_fast.bench.tune.entries import Entry
from mumoe_fast.kernels.configs import FEW_TOKENS, Config, architecture
from mumoe_fast.testing.acceptance import assert_accepted
from mumoe_fast.testing.trials import Trial

JUDGED_TOKENS = 272  # of 16, but of no larger block; the same specialisation of a kernel as of the many that are timed
WORTH = 0.98  # of the time before: smaller gains are the clock's
ROUNDS = 3
CALLS, BURSTS = 5, 5
SMALLEST = {"GROUP_T": 1, "BLOCK_T": 1, "CHUNKS": 1, "GUESSES": 1}  # of a block; a dot takes no fewer than 16

Ahead = Callable[[Entry, Sequence[Config]], None]  # told what will be tried next


@dataclass(frozen=True)
class Found:
    """The fastest configuration of an entry beside the library's own, with the seconds of both."""

    entry: Entry
    before: Config
    after: Config
    seconds_before: float
    seconds_after: float

    def __str__(self) -> str:
        """For the terminal."""
        times = f"{quantity(self.seconds_before, 's')} → {quantity(self.seconds_after, 's')}"
        return f"{self.entry.name}: {times}, {self.after}"

    def record(self, architecture: str) -> dict[str, object]:
        """Plain data."""
        return {
            "table": self.entry.table,
            "sizes": dict(self.entry.options),
            "architecture": architecture,
            "before": asdict(self.before),
            "after": asdict(self.after),
            "seconds": [self.seconds_before, self.seconds_after],
        }


def steps(config: Config) -> Iterator[Config]:
    """The configurations one step away; a row's BLOCK_N is its size class and stays."""
    for name, block in config.blocks.items():
        if name not in ("BLOCK_N", "BLOCK_P"):
            for other in (block // 2, 2 * block):
                if other >= SMALLEST.get(name, 16):
                    yield replace(config, blocks={**config.blocks, name: other})
    for warps in (config.num_warps // 2, 2 * config.num_warps):
        if 1 <= warps <= 16:
            yield replace(config, num_warps=warps)
    for stages in (config.num_stages - 1, config.num_stages + 1):
        if 1 <= stages <= 6:
            yield replace(config, num_stages=stages)


def tune(
    entry: Entry,
    device: torch.device,
    clock: Clock,
    ahead: Ahead = lambda entry, configs: None,
    on_step: Callable[[str], None] = lambda what: None,
) -> Found:
    """Take the fastest step while it pays.

    Raises:
        RuntimeError: the library's own configuration cannot be timed.
    """
    name = architecture(device)
    few, many = entry.trial(device, JUDGED_TOKENS), entry.trial(device)
    known: dict[str, float] = {}

    def seconds(config: Config) -> float:
        if repr(config) not in known:
            on_step(f"{entry.name}: {config}")
            with entry.using(name, config):
                known[repr(config)] = _seconds(few, many, clock, replayed(entry, device))
        return known[repr(config)]

    with entry.alone(name):
        before = best = entry.current(name)
        if seconds(before) == float("inf"):
            raise RuntimeError(f"{entry.name}: its own configuration does not run or is wrong")
        for _ in range(ROUNDS):
            candidates = list(steps(best))
            ahead(entry, [config for config in candidates if repr(config) not in known])
            candidate = min(candidates, key=seconds)
            if seconds(candidate) > WORTH * seconds(best):
                break
            best = candidate
        return Found(entry, before, best, seconds(before), seconds(best))


def replayed(entry: Entry, device: torch.device) -> bool:
    """Whether it is timed as a replay: eager calls on few tokens take as long as their launches, whatever the tiles."""
    return device.type == "cuda" and entry.tokens <= FEW_TOKENS and not entry.backward


def judged(few: Trial, many: Trial, *, replay: bool) -> Action:
    """The work on many tokens, run once, as its replay if asked for; of few tokens the results are judged before.

    Raises:
        Exception: it does not compile, does not fit, or is outside the acceptance rule.
    """
    assert_accepted(few.judge("triton"))
    many.run("triton")
    action = partial(many.run, "triton")
    return captured(action) if replay else action


def _seconds(few: Trial, many: Trial, clock: Clock, replay: bool) -> float:
    """Seconds of the work; infinite for what does not run or is wrong."""
    try:
        action = judged(few, many, replay=replay)
        return median(clock(action, CALLS) for _ in range(BURSTS))
    except Exception:  # of the compiler, of the driver, or of the rule: a candidate less
        return float("inf")

"""The memory counted without data is what a profiler sees of the same call with data."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import pytest
import torch

from mumoe_fast.bench.measure import peak_bytes as measured
from mumoe_fast.bench.static import memory
from mumoe_fast.bench.step import FORWARD, STEP, action, random_tokens
from mumoe_fast.bench.suite.allocation import peak_bytes
from mumoe_fast.bench.suite.implementations import IMPLEMENTATIONS, Case
from mumoe_fast.bench.suite.workloads import Workload
from mumoe_fast.kernels._common import Launch, _recording
from mumoe_fast.kernels.configs import target_architecture

SIDES = {side.name: side for side in IMPLEMENTATIONS}
SMALL = Workload("block", "Block", 300, (48, 96, 48), (24,), (("cp", 40), ("tr", (4, 4, 16)), ("tucker", (8, 24, 24))))


class Nowhere(list[Launch]):
    """Keeps nothing."""

    def append(self, launch: Launch) -> None:
        """Drop it."""


@contextmanager
def launching_nothing() -> Iterator[None]:
    """The launchers allocate and run nothing: the interpreter keeps a launch's arguments for the garbage collector."""
    token = _recording.set(Nowhere())
    try:
        with target_architecture("interpreter"):
            yield
    finally:
        _recording.reset(token)


@pytest.mark.parametrize("direction", [FORWARD, STEP])
@pytest.mark.parametrize("name", ["dense", "CP reference", "TR reference", "CP triton", "TR triton", "Tucker triton"])
def test_it_is_what_the_profiler_sees(name: str, direction: str) -> None:
    case = Case(SMALL, SIDES[name], torch.float32, direction)
    x = random_tokens(SMALL.tokens, SMALL.features[0], dtype=torch.float32)
    act = action(case.implementation.build(SMALL, torch.float32, torch.device("cpu")), x, direction)
    with launching_nothing():
        act()
        seen = measured(act, torch.device("cpu"))
    assert peak_bytes(case, "interpreter") == pytest.approx(seen, rel=0.02)


def test_a_training_step_of_a_block_holds_no_more_than_the_dense_ones() -> None:
    *found, dense = memory.rows()
    shares = {name: float(of_dense) for name, _, of_dense, _ in found}
    assert dense[0] == "dense"
    assert shares["CP"] <= 0.95
    assert shares["TR"] <= 0.95


def test_a_tensor_that_is_kept_longer_counts() -> None:
    deeper = replace(SMALL, tokens=2 * SMALL.tokens)
    one, two = (
        peak_bytes(Case(workload, SIDES["dense"], torch.float32, STEP), "sm_90") for workload in (SMALL, deeper)
    )
    assert 1.8 < two / one < 2

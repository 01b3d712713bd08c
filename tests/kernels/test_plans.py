"""Planned launches: the JIT's own, and what a description must not do."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from typing import Any

import pytest
import torch
import triton
import triton.language as tl
from torch import Tensor

from mumoe_fast.kernels import _plans
from mumoe_fast.kernels._common import Launch, record_launches
from mumoe_fast.kernels._plans import planned
from mumoe_fast.kernels.configs import Config

CONFIG = Config({"BLOCK_T": 16}, 1, 1)


@triton.jit
def _scale_kernel(rows, scale, T, BLOCK_T: tl.constexpr):
    offs = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    tl.store(rows[1][0] + offs, tl.load(rows[0] + offs, mask=offs < T) * scale, mask=offs < T)


def _described(x: Tensor, y: Tensor, scale: float, **arguments: Any) -> Launch:
    T = len(x)
    return Launch(_scale_kernel, (-(-T // 16),), CONFIG, {"rows": (x, (y,)), "scale": scale, "T": T, **arguments})


@planned
def _scale(x: Tensor, y: Tensor, *, device: torch.device, scale: float) -> Launch:
    assert x.is_meta
    assert y.is_meta
    return _described(x[:], y, scale)


def test_tensors_and_options_are_the_calls_own(device: torch.device) -> None:
    """Two tensors of a kind, one after the other and the other way round, and another option."""
    x, y = torch.randn(2, 40, device=device)
    for source, target in ((x, y), (y, x)):
        expected = source.clone()
        _scale(source, target, scale=2.0)
        torch.testing.assert_close(target, expected * 2)
        _scale(source, target, scale=3.0)
        torch.testing.assert_close(target, expected * 3)


def test_nothing_is_launched_for_no_tokens_or_while_launches_are_recorded() -> None:
    empty = torch.empty(0)
    _scale(empty, empty, scale=2.0)
    x, y = torch.randn(2, 40)
    before = y.clone()
    with record_launches("sm_90") as launches:
        planned(lambda x, y, *, device: _described(x, y, 2.0))(x, y)
        planned(lambda x, y, *, device: _described(x, y, 2.0))(empty, empty)
    assert torch.equal(y, before)
    (launch,) = launches
    assert launch.arguments["rows"][0] is x


def test_plans_are_forgotten_beyond_a_number(monkeypatch: pytest.MonkeyPatch, device: torch.device) -> None:
    described = []

    @planned
    def scale(x: Tensor, y: Tensor, *, device: torch.device) -> Launch:
        described.append(len(x))
        return _described(x, y, 2.0)

    monkeypatch.setattr(_plans, "MOST_PLANS", 2)
    for T in (1, 2, 1, 2, 3, 3, 1):
        x = torch.randn(T, device=device)
        scale(x, torch.empty_like(x))
    assert described == [1, 2, 3, 1]


@pytest.mark.parametrize(
    ("copied", "message"),
    [(lambda x: x.clone(), "rows: expected one of the planned tensors"), (lambda x: x[1:], "rows: expected one of")],
)
def test_a_description_uses_the_tensors_that_it_is_given(copied: Any, message: str) -> None:
    launch = planned(lambda x, y, *, device: _described(copied(x), y, 2.0))
    with pytest.raises(ValueError, match=message):
        launch(*torch.randn(2, 8))


@pytest.mark.parametrize("arguments", [{"another": 1}, {"BLOCK_T": 8, "T_": 1}])
def test_a_description_has_the_kernels_arguments(arguments: dict[str, int]) -> None:
    launch = planned(lambda x, y, *, device: _described(x, y, 2.0, **arguments))
    with pytest.raises(TypeError, match="_scale_kernel: expected rows, scale, T, BLOCK_T, got rows, scale, T,"):
        launch(*torch.randn(2, 8))


@pytest.mark.compile_only
def test_plans_launch_what_the_jit_would() -> None:
    """For calls that differ in one thing each: whatever a plan's key forgets would launch another's kernel."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-m", "tests.kernels.planned_launches"], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == {"different": [], "hooks": ["_gate_kernel"] * 2}

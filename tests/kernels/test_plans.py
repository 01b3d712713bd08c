"""Planned launchers: what they do again is what they did, for other tensors, and by the JIT's own kernels."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace

import pytest
import torch
import triton
import triton.language as tl
from torch import Tensor

from mumoe_fast.bench.suite.allocation import LiveBytes
from mumoe_fast.kernels import _plans
from mumoe_fast.kernels._common import launch, record_launches
from mumoe_fast.kernels._plans import forget_plans, planned, unplanned
from mumoe_fast.kernels.configs import Config
from mumoe_fast.testing.cases import Case, cases

CONFIG = Config({"BLOCK_T": 16}, 1, 1)
BY_CHANCE = torch.arange(4.0)


@triton.jit
def _scale_kernel(rows, scale, T, BLOCK_T: tl.constexpr):
    offs = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    tl.store(rows[1][0] + offs, tl.load(rows[0] + offs, mask=offs < T) * scale, mask=offs < T)


def scaled(x: Tensor, scale: float) -> Tensor:
    y, T = torch.empty_like(x), len(x)
    launch(_scale_kernel, (-(-T // 16),), CONFIG, x.device, rows=(x, (y,)), scale=scale, T=T)
    return y


def planned_cases() -> list[Case]:
    """The first quick case of every family of planned launchers, and whole layers in the one call of inference."""
    first: dict[str, Case] = {}
    for case in cases():
        if case.dtype == torch.float32 and case.quick and case.family not in ("topk", "mxd", "layer"):
            first.setdefault(case.family, case)
    layers = [case for case in cases() if case.name.startswith("layer/") and case.name.endswith("-forward/float32")]
    few = next(case for case in cases() if case.name.startswith("tucker/T1-") and case.dtype == torch.float32)
    return [*first.values(), *layers, few]


@pytest.mark.parametrize("case", planned_cases(), ids=str)
def test_a_plan_does_to_other_tensors_what_the_launcher_would(case: Case, device: torch.device) -> None:
    trial = case.build(device)
    other = replace(
        trial,
        inputs={name: x.flip(0) if x.dim() else 0.9 * x for name, x in trial.inputs.items()},
        upstream={name: x.flip(0) for name, x in trial.upstream.items()},
    )
    for _ in range(2):
        trial.run("triton")
    got = other.run("triton")
    assert unplanned() <= {"batch_norm_statistics"}  # it gives two from one operation
    forget_plans()
    expected = other.run("triton")
    assert got.keys() == expected.keys()
    assert all(torch.equal(got[name], expected[name]) for name in got)


def test_only_the_first_two_calls_of_a_kind_reach_the_launcher(device: torch.device) -> None:
    reached = []

    @planned
    def scale(x: Tensor, factors: Sequence[float], *, twice: bool = False) -> list[Tensor | None]:
        reached.append(len(x))
        return [None, *(scaled(x, factor * (1 + twice)) for factor in (2.0, 3.0))]

    for T, twice in ((8, False),) * 4 + ((9, False), (8, True), (9, False)) + ((8, True), (9, False)) * 2:
        x = torch.randn(T, device=device)
        nothing, double, triple = scale(x, [], twice=twice)
        assert nothing is None
        torch.testing.assert_close([double, triple], [2 * x * (1 + twice), 3 * x * (1 + twice)])
    assert reached == [8, 8, 9, 8, 9, 8]


def _from_elsewhere(x: Tensor, y: Tensor) -> Tensor:
    return x + BY_CHANCE.to(x.device)


def _of_unknown_length(x: Tensor, y: Tensor) -> Tensor:
    return x[x > 0] * 2


def _two_at_once(x: Tensor, y: Tensor) -> Tensor:
    return x.sort().values


def _on_a_number(x: Tensor, y: Tensor) -> Tensor:
    return x if x.sum().item() > 0 else y


@pytest.mark.parametrize("launcher", [_from_elsewhere, _of_unknown_length, _two_at_once, _on_a_number])
def test_what_cannot_be_repeated_is_called_ever_after(
    launcher: Callable[[Tensor, Tensor], Tensor], device: torch.device
) -> None:
    call = planned(launcher)
    for _ in range(4):
        x, y = torch.randn(2, 4, device=device)
        assert torch.equal(call(x, y), launcher(x, y))
    assert unplanned() == {launcher.__name__}


def _in_place(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    total = torch.empty(2, 4, device=x.device)
    total[1] = scaled(x, 2.0).add_(y)
    total[0] = torch.mul(y, 3.0, out=torch.empty_like(y))
    return total, total.flatten()[4:].view(2, 2).t()


def _views(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    square = torch.stack([x, y]).view(2, 2, 2)
    return torch.mm(square.flatten(1).t(), square[1]), scaled(square[0].reshape(4)[1:], 2.0)


@pytest.mark.parametrize("launcher", [_in_place, _views])
def test_changes_and_views_are_repeated(
    launcher: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]], device: torch.device
) -> None:
    call = planned(launcher)
    for _ in range(4):
        x, y = torch.randn(2, 4, device=device)
        for got, expected in zip(call(x, y), launcher(x, y), strict=True):
            assert torch.equal(got, expected)
            assert got.stride() == expected.stride()
    assert not unplanned()


def test_one_tensor_in_two_places_is_no_pattern_for_others(device: torch.device) -> None:
    @planned
    def difference(x: Tensor, y: Tensor) -> Tensor:
        return x - y

    for _ in range(3):
        x, y = torch.randn(2, 4, device=device)
        assert not difference(x, x).any()
        assert torch.equal(difference(x, y), x - y)


def test_a_plan_lets_go_of_what_it_has_read(device: torch.device) -> None:
    @planned
    def chain(x: Tensor) -> Tensor:
        for _ in range(3):
            x = torch.mm(x, x)
            x = torch.cat([x.t(), x[:8]])[8:]
        return x

    peaks = []
    for _ in range(4):
        with LiveBytes("sm_90") as live:
            chain(torch.randn(64, 64, device=device))
        peaks.append(live.peak)
    assert not unplanned()
    assert peaks[2] == peaks[3] <= peaks[0]


def test_nothing_is_planned_while_launches_are_recorded() -> None:
    call = planned(scaled)
    x = torch.randn(40)
    with record_launches("sm_90") as launches:
        for _ in range(3):
            call(x, 2.0)
            call(x[:0], 2.0)
    assert [launch.arguments["rows"][0] is x for launch in launches] == [True] * 3


def test_plans_are_forgotten_beyond_a_number(monkeypatch: pytest.MonkeyPatch, device: torch.device) -> None:
    reached = []

    @planned
    def double(x: Tensor) -> Tensor:
        reached.append(len(x))
        return scaled(x, 2.0)

    monkeypatch.setattr(_plans, "MOST_PLANS", 2)
    for T in (1, 2, 1, 2, 1, 2, 3, 3, 1):
        double(torch.randn(T, device=device))
    assert reached == [1, 2, 1, 2, 3, 3, 1]


@pytest.mark.compile_only
def test_plans_launch_what_the_jit_would() -> None:
    """For calls that differ in one thing each: whatever a plan's key forgets would launch another's kernel."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-m", "tests.kernels.planned_launches"], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == {"different": [], "hooks": ["_gate_kernel"] * 2}

"""Looking for tiles, with a clock that knows what it wants to hear."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import pytest
import torch
import typer
from torch import Tensor
from typer.testing import CliRunner

pytest.importorskip("triton")

from mumoe_fast.bench import tune as tuning
from mumoe_fast.bench.tune import ENTRIES, Entry, command, records, steps, tune
from mumoe_fast.kernels import _plans, configs
from mumoe_fast.kernels._common import Launch
from mumoe_fast.kernels.configs import Config, architecture, target_architecture
from mumoe_fast.kernels.entmax import entmax_forward
from mumoe_fast.testing import trials

CPU = torch.device("cpu")
HERE = "interpreter"
ROWS = Entry("_ROWS", trials.entmax, {"T": 3, "N": 20, "alpha": 1.5}, backward=False)


def clock_by(cost: Callable[[Config], float], entry: Entry = ROWS) -> Callable[..., float]:
    """A clock that reads the configuration in use."""
    return lambda action, repeats: cost(entry.current(HERE))


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tuning, "BURSTS", 1)


def test_steps_go_on_while_they_pay_and_leave_the_library_as_it_was() -> None:
    before = ROWS.current(HERE)
    assert before.blocks["BLOCK_T"] == 2
    found = tune(ROWS, CPU, clock_by(lambda config: 1.0 / min(config.blocks["BLOCK_T"], 8)))
    blocks = {**before.blocks, "BLOCK_T": 8}
    assert found.after == Config(blocks, before.num_warps, before.num_stages)
    assert (found.seconds_before, found.seconds_after) == (0.5, 0.125)
    assert ROWS.current(HERE) is before
    (record,) = records([found], HERE)
    assert record["after"] == {"blocks": blocks, "num_warps": 1, "num_stages": 1}


def test_a_gain_within_the_clocks_noise_changes_nothing() -> None:
    found = tune(ROWS, CPU, clock_by(lambda config: 0.99 if config.blocks["BLOCK_T"] == 4 else 1.0))
    assert found.after == found.before


def test_what_is_wrong_or_does_not_run_is_never_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    """BLOCK_T 4 gives wrong results, BLOCK_T 1 raises, and both would be fast."""
    from mumoe_fast.kernels import entmax

    forward, timed = entmax.entmax_forward, []

    def spoilt(x: torch.Tensor, alpha: float) -> torch.Tensor:
        block = ROWS.current(HERE).blocks["BLOCK_T"]
        if block == 1:
            raise ValueError("out of resources")
        return forward(x, alpha) * (1.5 if block == 4 else 1.0)

    def cost(config: Config) -> float:
        timed.append(config.blocks["BLOCK_T"])
        return 0.1 if config.blocks["BLOCK_T"] != 2 else 1.0

    monkeypatch.setattr(entmax, "entmax_forward", spoilt)
    found = tune(ROWS, CPU, clock_by(cost))
    assert found.after == found.before
    assert set(timed) == {2}


def test_a_configuration_of_its_own_that_fails_is_an_error() -> None:
    def broken(action: object, repeats: int) -> float:
        raise RuntimeError("no clock")

    with pytest.raises(RuntimeError, match=r"_ROWS T 3, N 20.*its own configuration"):
        tune(ROWS, CPU, broken)


def test_a_planned_launch_has_the_configuration_in_use(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first plan is remembered, and must not be timed in another's place."""
    used: list[int] = []
    plan = _plans._Plan

    def noted(described: Launch, stand_ins: Sequence[Tensor | None]) -> _plans._Plan:
        used.append(described.config.blocks["BLOCK_T"])
        return plan(described, stand_ins)

    monkeypatch.setattr(_plans, "_Plan", noted)
    _plans.forget_plans()
    x = torch.randn(3, 20)
    for _ in range(2):
        entmax_forward(x, 1.5)
    with ROWS.using(HERE, replace(ROWS.current(HERE), blocks={"BLOCK_T": 1, "BLOCK_N": 64})):
        entmax_forward(x, 1.5)
    entmax_forward(x, 1.5)
    assert used == [2, 1, 2]


@pytest.mark.parametrize("entry", ENTRIES, ids=lambda entry: entry.name)
def test_every_entry_is_in_the_library_and_has_steps(entry: Entry) -> None:
    config = entry.current("sm_90")
    near = list(steps(config))
    assert len(near) >= 3
    assert len({repr(other) for other in near}) == len(near)
    assert config not in near
    with entry.using("sm_90", near[0]):
        assert entry.current("sm_90") == near[0]
    assert entry.current("sm_90") == config


def test_the_kernels_take_what_is_tried() -> None:
    entry = next(entry for entry in ENTRIES if entry.table == "_CP_FORWARD")
    other = next(steps(entry.current("sm_90")))
    with target_architecture("sm_90"), entry.using("sm_90", other):
        assert architecture(CPU) == "sm_90"
        assert configs.cp_forward_config(CPU, torch.bfloat16, 24_576, wide=True) == other


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.parametrize(("only", "message"), [("nothing", "nothing matches"), ("CP", "expected a GPU")])
def test_the_command_says_what_it_needs(only: str, message: str) -> None:
    app = typer.Typer()
    app.command()(command)
    result = CliRunner().invoke(app, ["--only", only])
    assert result.exit_code == 2
    assert message in result.output

"""Looking for tiles, with a clock that knows what it wants to hear."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
import typer
from typer.testing import CliRunner

pytest.importorskip("triton")

from mumoe_fast.bench.tune import command, search
from mumoe_fast.bench.tune.ahead import compiling_ahead, run_once
from mumoe_fast.bench.tune.crossover import CONTESTS, Contest, Crossing, contest
from mumoe_fast.bench.tune.entries import ENTRIES, KERNEL, NEVER, Entry, contracting, table
from mumoe_fast.bench.tune.search import steps, tune
from mumoe_fast.kernels import configs, entmax
from mumoe_fast.kernels._common import launch
from mumoe_fast.kernels.configs import Config, architecture, target_architecture
from mumoe_fast.kernels.entmax import entmax_forward
from mumoe_fast.testing import trials

CPU = torch.device("cpu")
HERE = "interpreter"
ROWS = Entry("rows.ROWS", trials.entmax, {"T": 3, "N": 20, "alpha": 1.5}, dtype=torch.float32)


def clock_by(cost: Callable[[Config], float], entry: Entry = ROWS) -> Callable[..., float]:
    """A clock that reads the configuration in use."""
    return lambda action, repeats: cost(entry.current(HERE))


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(search, "BURSTS", 1)


def test_steps_go_on_while_they_pay_and_leave_the_library_as_it_was() -> None:
    before = ROWS.current(HERE)
    assert before.blocks["BLOCK_T"] == 2
    found = tune(ROWS, CPU, clock_by(lambda config: 1.0 / min(config.blocks["BLOCK_T"], 8)))
    blocks = {**before.blocks, "BLOCK_T": 8}
    assert found.after == Config(blocks, before.num_warps, before.num_stages)
    assert (found.seconds_before, found.seconds_after) == (0.5, 0.125)
    assert ROWS.current(HERE) is before
    assert found.record(HERE)["after"] == {"blocks": blocks, "num_warps": 1, "num_stages": 1}


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

    with pytest.raises(RuntimeError, match=r"rows\.ROWS T 3, N 20.*its own configuration"):
        tune(ROWS, CPU, broken)


def test_a_plan_has_the_configuration_in_use(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is remembered must not be timed in another's place."""
    used: list[int] = []

    def noted(kernel: Any, grid: Any, config: Config, *rest: Any, **arguments: Any) -> None:
        used.append(config.blocks["BLOCK_T"])
        launch(kernel, grid, config, *rest, **arguments)

    monkeypatch.setattr(entmax, "launch", noted)
    x = torch.randn(3, 20)
    for _ in range(3):
        entmax_forward(x, 1.5)
    with ROWS.using(HERE, replace(ROWS.current(HERE), blocks={**ROWS.current(HERE).blocks, "BLOCK_T": 1})):
        entmax_forward(x, 1.5)
    entmax_forward(x, 1.5)
    assert used == [2, 2, 1, 2]


@pytest.mark.parametrize("entry", ENTRIES, ids=lambda entry: entry.name)
def test_every_entry_is_in_the_library_and_has_steps(entry: Entry) -> None:
    assert entry.trial(CPU, tokens=2).upstream
    config = entry.current("sm_90")
    near = list(steps(config))
    assert len(near) >= 3
    assert len({repr(other) for other in near}) == len(near)
    assert config not in near
    with entry.using("sm_90", near[0]):
        assert entry.current("sm_90") == near[0]
    assert entry.current("sm_90") == config


def test_the_kernels_take_what_is_tried() -> None:
    entry = next(entry for entry in ENTRIES if entry.table == "contraction.CP_FORWARD")
    other = next(steps(entry.current("sm_90")))
    with target_architecture("sm_90"), entry.using("sm_90", other):
        assert architecture(CPU) == "sm_90"
        assert configs.cp_forward_config(CPU, torch.bfloat16, 24_576, wide=True) == other


def test_what_comes_next_is_told_ahead() -> None:
    told: list[list[int]] = []
    tune(ROWS, CPU, clock_by(lambda config: 1.0), lambda entry, near: told.append([c.blocks["BLOCK_T"] for c in near]))
    assert told == [[config.blocks["BLOCK_T"] for config in steps(ROWS.current(HERE))]]


def test_candidates_run_once_and_failures_stay_where_they_are() -> None:
    assert run_once(ROWS, ROWS.current(HERE), CPU)
    assert not run_once(ROWS, Config({"BLOCK_T": 3, "BLOCK_N": 64}), CPU)
    with compiling_ahead(CPU, processes=1) as ahead:
        ahead(ROWS, [Config({"BLOCK_T": 3, "BLOCK_N": 64}), ROWS.current(HERE)])


def test_an_entry_says_who_contracts_and_afterwards_the_library_decides_again() -> None:
    entry = next(entry for entry in ENTRIES if entry.table == "contraction.CP_FORWARD")
    arguments = "cp", CPU, torch.bfloat16, 24_576, 3072, "gelu"
    with target_architecture("sm_90"):
        assert configs.vendor_contracts(*arguments)
        with entry.alone("sm_90"):
            assert not configs.vendor_contracts(*arguments)
        assert configs.vendor_contracts(*arguments)


CONTEST = Contest(
    "contraction.CP_VENDOR",
    "plain",
    "contracted",
    (32, 64, 160),
    trials.cp,
    "I",
    {"T": 20, "O": 16, "N": (4,), "R": 16},
)


def clock_of_contest(kernel: Callable[[int], float], vendor: Callable[[int], float]) -> Callable[..., float]:
    """A clock that runs the action and looks at what it computed, and where."""
    from mumoe_fast.kernels import cp

    launched = cp.cp_forward
    seen = {}

    def noting(z: torch.Tensor, *arguments: object, **options: object) -> object:
        seen["seconds"] = (kernel if table("contraction.CP_VENDOR")[HERE] == KERNEL else vendor)(z.shape[1])
        return launched(z, *arguments, **options)

    def clock(action: Callable[[], object], repeats: int) -> float:
        with pytest.MonkeyPatch.context() as patched:
            patched.setattr(cp, "cp_forward", noting)
            action()
        return float(seen["seconds"])

    return clock


def test_a_contest_finds_the_least_size_from_which_on_the_vendor_is_faster() -> None:
    before = CONTEST.current(HERE)
    crossing = contest(CONTEST, CPU, clock_of_contest(lambda I: float(I), lambda I: 50.0))
    assert (crossing.kernel, crossing.vendor) == ((32, 64, 160), (50, 50, 50))
    assert crossing.size == 64
    assert crossing.after(before) == before._replace(plain=configs.From(before.plain.tokens, 64))
    assert crossing.record(HERE)["after"] == 64
    with CONTEST.using(HERE, crossing.after(before)):
        assert configs.vendor_contracts("cp", CPU, torch.bfloat16, before.plain.tokens, 64, "none")
    assert CONTEST.current(HERE) == before


@pytest.mark.parametrize(
    ("vendor", "size"), [((1, 1, 1), 32), ((1, 3, 1), 160), ((1, 1, 3), NEVER), ((float("inf"),) * 3, NEVER)]
)
def test_a_vendor_that_loses_later_does_not_win_before(vendor: tuple[float, ...], size: int) -> None:
    assert Crossing(CONTEST, (2, 2, 2), vendor).size == size


def test_a_side_that_is_wrong_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    from mumoe_fast.kernels import cp

    right = cp.vendor_product
    monkeypatch.setattr(cp, "vendor_product", lambda *arguments: right(*arguments) * 1.5)
    crossing = contest(CONTEST, CPU, lambda action, repeats: 1.0)
    assert crossing.kernel == (1, 1, 1)
    assert crossing.vendor[1:] == (float("inf"),) * 2 or crossing.vendor[2] == float("inf")


@pytest.mark.parametrize("each", CONTESTS, ids=lambda each: each.name)
def test_every_contest_is_of_the_library(each: Contest) -> None:
    assert each.trial(each.sizes[0], CPU, tokens=2).upstream
    current = each.current("sm_90")
    assert getattr(getattr(current, each.way), each.field) > 0
    assert list(each.sizes) == sorted(each.sizes)
    with contracting("sm_90", KERNEL):
        assert each.current("sm_90") == KERNEL
    assert each.current("sm_90") == current


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.parametrize(("only", "message"), [("nothing", "nothing matches"), ("CP", "expected a GPU")])
def test_the_command_says_what_it_needs(only: str, message: str) -> None:
    app = typer.Typer()
    app.command()(command)
    result = CliRunner().invoke(app, ["--only", only])
    assert result.exit_code == 2
    assert message in result.output

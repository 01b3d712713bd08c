"""The tables of goals: their arithmetic, what they refuse to time, and tiny workloads through all of it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import ModuleType

import pytest
import torch
import typer
from rich.console import Console
from torch import Tensor, nn
from typer.testing import CliRunner

from mumoe_fast.bench.goals import cpu, gpu, matching, on_cpu, on_gpu, sides
from mumoe_fast.bench.goals import measure as measuring
from mumoe_fast.bench.goals.goal import MEMORY, PARAMETERS, REPLAY, Workload, at_most, faster, within
from mumoe_fast.bench.goals.measure import (
    Measurement,
    Outcome,
    build,
    check,
    compare,
    measure,
    on_gemm,
)
from mumoe_fast.bench.goals.report import json_lines, show, table_rows
from mumoe_fast.bench.step import FORWARD, STEP, results, truth
from mumoe_fast.layers import MuMoE
from mumoe_fast.ops import native_gemm
from mumoe_fast.ops.dispatch import NATIVE_READY

OURS = cpu.OURS


def tiny_layer() -> nn.Module:
    return sides.trained(MuMoE(12, 10, 8, rank=4, impl="reference"))


def tiny_dense() -> nn.Module:
    return nn.Linear(12, 10)


def absent(*_: object) -> nn.Module:
    raise ImportError("no such package")


class Off(nn.Module):
    """A layer whose output, or only whose gradient, is wrong."""

    def __init__(self, *, forward: float, backward: float) -> None:
        super().__init__()
        self.layer, self.wrong = tiny_layer(), (forward, backward)

    def forward(self, x: Tensor) -> Tensor:
        forward, backward = self.wrong
        y: Tensor = self.layer(x)
        return y * backward + y.detach() * (forward - backward)

    def named_parameters(self, *args: object, **kwargs: object):  # type: ignore[no-untyped-def, override]
        return self.layer.named_parameters()


TINY = Workload(
    "tiny",
    torch.float32,
    (6, 12),
    OURS,
    tiny_layer,
    tiny_layer,
    {"dense": tiny_dense, "absent": absent},
    {FORWARD: (faster("dense", 2), faster("absent", 2)), STEP: (within("dense", 1e9),), MEMORY: (within("dense", 9),)},
)


def test_faster_and_within_read_the_same_times_the_other_way_round() -> None:
    ours, theirs = Measurement(OURS, (1.0, 2.0, 4.0)), Measurement("peer", (6.0, 6.0, 6.0))
    quick, share = compare(faster("peer", 3), ours, theirs), compare(within("peer", 0.3), ours, theirs)
    assert quick.figure == 3.0  # of the medians
    assert (quick.low, quick.high) == (2.25, 4.5)  # quartiles of 1.5, 3 and 6
    assert quick.met
    assert share.figure == pytest.approx(1 / 3)
    assert not share.met
    assert not compare(faster("peer", 3.01), ours, theirs).met
    assert compare(within("peer", 1 / 3), ours, theirs).met


def test_a_goal_of_one_gemm_is_not_asked_on_another() -> None:
    goals = (within("dense", 0.6, gemm="onednn"), within("dense", 1.04, gemm="aten"), within("dense", 2))
    workload = replace(TINY, goals={FORWARD: goals})
    assert [goal.limit for goal in workload.asked(FORWARD, "onednn")] == [0.6, 2]
    assert [goal.limit for goal in workload.asked(FORWARD, "aten")] == [1.04, 2]
    assert [goal.limit for goal in workload.asked(FORWARD, None)] == [2]


@pytest.mark.parametrize("table", [cpu, gpu])
def test_every_goal_names_a_peer(table: ModuleType) -> None:
    names = [(workload.name, workload.dtype) for workload in table.WORKLOADS]
    assert len(set(names)) == len(names)
    for workload in table.WORKLOADS:
        assert workload.impl == table.OURS
        for direction, goals in workload.goals.items():
            assert direction in (FORWARD, REPLAY, STEP, MEMORY, PARAMETERS)
            assert {goal.peer for goal in goals} <= {workload.impl, *workload.peers}, workload.name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_right_side_passes(dtype: torch.dtype) -> None:
    verdicts, problem = check(replace(TINY, dtype=dtype))
    assert problem is None
    assert {"y", "y in training", "dx", "dgate.weights.0", "dexperts.out_factor"} <= {v.name for v in verdicts}


@pytest.mark.parametrize(
    ("forward", "backward", "blamed"), [(1.01, 1.0, "wrong: y"), (1.0, 1.01, "wrong: d"), (float("nan"), 1.0, "NOT")]
)
def test_a_wrong_side_is_not_timed(forward: float, backward: float, blamed: str) -> None:
    workload = replace(TINY, ours=partial(Off, forward=forward, backward=backward))
    outcomes = list(measure(workload, repeats=1, seconds=1))
    assert [outcome.direction for outcome in outcomes] == [FORWARD, STEP, MEMORY]
    for outcome in outcomes:
        assert outcome.refused is not None
        assert blamed in outcome.refused
        assert not outcome.measurements
        assert not outcome.comparisons
    (row,) = table_rows(outcomes[0])
    assert row[:3] == ("tiny, float32", FORWARD, "refused")
    (record,) = [json.loads(line) for line in json_lines(outcomes[:1], {}).splitlines()]
    assert blamed in record["refused"]
    assert "p50" not in record


def test_the_truth_by_groups_of_tokens_is_the_truth() -> None:
    module = build(tiny_layer, torch.float64)
    x, dy = torch.randn(67, 12, dtype=torch.float64), torch.randn(67, 10, dtype=torch.float64)
    whole = results(module, x, dy)
    exact, magnitude = truth(module, x, dy)
    torch.testing.assert_close(exact, whole)
    # t̄ of the output factor's gradient, token by token, is what the groups' must not exceed.
    each = [results(module, *token)["dexperts.out_factor"].abs() for token in zip(x.split(1), dy.split(1))]
    name = "dexperts.out_factor"
    assert (magnitude[name] >= exact[name].abs() - 1e-12).all()
    assert (magnitude[name] <= sum(each) + 1e-12).all()
    assert magnitude[name].max() > 1.5 * exact[name].abs().max()


def test_a_side_that_is_only_wrong_in_backward_is_found_only_where_backward_is_asked() -> None:
    workload = replace(TINY, ours=partial(Off, forward=1.0, backward=1.01), goals={FORWARD: TINY.goals[FORWARD]})
    assert check(workload)[1] is None


def test_a_tiny_workload_from_end_to_end() -> None:
    begun: list[str] = []
    outcomes = list(measure(TINY, repeats=3, seconds=5, on_start=begun.append))
    assert begun == ["check", FORWARD, STEP, MEMORY]
    records = [json.loads(line) for line in json_lines(outcomes, {"date": "today"}).splitlines()]
    assert [(r["direction"], r["implementation"]) for r in records] == [
        (FORWARD, OURS),
        (FORWARD, "dense"),
        (FORWARD, "absent"),
        (STEP, OURS),
        (STEP, "dense"),
        (MEMORY, OURS),
        (MEMORY, "dense"),
    ]
    ours, dense, missing = records[:3]
    assert 0 < ours["minimum"] <= ours["p20"] <= ours["p50"] <= ours["p80"]
    assert ours["bursts"] == dense["bursts"] == 3
    assert ours["goals"][0]["ratio"] == pytest.approx(dense["p50"] / ours["p50"])
    assert ours["date"] == "today"
    assert "no such package" in missing["refused"]
    # The dense step allocates at least y and the gradients of x, weight and bias; all of them at the end but y.
    assert records[-1]["peak_bytes"] >= 4 * (6 * 12 + 12 * 10 + 10)
    console = Console(width=200, record=True)
    show(outcomes, console)
    text = console.export_text()
    assert "≤ 1e+09×" in text
    assert "absent cannot run: no such package" in text


def test_the_pattern_chooses_directions() -> None:
    chosen = matching("^TINY.*float32, forward$", [TINY, replace(TINY, name="other")])
    assert [(workload.name, list(workload.goals)) for workload in chosen] == [("tiny", [FORWARD])]


def test_the_command_writes_records(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(cpu, "WORKLOADS", [TINY])
    app = typer.Typer()
    app.command()(on_cpu)
    path = tmp_path / "cpu.jsonl"
    result = CliRunner().invoke(app, ["--only", "backward", "--repeats", "1", "--json", str(path)])
    assert result.exit_code == 0, result.output
    records = [json.loads(line) for line in path.read_text().splitlines()]
    assert [record["implementation"] for record in records] == [OURS, "dense"]
    assert all(record["date"] and record["CPU"] and record["software"] for record in records)
    assert CliRunner().invoke(app, ["--only", "nothing"]).exit_code == 2
    assert CliRunner().invoke(app, ["--only", "("]).exit_code == 2
    monkeypatch.setattr(cpu, "WORKLOADS", [replace(TINY, ours=absent)])
    assert CliRunner().invoke(app, ["--only", "backward"]).exit_code == 1


@pytest.mark.skipif(not NATIVE_READY, reason="the native kernels are not built")
def test_the_gemm_is_put_back() -> None:
    before = native_gemm.in_use()
    other = "aten" if before.name == "onednn" else "onednn"
    with on_gemm(other):
        assert native_gemm.in_use().name == other
    assert native_gemm.in_use() == before


def test_a_missing_peer_leaves_the_others_compared() -> None:
    sides = {OURS: Measurement(OURS, (1.0,)), "dense": Measurement("dense", (3.0,))}
    outcome = Outcome(TINY, FORWARD, None, TINY.goals[FORWARD], sides)
    assert [comparison.figure for comparison in outcome.comparisons] == [3.0]
    assert list(table_rows(outcome)) == [
        ("tiny, float32", FORWARD, "1 s", "", "", ""),
        ("  dense", "", "3 s", "3× [3–3]", "≥ 2×", "yes"),
        ("  absent", "", "cannot run", "", "≥ 2×", ""),
    ]


# --- on a GPU ---------------------------------------------------------------------------------------------------------

SMALL = gpu.Sizes(
    classifier=(32, 24),
    classifier_experts=4,
    block=(16, 64),
    block_experts=6,
    block_tokens=24,
    rows=((5, 20),),
    final_rank=8,
    final_experts=(40,),
    final_tokens=9,
    moe_experts=(8,),
)


@pytest.fixture
def in_this_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """No torch.compile, no liger-kernel, and no process for each peak: they take seconds and are tested elsewhere."""
    monkeypatch.setattr(gpu.LigerSparseMoE, "experts", absent)
    monkeypatch.setattr(torch, "compile", lambda module: module)
    monkeypatch.setattr(measuring, "in_fresh_process", lambda function, *arguments: function(*arguments))


@pytest.mark.usefixtures("in_this_process")
@pytest.mark.parametrize("workload", gpu.workloads(SMALL, "reference"), ids=lambda workload: workload.name)
def test_the_gpus_table_in_small(workload: Workload) -> None:
    outcomes = list(measure(workload, repeats=3, seconds=1))
    assert [outcome.direction for outcome in outcomes] == list(workload.goals)
    for outcome in outcomes:
        if outcome.direction == REPLAY:
            assert outcome.refused == "CUDA graphs need a GPU"
            continue
        assert outcome.refused is None
        absent_here = {gpu.LIGER} if gpu.LIGER in workload.peers and outcome.direction != PARAMETERS else set()
        assert (outcome.missing or {}).keys() == absent_here
        wanted = {goal.peer for goal in outcome.goals} | {workload.impl}
        assert outcome.measurements.keys() == wanted - absent_here


@pytest.mark.usefixtures("in_this_process")
def test_the_gpus_table_by_the_kernels(device: torch.device) -> None:
    pytest.importorskip("triton")
    for workload in matching("entmax|beside.*forward$", gpu.workloads(SMALL)):
        for outcome in measure(workload, repeats=1, seconds=1, device=device):
            assert outcome.refused is None or outcome.direction == REPLAY
            assert outcome.verdicts
            assert all(verdict.passed for verdict in outcome.verdicts)


def test_a_goal_in_seconds_is_about_ours_alone() -> None:
    goal = at_most(OURS, 15e-6)
    workload = replace(TINY, goals={FORWARD: (goal,)})
    for seconds, met in ((14e-6, "yes"), (16e-6, "no")):
        measurement = Measurement(OURS, (seconds, seconds, 1.0))
        outcome = Outcome(workload, FORWARD, None, (goal,), {OURS: measurement})
        (comparison,) = outcome.comparisons
        assert comparison.figure == seconds
        ours, asked = table_rows(outcome)
        assert ours[2] == f"{seconds * 1e6:.0f} µs"
        assert asked == ("  alone", "", "", "", "≤ 15 µs", met)


def test_a_call_on_several_inputs_is_on_each_and_replayed_as_one(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[int] = []
    recorded: list[object] = []
    module = sides.Function(lambda x: x.sum() if seen.append(x.data_ptr()) is None else x)
    monkeypatch.setattr(measuring, "captured", lambda act: recorded.append(act) or (lambda: "replayed"))
    inputs = [torch.ones(2, 3) for _ in range(3)]
    assert measuring._action(module, inputs, REPLAY)() == "replayed"
    assert seen == [x.data_ptr() for x in inputs]
    assert len(recorded) == 1
    assert len(measuring._action(module, inputs, FORWARD)()) == 3  # type: ignore[arg-type]


def test_the_time_of_several_inputs_is_that_of_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measuring, "wall_clock", lambda act, repeats: 8.0)
    monkeypatch.setattr(measuring, "clock_of", lambda device: lambda act, repeats: 4.0)
    goals = {FORWARD: (within("dense", None),)}
    (by_device,) = measure(replace(TINY, goals=goals, inputs=4), repeats=3, seconds=1)
    (by_host,) = measure(replace(TINY, goals=goals, host_clock=True), repeats=3, seconds=1)
    assert by_device.measurements["dense"].values == (1.0, 1.0, 1.0)
    assert by_host.measurements["dense"].values == (8.0, 8.0, 8.0)


def test_what_fails_while_it_is_measured_ends_no_table(monkeypatch: pytest.MonkeyPatch) -> None:
    def out_of_memory(*arguments: object) -> None:
        raise torch.OutOfMemoryError("no memory")

    workload = replace(TINY, goals={FORWARD: TINY.goals[FORWARD]})
    monkeypatch.setattr(measuring, "_action", out_of_memory)
    (outcome,) = measure(workload, repeats=1, seconds=1)
    assert outcome.refused == "cannot run: no memory"
    monkeypatch.setattr(measuring, "truth", out_of_memory)
    (outcome,) = measure(workload, repeats=1, seconds=1)
    assert outcome.refused == "cannot be checked: no memory"


def test_whatever_a_compiler_raises_ends_no_table() -> None:
    """Triton's errors are of no class that torch knows."""

    class OutOfResourcesError(Exception):
        pass

    def ours() -> nn.Module:
        raise OutOfResourcesError("shared memory")

    goals = {FORWARD: TINY.goals[FORWARD]}
    (outcome,) = measure(replace(TINY, ours=ours, goals=goals), repeats=1, seconds=1)
    assert outcome.refused == "cannot run: shared memory"
    (outcome,) = measure(replace(TINY, peers={**TINY.peers, "dense": ours}, goals=goals), repeats=1, seconds=1)
    assert outcome.refused is None
    assert outcome.missing is not None
    assert outcome.missing["dense"] == "shared memory"


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_the_gpus_table_needs_a_gpu() -> None:
    app = typer.Typer()
    app.command()(on_gpu)
    result = CliRunner().invoke(app, ["--only", "entmax"])
    assert result.exit_code == 2
    assert "expected a GPU" in result.output


def test_an_interrupted_table_shows_and_writes_what_there_is(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def stopped(workload: Workload, **options: object) -> Iterator[Outcome]:
        yield Outcome(TINY, FORWARD, None, (), {OURS: Measurement(OURS, (1.0,))}, (check(TINY)[0][0],))
        raise KeyboardInterrupt

    monkeypatch.setattr(measuring, "measure", stopped)
    app, path = typer.Typer(), tmp_path / "cpu.jsonl"
    app.command()(on_cpu)
    result = CliRunner().invoke(app, ["--json", str(path)])
    assert result.exit_code == 130
    assert "Interrupted" in result.output
    assert "tiny, float32" in result.output
    assert len(path.read_text().splitlines()) == 1

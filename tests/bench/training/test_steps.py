"""Training steps side by side: the counts, the check, the shares, and a tiny table through all of it."""

from __future__ import annotations

import io
import json
import pickle
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from torch import Tensor
from typer.testing import CliRunner

pytest.importorskip("transformers")

import mumoe_fast.bench.training as command
from mumoe_fast.bench.cli import app
from mumoe_fast.bench.training import steps, workloads
from mumoe_fast.bench.training.report import best_precision, json_lines, row, show
from mumoe_fast.bench.training.steps import Result, check, count, measure, results
from mumoe_fast.bench.training.workloads import (
    DENSE,
    NATIVE,
    REFERENCE,
    VARIANTS,
    Precision,
    Shape,
    Side,
    Training,
    Variant,
    sides,
)
from mumoe_fast.layers import MuMoEMLP
from mumoe_fast.ops.dispatch import NATIVE_READY

# Of the least size where bfloat16's errors average out: the rule is about the largest error of a tensor.
SHAPE = Shape(layers=2, heads=2, width=96, vocabulary=80, context=128)
CP = Variant("cp", {"num_experts": 8, "rank": 64}, paper=(1.0, 2.0))
TR = Variant("tr", {"num_experts": 8, "factorization": "tr", "rank": (2, 2, 32)})
needs_native = pytest.mark.skipif(not NATIVE_READY, reason="the native kernels are not built")


def result(side: Side, seconds: tuple[float, ...] = (), **options: Any) -> Result:
    return Result(side, Precision.AUTOCAST, SHAPE, 10, 20, seconds, **options)


def test_the_models_have_the_papers_parameters() -> None:
    for variant in VARIANTS[1:]:
        in_mlps, in_all = count(Side(variant, NATIVE), Shape())
        assert (round(in_mlps / 1e6, 1), round(in_all / 1e6, 1)) == variant.paper
    assert count(Side(DENSE, None), Shape()) == (56_669_184, 124_439_808)


def test_every_variant_runs_natively_and_by_the_reference_and_the_dense_one_once() -> None:
    assert [str(side) for side in sides((DENSE, CP))] == ["dense", "cp, native", "cp, reference"]


@pytest.mark.parametrize("precision", Precision)
def test_a_step_updates_every_parameter_and_sides_start_alike(precision: Precision) -> None:
    model = workloads.build(Side(CP, NATIVE), SHAPE, torch.float32)
    assert [mlp.gate.impl for mlp in workloads.mlps(model) if isinstance(mlp, MuMoEMLP)] == ["native", "native"]
    training = Training(Side(CP, REFERENCE), SHAPE, precision)
    start = {name: p.detach().clone() for name, p in training.model.named_parameters()}
    assert {p.dtype for p in start.values()} == {precision.parameters}
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter.to(precision.parameters), start[name]), name
    training.step()
    for name, parameter in training.model.named_parameters():
        assert parameter.grad is None
        assert training.optimizer.state[parameter]["exp_avg"].any(), name
    assert not torch.equal(training.model.lm_head.weight, start["transformer.wte.weight"])


def test_the_loss_is_of_the_next_token() -> None:
    model = workloads.build(Side(DENSE, None), SHAPE, torch.float64)
    x = workloads.tokens(SHAPE)
    assert x.shape == (1, SHAPE.context + 1)
    assert workloads.tokens(SHAPE, 5).shape == (1, 6)
    probabilities = model(x[:, :-1]).logits.softmax(-1)[0]
    expected = -probabilities[torch.arange(SHAPE.context), x[0, 1:]].log().mean()
    torch.testing.assert_close(workloads.loss(model, x, None).double(), expected, rtol=1e-6, atol=0)


@needs_native
@pytest.mark.parametrize("precision", Precision)
@pytest.mark.parametrize("variant", [CP, TR], ids=str)
def test_what_is_right_is_let_through(variant: Variant, precision: Precision) -> None:
    checked = check(Side(variant, NATIVE), SHAPE, precision)
    assert checked.problem is None
    assert checked.worst is not None
    assert 0 < checked.worst <= 1


@needs_native
@pytest.mark.parametrize("name", ["loss", "transformer.h.1.mlp.gate.weights.0", "lm_head"])
def test_what_is_wrong_is_not_timed(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    def wrong(side: Side, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        found = dict(results(side, *args, **kwargs))
        key = "transformer.wte.weight" if name == "lm_head" else name
        return found | ({key: 1.1 * found[key]} if side.impl == NATIVE else {})

    monkeypatch.setattr(steps, "results", wrong)
    wanted = sides((DENSE, CP))
    monkeypatch.setattr(steps, "in_fresh_process", lambda function, *args: 1)
    found = list(measure(wanted, SHAPE, Precision.BFLOAT16, turns=3, seconds=1))
    assert [bool(one.seconds) for one in found] == [True, False, True]
    assert (found[1].refused or "").startswith("wrong: ")
    assert row(found[1])[5] == "refused"
    record = json.loads(json_lines(found, {}).splitlines()[1])
    assert record["refused"] == found[1].refused
    assert "tokens_per_second" not in record


def test_shares_are_medians_of_the_turns_ratios() -> None:
    one = result(Side(CP, NATIVE), (1.0, 2.0, 4.0), dense_seconds=(2.0, 2.0, 2.0))
    assert [one.of_dense(q) for q in (0.25, 0.5, 0.75)] == [0.75, 1.0, 1.5]
    assert one.tokens_per_second() == 64.0
    assert one.met is True
    assert replace(one, dense_seconds=(1.8, 1.8, 1.8)).met is False
    assert replace(one, side=Side(CP, REFERENCE)).met is None
    assert row(one)[7:9] == ("1.000 (0.750–1.500)", "≥ 0.93: yes")


def test_the_goal_is_about_the_dense_models_faster_precision() -> None:
    slow, quick = result(Side(DENSE, None), (2.0,)), result(Side(DENSE, None), (1.0,))
    quick = replace(quick, precision=Precision.BFLOAT16)
    assert best_precision([slow, quick]) == Precision.BFLOAT16
    assert best_precision([replace(slow, seconds=(0.5,)), quick]) == Precision.AUTOCAST


@needs_native
def test_the_command_measures_prints_and_writes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(command, "Shape", lambda context: replace(SHAPE, context=context))
    wanted = [Side(DENSE, None), Side(CP, NATIVE)]
    assert pickle.loads(pickle.dumps(wanted)) == wanted  # as a process of its own needs them, which here is this one
    monkeypatch.setattr(command, "sides", lambda: wanted)
    monkeypatch.setattr(steps, "in_fresh_process", lambda function, *arguments: function(*arguments))
    path = tmp_path / "speed.jsonl"
    arguments = ["bench", "training", "speed", "--precision", "autocast", "--context", "112", "--turns", "3"]
    done = CliRunner(env={"COLUMNS": "200"}).invoke(app, [*arguments, "--json", str(path)])
    assert done.exit_code == 0, done.output
    assert "cp, native" in done.output
    records = [json.loads(line) for line in path.read_text().splitlines()]
    assert [(r["model"], r["implementation"]) for r in records] == [("dense", None), ("cp", "native")]
    assert all(len(r["seconds"]) == 3 and r["peak_bytes"] > 10_000 for r in records)
    assert all(r["shape"]["context"] == 112 and r["precision"] == "autocast" and "software" in r for r in records)
    assert records[0]["of_dense"] == {"p25": 1.0, "p50": 1.0, "p75": 1.0}
    assert records[1]["paper_millions"] == [1.0, 2.0]


def test_the_table_shows_counts_beside_the_papers() -> None:
    console = Console(width=200, record=True, file=io.StringIO())
    dense = result(Side(DENSE, None), (1.0,), dense_seconds=(1.0,), peak_bytes=5)
    show([dense, result(Side(CP, NATIVE), (1.0,), dense_seconds=(1.0,), peak_bytes=5)], console)
    text = console.export_text()
    assert "1.0 M" in text
    assert "2.0 M" in text
    assert "one context of 128 random tokens" in text

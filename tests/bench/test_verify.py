"""`mumoe verify`: what it finds, how it says so, how a row is seen again, and what counts as worse."""

from __future__ import annotations

import json
import math
import re
import shlex
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from click.testing import Result
from torch import Tensor
from typer.testing import CliRunner

from mumoe_fast import functional
from mumoe_fast.bench.cli import app
from mumoe_fast.bench.verify import quick_verify
from mumoe_fast.bench.verify.compare import BASELINES, FACTOR, FLOOR, compare, is_worse
from mumoe_fast.bench.verify.records import Row, json_lines, load, worst_first
from mumoe_fast.bench.verify.report import reproduce
from mumoe_fast.testing.cases import cases

ONE = "^cp/T17.*/float32/"


def verify(*arguments: str) -> Result:
    return CliRunner(env={"COLUMNS": "200"}).invoke(app, ["verify", *arguments])


def saved(tmp_path: Path, *arguments: str) -> list[Row]:
    path = tmp_path / "rows.jsonl"
    verify(*arguments, "--save", str(path))
    return load(path)


def arguments_of(row: Row) -> list[str]:
    words = shlex.split(reproduce(row))
    return words[words.index("verify") + 1 :]


@pytest.fixture
def dropped_edge(monkeypatch: pytest.MonkeyPatch) -> None:
    """Triton's entmax with a mask that ends one expert early: the last coefficient of every row is lost."""
    entmax = pytest.importorskip("mumoe_fast.kernels.entmax")
    forward = entmax.entmax_forward

    def short(x: Tensor, alpha: float) -> Tensor:
        a: Tensor = forward(x, alpha)
        a[:, -1] = 0
        return a

    monkeypatch.setattr(entmax, "entmax_forward", short)


# --- what it finds ----------------------------------------------------------------------------------------------------


def test_quick_cases_of_the_reference_pass() -> None:
    result = verify("--quick", "--impl", "reference", "--compare", "baseline")
    assert result.exit_code == 0, result.output
    assert "results pass (reference)" in result.output
    assert "Nothing got worse" in result.output
    assert not quick_verify("reference", torch.device("cpu"), [torch.bfloat16])


@pytest.mark.usefixtures("dropped_edge")
def test_a_wrong_mask_edge_is_named_worst_first(tmp_path: Path) -> None:
    path = tmp_path / "wrong.jsonl"
    result = verify("--impl", "triton", "--only", "^(entmax/flat-T4|gate/T1-)", "--save", str(path))
    assert result.exit_code == 1, result.output
    rows = load(path)
    failed = worst_first(row for row in rows if not row.passed)
    assert {row.family for row in rows} == {"entmax", "gate"}
    assert {row.family for row in failed} == {"entmax"}
    assert {row.dtype for row in failed} == {"float32", "bfloat16", "float16"}
    shown = [line.split()[0] for line in result.output.splitlines() if line.startswith(" entmax/")]
    assert shown == [row.name for row in failed]
    assert reproduce(failed[0]) in result.output
    assert f"{len(failed)} of {len(rows)} results are outside the rule" in result.output


@pytest.mark.usefixtures("dropped_edge")
def test_quick_verify_says_what_fails(monkeypatch: pytest.MonkeyPatch, device: torch.device) -> None:
    entmax_and_gate = [case for case in cases() if case.family in ("entmax", "gate")]
    monkeypatch.setattr("mumoe_fast.bench.verify.run.cases", lambda: entmax_and_gate)
    failed = quick_verify("triton", device, [torch.float32])
    assert [(row.family, row.dtype, row.result) for row in failed] == [
        ("entmax", "float32", "a"),
        ("entmax", "float32", "dx"),
    ]
    assert failed == worst_first(failed)
    assert re.fullmatch(r"entmax/.*/float32/a by triton: error \S+ is \S+ of the allowed \S+", str(failed[0]))


def test_a_case_that_raises_is_a_row_and_the_others_go_on(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def broken(*arguments: object, **options: object) -> Tensor:
        raise RuntimeError("no such kernel\nand a long story")

    monkeypatch.setattr(functional, "cp_experts", broken)
    path = tmp_path / "raised.jsonl"
    result = verify("--impl", "reference", "--only", "^(cp|tr)/T17.*/float32/", "--save", str(path))
    assert result.exit_code == 1
    assert "RuntimeError: no such kernel" in result.output
    first, *others = worst_first(load(path))
    assert (first.family, first.failure, first.error) == ("cp", "RuntimeError: no such kernel", math.inf)
    assert {row.family for row in others} == {"tr"}
    assert all(row.passed for row in others)
    assert repr(saved(tmp_path, *arguments_of(first))) == repr([first])  # its eager error is NaN, unequal to itself


def test_a_result_that_is_not_finite_fails(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    experts = functional.cp_experts
    monkeypatch.setattr(functional, "cp_experts", lambda *args, **options: experts(*args, **options) * math.nan)
    rows = saved(tmp_path, "--impl", "reference", "--only", ONE)
    assert rows
    assert all(row.error == math.inf and not row.passed and not row.failure for row in rows)


# --- a row again ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("pattern", [ONE, "^layer/tr-.*N6x3.*/bfloat16/dgate", "^learned.*1.05/float16/", "^mxd.*/dz"])
def test_the_command_of_a_row_gives_that_row_alone(pattern: str, tmp_path: Path) -> None:
    rows = saved(tmp_path, "--impl", "reference", "--only", pattern)
    assert rows
    for row in rows:
        assert saved(tmp_path, *arguments_of(row)) == [row]


def test_the_interpreter_and_the_device_are_part_of_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    row = Row("cp/T1/float32", "dU_0", "triton", "cpu", 1.0)
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    command = reproduce(row, "cpu")
    assert command == "TRITON_INTERPRET=1 mumoe verify --impl triton --device cpu --only '^cp/T1/float32/dU_0$'"
    monkeypatch.delenv("TRITON_INTERPRET")
    assert reproduce(replace(row, impl="native")).startswith("mumoe verify --impl native --only")


# --- what got worse ---------------------------------------------------------------------------------------------------


def test_the_same_numbers_again_are_no_worse(tmp_path: Path) -> None:
    path = tmp_path / "saved.jsonl"
    assert verify("--impl", "reference", "--only", ONE, "--save", str(path)).exit_code == 0
    result = verify("--impl", "reference", "--only", ONE, "--compare", str(path))
    assert result.exit_code == 0, result.output
    assert f"Nothing got worse: {len(load(path))} results compared" in result.output


@pytest.mark.parametrize("of_allowance", [0.7, 7.0])
def test_what_got_worse_is_named_within_the_rule_and_outside(
    of_allowance: float, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    path, again = tmp_path / "saved.jsonl", tmp_path / "again.jsonl"
    verify("--impl", "reference", "--only", ONE, "--save", str(path))
    before = next(row for row in load(path) if row.result == "y")
    experts, shift = functional.cp_experts, of_allowance * before.allowance
    monkeypatch.setattr(functional, "cp_experts", lambda *args, **options: experts(*args, **options) + shift)
    result = verify("--impl", "reference", "--only", ONE, "--compare", str(path), "--save", str(again))
    assert result.exit_code == 1
    now = next(row for row in load(again) if row.result == "y")
    assert now.passed == (of_allowance < 1)
    figures = f"{before.of_allowance:.2f} of the allowance before, {now.of_allowance:.2f} now"
    worse = [line for line in result.output.splitlines() if line.startswith("worse:")]
    assert worse == [f"worse: reference {before.name}: {figures}"]
    assert reproduce(now) in result.output


def test_what_is_gone_is_named_where_it_should_have_been(tmp_path: Path) -> None:
    path = tmp_path / "saved.jsonl"
    verify("--impl", "reference", "--only", "^cp/T17", "--save", str(path))
    path.write_text(path.read_text().replace('"dU_1"', '"dU_9"', 1))
    missing = next(row.name for row in load(path) if row.result == "dU_9")
    result = verify("--impl", "reference", "--only", "^cp/T17", "--compare", str(path))
    assert result.exit_code == 1
    assert f"gone: reference {missing}" in result.output
    assert "1 are new" in result.output
    assert verify("--impl", "reference", "--only", "^cp/T17.*/y", "--compare", str(path)).exit_code == 0
    assert verify("--impl", "reference", "--quick", "--only", "^tr/", "--compare", str(path)).exit_code == 0


def row(of_allowance: float, impl: str = "native") -> Row:
    return Row("cp/T1/float32", "y", impl, "cpu", of_allowance, 0.1, 1.0)


@pytest.mark.parametrize(
    ("now", "earlier", "worse"),
    [
        (0.5, 0.5, False),
        (FACTOR * FLOOR, 0.0, False),
        (1.01 * FACTOR * FLOOR, 0.0, True),
        (0.99 * FACTOR * 0.45, 0.45, False),
        (1.01 * FACTOR * 0.45, 0.45, True),
        (1.01, 0.9, True),
        (9.0, 1.01, False),
        (math.inf, 0.9, True),
    ],
)
def test_worse_is_more_than_rounding_explains(now: float, earlier: float, worse: bool) -> None:
    assert is_worse(row(now), row(earlier)) == worse
    comparison = compare([row(now)], [row(earlier)])
    assert comparison.passed != worse
    assert comparison.compared == 1


def test_implementations_are_compared_with_themselves() -> None:
    comparison = compare([row(0.9), row(0.1, "triton")], [row(0.9), row(0.1, "triton")])
    assert comparison.passed
    assert comparison.compared == 2


# --- files ------------------------------------------------------------------------------------------------------------


def test_rows_come_back_from_a_file(tmp_path: Path) -> None:
    rows = [
        row(0.123),
        replace(row(0.1), result="dz", error=math.inf),
        Row("tr/T1/float16", "", "triton", "cuda", math.inf, failure="ValueError: no"),
    ]
    path = tmp_path / "rows.jsonl"
    path.write_text(json_lines(rows, {"date": "today"}))
    head, *lines = map(json.loads, path.read_text().splitlines())
    assert head == {"run": {"date": "today"}, "figures": ["error", "eager_error", "allowance"]}
    assert len(lines) == 2
    back = load(path)
    assert [(r.name, r.impl, r.device, r.error, r.failure) for r in back] == [
        (r.name, r.impl, r.device, r.error, r.failure) for r in rows
    ]
    assert [r.passed for r in back] == [True, False, False]


@pytest.mark.parametrize("impl", ["reference", "native", "triton"])
def test_the_baselines_are_of_cases_that_exist_and_passed(impl: str) -> None:
    baseline = load(BASELINES / f"{impl}.jsonl")
    names = {f"{case.name}/{name}" for case in cases() for name in case.build(torch.device("cpu")).names}
    assert {r.impl for r in baseline} == {impl}
    assert all(r.passed for r in baseline)
    assert {r.name for r in baseline} <= names
    if impl != "native":
        assert {r.name for r in baseline} == names


# --- bad input --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--impl", "cuda"], "expected one of triton, native, reference, got 'cuda'"),
        (["--only", "("], "expected a regular expression, got '('"),
        (["--impl", "reference", "--only", "^nothing"], "no result of reference matches '^nothing'"),
        (["--compare", "no/such/file"], "No such file"),
        (["--device", "toaster"], "toaster"),
    ],
)
def test_bad_arguments_are_named(arguments: list[str], message: str) -> None:
    result = verify(*arguments)
    assert result.exit_code == 2
    assert message in " ".join(result.output.split())


def test_a_file_of_something_else_is_named_by_its_line(tmp_path: Path) -> None:
    path = tmp_path / "other.jsonl"
    path.write_text('{"run": {}}\n{"latency": 3}\n')
    result = verify("--impl", "reference", "--only", ONE, "--compare", str(path))
    assert result.exit_code == 2
    assert "jsonl:2: expected a record of mumoe verify --save" in " ".join(result.output.split())

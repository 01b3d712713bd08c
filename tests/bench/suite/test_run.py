"""The suite from end to end on a tiny workload: what is measured and what refused, and a slowdown that is caught."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from typer.testing import CliRunner

from mumoe_fast.bench import suite
from mumoe_fast.bench.cli import app
from mumoe_fast.bench.step import FORWARD, STEP
from mumoe_fast.bench.suite import implementations, machine, table
from mumoe_fast.bench.suite import run as runner
from mumoe_fast.bench.suite.implementations import DENSE, IMPLEMENTATIONS, Case, Implementation
from mumoe_fast.bench.suite.records import Record, read_records
from mumoe_fast.bench.suite.workloads import Workload

CPU = torch.device("cpu")
TINY = Workload("tiny block", "Tiny", 24, (16, 32, 16), (8,), (("cp", 8),))
REFERENCE = next(side for side in IMPLEMENTATIONS if side.name == "CP reference")
DENSE_SIDE = next(side for side in IMPLEMENTATIONS if side.name == DENSE)


@pytest.fixture(autouse=True)
def small_ceilings(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(machine.COPIED_BYTES, "cpu", 1 << 16)
    monkeypatch.setitem(machine.GEMM_SIZE, "cpu", 64)


class Twice(nn.Module):
    """A module that does its work more than once."""

    def __init__(self, inner: nn.Module, times: int) -> None:
        super().__init__()
        self.inner, self.times = inner, times

    def forward(self, x: Tensor) -> Tensor:
        for _ in range(self.times - 1):
            self.inner(x)
        y: Tensor = self.inner(x)
        return y


def wrapped(workload: Workload, times: int, make: Callable[[Workload], nn.Module] = DENSE_SIDE.make) -> nn.Module:
    return Twice(make(workload), times)


def working(times: int) -> Implementation:
    """The dense layer, doing its work several times; its twin does it once."""
    return replace(
        DENSE_SIDE,
        name="worker",
        kind="sparse MoE",
        make=partial(wrapped, times=times),
        twin=partial(wrapped, times=1, make=DENSE_SIDE.twin),
    )


class Off(nn.Module):
    """A module whose results are a little wrong."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        return 1.01 * self.inner(x)


def off(workload: Workload) -> nn.Module:
    return Off(DENSE_SIDE.make(workload))


def plain(workload: Workload) -> nn.Module:
    return Twice(DENSE_SIDE.twin(workload), 1)


def absent(workload: Workload) -> nn.Module:
    raise ImportError("no such package\nand more")


def hindered(workload: Workload, dtype: torch.dtype, device: torch.device) -> str:
    return "it is not for this device"


WRONG = replace(DENSE_SIDE, name="wrong", make=off, twin=plain)
ABSENT = replace(DENSE_SIDE, name="absent", make=absent)
HINDERED = replace(DENSE_SIDE, name="hindered", hindrance=hindered)


def cases(*sides: Implementation, directions: tuple[str, ...] = (FORWARD, STEP)) -> list[Case]:
    return [Case(TINY, side, torch.float32, direction) for direction in directions for side in sides]


def records_of(
    *sides: Implementation, directions: tuple[str, ...] = (FORWARD, STEP), **options: object
) -> list[Record]:
    chosen = cases(*sides, directions=directions)
    return list(runner.run(chosen, CPU, seconds=0.05, verify=lambda *_: None, **options))  # type: ignore[arg-type]


def test_every_case_becomes_a_record_with_everything() -> None:
    begun: list[str] = []
    records = records_of(REFERENCE, DENSE_SIDE, on_start=begun.append)
    assert [(record.implementation, record.direction) for record in records] == [
        ("CP reference", FORWARD),
        (DENSE, FORWARD),
        ("CP reference", STEP),
        (DENSE, STEP),
    ]
    assert begun[0] == "the machine's ceilings"
    assert "tiny block, forward" in begun
    for record in records:
        assert record.refused is None
        assert record.latency is not None
        assert 0 < record.latency.minimum <= record.latency.p20 <= record.latency.p50 <= record.latency.p80
        assert record.latency.bursts >= 3
        assert record.graph_latency is None
        assert record.error_of_allowance is not None
        assert record.error_of_allowance <= 1
        assert record.over_floor is not None
        assert record.flops_per_second is not None
        assert (record.tokens, record.num_experts, record.dtype, record.group) == (24, 8, "float32", "Tiny")
        assert record.run.versions["torch"] == torch.__version__
        assert record.run.machine["threads"] == str(torch.get_num_threads())
    dense = [record for record in records if record.implementation == DENSE]
    assert dense[0].parameters == 16 * 32 + 32 + 32 * 16 + 16
    # Forward holds at least the hidden activation and the output; the step also every gradient.
    assert dense[0].peak_bytes is not None
    assert dense[0].peak_bytes >= 4 * 24 * (32 + 16)
    assert dense[1].peak_bytes is not None
    assert dense[1].peak_bytes >= 4 * (dense[1].parameters + 24 * 16)  # type: ignore[operator]


def test_what_is_wrong_or_cannot_run_is_not_timed() -> None:
    records = {(r.implementation, r.direction): r for r in records_of(WRONG, HINDERED, ABSENT, DENSE_SIDE)}
    for direction in (FORWARD, STEP):
        wrong = records["wrong", direction]
        assert wrong.wrong
        assert wrong.refused is not None
        assert wrong.refused.startswith("wrong: ")
        assert records["hindered", direction].refused == "it is not for this device"
        assert records["absent", direction].refused == "cannot run: no such package"
        for name in ("wrong", "hindered", "absent"):
            assert records[name, direction].latency is None
            assert records[name, direction].peak_bytes is None
        assert not records["hindered", direction].wrong
        assert records[DENSE, direction].latency is not None
    console = Console(width=200, record=True)
    table.show(list(records.values()), console)
    text = console.export_text()
    assert "left out: hindered: it is not for this device (tiny block)" in text
    assert "left out: absent: cannot run: no such package" in text
    assert "WRONG wrong: wrong: " in text


def test_a_workload_whose_input_is_not_there_is_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)  # where no demo was run
    trained = replace(TINY, name="trained", block=0)
    sides = [Case(trained, side, torch.float32, FORWARD) for side in (REFERENCE, DENSE_SIDE)]
    records = list(runner.run(sides, CPU, seconds=0.05, verify=lambda *_: None))
    assert len(records) == 2
    assert all(record.refused is not None and "`mumoe demo` writes it" in record.refused for record in records)


def test_an_implementation_outside_the_rule_is_not_timed() -> None:
    asked = []

    def verify(impl: str, device: torch.device, dtypes: object) -> str | None:
        asked.append(impl)
        return "its quick verify fails: gate forward" if impl == "mine" else None

    mine = replace(REFERENCE, name="CP mine", kind="ours", impl="mine")
    absent_one = replace(mine, name="CP absent", impl="absent one", hindrance=hindered)
    sides = cases(mine, absent_one, REFERENCE, directions=(FORWARD,))
    ours, left, reference = runner.run(sides, CPU, seconds=0.05, verify=verify)
    assert asked == ["mine"], "what cannot run is not asked"
    assert ours.wrong
    assert ours.refused == "its quick verify fails: gate forward"
    assert ours.latency is None
    assert left.refused == "it is not for this device"
    assert reference.latency is not None


def test_selection_by_pattern_and_by_impl() -> None:
    native, triton = (replace(REFERENCE, name=f"CP {impl}", impl=impl) for impl in ("native", "triton"))
    everything = cases(native, triton, DENSE_SIDE)
    assert runner.select(everything, "", []) == everything
    assert {c.implementation.name for c in runner.select(everything, "", ["native"])} == {"CP native", DENSE}
    (one,) = runner.select(everything, "^TINY block, cp TRITON, float32, forward$", [])
    assert (one.implementation.name, one.direction) == ("CP triton", FORWARD)


def test_commits_are_named_only_in_a_checkout(tmp_path: Path) -> None:
    assert machine.commit(tmp_path) == ""
    assert machine.describe_run(CPU, 3).seed == 3


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch) -> Callable[..., tuple[int, str]]:
    """The command line on the tiny workload, whose worker works `times` as long."""

    def invoke(*arguments: str, times: int = 1) -> tuple[int, str]:
        sides = (working(times), DENSE_SIDE, HINDERED)
        monkeypatch.setattr(implementations, "cases", lambda name: iter(cases(*sides, directions=(FORWARD,))))
        result = CliRunner().invoke(app, ["bench", *arguments])
        return result.exit_code, " ".join(result.output.split())

    return invoke


class Operators(TorchDispatchMode):
    """Counts torch's operators."""

    def __init__(self) -> None:
        super().__init__()
        self.number = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.number += 1
        return func(*args, **(kwargs or {}))


def by_operators(action: Callable[[], object], repeats: int) -> float:
    """A clock that nobody else on the machine can hurry or delay: a millisecond for each of torch's operators."""
    with Operators() as counted:
        action()
    return 1e-3 * counted.number


def test_a_deliberate_slowdown_is_caught_from_end_to_end(
    command: Callable[..., tuple[int, str]], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(runner, "clock_of", lambda device: by_operators)
    for name, times in (("before", 1), ("after", 8)):
        code, output = command("--out", str(tmp_path / name), "--seconds", "0.3", times=times)
        assert code == 0, output
        assert "left out: hindered" in output
        assert (tmp_path / name / "report.html").exists()
    before, after = (read_records(tmp_path / name / "results.jsonl") for name in ("before", "after"))
    assert len(before) == len(after) == 3
    code, output = command("compare", str(tmp_path / "before"), str(tmp_path / "after"))
    assert code == 1, output
    assert "tiny block, worker, float32, forward latency" in output
    assert "3 rows compared: 1 worse, 0 better" in output
    code, output = command("compare", str(tmp_path / "before"), str(tmp_path / "before"), "--threshold", "0")
    assert code == 0, output
    assert "3 rows compared: 0 worse, 0 better" in output


def test_bad_arguments_are_refused(command: Callable[..., tuple[int, str]], tmp_path: Path) -> None:
    for arguments, message in (
        (("--only", "("), "expected a regular expression"),
        (("--only", "nothing"), "nothing in the quick suite matches"),
        (("--impl", "magic"), "expected triton or native, got magic"),
        (("--device", "tpu"), "expected cpu or cuda"),
        (("compare", str(tmp_path), str(tmp_path)), "expected a file of records"),
    ):
        code, output = command(*arguments)
        assert code == 2, output
        assert message in output.replace("│ ", "").replace(" │", ""), output


def test_a_wrong_side_fails_the_command(
    command: Callable[..., tuple[int, str]], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    assert command("--out", str(tmp_path), "--only", "worker")[0] == 0
    monkeypatch.setattr(suite, "_measure", lambda *_: iter(records_of(WRONG)))
    assert command("--out", str(tmp_path))[0] == 1


def test_an_interrupted_run_shows_what_it_has(
    command: Callable[..., tuple[int, str]], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def interrupted(records: list[Record]) -> Iterator[Record]:
        yield from records
        raise KeyboardInterrupt

    (record,) = records_of(DENSE_SIDE, directions=(FORWARD,))
    monkeypatch.setattr(suite, "_measure", lambda *_: interrupted([record]))
    code, output = command("--out", str(tmp_path))
    assert code == 130
    assert "tiny block, float32, forward" in output
    assert read_records(tmp_path / "results.jsonl") == [record]
    assert (tmp_path / "report.html").exists()
    monkeypatch.setattr(suite, "_measure", lambda *_: interrupted([]))
    assert command("--out", str(tmp_path))[0] == 130

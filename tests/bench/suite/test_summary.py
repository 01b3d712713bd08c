"""The summary has a row wherever ours was measured, and its ratios are of the best of each rival."""

from __future__ import annotations

from pathlib import Path

from mumoe_fast.bench.suite.records import Record, measured
from mumoe_fast.bench.suite.summary import COLUMNS, summary, write_summary
from tests.bench.suite.sample import sample_records


def rows(text: str) -> list[list[str]]:
    return [[cell.strip() for cell in line[1:-1].split("|")] for line in text.splitlines() if line.startswith("|")]


def test_a_row_per_comparison_and_factorisation(tmp_path: Path) -> None:
    records = sample_records()
    write_summary(records, tmp_path / "summary.md")
    text = (tmp_path / "summary.md").read_text()
    assert text.startswith("a made-up CPU, mumoe-fast 0.0, torch 2.13.0; 2026-01-02\n")
    head, _, *body = rows(text)
    assert tuple(head) == COLUMNS
    ours = [record for record in measured(records) if record.kind == "ours"]
    assert len(body) == len(ours)
    assert all(len(row) == len(COLUMNS) for row in body)
    assert [row[0] for row in body] == [f"{r.workload}, {r.dtype}, {r.direction}" for r in ours]
    assert [row[1].rsplit(" ", 2)[0] for row in body] == [r.implementation for r in ours]


def test_the_rivals_are_the_fastest_of_their_kind() -> None:
    def seconds(name: str) -> float:
        (found,) = (r for r in chosen if r.implementation == name)
        assert found.seconds is not None
        return found.seconds

    place = ("GPT-2 block, T = 2,048", "float32", "forward")
    chosen = [r for r in measured(sample_records()) if (r.workload, r.dtype, r.direction) == place]
    _, _, cp, tr = rows(summary(chosen))
    by_column = dict(zip(COLUMNS, cp, strict=True))
    assert by_column["time × dense"] == f"{seconds('CP native') / seconds('dense'):.2f}"
    assert by_column["time × reference"] == f"{seconds('CP native') / seconds('CP reference, torch.compile'):.2f}"
    assert by_column["memory × dense"] == f"{1.4 / 1.5:.2f}"
    assert tr[COLUMNS.index("time × reference")] == f"{seconds('TR native') / seconds('TR reference'):.2f}"


def test_nothing_measured_and_rivals_that_are_missing() -> None:
    assert summary([]) == "Nothing was measured.\n"
    (ours, *_) = (record for record in sample_records() if record.implementation == "CP native")
    _, _, row = rows(summary([ours]))
    assert row[2:] == [""] * (len(COLUMNS) - 2)
    alone: list[Record] = [record for record in sample_records() if record.kind == "dense"]
    assert len(rows(summary(alone))) == 2

"""Every figure of the paper's tables stands beside ours; the two differ exactly where the paper contradicts itself."""

import re

import pytest
from typer import Typer
from typer.testing import CliRunner

from mumoe_fast.bench import paper, paper_tables
from mumoe_fast.bench.paper_tables import Entry, read
from tests.bench.test_report import assert_self_contained

TABLES = {one.name: one for one in paper_tables.tables()}
ENTRIES = [(name, entry) for name, one in TABLES.items() for entry in one.entries]


def figures(name: str) -> dict[tuple[str, str], tuple[str, float]]:
    return {(entry.row, entry.column): (entry.printed, entry.ours) for entry in TABLES[name].entries}


def test_table_4() -> None:
    assert figures("Table 4") == {
        ("Dense/sparse MoE", "GPT-2, N = 256"): ("14.5B", 14_509_670_400),
        ("Dense/sparse MoE", "Mixer S/16, N = 64"): ("1.13B", 1_127_026_688),
        ("CPμMoE", "GPT-2, N = 256"): ("57.0M", 57_029_664),
        ("CPμMoE", "Mixer S/16, N = 64"): ("17.7M", 17_706_480),
        ("TRμMoE", "GPT-2, N = 256"): ("57.4M", 57_399_264),
        ("TRμMoE", "Mixer S/16, N = 64"): ("17.4M", 17_366_656),
    }


def test_table_5() -> None:
    assert figures("Table 5") == {
        ("Dense MoE", "parameters"): ("NIO", 301_989_888),
        ("Dense MoE", "FLOPs"): ("NIO", 301_989_888),
        ("Dense MoE", "matrix rank"): ("min(I, O)", 768),
        ("Sparse MoE", "parameters"): ("NIO", 301_989_888),
        ("Sparse MoE", "FLOPs"): ("KIO", 1_179_648),
        ("Sparse MoE", "matrix rank"): ("min(I, O)", 768),
        ("CPμMoE", "parameters"): ("R(N + I + O)", 1_048_576),
        ("CPμMoE", "FLOPs"): ("R(N + I + O)", 1_048_576),
        ("CPμMoE", "matrix rank"): ("min(I, O, R)", 512),
        ("TRμMoE", "parameters"): ("R₁NR₂ + R₂IR₃ + R₃OR₁", 3_153_920),
        ("TRμMoE", "FLOPs"): ("R₂IR₃ + R₁NR₂ + R₁R₂R₃ + R₁OR₃", 3_162_112),
        ("TRμMoE", "matrix rank"): ("min(R₃·min(R₁, R₂), I, O)", 768),
    }
    assert {entry.difference for entry in TABLES["Table 5"].entries} == {0}


def test_table_6() -> None:
    """Weights in float32 are a lower bound on the peak memory that the paper measured."""
    found = figures("Table 6")
    peaks = {row: printed for (row, column), (printed, _) in found.items() if column.startswith("MB")}
    assert peaks == {
        "Linear layer": "12.07 MB",
        "Dense MoE": "390.17 MB",
        "Sparse MoE": "765.19 MB",
        "TRμMoE": "15.87 MB",
        "CPμMoE": "14.02 MB",
    }
    assert {row: ours for (row, column), (_, ours) in found.items() if column == "parameters"} == {
        "Linear layer": 769_000,
        "Dense MoE": 98_530_304,
        "Sparse MoE": 98_530_304,
        "TRμMoE": 779_648,
        "CPμMoE": 766_048,
    }
    assert {row: ours for (row, column), (_, ours) in found.items() if column == "FLOPs"} == {
        "Linear layer": 768_000,
        "Dense MoE": 98_530_304,
        "Sparse MoE": 98_304 + 2 * 768_000,
        "TRμMoE": 781_184,
        "CPμMoE": 766_048,
    }
    weights = [entry for entry in TABLES["Table 6"].entries if entry.printed]
    assert all(entry.agrees is None and entry.difference is not None and entry.difference < 0 for entry in weights)


def test_table_8() -> None:
    assert figures("Table 8") == {
        ("CPμMoE", "original"): ("155.1B", 155_122_532_352),
        ("TRμMoE", "original"): ("622.8B", 622_808_399_872),
        ("CPμMoE", "fast"): ("1.4M", 1_442_304),
        ("TRμMoE", "fast"): ("3.5M", 3_557_376),
    }


@pytest.mark.parametrize("name", ["Table 10 (a)", "Table 10 (b)"])
def test_table_10(name: str) -> None:
    """Printed to the last digit: rows, columns, and the differences, which are 0 but for one."""
    entries = TABLES[name].entries
    assert len(entries) == 7 * 3
    differences = {(entry.row, entry.column): entry.difference for entry in entries if entry.difference}
    doubled = {("128 × 2 × 2 × 2", "with one level"): 4_425_728 - 8_851_456}
    assert differences == (doubled if name == "Table 10 (b)" else {})


def test_ours_differ_exactly_where_the_paper_contradicts_itself() -> None:
    differing = {(name, entry.row, entry.column) for name, entry in ENTRIES if entry.agrees is False}
    assert differing == {
        ("Table 8", "TRμMoE", "fast"),
        ("Table 10 (b)", "128 × 2 × 2 × 2", "with one level"),
    }
    assert {(name, entry.row, entry.column) for name, entry in ENTRIES if entry.note} == differing


@pytest.mark.parametrize(
    ("printed", "ours", "agrees"),
    [
        ("57.0M", 57_049_000, True),
        ("57.0M", 57_051_000, False),
        ("1.13B", 1_125_000_000, True),
        ("1,069,568", 1_069_569, False),
        ("12.07 MB", 12.074, True),
    ],
)
def test_a_figure_agrees_where_ours_rounds_to_it(printed: str, ours: float, agrees: bool) -> None:
    assert read("row", "column", printed, ours).agrees is agrees
    assert read("row", "column", printed, ours, comparable=False).agrees is None


def test_what_the_paper_does_not_print_is_not_compared() -> None:
    entry = Entry("row", "column", 5)
    assert entry.difference is entry.agrees is None
    assert paper.cells(entry) == ["row", "column", "", "5", "", ""]
    with pytest.raises(ValueError, match=r"printed: expected a number such as 57\.0M or 1,069,568, got 'many'"):
        read("row", "column", "many", 5)


def test_figure_8() -> None:
    """From 2 to 16,384 experts: N·I·O, R(N + I + O), R₁NR₂ + R₂IR₃ + R₃OR₁."""
    dense, cp, tr, linear = paper.figure_8()
    assert [N for N, _ in dense.points] == [2**power for power in range(1, 15)]
    assert all(value == N * 512 * 2048 for N, value in dense.points)
    assert all(value == 384 * (N + 512 + 2048) for N, value in cp.points)
    assert all(value == 4 * N * 4 + 4 * 512 * 97 + 97 * 2048 * 4 for N, value in tr.points)
    assert {value for _, value in linear.points} == {512 * 2048}
    crossing = int(re.findall(r"from N = (\d+) on", paper.figure_8_remark())[0])
    assert paper.layer("tr", crossing) < paper.layer("cp", crossing)
    assert paper.layer("tr", crossing - 1) >= paper.layer("cp", crossing - 1)


def test_the_command_prints_every_figure_and_writes_them(tmp_path) -> None:
    app = Typer()
    app.command()(paper.paper)
    result = CliRunner().invoke(app, ["--out", str(tmp_path / "new")], env={"COLUMNS": "160"})
    assert result.exit_code == 0, result.output
    written = assert_self_contained((tmp_path / "new" / "paper.html").read_text(encoding="utf-8"))
    for one in TABLES.values():
        for text in (one.caption, *one.remarks, *paper.notes(one)):
            assert text in " ".join(result.output.split())
            assert text in written.text
        for entry in one.entries:
            assert all(cell in result.output and cell in written.text for cell in paper.cells(entry))
    assert "dense/sparse MoE: 2.1M at 2" not in written.text
    assert "dense/sparse MoE: 2,097,152 at 2" in written.text

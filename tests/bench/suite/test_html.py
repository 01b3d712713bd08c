"""The report shows every record's figures, what was left out and what is wrong, and says what is only predicted."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from mumoe_fast.bench.report import interval, quantity
from mumoe_fast.bench.suite.html import page, spread_of, write_report
from mumoe_fast.bench.suite.plots import plots, scale_of
from mumoe_fast.bench.suite.records import Flops, Latency, Record, measured
from mumoe_fast.bench.suite.rivals import Rivals, fastest
from tests.bench.suite.sample import sample_records
from tests.bench.test_report import Page, assert_self_contained

EVERY = sample_records()
SOME = [r for r in EVERY if r.dtype == "bfloat16" and r.direction == "forward"]


@pytest.fixture(scope="module")
def shown() -> Page:
    return assert_self_contained(page(SOME))


def one(name: str, workload: str = "GPT-2 block, T = 128") -> Record:
    (found,) = (r for r in SOME if (r.implementation, r.workload) == (name, workload) and not r.predicted)
    return found


def seconds(record: Record) -> float:
    assert record.seconds is not None
    return record.seconds


def test_every_measurement_is_shown(shown: Page) -> None:
    for record in SOME:
        if record.latency is None or record.flops is None or record.peak_bytes is None:
            continue
        latency = record.latency
        for figure in (latency.p50, latency.minimum):
            assert quantity(figure, "s") in shown.text
        assert interval(latency.p20, latency.p80, "s") in shown.text
        assert quantity(record.peak_bytes, "B") in shown.text
        assert f"{record.flops.formula:,}" in shown.text
        assert f"{record.over_floor:.3g}" in shown.text


def test_points_of_the_plots_are_the_records(shown: Page) -> None:
    dense = one("dense")
    assert dense.latency is not None
    assert f"dense: {quantity(dense.latency.p50, 's')} at 128" in shown.text
    assert f"floor: {quantity(one('CP native').floor.seconds, 's')} at 128" not in shown.text, "a line, without marks"  # type: ignore[union-attr]
    over_experts = one("CP reference", "CLIP final layer, N = 1,024")
    assert over_experts.peak_bytes is not None
    assert f"CP reference: {quantity(over_experts.peak_bytes, 'B')} at 1,024" in shown.text


def test_what_is_left_out_or_wrong_says_why(shown: Page) -> None:
    assert "Triton compiles for GPUs; its interpreter is for tests and no speed" in shown.text
    assert "Wrong, and therefore not timed: TR broken: outside the acceptance rule" in shown.text
    warnings = [attributes for tag, attributes in shown.tags if tag == "p" and attributes.get("class") == "warning"]
    assert len(warnings) == 2, "one for what is wrong, one for the predictions"


def test_predictions_are_labelled_and_apart(shown: Page) -> None:
    assert "H100 SXM" in shown.text
    assert shown.text.index("Predicted, not measured") < shown.text.index("Nothing in this section was measured")
    (predicted,) = (r for r in SOME if r.predicted and r.implementation == "CP native" and r.tokens == 128)
    assert predicted.predicted_seconds is not None
    text = f"{quantity(predicted.predicted_seconds, 's')} ({predicted.over_floor:.3g})"
    assert shown.text.count(text) == 1
    assert shown.text.index(text) > shown.text.index("Predicted, not measured")
    assert "Predicted" not in assert_self_contained(page([one("dense")])).text


def test_the_machine_and_its_ceilings(shown: Page) -> None:
    for text in ("a made-up CPU", "2 threads", "torch 2.13.0", "0123456789ab", "800 GFLOP/s", "20 GB/s", "2026-01-02"):
        assert text in shown.text


def test_ratios_are_to_the_same_workload_and_the_fastest_reference() -> None:
    rivals = Rivals(measured(EVERY))
    ours, compiled, dense = one("CP native"), one("CP reference, torch.compile"), one("dense")
    assert rivals.times_dense(ours) == seconds(ours) / seconds(dense)
    assert rivals.times_reference(ours) == seconds(ours) / seconds(compiled)
    assert rivals.times_reference(dense) is None
    assert Rivals([ours]).times_dense(ours) is None
    assert fastest(EVERY, "no kind") is None


@pytest.mark.parametrize(
    ("ratios", "text"),
    [([], "–"), ([None], "–"), ([0.5], "0.5"), ([0.8, None, 1234.5, 0.9], "0.9 (0.8–1,234)")],
)
def test_a_range_of_ratios(ratios: list[float | None], text: str) -> None:
    assert spread_of(ratios) == text


def test_groups_are_plotted_over_what_their_workloads_differ_in() -> None:
    def of(group: str) -> list[Record]:
        return [r for r in SOME if r.group == group and r.latency is not None]

    assert scale_of(of("GPT-2 block")) == "tokens"
    assert scale_of(of("CLIP final layer over experts")) == "num_experts"
    assert scale_of(of("Table 10 hierarchies")) is None
    twins = [replace(r, workload=f"{r.workload} {i}") for r in of("GPT-2 block") for i in range(2)]
    assert scale_of(twins) is None, "two workloads of as many tokens and experts have no place on a line"
    assert len(list(plots(of("GPT-2 block"), "a title"))) == 2, "one for each factorisation"
    _, ranking = plots(of("Table 10 hierarchies"), "a title")
    assert f"ours: CP native at {quantity(seconds(one('CP native', 'Table 10 layer, N = 128 × 2')), 's')}" in ranking


def test_counts_that_differ_are_explained() -> None:
    record = replace(one("dense"), flops=Flops(100, 200, None, "torch counts twice"))
    text = assert_self_contained(page([record])).text
    assert "GPT-2 block, T = 128, forward, dense: torch counts twice" in text
    assert "by fvcore" in text


def test_replays_of_cuda_graphs_have_a_column_where_there_are_any(shown: Page) -> None:
    assert "CUDA graph" not in shown.text
    replayed = replace(one("dense"), graph_latency=Latency(1e-6, 2.34e-6, 3e-6, 1e-6, 5))
    text = assert_self_contained(page([replayed, one("CP native")])).text
    assert "CUDA graph" in text
    assert "2.34 µs" in text


def test_nothing_measured_is_still_a_page(tmp_path: Path) -> None:
    write_report([], tmp_path / "report.html")
    text = assert_self_contained((tmp_path / "report.html").read_text(encoding="utf-8")).text
    assert "Nothing was measured." in text
    refused = replace(one("dense"), latency=None, floor=None, flops=None, refused="there is none")
    assert "there is none" in assert_self_contained(page([refused])).text

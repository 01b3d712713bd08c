"""What moved is found, what only wavers is not."""

from __future__ import annotations

from dataclasses import replace

import pytest

from mumoe_fast.bench.suite.compare import compare
from mumoe_fast.bench.suite.records import Latency, Record
from tests.bench.suite.test_records import FULL, PREDICTED, REFUSED, RUN


def taking(p50: float, spread: float = 0.01, **fields: object) -> Record:
    latency = Latency(p50 * (1 - spread), p50, p50 * (1 + spread), p50 * (1 - 2 * spread), 9)
    return replace(FULL, latency=latency, **fields)  # type: ignore[arg-type]


def test_nothing_moves_between_equal_runs() -> None:
    both = [FULL, replace(FULL, dtype="bfloat16"), PREDICTED]
    found = compare(both, both, 0.0)
    assert not found.changes
    assert (found.compared, found.only_before, found.only_after, found.differences) == (2, [], [], [])


@pytest.mark.parametrize(
    ("before", "after", "moved"),
    [
        (taking(1.0), taking(1.2), True),
        (taking(1.2), taking(1.0), True),
        (taking(1.0), taking(1.08), False),  # under the threshold
        (taking(1.0, spread=0.15), taking(1.2, spread=0.15), False),  # the spans overlap
        (taking(1.0, spread=0.01), taking(1.2, spread=0.5), False),
    ],
)
def test_a_latency_moves_beyond_its_spread_and_the_threshold(before: Record, after: Record, moved: bool) -> None:
    found = compare([before], [after], 0.1)
    assert bool(found.changes) == moved
    assert bool(found.regressions) == (moved and after.seconds > before.seconds)  # type: ignore[operator]


def test_the_worst_comes_first_and_memory_and_graphs_count() -> None:
    before = [taking(1.0, workload="a", graph_latency=Latency(1, 1, 1, 1, 3)), taking(1.0, workload="b")]
    after = [
        taking(1.5, workload="a", graph_latency=Latency(2, 2, 2, 2, 3), peak_bytes=3 << 20),
        taking(0.5, workload="b", peak_bytes=(1 << 20) + 1),
    ]
    found = compare(before, after, 0.1)
    assert [(change.key[0], change.metric, change.ratio) for change in found.changes] == [
        ("a", "peak memory", 3.0),
        ("a", "CUDA graph", 2.0),
        ("a", "latency", 1.5),
        ("b", "latency", 0.5),
    ]
    assert len(found.regressions) == 3


def test_what_is_refused_now_is_a_regression_and_what_was_refused_is_none() -> None:
    (change,) = compare([FULL], [REFUSED], 0.1).regressions
    assert (change.metric, change.reason) == ("refused", "wrong: y")
    assert not compare([REFUSED], [FULL], 0.1).changes
    assert not compare([REFUSED], [REFUSED], 0.1).changes


def test_rows_of_one_run_only_are_named_and_other_machines_told() -> None:
    run = replace(RUN, machine={"CPU": "another CPU", "threads": "2"}, versions={"torch": "2.13.0", "triton": "3.9.0"})
    found = compare([FULL], [taking(9.0, workload="new", run=run)], 0.1)
    assert (found.compared, found.changes) == (0, [])
    assert found.only_before == [FULL.key]
    assert found.only_after[0][0] == "new"
    assert found.differences == ["CPU: a CPU, then another CPU", "triton: none, then 3.9.0"]

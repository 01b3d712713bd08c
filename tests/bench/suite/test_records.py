"""Records survive the way through a file, and what is no record is refused with its place."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from mumoe_fast.bench.suite.records import (
    Ceilings,
    Floor,
    Flops,
    Latency,
    Record,
    RecordError,
    Run,
    json_line,
    measured,
    read_records,
    write_records,
)

RUN = Run("2026-01-02T03:04:05+00:00", "abc1234+", 0, {"CPU": "a CPU", "threads": "2"}, {"torch": "2.13.0"})
FULL = Record(
    workload="GPT-2 block, T = 64",
    group="GPT-2 block",
    tokens=64,
    num_experts=256,
    implementation="μMoE cp, native",
    kind="ours",
    factorization="cp",
    dtype="float32",
    direction="forward",
    run=RUN,
    error_of_allowance=0.25,
    latency=Latency(p20=0.9, p50=2.0, p80=2.5, minimum=0.5, bursts=7),
    peak_bytes=1 << 20,
    parameters=1000,
    flops=Flops(formula=600, torch=600, fvcore=None, explanation="no fvcore"),
    floor=Floor(flops=500, bytes=100, seconds=0.5),
    ceilings=Ceilings(bytes_per_second=200.0, flops_per_second=1000.0),
)
REFUSED = replace(FULL, refused="wrong: y", wrong=True, latency=None, peak_bytes=None, flops=None, floor=None)
PREDICTED = replace(FULL, latency=None, predicted_for="NVIDIA H100 SXM", predicted_seconds=0.125)


def test_records_come_back_as_they_were_written(tmp_path: Path) -> None:
    path = tmp_path / "results.jsonl"
    for number, _ in enumerate(write_records([FULL, REFUSED, PREDICTED], path), 1):
        assert len(path.read_text().splitlines()) == number, "a run that ends early has written what it had measured"
    assert read_records(path) == [FULL, REFUSED, PREDICTED]


def test_the_derived_figures() -> None:
    assert FULL.seconds == 2.0
    assert FULL.flops_per_second == 300
    assert FULL.bytes_per_second == 50
    assert FULL.fraction_of_flops == pytest.approx(0.3)
    assert FULL.fraction_of_bytes == pytest.approx(0.25)
    assert FULL.over_floor == 4
    assert (PREDICTED.seconds, PREDICTED.over_floor, PREDICTED.flops_per_second) == (0.125, 0.25, None)
    assert (REFUSED.seconds, REFUSED.over_floor, REFUSED.bytes_per_second) == (None, None, None)
    assert measured([FULL, REFUSED, PREDICTED]) == [FULL]
    assert Flops(None, None, 7).best == 7
    assert json.loads(json_line(FULL))["over_floor"] == 4


def test_a_prediction_is_not_compared_with_a_measurement() -> None:
    assert PREDICTED.predicted
    assert not FULL.predicted
    assert PREDICTED.key != FULL.key
    assert REFUSED.key == FULL.key


def changed(**fields: object) -> str:
    return json.dumps(json.loads(json_line(FULL)) | fields)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "line 2: expected JSON"),
        ("[]", "line 2: record: expected an object"),
        ("{}", "line 2: format: expected 1, got None"),
        (changed(format=2), "format: expected 1, got 2"),
        (changed(tokens="64"), "record.tokens: expected int, got '64'"),
        (changed(tokens=True), "record.tokens: expected int, got True"),
        (changed(latency={"p20": 1.0}), "record.latency: expected p50, p80, minimum, bursts, which it lacks"),
        (changed(floor=3), "record.floor: expected an object, got 3"),
        (changed(colour="red"), "got colour too"),
        (changed(workload=None), "record.workload: expected str, got None"),
        (changed(run={**json.loads(json_line(FULL))["run"], "machine": {"CPU": 3}}), "run.machine.CPU: expected str"),
    ],
)
def test_what_is_no_record_is_named_with_its_line(line: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "results.jsonl"
    path.write_text(json_line(FULL) + line + "\n")
    with pytest.raises(RecordError) as caught:
        read_records(path)
    assert message in str(caught.value)
    assert str(path) in str(caught.value)


def test_a_missing_or_empty_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(RecordError, match="expected a file of records"):
        read_records(tmp_path / "nothing.jsonl")
    (tmp_path / "empty.jsonl").write_text("\n")
    with pytest.raises(RecordError, match="at least one record"):
        read_records(tmp_path / "empty.jsonl")


def test_numbers_that_are_none_are_not_written(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="not JSON compliant"):
        list(write_records([replace(FULL, error_of_allowance=float("nan"))], tmp_path / "results.jsonl"))

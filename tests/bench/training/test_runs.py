"""Losses side by side, on a tiny model: equal steps, what is printed and written, and what an interrupt keeps."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from threading import Event

import pytest
from rich.console import Console
from typer.testing import CliRunner

pytest.importorskip("transformers")

from mumoe_fast.bench.cli import app
from mumoe_fast.bench.training import runs
from mumoe_fast.bench.training.runs import compare_losses, page, rows
from mumoe_fast.examples._tokens import Corpus
from mumoe_fast.examples.train_gpt import SIZES, ModelConfig, TrainConfig

TINY = ModelConfig(experts=6, layers=1, heads=2, width=32, context=24, impl="reference")
SHORT = TrainConfig(batch=4, learning_rate=1e-2)


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "text"
    path.write_bytes(b"".join(b"%d squared is %d; " % (i, i * i) for i in range(400)))
    return path


def test_the_command_trains_all_models_equally_prints_and_writes(
    text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(SIZES, "tiny", (TINY, SHORT))
    out = tmp_path / "out"
    arguments = ["bench", "training", "losses", "--steps", "24", "--text", str(text), "--out", str(out)]
    done = CliRunner(env={"COLUMNS": "200"}).invoke(app, arguments)
    assert done.exit_code == 0, done.output
    records = [json.loads(line) for line in (out / "losses.jsonl").read_text().splitlines()]
    assert [record["model"] for record in records] == ["dense", "CP", "TR"]
    assert [record["shape"]["mlp"] for record in records] == ["dense", "cp", "tr"]
    report = (out / "report.html").read_text()
    for record in records:
        losses = record["training_losses"]
        assert len(losses) == record["steps"] == record["training"]["steps"] == 24
        assert losses[-1] < losses[0] - 1
        assert record["held_out"] < 4.5  # a uniform guess is 5.5
        assert list(record["held_out_losses"]) == [str(step) for step in range(2, 25, 2)]
        assert abs(record["parameters"] / records[0]["parameters"] - 1) < 0.2  # matched, but ranks go by eights
        for shown in (f"{record['parameters']:,}", f"{record['held_out']:.4f}"):
            assert shown in done.output
            assert shown in report
        assert f"{record['model']}, held out: " in report  # a point of the plot, on hover
    assert "stopped" not in done.output


def test_the_models_see_the_same_batches(text: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[range, int]] = []
    windows = Corpus.windows

    def spy(corpus: Corpus, samples: range, context: int, seed: int) -> object:
        seen.append((samples, seed))
        return windows(corpus, samples, context, seed)

    monkeypatch.setattr(Corpus, "windows", spy)
    compare_losses(minutes=1, steps=2, text=text, console=Console(quiet=True), model=TINY, training=SHORT)
    assert seen == [(range(4), 0)] * 3 + [(range(4, 8), 0)] * 3


def test_an_interrupt_keeps_what_was_measured_and_says_so(text: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    @contextmanager
    def interrupted_at_once() -> Iterator[Event]:
        asked = Event()
        asked.set()
        yield asked

    monkeypatch.setattr(runs, "catch_interrupt", interrupted_at_once)
    losses = compare_losses(minutes=1, steps=9, text=text, console=Console(quiet=True), model=TINY, training=SHORT)
    assert losses.done == 1
    assert [row[2] for row in rows(losses)] == ["1", "1", "1"]
    assert "stopped after 1 of 9 steps" in (losses.interruption or "")
    assert "stopped after 1 of 9 steps" in page(losses, {})


def test_the_minutes_say_how_many_steps(text: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[float] = []
    monkeypatch.setattr(runs, "affordable_steps", lambda trainers, seconds: asked.append(seconds) or 3)
    losses = compare_losses(minutes=0.5, text=text, console=Console(quiet=True), model=TINY, training=SHORT)
    assert asked == [30.0]
    assert losses.done == losses.training.steps == 3
    assert losses.interruption is None


def test_the_difference_is_against_the_dense_models_held_out_loss(text: Path) -> None:
    losses = compare_losses(minutes=1, steps=1, text=text, console=Console(quiet=True), model=TINY, training=SHORT)
    made_up = [replace(run, held_out=held_out) for run, held_out in zip(losses.runs, (2.0, 1.9, 2.1), strict=True)]
    assert [row[-1] for row in rows(replace(losses, runs=made_up))] == ["", "-5.00%", "+5.00%"]

"""The demo end to end on a tiny model: what it prints and writes is what it trained and measured."""

import io
import re
import signal
from dataclasses import replace
from pathlib import Path
from threading import Event

import pytest
import torch
from rich.console import Console

from mumoe_fast.bench import demo as demonstration
from mumoe_fast.bench.demo import (
    Demo,
    TextTrainer,
    affordable_steps,
    resident_bytes,
    run,
    start_training,
    train_together,
    twin,
)
from mumoe_fast.bench.demo_result import running_mean
from mumoe_fast.examples._tokens import Corpus
from mumoe_fast.examples._training import TrainConfig, Trainer
from mumoe_fast.examples.train_gpt import MLP, ModelConfig, TextTask, Tokens
from mumoe_fast.ops.dispatch import obstacle

pytest.importorskip("transformers")

TINY = ModelConfig(experts=6, layers=1, heads=2, width=32, context=24)
SHORT = TrainConfig(batch=4, learning_rate=1e-2)
TEXT = b"".join(b"%d squared is %d; " % (i, i * i) for i in range(400))


def trainer(mlp: MLP = "cp") -> TextTrainer:
    shape = replace(TINY, mlp=mlp, impl="reference")
    return start_training(shape, Corpus.from_bytes(TEXT), replace(SHORT, steps=4), torch.device("cpu"))


def run_tiny(folder: Path, steps: int, impl: str = "reference", text: bytes = TEXT) -> tuple[Demo, str, str]:
    """The demo's result, what it printed and what it wrote."""
    (folder / "text").write_bytes(text)
    printed, report = io.StringIO(), folder / "report.html"
    demo = run(
        steps=steps,
        impl=impl,
        device="cpu",
        text=folder / "text",
        output=report,
        model=TINY,
        training=SHORT,
        console=Console(file=printed, width=200),
    )
    return demo, printed.getvalue(), report.read_text(encoding="utf-8")


def test_demo_trains_compares_and_reports(tmp_path: Path) -> None:
    demo, printed, report = run_tiny(tmp_path, steps=24)
    assert demo.interruption is None
    assert [row.name for row in demo.rows] == ["dense", "μMoE, reference", "μMoE, best here"]
    for name, row in zip(("dense", "μMoE"), demo.rows, strict=False):
        losses = [record.loss for record in demo.records[name]]
        assert len(losses) == 24
        assert losses[-1] < losses[0] - 1
        assert row.held_out is not None
        assert row.held_out < 4.5  # a uniform guess is 5.5
        for shown in (f"{row.parameters:,}", f"{row.held_out:.4f}"):
            assert shown in printed
            assert shown in report
    assert demo.rows[2].cells()[2:] == ["same"] * 4, "what was not measured again is not shown as if it had been"
    assert re.search(r"The best implementation here is the reference itself \(it was asked for\)", printed)
    assert "src=" not in report
    assert not re.search(r"href=\"[^#]", report)
    assert "http" not in report
    assert report.count(", held out: ") == 2 * 8  # eight evaluations of each model tell their values
    assert len(demo.experts) == report.count("<h3>Expert ") == 3
    assert all(expert.snippets for expert in demo.experts)


def test_an_interrupt_ends_training_at_equal_steps_and_reports_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    update = Trainer.update

    def update_and_interrupt(self: TextTrainer) -> float:
        if self.done == 5 and self.task.config.mlp == "dense" and self.config.steps == 100:
            signal.raise_signal(signal.SIGINT)
        return update(self)

    monkeypatch.setattr(Trainer, "update", update_and_interrupt)
    measured = pytest.MonkeyPatch()
    measured.setattr(demonstration, "compare", lambda *_: ([], []))  # measuring goes on training copies
    try:
        demo, printed, report = run_tiny(tmp_path, steps=100)
    finally:
        measured.undo()
    assert demo.done == 6
    assert {name: len(records) for name, records in demo.records.items()} == {"dense": 6, "μMoE": 6}
    for shown in (printed, report):
        assert "Training was stopped after 6 of 100 steps" in shown


def test_the_kernels_row_is_measured_beside_the_references(tmp_path: Path) -> None:
    """With another implementation than the reference there are two μMoE rows, of one set of weights."""
    if (reason := obstacle("native", torch.device("cpu"), torch.float32)) is not None:
        pytest.skip(reason)
    demo, printed, _ = run_tiny(tmp_path, steps=1, impl="native", text=TEXT[:1000])
    _, reference, kernels = demo.rows
    assert kernels.name == "μMoE, native"
    assert kernels.parameters == reference.parameters
    assert kernels.held_out == pytest.approx(reference.held_out, abs=1e-4)
    assert "the two losses differ by" in printed


def test_both_models_see_the_same_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: dict[str, list[torch.Tensor]] = {"dense": [], "cp": []}
    batch = TextTask.batch

    def spy(self: TextTask, samples: range) -> Tokens:
        x, y = batch(self, samples)
        seen[self.config.mlp].append(x)
        return x, y

    monkeypatch.setattr(TextTask, "batch", spy)
    train_together({"dense": trainer("dense"), "μMoE": trainer("cp")}, Console(file=io.StringIO()), Event())
    assert len(seen["dense"]) == len(seen["cp"]) == 4
    assert all(torch.equal(a, b) for a, b in zip(seen["dense"], seen["cp"], strict=True))


def test_a_machine_that_became_slow_ends_training_at_equal_steps() -> None:
    trainers = {"dense": trainer("dense"), "μMoE": trainer("cp")}
    records = train_together(trainers, Console(file=io.StringIO()), Event(), limit=0)
    assert {name: len(found) for name, found in records.items()} == {"dense": 1, "μMoE": 1}
    assert {run.done for run in trainers.values()} == {1}


def test_a_twin_trains_as_the_original_does_and_leaves_it_alone() -> None:
    original, alone = trainer(), trainer()
    for _ in range(2):
        original.update()
        alone.update()
    copy = twin(original, "reference")
    assert [copy.update(), copy.update()] == [alone.update(), alone.update()]
    assert original.done == 2
    assert original.update() != copy.update()


def test_resident_bytes_are_weights_statistics_and_two_moments() -> None:
    run_ = trainer("dense")
    weights = sum(p.numel() for p in run_.model.parameters())
    assert resident_bytes(run_) == 4 * weights
    run_.update()
    count = len(list(run_.model.parameters()))
    assert resident_bytes(run_) == 4 * (3 * weights + count)  # AdamW keeps a step counter for each


def test_affordable_steps_follow_the_time_that_is_given(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        demonstration, "interleaved_seconds", lambda actions, **_: {name: [0.25, 0.2, 0.3] for name in actions}
    )
    trainers = {"dense": trainer("dense"), "μMoE": trainer()}
    assert affordable_steps(trainers, 110) == 220
    assert affordable_steps(trainers, 0.1) == 20
    assert affordable_steps(trainers, 1e6) == 1500


def test_running_mean_has_no_bias_towards_its_start() -> None:
    assert running_mean([2.0] * 5) == pytest.approx([2.0] * 5)
    assert running_mean([4.0, 0.0], memory=0.5) == pytest.approx([4.0, 4 / 3])
    assert running_mean([]) == []

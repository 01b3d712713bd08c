"""The trainer: what a step computes, what resumes, what is refused, whatever is trained."""

import io
import json
import os
import signal
from collections.abc import Iterator
from dataclasses import replace
from itertools import islice
from pathlib import Path

import pytest
import torch
from rich.console import Console
from torch import nn
from toy_task import Regression

from mumoe_fast.examples._checkpoints import Checkpoints, OtherRunError, complete_checkpoints
from mumoe_fast.examples._optimizer import adamw, clip_gradients, warmed_cosine
from mumoe_fast.examples._processes import Processes, join_processes
from mumoe_fast.examples._run import LOG, catch_interrupt, fit, read_log
from mumoe_fast.examples._training import TrainConfig, Trainer

SHORT = TrainConfig(steps=12, batch=4, learning_rate=1e-2, evaluate_every=5, checkpoint_every=4)


def trainer(config: TrainConfig = SHORT, dropout: float = 0.0) -> Trainer[Regression]:
    return Trainer(Regression(dropout), config)


def losses(run: Trainer[Regression]) -> list[float]:
    return [record.loss for record in run]


def test_records_say_what_happened() -> None:
    run = trainer()
    records = list(run)
    assert [record.step for record in records] == list(range(1, 13))
    assert [record.step for record in records if record.figures] == [5, 10, 12]
    assert records[-1].units == 12 * 4
    assert records[-1].units_per_second > 0
    assert records[-1].peak_bytes > 10**7
    assert records[-1].figures == run.evaluate()
    assert run.evaluate(complete=True) != run.evaluate()
    assert records[-1].loss < records[0].loss


def test_micro_batches_train_as_one_large_batch() -> None:
    runs = [Trainer(Regression(dtype=torch.float64), replace(SHORT, accumulate=n)) for n in (1, 2, 4)]
    expected, *actual = (losses(run) for run in runs)
    for found in actual:
        assert found == pytest.approx(expected, rel=1e-9)
    for mine, theirs in zip(runs[0].model.parameters(), runs[1].model.parameters(), strict=True):
        torch.testing.assert_close(mine, theirs)


def test_a_batch_that_cannot_be_divided_is_refused() -> None:
    with pytest.raises(ValueError, match=r"batch: expected a multiple of 3, 3 micro-batches in each of 1.*got 4"):
        trainer(replace(SHORT, accumulate=3))


def test_dropout_follows_from_seed_and_step_alone() -> None:
    whole, parted = trainer(dropout=0.5), trainer(dropout=0.5)
    expected = losses(whole)
    first = [record.loss for record in islice(parted, 7)]
    torch.manual_seed(12345)
    assert first + losses(parted) == expected
    assert losses(trainer(replace(SHORT, seed=1), dropout=0.5)) != expected


def test_evaluation_is_without_dropout_and_leaves_the_model_training() -> None:
    run = trainer(dropout=0.5)
    assert run.evaluate() == run.evaluate()
    assert run.model.training


def test_learning_rate_warms_up_and_falls_to_its_floor() -> None:
    rates = [warmed_cosine(step, 30, highest=1e-2, final=0.1, warmup=0.1) for step in range(31)]
    assert rates[0] == pytest.approx(1e-2 / 3)
    assert rates.index(max(rates)) in (2, 3)
    assert max(rates) == 1e-2
    assert rates[16] == pytest.approx(1e-2 * 0.55, rel=0.1)
    assert rates[-1] == pytest.approx(1e-3)


def test_the_schedule_reaches_the_optimiser() -> None:
    run = trainer()
    for record in run:
        assert {group["lr"] for group in run.optimizer.param_groups} == {record.learning_rate}
    assert record.learning_rate == run.learning_rate(11)


def test_weight_decay_is_on_matrices_that_are_no_biases() -> None:
    model = nn.Module()
    model.weight, model.in_bias, model.scale = (nn.Parameter(torch.ones(2, 2)) for _ in range(3))
    model.scale = nn.Parameter(torch.ones(2))
    model.frozen = nn.Parameter(torch.ones(2, 2), requires_grad=False)
    groups = adamw(model, weight_decay=0.3, betas=(0.9, 0.95)).param_groups
    decays = {id(p): group["weight_decay"] for group in groups for p in group["params"]}
    assert decays == {id(model.weight): 0.3, id(model.in_bias): 0.0, id(model.scale): 0.0}


@pytest.mark.parametrize("limit", [0.5, 100.0])
def test_clipping_is_torchs(limit: float) -> None:
    models = [Regression().model for _ in range(2)]
    for model in models:
        model(torch.ones(3, 8)).square().sum().backward()
    clip_gradients(models[0].parameters(), limit, Processes(torch.device("cpu")))
    nn.utils.clip_grad_norm_(models[1].parameters(), limit)
    for mine, theirs in zip(models[0].parameters(), models[1].parameters(), strict=True):
        torch.testing.assert_close(mine.grad, theirs.grad)


def test_a_run_goes_on_from_its_folder(tmp_path: Path) -> None:
    expected, figures = losses(trainer(dropout=0.2)), {}
    for steps in (5, None):
        run, console = trainer(dropout=0.2), Console(file=io.StringIO())
        if steps is None:
            figures = fit(run, out=tmp_path, console=console)
        else:
            with pytest.raises(RuntimeError, match="no such sample"):
                fit(Trainer(_Ends(steps), SHORT), out=tmp_path, console=console)
    assert [record.loss for record in read_log(tmp_path)] == expected
    assert [path.name for path in complete_checkpoints(tmp_path)] == ["step-00000008", "step-00000012"]
    assert "going on after step 4" in console.file.getvalue()  # type: ignore[attr-defined]
    assert fit(trainer(dropout=0.2), out=tmp_path, console=console) == figures, "a run that is complete stays as it is"
    assert len(read_log(tmp_path)) == 12


class _Ends(Regression):
    def __init__(self, steps: int) -> None:
        super().__init__(dropout=0.2)
        self.end = steps * SHORT.batch

    def batch(self, samples: range) -> torch.Tensor:
        if self.end in samples:
            raise RuntimeError("no such sample")
        return super().batch(samples)


def test_another_configuration_is_refused_by_field(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path, {"training": SHORT, "other": TrainConfig()})
    checkpoints.save(trainer())
    for name, changed in (
        ("training.learning_rate: expected 0.01.*got 0.5", {"training": replace(SHORT, learning_rate=0.5)}),
        (r"training.betas: expected \[0.9, 0.95\].*got \[0.5, 0.95\]", {"training": replace(SHORT, betas=(0.5, 0.95))}),
        ("other.steps: expected 300.*got 7", {"training": SHORT, "other": TrainConfig(steps=7)}),
    ):
        with pytest.raises(OtherRunError, match=name):
            Checkpoints(tmp_path, changed).resume(trainer())
    pace = replace(SHORT, accumulate=2, evaluate_every=1, checkpoint_every=1)
    assert Checkpoints(tmp_path, {"training": pace}).resume(trainer(pace))


def test_what_is_unfinished_is_no_checkpoint(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path, {"training": SHORT})
    (tmp_path / "step-00000009.unfinished").mkdir(parents=True)
    assert not checkpoints.resume(trainer())
    run = trainer()
    run.update()
    checkpoints.save(run)
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000001"]
    assert json.loads((tmp_path / "step-00000001" / "run.json").read_text())["done"] == 1


@pytest.fixture
def interrupted_at(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    update = Trainer.update

    def update_and_interrupt(self: Trainer[Regression]) -> float:
        if self.done == 6:
            signal.raise_signal(signal.SIGINT)
        return update(self)

    monkeypatch.setattr(Trainer, "update", update_and_interrupt)
    yield
    monkeypatch.undo()


@pytest.mark.usefixtures("interrupted_at")
def test_an_interrupt_keeps_the_step_in_progress(tmp_path: Path) -> None:
    printed = io.StringIO()
    fit(trainer(), out=tmp_path, console=Console(file=printed, width=200))
    assert "after 7 of 12 steps" in printed.getvalue()
    assert complete_checkpoints(tmp_path)[-1].name == "step-00000007"
    assert len((tmp_path / LOG).read_text().splitlines()) == 7


def test_the_first_interrupt_asks_and_the_second_raises() -> None:
    before = signal.getsignal(signal.SIGINT)  # ignored where the tests run in a shell's background
    with catch_interrupt() as interrupted:
        os.kill(os.getpid(), signal.SIGINT)
        assert interrupted.wait(5)
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is before


@pytest.mark.parametrize(
    ("processes", "arguments", "message"),
    [
        (1, {"tensor_parallel": 2}, "tensor_parallel: expected a divisor of the 1 processes.*got 2"),
        (6, {"tensor_parallel": 4}, "tensor_parallel: expected a divisor of the 6 processes.*got 4"),
        (2, {"strategy": "none"}, "parallel: expected ddp or fsdp.*2 processes, got none"),
        (4, {"strategy": "ddp", "tensor_parallel": 2}, "parallel: expected fsdp or none.*got ddp"),
    ],
)
def test_processes_that_cannot_be_arranged_are_refused(
    monkeypatch: pytest.MonkeyPatch, processes: int, arguments: dict[str, object], message: str
) -> None:
    monkeypatch.setenv("WORLD_SIZE", str(processes))
    with pytest.raises(ValueError, match=message), join_processes(**arguments):  # type: ignore[arg-type]
        pass

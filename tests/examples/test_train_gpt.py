"""The example trains, its two kinds of model are comparable, and a run that stops can go on."""

import copy
import os
import signal
from dataclasses import replace
from itertools import islice
from pathlib import Path

import pytest
import torch
from typer import Typer
from typer.testing import CliRunner

from mumoe_fast.examples import train_gpt
from mumoe_fast.examples._text import Corpus
from mumoe_fast.examples.train_gpt import (
    GPT,
    ModelConfig,
    TrainConfig,
    Trainer,
    build_model,
    catch_interrupt,
    count_parameters,
)

TINY = ModelConfig(experts=6, impl="reference", layers=1, heads=2, width=32, context=24)
SHORT = TrainConfig(steps=30, batch=4, learning_rate=1e-2, evaluate_every=10, evaluate_windows=4)
TEXT = b"".join(b"%d squared is %d; " % (i, i * i) for i in range(400))


def trainer(model: ModelConfig = TINY, config: TrainConfig = SHORT) -> Trainer:
    return Trainer(build_model(model, "cpu", config.seed), Corpus.from_bytes(TEXT), config)


@pytest.mark.parametrize("mlp", ["dense", "cp"])
def test_loss_falls_on_text_that_was_not_trained_on(mlp: train_gpt.MLP) -> None:
    run = trainer(replace(TINY, mlp=mlp))
    before = run.evaluate()
    records = list(run)
    assert [record.step for record in records] == list(range(1, 31))
    assert [record.step for record in records if record.held_out is not None] == [10, 20, 30]
    assert run.evaluate() < before - 1
    assert records[-1].tokens == 30 * 4 * 24
    assert records[-1].tokens_per_second > 0


def test_every_parameter_learns() -> None:
    run = trainer()
    before = copy.deepcopy(run.model)
    list(run)
    for (name, old), new in zip(before.named_parameters(), run.model.parameters(), strict=True):
        assert not torch.equal(old, new), name


def test_batches_depend_on_seed_and_step_alone() -> None:
    corpus = Corpus.from_bytes(TEXT)
    torch.manual_seed(1)
    x, y = corpus.batch(3, 4, 24, seed=0)
    torch.manual_seed(2)
    again, _ = corpus.batch(3, 4, 24, seed=0)
    assert torch.equal(x, again)
    assert torch.equal(x[:, 1:], y[:, :-1])
    assert not torch.equal(x, corpus.batch(4, 4, 24, seed=0)[0])
    assert not torch.equal(x, corpus.batch(3, 4, 24, seed=1)[0])


def test_held_out_windows_tile_the_last_tenth() -> None:
    corpus = Corpus.from_bytes(TEXT)
    assert bytes(corpus.train.tolist()) + bytes(corpus.held_out.tolist()) == TEXT
    assert len(corpus.held_out) == pytest.approx(len(TEXT) / 10, abs=1)
    x, y = corpus.held_out_windows(24)
    assert torch.equal(x.flatten(), corpus.held_out[: x.numel()].long())
    assert torch.equal(y.flatten(), corpus.held_out[1 : y.numel() + 1].long())
    few, _ = corpus.held_out_windows(24, limit=3)
    assert torch.equal(few[[0, -1]], x[[0, -1]])
    assert len(few) == 3


def test_parameters_match_within_one_step_of_the_rank() -> None:
    """`rank=None` takes the multiple of 8 that comes nearest, so it is at most four ranks per layer off."""
    shape = replace(TINY, width=64, experts=16, layers=2)
    dense, mumoe = (GPT(replace(shape, mlp=mlp)) for mlp in ("dense", "cp"))
    per_rank = 2 * 16 + (64 + 1) + (256 + 1) + 256 + 64  # two expert layers of 16 experts: 64 → 256 → 64
    assert abs(count_parameters(mumoe) - count_parameters(dense)) <= 2 * 4 * per_rank


def test_one_seed_starts_dense_and_mumoe_from_the_same_weights_outside_the_mlp() -> None:
    dense, mumoe = (dict(build_model(replace(TINY, mlp=mlp), "cpu", 0).named_parameters()) for mlp in ("dense", "cp"))
    shared = [name for name in dense if ".mlp." not in name]
    assert len(shared) > 5
    for name in shared:
        assert torch.equal(dense[name], mumoe[name]), name


def test_the_model_is_causal() -> None:
    model = build_model(TINY, "cpu", 0).eval()
    x = torch.randint(256, (1, 24))
    y = x.clone()
    y[0, 12:] = (y[0, 12:] + 1) % 256
    assert torch.equal(model(x)[0, :12], model(y)[0, :12])
    assert not torch.equal(model(x)[0, 12:], model(y)[0, 12:])


def test_a_run_that_stopped_goes_on_as_if_it_had_not() -> None:
    whole, parted = trainer(), trainer()
    expected = [record.loss for record in whole]
    first = [record.loss for record in islice(parted, 7)]
    assert parted.done == 7
    assert first + [record.loss for record in parted] == expected


def test_learning_rate_warms_up_and_falls_to_its_floor() -> None:
    rates = [trainer().learning_rate(step) for step in range(SHORT.steps + 1)]
    assert rates[0] == pytest.approx(SHORT.learning_rate / 3)
    assert rates.index(max(rates)) in (2, 3)
    assert max(rates) == SHORT.learning_rate
    assert rates[-1] == pytest.approx(0.1 * SHORT.learning_rate)


def test_weight_decay_is_on_matrices_only() -> None:
    matrices, vectors = trainer().optimizer.param_groups
    assert {p.ndim for p in vectors["params"]} == {1}
    assert min(p.ndim for p in matrices["params"]) == 2
    assert (matrices["weight_decay"], vectors["weight_decay"]) == (0.1, 0.0)


def test_a_text_too_short_for_the_context_is_refused() -> None:
    with pytest.raises(ValueError, match=r"text: expected more than 250 bytes.*got 240"):
        Trainer(GPT(TINY), Corpus.from_bytes(TEXT[:240]), SHORT)


def test_the_first_interrupt_asks_and_the_second_raises() -> None:
    with catch_interrupt() as interrupted:
        os.kill(os.getpid(), signal.SIGINT)
        assert interrupted.wait(5)
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_command_line_saves_what_was_trained_before_an_interrupt(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ctrl-C in the middle of the fifth step: that step is completed, and then everything is kept."""
    update = Trainer.update

    def update_and_interrupt(self: Trainer) -> float:
        if self.done == 4:
            signal.raise_signal(signal.SIGINT)
        return update(self)

    monkeypatch.setattr(Trainer, "update", update_and_interrupt)
    (tmp_path / "text").write_bytes(TEXT)
    app = Typer()
    app.command()(train_gpt.main)
    arguments = "--steps 50 --layers 1 --width 32 --heads 2 --context 24 --experts 6 --device cpu --impl reference"
    files = ["--text", str(tmp_path / "text"), "--out", str(tmp_path / "saved.pt")]
    result = CliRunner().invoke(app, [*arguments.split(), *files], catch_exceptions=False)
    assert result.exit_code == 0
    assert "after 5 of 50 steps" in result.output
    saved = torch.load(tmp_path / "saved.pt")
    assert saved["done"] == 5
    assert [record["step"] for record in saved["records"]] == [1, 2, 3, 4, 5]
    GPT(ModelConfig(**saved["model_config"])).load_state_dict(saved["model"])

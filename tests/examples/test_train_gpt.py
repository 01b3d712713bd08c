"""The example trains, its dense and its μMoE models are comparable, and its command explains itself and goes on."""

import copy
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from mumoe_fast.examples import train_gpt
from mumoe_fast.examples._run import read_log
from mumoe_fast.examples._tokens import Corpus
from mumoe_fast.examples._training import TrainConfig, Trainer, count_parameters
from mumoe_fast.examples.train_gpt import SIZES, ModelConfig, TextTask, app, build_model, load_model

pytest.importorskip("transformers")

TINY = ModelConfig(experts=6, impl="reference", layers=1, heads=2, width=32, context=24)
SHORT = TrainConfig(steps=30, batch=4, learning_rate=1e-2, evaluate_every=10)
TEXT = b"".join(b"%d squared is %d; " % (i, i * i) for i in range(400))


def trainer(model: ModelConfig = TINY, config: TrainConfig = SHORT) -> Trainer[TextTask]:
    corpus = Corpus.from_bytes(TEXT)
    return Trainer(TextTask(build_model(model, "cpu", config.seed), model, corpus, windows=4), config)


@pytest.mark.parametrize("mlp", ["dense", "cp"])
def test_loss_falls_on_text_that_was_not_trained_on(mlp: train_gpt.MLP) -> None:
    run = trainer(replace(TINY, mlp=mlp))
    before = run.evaluate(complete=True)["held_out"]
    assert before == pytest.approx(5.545, abs=0.1)  # ln 256: it knows nothing yet
    records = list(run)
    assert [record.step for record in records if record.figures] == [10, 20, 30]
    assert run.evaluate(complete=True)["held_out"] < before - 1
    assert records[-1].units == 30 * 4 * 24


def test_every_parameter_learns() -> None:
    run = trainer()
    before = copy.deepcopy(run.model)
    list(run)
    for (name, old), new in zip(before.named_parameters(), run.model.parameters(), strict=True):
        assert not torch.equal(old, new), name


def test_evaluation_is_the_mean_over_all_held_out_tokens() -> None:
    run = trainer()
    x, y = run.task.corpus.held_out_windows(24)
    with torch.no_grad():
        expected = run.task.loss(run.model.eval(), (x, y)).item()
    assert run.evaluate(complete=True)["held_out"] == pytest.approx(expected, rel=1e-5)


def test_parameters_match_within_one_step_of_the_rank() -> None:
    """`rank=None` takes the multiple of 8 that comes nearest, so it is at most four ranks per layer off."""
    shape = replace(TINY, width=64, experts=16, layers=2)
    dense, mumoe = (count_parameters(build_model(replace(shape, mlp=mlp), "cpu", 0)) for mlp in ("dense", "cp"))
    per_rank = 2 * 16 + (64 + 1) + (256 + 1) + 256 + 64  # two expert layers of 16 experts: 64 → 256 → 64
    assert abs(mumoe - dense) <= 2 * 4 * per_rank


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
    assert torch.equal(model(x).logits[0, :12], model(y).logits[0, :12])
    assert not torch.equal(model(x).logits[0, 12:], model(y).logits[0, 12:])


@pytest.mark.parametrize(("mlp", "rank", "millions"), [("dense", None, 124.4), ("cp", 556, 124.8), ("tr", 149, 125.2)])
def test_the_papers_size_has_the_papers_parameters(mlp: train_gpt.MLP, rank: int | None, millions: float) -> None:
    shape, training = SIZES["124M"]
    with torch.device("meta"):
        model = build_model(replace(shape, mlp=mlp, rank=rank), "meta", 0)
    assert count_parameters(model) / 1e6 == pytest.approx(millions, abs=0.06)
    assert (training.learning_rate, training.batch, training.weight_decay) == (6e-4, 24, 0.1)
    assert (training.steps, round(training.warmup * training.steps)) == (100_000, 2000)


def test_more_tokens_than_the_model_knows_are_refused() -> None:
    corpus = replace(Corpus.from_bytes(TEXT), vocabulary=300)
    with pytest.raises(ValueError, match="vocabulary: expected the text's 300, got 256"):
        TextTask(build_model(TINY, "cpu", 0), TINY, corpus)


def run(*arguments: str) -> tuple[int, str]:
    result = CliRunner().invoke(app, arguments, env={"COLUMNS": "200"})
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result.exit_code, " ".join(result.output.split())


SHAPE = "--layers 1 --width 32 --heads 2 --context 24 --experts 6"
SMALL = ["train", *SHAPE.split(), "--device", "cpu", "--impl", "reference"]


def test_a_run_goes_on_by_itself_and_another_one_is_refused(tmp_path: Path) -> None:
    (tmp_path / "text").write_bytes(TEXT)
    files = ["--text", str(tmp_path / "text"), "--out", str(tmp_path / "run")]
    code, printed = run(*SMALL, *files, "--steps", "6", "--checkpoint-every", "4")
    assert code == 0, printed
    assert "cp MLPs" in printed
    assert "after 6 of 6 steps" in printed
    assert len(read_log(tmp_path / "run")) == 6
    code, printed = run(*SMALL, *files, "--steps", "6", "--rank", "40")
    assert code == 2
    assert "model.rank: expected None as in" in printed
    assert "Traceback" not in printed
    code, printed = run(*SMALL, *files, "--steps", "6")
    assert code == 0
    assert "going on after step 6" in printed
    model, config = load_model(tmp_path / "run")
    assert config == TINY
    assert not model.training


def test_a_run_without_checkpoints_is_no_model(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="run: expected a folder with a complete checkpoint"):
        load_model(tmp_path)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--experts", "0"], "num_experts"),
        (["--batch", "3", "--accumulate", "2"], "batch: expected a multiple of 2"),
        (["--text", "short", "--context", "50"], "text: expected more than 510 tokens"),
        (["--tensor-parallel", "2"], "tensor_parallel: expected a divisor of the 1 processes"),
    ],
)
def test_bad_options_are_named(
    arguments: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("short").write_text("x" * 500)
    code, printed = run(*SMALL, *arguments)
    assert code == 2
    assert message in printed


def test_without_transformers_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    code, printed = run(*SMALL)
    assert code == 2
    assert "pip install 'mumoe-fast[examples]'" in printed


def test_a_prepared_file_is_trained_on(tmp_path: Path) -> None:
    (tmp_path / "text").write_bytes(TEXT)
    code, printed = run("prepare", str(tmp_path / "text"), str(tmp_path / "tokens"))
    assert code == 0
    assert f"{len(TEXT):,} tokens of 256" in printed
    code, _ = run(*SMALL, "--steps", "2", "--mlp", "dense", "--text", str(tmp_path / "tokens"))
    assert code == 0


@pytest.mark.parametrize(("command", "word"), [("train", "--tensor-parallel"), ("prepare", "--tokenizer")])
def test_the_commands_explain_themselves(command: str, word: str) -> None:
    code, printed = run(command, "--help")
    assert code == 0
    assert word in printed

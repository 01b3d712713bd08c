"""Training in several processes on this machine, over gloo, against one process; also as torchrun starts them."""

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import parallel_training
import pytest
import torch
import torch.distributed as dist
from distributed.processes import run_in_processes
from parallel_training import SHAPE, TRAINING, Trainer

from mumoe_fast.examples._run import read_log
from mumoe_fast.examples._tokens import Corpus
from mumoe_fast.examples.train_gpt import TextTask, build_model, load_model

pytest.importorskip("transformers")
pytestmark = pytest.mark.skipif(not dist.is_available(), reason="this PyTorch is built without torch.distributed")


def test_four_processes_train_as_one_and_one_goes_on_with_what_they_saved(tmp_path: Path) -> None:
    run_in_processes(4, parallel_training.CHECKS, tmp_path)
    parallel_training.checkpoint_is_read(tmp_path)


def test_torchrun_trains_and_saves_what_one_process_loads(tmp_path: Path) -> None:
    text, out = tmp_path / "text", tmp_path / "run"
    text.write_bytes(parallel_training.CORPUS.tokens.tobytes())
    shape = "--mlp cp --experts 6 --impl reference --layers 2 --heads 2 --width 32 --context 16"
    training = "--steps 4 --batch 8 --accumulate 2 --learning-rate 3e-3 --norm layer --device cpu --parallel fsdp"
    program = ["torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "mumoe_fast.examples.train_gpt"]
    finished = subprocess.run(
        [sys.executable, "-m", *program, "train", *shape.split(), *training.split(), "--text", text, "--out", out],
        capture_output=True,
        text=True,
        timeout=300,
        env=os.environ | {"OMP_NUM_THREADS": "1", "COLUMNS": "200"},
    )
    assert finished.returncode == 0, finished.stderr
    assert finished.stdout.count("after 4 of 4 steps") == 1, "only the first process prints"
    assert "2 (fsdp) × 1 (tensor parallel) processes" in finished.stdout
    config = replace(SHAPE, norm="layer")
    task = TextTask(build_model(config, "cpu", 0), config, Corpus.load(text))
    alone = Trainer(task, replace(TRAINING, clip=1.0))
    expected = [record.loss for record in alone]
    assert [record.loss for record in read_log(out)] == pytest.approx(expected, rel=2e-5)
    model, loaded = load_model(out)
    assert loaded == config
    x, _ = task.corpus.held_out_windows(16, limit=4)
    with torch.no_grad():
        torch.testing.assert_close(model(x).logits, task.model.eval()(x).logits, rtol=1e-3, atol=1e-4)

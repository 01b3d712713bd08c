"""Training in two and in four processes on this machine, over gloo, against one process."""

from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from distributed import checkpoints, data_parallel, tensor_parallel
from distributed.problems import assert_same
from distributed.processes import run_in_processes

pytestmark = [
    pytest.mark.skipif(not dist.is_available(), reason="this PyTorch is built without torch.distributed"),
    pytest.mark.filterwarnings("ignore:torch.distributed is disabled, unavailable or uninitialized"),
]

EVERYWHERE = [
    tensor_parallel.same_step_as_one_process,
    tensor_parallel.parameters_are_divided,
    tensor_parallel.collectives_are_those_promised,
]
TWO = [
    *EVERYWHERE,
    tensor_parallel.same_evaluation_as_one_process,
    tensor_parallel.copies_are_sharded_alike,
    tensor_parallel.same_training_as_one_process,
    tensor_parallel.one_graph_when_compiled,
    tensor_parallel.bad_arguments_are_named_and_change_nothing,
    data_parallel.ddp_is_not_converted,
    data_parallel.ddp_trains_as_one_process,
    data_parallel.batch_norm_over_processes_compiles_to_one_graph,
    data_parallel.fsdp_trains_as_one_process,
    data_parallel.fsdp_computes_in_bfloat16_and_keeps_float32,
    checkpoints.checkpoint_is_written,
]
FOUR = [
    *EVERYWHERE,
    tensor_parallel.tokens_and_rank_are_both_divided,
    tensor_parallel.batch_norm_needs_to_know_who_holds_other_tokens,
    checkpoints.checkpoint_is_read,
]


def test_two_and_four_processes(tmp_path: Path) -> None:
    """One test, since what two processes write is read by four and by one."""
    run_in_processes(2, TWO, tmp_path)
    run_in_processes(4, FOUR, tmp_path)
    checkpoints.checkpoint_is_read(tmp_path, processes=False)
    whole = torch.load(tmp_path / "whole.pt")
    assert_same(whole, dict(checkpoints.trained_once()[0].state_dict()))

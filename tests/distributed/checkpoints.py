"""A checkpoint of two processes, written and read through torch.distributed.checkpoint."""

from __future__ import annotations

from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_state_dict,
    set_state_dict,
)
from torch.distributed.tensor.experimental import implicit_replication

from distributed.problems import Case, all_processes, assert_same, full
from mumoe_fast.distributed import parallelize

CASE = Case(True, "tr", (5, 3))


def checkpoint_is_written(folder: Path) -> None:
    model = parallelize(CASE.build(), all_processes())
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.03)
    model(CASE.tokens()).backward(CASE.upstream())
    with implicit_replication():
        optimizer.step()
    state, optimizer_state = get_state_dict(model, optimizer)
    dcp.save({"model": state, "optimizer": optimizer_state}, checkpoint_id=folder / "checkpoint")
    whole = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
    if dist.get_rank() == 0:
        torch.save(whole, folder / "whole.pt")


def trained_once() -> tuple[nn.Module, torch.optim.Optimizer]:
    """What the checkpoint holds, computed by one process."""
    model = CASE.build()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.03)
    model(CASE.tokens()).backward(CASE.upstream())
    optimizer.step()
    return model, optimizer


def checkpoint_is_read(folder: Path, processes: bool = True) -> None:
    expected, expected_optimizer = trained_once()
    model = CASE.build(seed=5)
    model = parallelize(model, all_processes()) if processes else model
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.03)
    state, optimizer_state = get_state_dict(model, optimizer)
    both = {"model": state, "optimizer": optimizer_state}
    dcp.load(both, checkpoint_id=folder / "checkpoint", no_dist=not processes)
    set_state_dict(model, optimizer, model_state_dict=both["model"], optim_state_dict=both["optimizer"])
    assert_same({name: full(p) for name, p in model.named_parameters()}, dict(expected.named_parameters()))
    moments = [full(optimizer.state[p]["exp_avg"]) for p in model.parameters()]
    for mine, theirs in zip(moments, expected.parameters(), strict=True):
        torch.testing.assert_close(mine, expected_optimizer.state[theirs]["exp_avg"])

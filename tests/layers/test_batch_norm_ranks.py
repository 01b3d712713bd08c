"""Batch norm's statistics are those of all ranks' tokens, forward and backward, as SyncBatchNorm's are."""

import os
import socket
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from mumoe_fast import ExpertGate

SPLIT = (5, 3)  # tokens of each rank: unequal, as the last batch of an epoch is


def problem() -> tuple[ExpertGate, torch.Tensor, torch.Tensor]:
    """A gate with batch norm, its tokens and the gradient from above: the same in every process."""
    torch.manual_seed(3)
    gate = ExpertGate(8, 5, norm="batch", dtype=torch.float64)
    torch.nn.init.normal_(gate.weights[0])
    return gate, torch.randn(sum(SPLIT), 8, dtype=torch.float64), torch.randn(sum(SPLIT), 5, dtype=torch.float64)


def results(gate: ExpertGate, z: torch.Tensor, da: torch.Tensor) -> dict[str, torch.Tensor]:
    z = z.clone().requires_grad_()
    (a,) = gate(z)
    a.backward(da)
    grad = gate.weights[0].grad
    assert grad is not None
    assert z.grad is not None
    statistics = gate.norms[0].state_dict()
    return {"a": a.detach(), "dz": z.grad, "dweight": grad, **statistics}


def rank_process(rank: int, port: int, folder: str) -> None:
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    dist.init_process_group("gloo", rank=rank, world_size=len(SPLIT))
    gate, z, da = problem()
    mine = slice(sum(SPLIT[:rank]), sum(SPLIT[: rank + 1]))
    torch.save(results(gate, z[mine], da[mine]), Path(folder) / f"{rank}.pt")
    dist.destroy_process_group()


@pytest.mark.skipif(not dist.is_available(), reason="this PyTorch is built without torch.distributed")
def test_two_ranks_are_one_batch(tmp_path: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    mp.spawn(rank_process, (port, str(tmp_path)), nprocs=len(SPLIT))
    ranks = [torch.load(tmp_path / f"{rank}.pt") for rank in range(len(SPLIT))]
    expected = results(*problem())
    torch.testing.assert_close(torch.cat([r["a"] for r in ranks]), expected["a"])
    torch.testing.assert_close(torch.cat([r["dz"] for r in ranks]), expected["dz"])
    torch.testing.assert_close(sum(r["dweight"] for r in ranks), expected["dweight"])
    for r in ranks:
        torch.testing.assert_close(r["running_mean"], expected["running_mean"])
        torch.testing.assert_close(r["running_var"], expected["running_var"])

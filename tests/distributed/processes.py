"""Run checks in several processes on this machine: each process runs them all, so that starting up is paid once."""

from __future__ import annotations

import traceback
from collections.abc import Callable, Sequence
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

Check = Callable[[Path], None]


def run_in_processes(world_size: int, checks: Sequence[Check], folder: Path) -> None:
    """Run every check in `world_size` processes with a folder that they share; fail with what failed where."""
    mine = folder / f"{world_size}"
    mine.mkdir()
    mp.spawn(_process, (world_size, checks, folder, mine), nprocs=world_size)
    assert {file.name for file in mine.glob("done-*")} == {f"done-{rank}" for rank in range(world_size)}
    failures = [file.read_text() for file in sorted(mine.glob("failed-*"))]
    if failures:
        pytest.fail("\n\n".join(failures), pytrace=False)


def _process(rank: int, world_size: int, checks: Sequence[Check], folder: Path, mine: Path) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{mine / 'rendezvous'}",
        rank=rank,
        world_size=world_size,
        timeout=timedelta(seconds=120),
    )
    for check in checks:
        torch.manual_seed(0)
        try:
            check(folder)
        except Exception:
            report = f"{check.__name__} in process {rank} of {world_size}:\n{traceback.format_exc()}"
            (mine / f"failed-{check.__name__}-{rank}").write_text(report)
        dist.barrier()
    (mine / f"done-{rank}").touch()
    dist.destroy_process_group()

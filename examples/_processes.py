"""The processes that train one model together: who holds which samples, and what is summed between them when."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Literal, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.nn.parallel import DistributedDataParallel

from mumoe_fast.distributed import parallelize

Strategy = Literal["auto", "none", "ddp", "fsdp"]


@dataclass(frozen=True)
class Processes:
    """This process's place among those that train together; without a mesh there is no other.

    Attributes:
        device: where this process computes.
        strategy: how those with other samples share the model: "ddp" copies it, "fsdp" shards it; "none" where there
            are none.
        mesh: the dimensions "data", over which samples are divided, and "tp", over which the experts' rank is.
    """

    device: torch.device
    strategy: Strategy = "none"
    mesh: DeviceMesh | None = None

    def __str__(self) -> str:
        if self.mesh is None:
            return str(self.device)
        data, tensor = self.mesh["data"].size(), self.mesh["tp"].size()
        return f"{self.device.type}, {data} ({self.strategy}) × {tensor} (tensor parallel) processes"

    @property
    def first(self) -> bool:
        """Whether this is the process that prints and keeps the log."""
        return self.mesh is None or dist.get_rank() == 0

    @property
    def count(self) -> int:
        """How many there are."""
        return 1 if self.mesh is None else self.mesh.size()

    @property
    def data_size(self) -> int:
        """Over how many processes the samples are divided."""
        return 1 if self.mesh is None else self.mesh["data"].size()

    @property
    def data_rank(self) -> int:
        """Which part of the samples is this process's."""
        return 0 if self.mesh is None else self.mesh["data"].get_local_rank()

    def distribute(self, model: nn.Module, blocks: Iterable[nn.Module], *, bfloat16: bool) -> nn.Module:
        """Share the model, on its device already, and return the module to call.

        Args:
            model: sharded in place, or left as it is.
            blocks: what FSDP gathers one at a time.
            bfloat16: FSDP computes in it, and keeps parameters and sums gradients in float32.
        """
        if self.mesh is None:
            return model
        if self.mesh["tp"].size() > 1:
            parallelize(model, self.mesh["tp"], data_group=self.mesh["data"].get_group())
        if self.strategy == "fsdp":
            policy = MixedPrecisionPolicy(torch.bfloat16, torch.float32) if bfloat16 else MixedPrecisionPolicy()
            for part in (*blocks, model):
                fully_shard(part, mesh=self.mesh["data"], mp_policy=policy)
        if self.strategy == "ddp":
            return DistributedDataParallel(model, process_group=self.mesh["data"].get_group())
        return model

    def accumulating(self, model: nn.Module, *, last: bool) -> AbstractContextManager[None]:
        """Around forward and backward of one micro-batch: gradients are exchanged with the `last` of them alone."""
        if isinstance(model, FSDPModule):
            model.set_requires_gradient_sync(last)
        if isinstance(model, DistributedDataParallel) and not last:
            return cast(AbstractContextManager[None], model.no_sync())
        return nullcontext()

    def sum(self, value: Tensor) -> Tensor:
        """The sum over all processes."""
        if self.mesh is not None:
            dist.all_reduce(value)
        return value

    def mean(self, value: Tensor) -> Tensor:
        """The mean over the processes with other samples."""
        if self.data_size > 1:
            assert self.mesh is not None
            dist.all_reduce(value, group=self.mesh["data"].get_group())
            value /= self.data_size
        return value

    def any(self, flag: bool) -> bool:
        """Whether it is true in any process."""
        if self.mesh is None:
            return flag
        flags = torch.tensor(float(flag), device=self.device)
        dist.all_reduce(flags, dist.ReduceOp.MAX)
        return bool(flags)

    def first_does(self, action: Callable[[], object]) -> None:
        """Let the first process act while the others wait."""
        if self.first:
            action()
        if self.mesh is not None:
            dist.barrier()


def default_device() -> str:
    """The GPU if there is one."""
    return "cuda" if torch.cuda.is_available() else "cpu"


@contextmanager
def join_processes(
    strategy: Strategy = "auto", tensor_parallel: int = 1, device: str | None = None
) -> Iterator[Processes]:
    """Join the processes that torchrun started, or be alone where it started none.

    Args:
        strategy: of data parallelism; "auto" is DDP, FSDP beside tensor parallelism, none in one process.
        tensor_parallel: how many processes share each expert layer.
        device: "cpu" or "cuda"; None is the GPU if there is one.

    Raises:
        ValueError: the number of processes is no multiple of `tensor_parallel`, or does not go with the strategy.
    """
    name, world_size = device or default_device(), int(os.environ.get("WORLD_SIZE", "1"))
    if tensor_parallel < 1 or world_size % tensor_parallel:
        raise ValueError(
            f"tensor_parallel: expected a divisor of the {world_size} processes (torchrun --nproc-per-node), "
            f"got {tensor_parallel}"
        )
    data_size = world_size // tensor_parallel
    if strategy == "auto":
        strategy = "none" if data_size == 1 else "ddp" if tensor_parallel == 1 else "fsdp"
    if strategy == "none" and data_size > 1:
        raise ValueError(f"parallel: expected ddp or fsdp for samples divided over {data_size} processes, got none")
    if strategy == "ddp" and tensor_parallel > 1:
        raise ValueError("parallel: expected fsdp or none beside tensor parallelism, got ddp, which takes no DTensors")
    if world_size == 1:
        yield Processes(torch.device(name))
        return
    place = torch.device(name, int(os.environ["LOCAL_RANK"])) if name == "cuda" else torch.device(name)
    if place.type == "cuda":
        torch.cuda.set_device(place)
    dist.init_process_group("nccl" if place.type == "cuda" else "gloo")
    try:
        mesh = init_device_mesh(place.type, (data_size, tensor_parallel), mesh_dim_names=("data", "tp"))
        yield Processes(place, strategy, mesh)
    finally:
        dist.destroy_process_group()

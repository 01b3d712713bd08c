"""What the processes train: layers whose gate has learned something, and steps compared with one process's."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor

from mumoe_fast import MuMoE, MuMoEMLP

RING = {1: (2,), 2: (2, 4)}  # the inner ranks by the number of levels
I, H, T = 10, 12, 6


@dataclass(frozen=True)
class Case:
    """One layer or MLP on tokens."""

    mlp: bool
    factorization: str = "cp"
    levels: tuple[int, ...] = (5,)
    impl: str = "reference"
    norm: str = "layer"
    bias: bool = True
    columns: int = 7  # the rank that is sharded: not divisible

    @property
    def rank(self) -> int | tuple[int, ...]:
        first = {"tr": 3, "tt": 1}.get(self.factorization)
        return self.columns if first is None else (first, *RING[len(self.levels)], self.columns)

    @property
    def dtype(self) -> torch.dtype:
        return torch.float64 if self.impl == "reference" else torch.float32

    def build(self, seed: int = 0) -> MuMoE | MuMoEMLP:
        torch.manual_seed(seed)
        options = {
            "factorization": self.factorization,
            "rank": self.rank,
            "impl": self.impl,
            "norm": self.norm,
            "bias": self.bias,
            "dtype": self.dtype,
        }
        layer = MuMoEMLP(I, H, I, self.levels, **options) if self.mlp else MuMoE(I, I, self.levels, **options)
        for weight in layer.gate.weights:
            nn.init.normal_(weight)
        return layer

    def tokens(self) -> Tensor:
        return torch.randn(T, I, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(self.dtype)

    def upstream(self) -> Tensor:
        return torch.randn(T, I, generator=torch.Generator().manual_seed(2), dtype=torch.float64).to(self.dtype)


def all_processes() -> DeviceMesh:
    return init_device_mesh("cpu", (dist.get_world_size(),), mesh_dim_names=("tp",))


def alone(layer: nn.Module) -> nn.Module:
    """The layer as a run of one process has it: its batch norm takes no other process's tokens."""
    group, _ = dist.new_subgroups(group_size=1)
    for module in layer.modules():
        if hasattr(module, "process_group"):
            module.process_group = group
    return layer


def full(tensor: Tensor) -> Tensor:
    """What all processes hold together."""
    return tensor.detach().full_tensor() if isinstance(tensor, DTensor) else tensor.detach()


def step(layer: nn.Module, x: Tensor, dy: Tensor) -> dict[str, Tensor]:
    """y, the gradients of the tokens and of every parameter, and the buffers afterwards."""
    x = x.clone().requires_grad_()
    y = layer(x)
    y.backward(dy)
    assert x.grad is not None
    gradients = {f"d{name}": full(p.grad) for name, p in layer.named_parameters()}
    return {"y": y.detach(), "dx": x.grad, **gradients, **dict(layer.named_buffers())}


def assert_same(actual: dict[str, Tensor], expected: dict[str, Tensor], **tolerance: float) -> None:
    assert actual.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(actual[name], tensor, msg=lambda text, name=name: f"{name}: {text}", **tolerance)

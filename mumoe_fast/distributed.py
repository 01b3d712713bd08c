"""Tensor parallelism: the experts of CP, tensor-ring and tensor-train layers sharded over their rank.

Every output is a sum over the rank R, and so a process that keeps R/p columns of every factor computes a summand of it:

    forward    y  = Σ_p y_p                   one all-reduce for every expert layer
    backward   dz = Σ_p dz_p,  da = Σ_p da_p  before the gate's backward, whose gradients are silently wrong otherwise

The gate and everything around the layers is replicated: all processes of the mesh see the same tokens. An MLP is two
expert layers and so two all-reduces forward: the activation between them is nonlinear and needs the whole sum. Sums are
taken in the dtype of what is summed: in bfloat16 each process's share is rounded once more.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any, ClassVar, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

from mumoe_fast.functional import cp_experts, tr_experts
from mumoe_fast.functional._collectives import sums
from mumoe_fast.layers import CPExperts, ExpertGate, Experts, MxDExperts, TRExperts, TTExperts

__all__ = ["RankShardedCPExperts", "RankShardedTRExperts", "RankShardedTTExperts", "parallelize"]

M = TypeVar("M", bound=nn.Module)


def parallelize(module: M, mesh: DeviceMesh, *, data_group: dist.ProcessGroup | None = None) -> M:
    """Shard every expert layer in `module` over its rank, in place.

    Each process of the mesh keeps R/p columns of the expert, input and output factors; of a tensor ring the columns of
    its last rank R_{E+2}, and all of its small expert cores. An uneven rank leaves the last processes with less (and
    PyTorch 2.11 gathers whole the gradients of what is not divided along its first dimension). The parameters become
    DTensors under the names that they had, so that optimisers, `fully_shard` over another dimension of the mesh and
    `torch.distributed.checkpoint` know what is where, and a checkpoint loads on any number of processes. All else stays
    replicated, in plain tensors. The values are those of the mesh's first process.

    Collectives for one expert layer (two in an MLP): forward one all-reduce of y (T×O); backward one of dz (T×I), one
    of da (T×N_e) for each level, and for a tensor ring one of each expert core's gradient.

    Parallelise before `fully_shard` and before the optimiser is made. What handles DTensors and plain tensors at once,
    such as `clip_grad_norm_` and fused optimisers, does so under `torch.distributed.tensor.experimental.
    implicit_replication()`.

    Args:
        module: a `MuMoE`, `MuMoEMLP`, or any model with such layers.
        mesh: the processes that share every layer, one dimension: of a larger mesh `mesh["tp"]`.
        data_group: the processes that hold other tokens, over which batch norm in the gates takes its statistics. None:
            there are none, all processes are in the mesh. A gate with a `process_group` of its own keeps it.

    Returns:
        `module`, whose expert layers have become `RankShardedCPExperts`, `…TRExperts` and `…TTExperts`.

    Raises:
        ValueError: nothing in `module` can be sharded, or something cannot; the mesh has several dimensions or more
            processes than a layer has rank; `data_group` is needed. `module` is then unchanged.
    """
    if mesh.ndim != 1:
        raise ValueError(f'mesh: expected one dimension, such as mesh["tp"], got {mesh.ndim}')
    layers = list(_expert_layers(module, mesh.size()))
    gates = [
        gate
        for gate in module.modules()
        if isinstance(gate, ExpertGate) and gate.norm == "batch" and gate.process_group is None
    ]
    if gates and data_group is None:
        data_group = _only_this_process(mesh)
    for gate in gates:
        gate.process_group = data_group
    for layer in layers:
        _shard(layer, mesh)
    _replicate_the_rest(module, mesh)
    return module


def _expert_layers(module: nn.Module, processes: int) -> Iterator[Experts]:
    """The layers to shard, each of them fit for it."""
    found = False
    for name, layer in module.named_modules():
        if not isinstance(layer, Experts | MxDExperts):
            continue
        found, where = True, f"module.{name}" if name else "module"
        if isinstance(layer, MxDExperts) or type(layer) not in _SHARDED:
            raise ValueError(
                f"{where}: expected CPExperts, TRExperts or TTExperts to shard, got {type(layer).__name__}"
            )
        if any(isinstance(p, DTensor) for p in layer.parameters()):
            raise ValueError(f"{where}: expected plain parameters, got DTensors; parallelize before fully_shard")
        R = layer.rank[-1]
        per_process = -(-R // processes)
        if per_process * (processes - 1) >= R:
            raise ValueError(f"{where}: expected a rank that leaves columns for {processes} processes, got {R}")
        yield layer
    if not found:
        raise ValueError(f"module: expected μMoE layers to shard, found none in {type(module).__name__}")


def _only_this_process(mesh: DeviceMesh) -> dist.ProcessGroup:
    """The group over which batch norm synchronises where no process holds other tokens."""
    if mesh.size() != dist.get_world_size():
        raise ValueError(
            f"data_group: expected the processes that hold other tokens, for batch norm's statistics: the mesh has "
            f"{mesh.size()} of {dist.get_world_size()} processes"
        )
    group: dist.ProcessGroup
    group, _ = dist.new_subgroups(group_size=1)
    return group


def _shard(layer: Experts, mesh: DeviceMesh) -> None:
    """Turn the layer into its sharded class and its parameters into DTensors, under the same names."""
    sharded = _SHARDED[type(layer)]
    for name, parameter in list(layer.named_parameters()):
        path, _, leaf = name.rpartition(".")
        dim = sharded.rank_dims.get(path or leaf)
        placement = Replicate() if dim is None else Shard(dim)
        tensor = distribute_tensor(parameter.detach(), mesh, [placement])
        setattr(layer.get_submodule(path), leaf, nn.Parameter(tensor, requires_grad=parameter.requires_grad))
    layer.__class__ = sharded
    assert isinstance(layer, _RankSharded)
    layer.mesh = mesh


@torch.no_grad()
def _replicate_the_rest(module: nn.Module, mesh: DeviceMesh) -> None:
    """Every plain parameter and buffer as the mesh's first process has it."""
    group = mesh.get_group()
    for tensor in (*module.parameters(), *module.buffers()):
        if not isinstance(tensor, DTensor) and not tensor.is_meta:
            dist.broadcast(tensor, group=group, group_src=0)


class _RankSharded(Experts):
    """Experts whose parameters are DTensors, sharded over the rank where `rank_dims` says so and else replicated.

    Attributes:
        mesh: the processes that share the layer.
    """

    function: ClassVar[Callable[..., Tensor]]
    rank_dims: ClassVar[Mapping[str, int]]
    mesh: DeviceMesh

    def forward(self, z: Tensor, coefficients: Any, *, support_only: bool = False) -> Tensor:
        """z (..., I) and one (..., N_e) per level to (..., O), all of them the same in every process."""
        group, E = self.mesh.get_group(), len(coefficients)
        local = {name: p.to_local() for name, p in self.named_parameters()}  # type: ignore[attr-defined]
        whole = [name for name in local if name.partition(".")[0] not in self.rank_dims]
        z, *rest = _partial_gradients(group, z, *coefficients, *(local[name] for name in whole))
        local.update(zip(whole, rest[E:], strict=True))
        options: dict[str, Any] = {"activation": self.activation, "support_only": support_only, "impl": self.impl}
        y = type(self).function(z, rest[:E], **_arguments(local), **options)
        total: Tensor = _Summed.apply(group, y)  # type: ignore[no-untyped-call]
        return total

    def extra_repr(self) -> str:
        """As before sharding, and over how many processes."""
        return f"{super().extra_repr()}, processes={self.mesh.size()}"


class RankShardedCPExperts(_RankSharded, CPExperts):
    """`CPExperts` of which this process holds R/p columns of every factor."""

    function = staticmethod(cp_experts)
    rank_dims: ClassVar = {"expert_factors": 1, "in_factor": 0, "in_bias": 0, "out_factor": 1}


class RankShardedTRExperts(_RankSharded, TRExperts):
    """`TRExperts` of which this process holds all expert cores, and R_{E+2}/p columns of the input and output cores."""

    function = staticmethod(tr_experts)
    rank_dims: ClassVar = {"in_core": 1, "in_bias": 1, "out_core": 2}


class RankShardedTTExperts(RankShardedTRExperts, TTExperts):
    """`TTExperts`, sharded as a tensor ring."""


_SHARDED: dict[type[nn.Module], type[_RankSharded]] = {
    CPExperts: RankShardedCPExperts,
    TRExperts: RankShardedTRExperts,
    TTExperts: RankShardedTTExperts,
}


def _arguments(parameters: Mapping[str, Tensor]) -> dict[str, Any]:
    """Parameters by their names in the layer, as the factorisation's function takes them: the levels' in a list."""
    arguments: dict[str, Any] = {}
    for name, tensor in parameters.items():
        group, _, level = name.partition(".")
        arguments[group] = [*arguments.get(group, []), tensor] if level else tensor
    return arguments


def _partial_gradients(group: dist.ProcessGroup, *tensors: Tensor) -> list[Tensor]:
    """Tensors that every process has, for a computation that gives each process a summand of their gradients."""
    wanted = [x for x in tensors if x.requires_grad]
    if not wanted:
        return list(tensors)
    marked = iter(_Replicated.apply(group, *wanted))  # type: ignore[no-untyped-call]
    return [next(marked) if x.requires_grad else x for x in tensors]


class _Replicated(torch.autograd.Function):
    """Forward the tensors as they are, backward the sums of their gradients over the group."""

    @staticmethod
    def forward(ctx: Any, group: dist.ProcessGroup, *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.group = group
        return tuple(x.view_as(x) for x in tensors)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        return None, *sums(gradients, ctx.group)


class _Summed(torch.autograd.Function):
    """Forward the sum over the group, backward the gradient as it is: every process has it whole."""

    @staticmethod
    def forward(ctx: Any, group: dist.ProcessGroup, x: Tensor) -> Tensor:
        (total,) = sums([x], group)
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[None, Tensor]:
        return None, gradient

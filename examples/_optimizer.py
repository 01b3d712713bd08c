"""AdamW as the examples use it: decay on matrices alone, a warm-up and a cosine, clipping by the norm of gradients."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor

from mumoe_fast.examples._processes import Processes


def warmed_cosine(step: int, steps: int, *, highest: float, final: float, warmup: float) -> float:
    """The learning rate of a step: linearly up, then down a cosine.

    Args:
        step: counted from 0.
        steps: of the whole run.
        highest: where the warm-up ends.
        final: where the cosine ends, as a share of `highest`.
        warmup: its length, as a share of `steps`.
    """
    rising = max(1, round(warmup * steps))
    if step < rising:
        return highest * (step + 1) / rising
    progress = (step - rising) / max(1, steps - rising)
    return highest * (final + (1 - final) * (1 + math.cos(math.pi * progress)) / 2)


def adamw(model: nn.Module, *, weight_decay: float, betas: tuple[float, float]) -> torch.optim.AdamW:
    """AdamW over what the model trains, decaying matrices and larger tensors but no biases.

    Parameters on different meshes are in different groups, since one fused update takes tensors of one mesh.
    """
    groups: defaultdict[tuple[bool, DeviceMesh | None], list[Tensor]] = defaultdict(list)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            decays = parameter.ndim >= 2 and not name.endswith("bias")
            groups[decays, _mesh(parameter)].append(parameter)
    return torch.optim.AdamW(
        [
            {"params": parameters, "weight_decay": weight_decay if decays else 0.0}
            for (decays, _), parameters in groups.items()
        ],
        betas=betas,
        fused=True,
    )


@torch.no_grad()
def clip_gradients(parameters: Iterable[nn.Parameter], limit: float, processes: Processes) -> None:
    """Scale all gradients so that their norm together is at most `limit`, whatever meshes they are on."""
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    groups: defaultdict[int, list[Tensor]] = defaultdict(list)
    for gradient in gradients:
        groups[processes.count // _shards(gradient)].append(_local(gradient))
    squares = [nn.utils.get_total_norm(group).square() / copies for copies, group in groups.items()]
    norm = processes.sum(torch.stack(squares).sum()).sqrt()  # a shard of which there are copies counts once in all
    scale = (limit / (norm + 1e-6)).clamp(max=1.0)
    torch._foreach_mul_([_local(gradient) for gradient in gradients], scale)


def _local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def _shards(tensor: Tensor) -> int:
    """Into how many parts the tensor is divided."""
    if not isinstance(tensor, DTensor):
        return 1
    sizes = zip(tensor.placements, tensor.device_mesh.shape, strict=True)
    return math.prod(size for placement, size in sizes if placement.is_shard())


def _mesh(tensor: Tensor) -> DeviceMesh | None:
    return tensor.device_mesh if isinstance(tensor, DTensor) else None

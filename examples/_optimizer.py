"""AdamW as the examples use it: decay on matrices alone, a warm-up and a cosine, clipping by the norm of gradients."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Iterator

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor


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
def clip_gradients(parameters: Iterable[nn.Parameter], limit: float) -> None:
    """Scale all gradients so that their norm together is at most `limit`, whatever meshes they are on."""
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    squares = sum((norm.square() for norm in _norms(gradients)), start=torch.zeros(()))
    scale = (limit / (squares.sqrt() + 1e-6)).clamp(max=1.0)
    for gradient in gradients:
        local = gradient.to_local() if isinstance(gradient, DTensor) else gradient
        local.mul_(scale.to(local.device))


def _norms(gradients: Iterable[Tensor]) -> Iterator[Tensor]:
    """One norm for the gradients of each mesh, in full."""
    groups: defaultdict[DeviceMesh | None, list[Tensor]] = defaultdict(list)
    for gradient in gradients:
        groups[_mesh(gradient)].append(gradient)
    for group in groups.values():
        norm = nn.utils.get_total_norm(group)
        yield norm.full_tensor() if isinstance(norm, DTensor) else norm


def _mesh(tensor: Tensor) -> DeviceMesh | None:
    return tensor.device_mesh if isinstance(tensor, DTensor) else None

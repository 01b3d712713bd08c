"""What all public functions do with their arguments before an operator sees them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from mumoe_fast import _validation as check


def autocast_is_on(device: torch.device) -> bool:
    """Whether autocast is on there. Torch refuses the question of meta, and 2.11 does not compile whether it would."""
    return device.type != "meta" and torch.is_autocast_enabled(device.type)


def autocast(*tensors: Any) -> list[Any]:
    """The tensors in autocast's dtype where autocast is on; float64 and None stay what they are."""
    device = tensors[0].device
    if not autocast_is_on(device):
        return list(tensors)
    dtype = torch.get_autocast_dtype(device.type)
    return [x if x is None or x.dtype == torch.float64 else x.to(dtype) for x in tensors]


def needs_gradient(tensors: Sequence[Tensor | None]) -> bool:
    """Whether backward will come: whether it is worth saving something for it."""
    return torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in tensors)


def tensor_per_level(**arguments: Sequence[Tensor]) -> None:
    """Every argument is a list or tuple with one floating-point tensor per hierarchy level."""
    lengths = {}
    for name, levels in arguments.items():
        if not isinstance(levels, list | tuple):
            raise TypeError(
                f"{name}: expected a list or tuple with one tensor per hierarchy level, got {type(levels).__name__}"
            )
        for e, x in enumerate(levels):
            check.floating(f"{name}[{e}]", x)
        lengths[name] = len(levels)
    if len(set(lengths.values())) > 1 or 0 in lengths.values():
        counts = ", ".join(f"{count} in {name}" for name, count in lengths.items())
        raise ValueError(
            f"expected one tensor per hierarchy level, the same number everywhere and at least one; got {counts}"
        )


def fitting(name: str, x: Tensor | None, shape: Sequence[int | None], z: Tensor) -> None:
    """The shape, and z's device and dtype; a None fits any size, and an absent tensor fits."""
    if x is not None:
        check.shape(name, x, shape)
        check.same_device_and_dtype(name, x, z, "z")


def tokens(x: Tensor) -> Tensor:
    """(..., I) as (T, I)."""
    return x.reshape(-1, x.shape[-1])


def untokens(y: Tensor, z: Tensor) -> Tensor:
    """An operator's result (T, X) with z's leading dimensions, and no view: autograd and FSDP2 guard views' users."""
    if z.dim() == 2:
        return y
    x: Tensor = torch.ops.aten._unsafe_view.default(y, (*z.shape[:-1], y.shape[-1]))
    return x


def gate_logits_arguments(
    z: Tensor, weight: Tensor, bias: Tensor | None, names: tuple[str, str] = ("weight", "bias")
) -> Tensor:
    """Check the arguments of ``z Gᵀ + b``; z as autocast wants it, beside which weight and bias may stay float32."""
    weight_name, bias_name = names
    check.floating("z", z)
    (z,) = autocast(z)
    check.floating(weight_name, weight)
    check.shape(weight_name, weight, [None, None])
    N, I = weight.shape
    if N == 0:
        raise ValueError(f"{weight_name}: expected at least one expert, got shape {tuple(weight.shape)}")
    check.last_dimension("z", z, I, f"in_features of {weight_name}")
    master = torch.float32 if autocast_is_on(z.device) else None
    check.same_device_and_dtype(weight_name, weight, z, "z", also=master)
    if bias is not None:
        check.shape(bias_name, bias, [N])
        check.same_device_and_dtype(bias_name, bias, weight, weight_name, also=master)
    return z

"""A whole layer in one operator, for inference: the gate and one factorisation's experts, any number of levels.

`define_layer` registers ``mumoe::<name>_layer`` for a `Family`. It launches what `mumoe::gate` and ``mumoe::<name>``
launch, and gives the same bits. What it saves is the host's time, which for few tokens is the cost of a layer on a GPU:
one operator's call in place of two, and without autograd, whose mere registration doubles that.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from mumoe_fast.ops._experts import Family, Shape
from mumoe_fast.ops._library import define_inference, launchers
from mumoe_fast.ops.gate import hierarchy_flops


def define_layer(family: Family) -> Callable[..., Tensor]:
    """Register the layer of the gate and the family's experts; it refuses to be differentiated."""
    name = f"{family.name}_layer"

    def forward(z: Tensor, gate_weights: list[Tensor], experts: list[Tensor], *rest: Any) -> Tensor:
        *shared, norm, alpha, eps, impl = rest
        _refuse_gradients(name, z, gate_weights, experts, shared)
        options = {"norm": norm, "alpha": alpha, "eps": eps}
        if impl == "triton":
            experts_forward = getattr(launchers(impl, family.module), f"{family.name}_forward")
            options["experts_forward"] = experts_forward
            y: Tensor = launchers(impl, "layer").layer_forward(z, gate_weights, experts, *shared, **options)
            return y
        a = launchers(impl, "gate").gate_hierarchy_forward(z, gate_weights, [], **options)
        return family.forward(z, a, experts, *shared, "none", False, False, impl)[0]

    def fake(z: Tensor, gate_weights: list[Tensor], experts: list[Tensor], *rest: Any) -> Tensor:
        *shared, _, _, _, impl = rest
        _refuse_gradients(name, z, gate_weights, experts, shared)
        return family.forward_fake(z, [], experts, *shared, "none", False, False, impl)[0]

    def flops(z: Shape, gate_weights: Sequence[Shape], experts: Sequence[Shape], *rest: Any, **_: Any) -> int:
        return hierarchy_flops(z, gate_weights) + family.forward_flops(z, None, experts, *rest)

    schema = (
        f"{name}(Tensor z, Tensor[] gate_weights, Tensor[] experts, {', '.join(family.shared)}, "
        "str norm, float alpha, float eps, str impl) -> Tensor"
    )
    return define_inference(schema, forward, fake, flops=flops)


def _refuse_gradients(
    name: str, z: Tensor, gate_weights: Sequence[Tensor], experts: Sequence[Tensor], shared: Sequence[Tensor | None]
) -> None:
    """RuntimeError where somebody may ask for gradients: nothing is saved for them."""
    if torch.is_grad_enabled() and any(
        x is not None and x.requires_grad for x in (z, *gate_weights, *experts, *shared)
    ):
        raise RuntimeError(
            f"mumoe::{name} is not differentiable: it is for inference, under torch.no_grad(). "
            f"Where gradients are wanted, call the gate and the experts."
        )

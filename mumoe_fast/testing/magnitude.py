"""The acceptance rule's t̄ for whole layers and blocks: each layer's contractions on absolute values.

A float32 contraction errs by its terms, not by their sum: where terms cancel, or where a GEMM adds them up in another
order than eager's does, only the sum of their absolute values says what is rounding.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence

import torch
from torch import Tensor

from mumoe_fast import reference
from mumoe_fast.layers import MuMoE, MuMoEMLP
from mumoe_fast.layers.experts import Experts


def block_magnitudes(module: MuMoE | MuMoEMLP, x: Tensor, dy: Tensor) -> dict[str, Tensor]:
    """t̄ of y, and of the gradients of x and of the experts' parameters ("d<name>"), apart from what the gate adds.

    Every layer is taken by itself, on what the exact one before it gives and on what the one after it hands back.

    Args:
        module: in float64, with impl="reference".
        x: (T, I) in float64.
        dy: (T, O) in float64.
    """
    a = [level.detach() for level in module.gate(x)]
    if isinstance(module, MuMoE):
        return _named("experts.", _magnitudes(module.experts, x, a, dy))
    with torch.no_grad():
        h = module.in_experts(x, a)
    h = h.requires_grad_()
    g = reference.ACTIVATIONS[module.activation](h)
    (slope,) = torch.autograd.grad(g, h, torch.ones_like(g))
    outer = _magnitudes(module.out_experts, g, a, dy)
    inner = _magnitudes(module.in_experts, x, a, outer["z"] * slope)
    found = _named("in_experts.", inner) | _named("out_experts.", outer)
    return found | {"y": outer["y"], "dx": inner["z"]}


def _magnitudes(experts: Experts, z: Tensor, a: Sequence[Tensor], dy: Tensor) -> dict[str, Tensor]:
    """t̄ of y, and of the gradients of z, which comes activated, and of the parameters."""
    linear = copy.copy(experts)  # shares the parameters
    linear.activation = None
    leaves = {name: p.detach().abs().requires_grad_() for name, p in experts.named_parameters()}
    z = z.detach().abs().requires_grad_()
    y = torch.func.functional_call(linear, leaves, (z, [level.abs() for level in a]))
    gradients = torch.autograd.grad(y, [z, *leaves.values()], dy.abs())
    return {"y": y.detach()} | dict(zip(("z", *leaves), gradients, strict=True))


def _named(prefix: str, found: dict[str, Tensor]) -> dict[str, Tensor]:
    parameters = {f"d{prefix}{name}": t for name, t in found.items() if name not in ("y", "z")}
    return parameters | {"y": found["y"], "dx": found["z"]}

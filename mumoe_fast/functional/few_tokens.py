"""A whole μMoE layer in one call, for few tokens without gradients, where the calls themselves are the cost."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from mumoe_fast.ops.dispatch import best

FEW_TOKENS = 16  # beyond, a GEMM earns its call


def fits_one_call(z: Tensor, weight: Tensor, impl: str) -> bool:
    """Whether `cp_layer` can take these tokens: few, fitting, on the CPU, and neither compiled, cast nor differentiated.

    Anything else, bad input included, is the business of the gate's and the experts' own functions.
    """
    return (
        not torch.is_grad_enabled()
        and impl in ("auto", "native")
        and z.dim() > 0
        and 0 < z.numel() <= FEW_TOKENS * z.shape[-1]
        and z.shape[-1] == weight.shape[-1]
        and z.dtype == weight.dtype
        and z.device == weight.device
        and best(z.device, z.dtype, "cp").impl == "native"
        and not torch.is_autocast_enabled("cpu")
        and not torch.compiler.is_compiling()
    )


def cp_layer(
    z: Tensor,
    gate_weights: Sequence[Tensor],
    expert_factors: Sequence[Tensor],
    in_factor: Tensor,
    in_bias: Tensor | None,
    out_factor: Tensor,
    *,
    norm: str,
    alpha: float,
    eps: float,
) -> Tensor:
    """Eq. 1 with CP experts, gate included: z (..., I) to (..., O), as `gate` and `cp_experts` compute it."""
    tokens = z if z.dim() == 2 else z.reshape(-1, z.shape[-1])
    y: Tensor = torch.ops.mumoe_native.cp_layer(
        tokens, gate_weights, expert_factors, in_factor, in_bias, out_factor, norm=norm, alpha=alpha, eps=eps
    )
    return y if z.dim() == 2 else y.view(*z.shape[:-1], y.shape[-1])

"""A whole μMoE layer in one call, for few tokens without gradients, where the calls themselves are the cost."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from mumoe_fast.ops.dispatch import NATIVE_DTYPES, NATIVE_READY

FEW_TOKENS = 16  # beyond, a GEMM earns its call


def fits_one_call(z: Tensor, in_factor: Tensor, impl: str) -> bool:
    """Whether `cp_layer` can take these tokens: few and fitting, on the CPU, not compiled, cast or differentiated.

    Anything else, bad input included, is the business of the gate's and the experts' own functions.
    """
    return (
        NATIVE_READY
        and not torch.is_grad_enabled()
        and impl in ("auto", "native")
        and 0 < z.numel() <= FEW_TOKENS * in_factor.shape[1]
        and z.dim() > 0
        and z.shape[-1] == in_factor.shape[1]
        and z.dtype == in_factor.dtype
        and z.dtype in NATIVE_DTYPES
        and z.is_cpu
        and in_factor.is_cpu
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
    y: Tensor = torch.ops.mumoe_native.cp_layer.default(
        tokens, gate_weights, expert_factors, in_factor, in_bias, out_factor, norm=norm, alpha=alpha, eps=eps
    )
    return y if z.dim() == 2 else y.view(*z.shape[:-1], y.shape[-1])

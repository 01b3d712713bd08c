"""A whole μMoE layer in one operator, without gradients: for few tokens the calls themselves are the cost."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from mumoe_fast import ops
from mumoe_fast.functional._arguments import autocast_is_on, tokens, untokens
from mumoe_fast.ops.dispatch import choose

FEW_TOKENS = 16  # beyond, a GEMM earns its call

_LAYERS = {
    "cp": ops.cp.cp_layer,
    "tr": ops.tensor_ring.tr_layer,
    "tt": ops.tensor_ring.tr_layer,
    "tucker": ops.tucker.tucker_layer,
}


def layer_in_one_call(
    factorization: str,
    z: Tensor,
    gate_weights: Sequence[Tensor],
    experts: Sequence[Tensor],
    shared: Sequence[Tensor | None],
    *,
    norm: str,
    alpha: float,
    eps: float,
    impl: str,
) -> Tensor | None:
    """Eq. 1, gate included: z (..., I) to (..., O), bit for bit as the gate's and the experts' kernels compute it.

    None where that is the business of the gate's and the experts' own functions: under autocast, by the reference, and
    for whatever does not fit, which they name. That nobody wants gradients is the caller's business.

    Args:
        factorization: of the experts: "cp", "tr", "tt" or "tucker".
        z: (..., I), any strides.
        gate_weights: one (N_e, I) per hierarchy level.
        experts: one tensor per level, as the factorisation's function takes them.
        shared: the parameters that the levels share, in its operator's order, input mode first, None for no bias.
        norm: "layer" or "none".
        alpha: entmax's, in [1, 2].
        eps: added to the variance.
        impl: "auto" or an implementation by name.

    Returns:
        (..., O) in z's dtype, or None.

    Raises:
        RuntimeError: the named impl cannot run here.
    """
    device, dtype = z.device, z.dtype
    if z.dim() == 0 or z.shape[-1] != gate_weights[0].shape[1] or autocast_is_on(device):
        return None
    for x in (*gate_weights, *experts, *shared):
        if x is not None and (x.dtype is not dtype or x.device != device):
            return None
    impl = choose(impl, z)
    if impl == "reference":
        return None
    flat = z if z.dim() == 2 else tokens(z)
    if impl == "native" and factorization == "cp" and 0 < len(flat) <= FEW_TOKENS:
        y = torch.ops.mumoe_native.cp_layer.default(
            flat, gate_weights, experts, *shared, norm=norm, alpha=alpha, eps=eps
        )
    else:
        y = _LAYERS[factorization](flat, gate_weights, experts, *shared, norm, alpha, eps, impl)
    return untokens(y, z)

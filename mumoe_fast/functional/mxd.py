"""The Mixture of Decoders (arXiv 2505.21364): its top-k gate, and its experts on the support that the gate leaves."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from mumoe_fast import _validation as check
from mumoe_fast import ops, reference
from mumoe_fast.functional._arguments import autocast, gate_logits_arguments, needs_gradient, tokens, untokens
from mumoe_fast.ops.dispatch import choose

__all__ = ["mxd_experts", "topk_gate"]


def topk_gate(
    z: Tensor, weight: Tensor, bias: Tensor | None = None, *, k: int = 32, impl: str = "auto"
) -> tuple[Tensor, Tensor]:
    """The Mixture of Decoders' gate ``a = topk(relu(z Gᵀ + b), k)`` with G = weight, as its support.

    Exactly k values are kept of each row, zeros among them where fewer logits are positive. Which are kept of logits
    that are exactly equal is unspecified. A row with NaN or ±inf among its logits has NaN values. The kernels compute
    and compare the logits in float32, the reference in z's dtype. Under autocast z is cast and weight and bias stay as
    they are, so that their gradients are accumulated and returned in float32.

    Args:
        z: (..., I), floating point, any strides.
        weight: (N, I), z's device and dtype.
        bias: (N,), or None.
        k: in [1, N].
        impl: "auto" or an implementation by name.

    Returns:
        values (..., k) in z's dtype (autocast's under autocast), non-negative and falling, and the indices (..., k) of
        their experts, int64. Only values are differentiable; a gradient flows where they are positive.

    Raises:
        TypeError: a tensor is not floating point, the dtypes differ, or k is not an int.
        ValueError: a shape, device, k or impl is not as above.
        RuntimeError: the named impl cannot run here.
    """
    z = gate_logits_arguments(z, weight, bias)
    k = check.positive("k", k)
    if k > len(weight):
        raise ValueError(f"k: expected at most the {len(weight)} experts of weight, got {k}")
    impl = choose(impl, z)
    if impl == "reference":
        values, indices = reference.topk_gate(z, weight, bias, k).topk(k, dim=-1)
        return values, indices
    values, indices = ops.mxd.topk_gate(tokens(z), weight, bias, k, impl)
    return untokens(values, z), untokens(indices, z)


def mxd_experts(
    h: Tensor,
    values: Tensor,
    indices: Tensor,
    expert_factors: Tensor,
    out_factor: Tensor,
    *,
    activation: str | None = None,
    impl: str = "auto",
) -> Tensor:
    """The Mixture of Decoders' experts: ``y = (C a) ⊙ (D act(h))``, that is ``Σ_n a_n diag(c_n) D act(h)``.

    a is given by its support, as `topk_gate` returns it, and only the rows of C that it names are read. Values that are
    zero contribute nothing. Under autocast every tensor but the indices is cast.

    Args:
        h: (..., H), floating point, any strides; with an activation, the pre-activation: the kernels never store act(h)
            in forward.
        values: (..., k), leading dimensions as h's.
        indices: (..., k), int64 or int32, each in [0, N). They are not checked, which would wait for the GPU.
        expert_factors: (N, O), Cᵀ: one row per expert.
        out_factor: (O, H), D.
        activation: applied to h: None, "gelu", "gelu_tanh", "relu" or "silu".
        impl: "auto" or an implementation by name.

    Returns:
        (..., O), h's dtype (autocast's under autocast).

    Raises:
        TypeError: a tensor is not floating point, the dtypes differ, or indices are not int64 or int32.
        ValueError: a shape, device, activation or impl is not as above.
        RuntimeError: the named impl cannot run here.
    """
    named = {"h": h, "values": values, "expert_factors": expert_factors, "out_factor": out_factor}
    for name, x in named.items():
        check.floating(name, x)
    h, values, expert_factors, out_factor = autocast(*named.values())
    _check_experts(h, values, indices, expert_factors, out_factor, activation)
    impl = choose(impl, h)
    if impl == "reference":
        return _reference(h, values, indices, expert_factors, out_factor, activation)
    save = needs_gradient([h, values, expert_factors, out_factor])
    flat = tokens(h), tokens(values), tokens(indices)
    y: Tensor = ops.mxd.mxd(*flat, expert_factors, out_factor, activation or "none", save, impl)[0]
    return untokens(y, h)


def _check_experts(
    h: Tensor, values: Tensor, indices: Tensor, expert_factors: Tensor, out_factor: Tensor, activation: str | None
) -> None:
    check.activation(activation)
    check.shape("out_factor", out_factor, (None, None))
    O, H = out_factor.shape
    check.last_dimension("h", h, H, "hidden_features of out_factor")
    check.shape("values", values, (*h.shape[:-1], None))
    check.shape("expert_factors", expert_factors, (None, O))
    for name, x in (("values", values), ("expert_factors", expert_factors), ("out_factor", out_factor)):
        check.same_device_and_dtype(name, x, h, "h")
    if indices.dtype not in (torch.int64, torch.int32):
        raise TypeError(f"indices: expected torch.int64 or torch.int32, got {indices.dtype}")
    check.shape("indices", indices, values.shape)
    if indices.device != h.device:
        raise ValueError(f"indices: expected device {h.device} as h has, got {indices.device}")


def _reference(
    h: Tensor, values: Tensor, indices: Tensor, expert_factors: Tensor, out_factor: Tensor, activation: str | None
) -> Tensor:
    """`reference.mxd_experts` of the coefficients that values and indices stand for.

    C a is summed over the k gathered rows. The dense product would multiply N/k times as much, 672 times for 21,500
    experts, and the rows, (..., k, O), are of about the size of the gate's logits, (..., N).
    """
    A = (values.unsqueeze(-2) @ expert_factors[indices]).squeeze(-2)
    return A * F.linear(reference.activate(h, activation), out_factor)

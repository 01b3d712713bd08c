"""The public functions: entmax, the gate, and the experts of each factorisation.

Each validates its arguments once, casts for autocast, flattens the leading dimensions to T tokens and calls one
operator, or, with `impl="reference"`, the reference under ordinary autograd.

`impl` is "auto" (the best implementation that can run here), "triton" or "reference"; a named one never falls back.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from mumoe_fast import _validation as check
from mumoe_fast import ops, reference
from mumoe_fast.ops.dispatch import choose

__all__ = ["batch_norm_gate", "cp_experts", "entmax", "gate"]


def _autocast(*tensors: Any) -> list[Any]:
    """The tensors in autocast's dtype where autocast is on; float64 and None stay what they are."""
    device = tensors[0].device.type
    if not torch.is_autocast_enabled(device):
        return list(tensors)
    dtype = torch.get_autocast_dtype(device)
    return [x if x is None or x.dtype == torch.float64 else x.to(dtype) for x in tensors]


def _needs_gradient(tensors: Sequence[Tensor | None]) -> bool:
    return torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in tensors)


def entmax(x: Tensor, alpha: float = 1.5, *, impl: str = "auto") -> Tensor:
    r"""α-entmax over the last dimension: ``a_n = [(α−1)x_n − τ]₊^{1/(α−1)}`` with τ such that ``Σ a_n = 1``.

    Softmax at α = 1, the paper's activation at 1.5, sparsemax at 2. Coefficients off the support are exactly zero. τ is
    computed in float32 for the half types. A row with NaN or ±inf comes out NaN, and no other row does: mask experts
    with a large negative number.

    Args:
        x: (..., N), floating point, any strides.
        alpha: a number in [1, 2].
        impl: "auto", "triton" or "reference".

    Returns:
        (..., N), x's dtype, each row summing to one.

    Raises:
        TypeError: x is not floating point.
        ValueError: alpha is outside [1, 2], x has no dimension or no experts, or impl is unknown.
        RuntimeError: the named impl cannot run here.
    """
    check.floating("x", x)
    check.alpha(alpha)
    if x.dim() == 0 or x.shape[-1] == 0:
        raise ValueError(f"x: expected shape (..., N) with at least one expert, got {tuple(x.shape)}")
    impl = choose(impl, x)
    if impl == "reference":
        return reference.entmax(x, alpha)
    a: Tensor = ops.entmax.entmax(x.reshape(-1, x.shape[-1]), alpha, impl)
    return a.view(x.shape)


def _check_gate(z: Tensor, weight: Tensor, bias: Tensor | None, alpha: float, eps: float) -> Tensor:
    """Check a gate's arguments; z as autocast wants it, beside which the weight may stay float32."""
    check.floating("z", z)
    (z,) = _autocast(z)
    check.floating("weight", weight)
    check.shape("weight", weight, [None, None])
    N, I = weight.shape
    if N == 0:
        raise ValueError(f"weight: expected at least one expert, got shape {tuple(weight.shape)}")
    check.last_dimension("z", z, I, "in_features of weight")
    master = torch.float32 if torch.is_autocast_enabled(z.device.type) else None
    check.same_device_and_dtype("weight", weight, z, "z", also=master)
    if bias is not None:
        check.shape("bias", bias, [N])
        check.same_device_and_dtype("bias", bias, weight, "weight", also=master)
    check.alpha(alpha)
    if not eps > 0:
        raise ValueError(f"eps: expected a positive number, got {eps!r}")
    return z


def gate(
    z: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    norm: str = "layer",
    alpha: float = 1.5,
    eps: float = 1e-5,
    impl: str = "auto",
) -> Tensor:
    """Expert coefficients (Eq. 1): ``a = entmax(norm(z Gᵀ + b))`` with G = weight.

    The logits, the norm and entmax are computed in float32. Under autocast z is cast and the weight stays as it is, so
    that its gradient is accumulated and returned in float32.

    Args:
        z: (..., I), floating point, any strides.
        weight: (N, I), z's device and dtype.
        bias: (N,), added to the logits before the norm, or None.
        norm: "layer" (over the experts, without affine parameters) or "none". Batch norm's statistics are the business
            of `batch_norm_gate`; with given statistics it is weight and bias folded, and norm="none".
        alpha: entmax's, in [1, 2].
        eps: added to the variance.
        impl: "auto", "triton" or "reference".

    Returns:
        (..., N), z's dtype (autocast's under autocast), each row non-negative and summing to one.

    Raises:
        TypeError: a tensor is not floating point, or the dtypes differ.
        ValueError: a shape, device, norm, alpha, eps or impl is not as above.
        RuntimeError: the named impl cannot run here.
    """
    check.one_of("norm", norm, ("layer", "none"))
    z = _check_gate(z, weight, bias, alpha, eps)
    impl = choose(impl, z)
    if impl == "reference":
        return reference.gate(z, weight, bias, norm="layer" if norm == "layer" else "none", alpha=alpha, eps=eps)
    a: Tensor = ops.gate.gate(z.reshape(-1, z.shape[-1]), weight, bias, norm, alpha, eps, impl)
    return a.view(*z.shape[:-1], weight.shape[0])


def batch_norm_gate(
    z: Tensor,
    weight: Tensor,
    *,
    alpha: float = 1.5,
    eps: float = 1e-5,
    process_group: dist.ProcessGroup | None = None,
    impl: str = "auto",
) -> tuple[Tensor, Tensor, Tensor]:
    """The gate in training with batch norm: ``a = entmax((s − mean)/√(var + eps))``, ``s = z Gᵀ``, over all tokens.

    Statistics are returned, never written: the caller keeps running ones. With torch.distributed initialised they are
    those of all ranks' tokens, as SyncBatchNorm's are, in both directions.

    Args:
        z: (..., I), at least two tokens over all ranks.
        weight: (N, I), z's device and dtype.
        alpha: entmax's, in [1, 2].
        eps: added to the variance.
        process_group: the ranks that share statistics; None is the default group.
        impl: "auto", "triton" or "reference".

    Returns:
        a (..., N) in z's dtype, mean (N,) and the unbiased variance (N,) in float32 (float64 for float64).

    Raises:
        TypeError, ValueError, RuntimeError: as `gate`; ValueError also for fewer than two tokens.
    """
    z = _check_gate(z, weight, None, alpha, eps)
    impl = choose(impl, z)
    tokens = z.reshape(-1, z.shape[-1])
    if impl == "reference":
        s = reference.gate_logits(tokens, weight)
        mean, var = reference.batch_norm_statistics(s)
    else:
        s = ops.batch_norm.gate_logits(tokens, weight, impl)
        mean, var = ops.batch_norm.batch_norm_statistics(s, impl)
    mean, var, T = _synchronize(mean, var, tokens.shape[0], process_group)
    if isinstance(T, int) and T < 2:
        raise ValueError(f"z: batch norm expected at least 2 tokens in training, got {T}")
    if impl == "reference":
        a = reference.entmax(reference.batch_norm(s, mean, var, eps), alpha).to(z.dtype)
    else:
        a = ops.batch_norm.batch_entmax(s, mean, torch.rsqrt(var + eps), alpha, z.dtype, impl)
    unbiased = var.detach() * (T / (T - 1))
    return a.view(*z.shape[:-1], weight.shape[0]), mean.detach(), unbiased


def _synchronize(
    mean: Tensor, var: Tensor, T: int, group: dist.ProcessGroup | None
) -> tuple[Tensor, Tensor, int | Tensor]:
    """Mean, biased variance and number of tokens over all ranks, differentiably; a single process keeps its own.

    Ranks may hold different numbers of tokens. The variance is merged from each rank's own around the common mean.
    """
    if not (dist.is_available() and dist.is_initialized() and dist.get_world_size(group) > 1):
        return mean, var, T
    from torch.distributed.nn.functional import all_reduce

    total = torch.tensor(float(T), device=mean.device, dtype=mean.dtype)
    dist.all_reduce(total, group=group)
    share = T / total
    if T == 0:  # no tokens have no mean, and NaN times a share of zero would reach the others
        mean, var = torch.zeros_like(mean), torch.zeros_like(var)
    common = all_reduce(mean * share, group=group)
    merged = all_reduce((var + (mean - common).square()) * share, group=group)
    return common, merged, total


def _check_levels(coefficients: Sequence[Tensor], experts: Sequence[Tensor], experts_name: str) -> None:
    """One tensor of coefficients and one of experts for each hierarchy level."""
    if not isinstance(coefficients, list | tuple) or not isinstance(experts, list | tuple):
        raise TypeError(
            f"coefficients and {experts_name}: expected a list or tuple with one tensor per hierarchy level, "
            f"got {type(coefficients).__name__} and {type(experts).__name__}"
        )
    if not experts or len(coefficients) != len(experts):
        raise ValueError(
            f"coefficients: expected one tensor per hierarchy level, as many as {experts_name} and at least one; "
            f"got {len(coefficients)} and {len(experts)}"
        )
    for e, (a, factor) in enumerate(zip(coefficients, experts, strict=True)):
        check.floating(f"{experts_name}[{e}]", factor)
        check.floating(f"coefficients[{e}]", a)


def _check_experts(
    z: Tensor,
    coefficients: Sequence[Tensor],
    experts: Sequence[Tensor],
    experts_name: str,
    others: Sequence[tuple[str, Tensor | None, Sequence[int | None]]],
) -> None:
    """What all factorisations ask of their arguments: one device, one dtype, fitting coefficients and named shapes."""
    for e, (a, factor) in enumerate(zip(coefficients, experts, strict=True)):
        check.shape(f"coefficients[{e}]", a, [*z.shape[:-1], factor.shape[0]])
        check.same_device_and_dtype(f"coefficients[{e}]", a, z, "z")
        check.same_device_and_dtype(f"{experts_name}[{e}]", factor, z, "z")
    for name, tensor, expected in others:
        if tensor is not None:
            check.floating(name, tensor)
            check.shape(name, tensor, expected)
            check.same_device_and_dtype(name, tensor, z, "z")


def cp_experts(
    z: Tensor,
    coefficients: Sequence[Tensor],
    expert_factors: Sequence[Tensor],
    in_factor: Tensor,
    out_factor: Tensor,
    in_bias: Tensor | None = None,
    *,
    activation: str | None = None,
    impl: str = "auto",
) -> Tensor:
    """CP experts (Eq. 2, 16): ``y = U_out [(Π_e U_eᵀ a_e) ⊙ (U_in act(z) + b)]``.

    Equal to ``Σ_n a_n (W_n z + b_n)`` on the experts that the factors stand for, none of which is formed. Under
    autocast every tensor is cast.

    Args:
        z: (..., I), floating point, any strides; with an activation, the pre-activation: act(z) is never stored.
        coefficients: one (..., N_e) per hierarchy level, leading dimensions as z's.
        expert_factors: one (N_e, R) per level.
        in_factor: (R, I).
        out_factor: (O, R).
        in_bias: (R,) or None.
        activation: applied to z: None, "gelu", "gelu_tanh", "relu" or "silu".
        impl: "auto", "triton" or "reference".

    Returns:
        (..., O), z's dtype (autocast's under autocast).

    Raises:
        TypeError: a tensor is not floating point, the dtypes differ, or the levels are not given as a list or tuple.
        ValueError: a shape, device, activation or impl is not as above.
        RuntimeError: the named impl cannot run here.
    """
    check.floating("z", z)
    check.floating("in_factor", in_factor)
    _check_levels(coefficients, expert_factors, "expert_factors")
    z, in_factor, out_factor, in_bias = _autocast(z, in_factor, out_factor, in_bias)
    coefficients, expert_factors = _autocast(*coefficients), _autocast(*expert_factors)
    check.activation(activation)
    check.shape("in_factor", in_factor, [None, None])
    R, I = in_factor.shape
    check.last_dimension("z", z, I, "in_features of in_factor")
    _check_experts(
        z,
        coefficients,
        expert_factors,
        "expert_factors",
        [
            *((f"expert_factors[{e}]", factor, (None, R)) for e, factor in enumerate(expert_factors)),
            ("in_factor", in_factor, (R, I)),
            ("out_factor", out_factor, (None, R)),
            ("in_bias", in_bias, (R,)),
        ],
    )
    impl = choose(impl, z)
    if impl == "reference":
        return reference.cp_experts(
            z, coefficients, expert_factors, in_factor, out_factor, in_bias, activation=activation
        )
    tokens = z.reshape(-1, I)
    a = [level.reshape(-1, level.shape[-1]) for level in coefficients]
    save = _needs_gradient([z, *coefficients, *expert_factors, in_factor, out_factor, in_bias])
    shared = (in_factor, in_bias, out_factor, activation or "none", save, impl)
    if len(a) == 1:
        y: Tensor = ops.cp.cp(tokens, a[0], expert_factors[0], *shared)[0]
    else:
        y = ops.cp.cp_hierarchy(tokens, a, list(expert_factors), *shared)[0]
    return y.view(*z.shape[:-1], out_factor.shape[0])

"""The gate: entmax, expert coefficients under layer norm, batch norm or none."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from mumoe_fast import _validation as check
from mumoe_fast import ops, reference
from mumoe_fast.functional._arguments import gate_logits_arguments, tensor_per_level, tokens, untokens
from mumoe_fast.functional._collectives import sum_both_ways, sums
from mumoe_fast.ops.dispatch import choose

__all__ = ["batch_norm_gate", "entmax", "gate", "gate_hierarchy"]


def entmax(x: Tensor, alpha: float | Tensor = 1.5, *, impl: str = "auto") -> Tensor:
    r"""α-entmax over the last dimension: ``a_n = [(α−1)x_n − τ]₊^{1/(α−1)}`` with τ such that ``Σ a_n = 1``.

    Softmax at α = 1, the paper's activation at 1.5, sparsemax at 2. Coefficients off the support are exactly zero. τ is
    computed in float32 for the half types. A row with NaN or ±inf comes out NaN, and no other row does: mask experts
    with a large negative number.

    Args:
        x: (..., N), floating point, any strides.
        alpha: a number in [1, 2]; or a scalar tensor in (1, 2] on x's device, which then gets a gradient (Correia et
            al., 2019) and whose value is never waited for.
        impl: "auto" or an implementation by name.

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
    return _entmax(x, alpha, choose(impl, x))


def _entmax(x: Tensor, alpha: float | Tensor, impl: str) -> Tensor:
    """`entmax` of checked arguments by a chosen implementation."""
    if impl == "reference":
        return reference.entmax(x, alpha)
    rows = tokens(x)
    if isinstance(alpha, Tensor):
        a: Tensor = ops.entmax.learned_entmax(rows, alpha, impl)
    else:
        a = ops.entmax.entmax(rows, alpha, impl)
    return untokens(a, x)


def _check_options(alpha: float | Tensor, eps: float) -> None:
    check.alpha(alpha)
    check.eps(eps)


def _check_gate(z: Tensor, weight: Tensor, bias: Tensor | None, alpha: float | Tensor, eps: float) -> Tensor:
    """Check a gate's arguments; z as autocast wants it, beside which the weight may stay float32."""
    z = gate_logits_arguments(z, weight, bias)
    _check_options(alpha, eps)
    return z


def gate(
    z: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    norm: str = "layer",
    alpha: float | Tensor = 1.5,
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
        alpha: entmax's, in [1, 2]; or a scalar tensor, as `entmax` takes it.
        eps: added to the variance.
        impl: "auto" or an implementation by name.

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
    flat = tokens(z)
    if isinstance(alpha, Tensor):  # the fused gate is compiled for one α: here its three steps, in float32
        s = ops.batch_norm.gate_logits(flat, weight, impl)
        s = s if bias is None else s + bias
        x = F.layer_norm(s, s.shape[-1:], eps=eps) if norm == "layer" else s
        a = _entmax(x, alpha, impl).to(z.dtype)
    else:
        a = ops.gate.gate(flat, weight, bias, norm, alpha, eps, impl)
    return untokens(a, z)


def gate_hierarchy(
    z: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor] | None = None,
    *,
    norm: str = "layer",
    alpha: float = 1.5,
    eps: float = 1e-5,
    impl: str = "auto",
) -> tuple[Tensor, ...]:
    """The `gate` of every level of a hierarchy, in one operator and on a GPU in one launch.

    Args:
        z: (..., I), floating point, any strides.
        weights: one (N_e, I) per level, z's device and dtype (under autocast they may stay float32).
        biases: one (N_e,) per level, or None.
        norm: as `gate` takes it.
        alpha: entmax's, in [1, 2], of every level.
        eps: added to the variance.
        impl: "auto" or an implementation by name.

    Returns:
        One (..., N_e) per level, as `gate` returns it.

    Raises:
        TypeError, ValueError, RuntimeError: as `gate`; also where the levels are not given as a list or tuple, or their
            numbers differ.
    """
    check.one_of("norm", norm, ("layer", "none"))
    tensor_per_level(weights=weights, **({} if biases is None else {"biases": biases}))
    every_bias = [None] * len(weights) if biases is None else biases
    for e, (weight, bias) in enumerate(zip(weights, every_bias, strict=True)):
        z = gate_logits_arguments(z, weight, bias, (f"weights[{e}]", f"biases[{e}]"))
    _check_options(alpha, eps)
    impl = choose(impl, z)
    if impl == "reference":
        return tuple(
            reference.gate(z, weight, bias, norm="layer" if norm == "layer" else "none", alpha=alpha, eps=eps)
            for weight, bias in zip(weights, every_bias, strict=True)
        )
    coefficients = ops.gate.gate_hierarchy(tokens(z), list(weights), list(biases or ()), norm, alpha, eps, impl)
    return tuple(untokens(a, z) for a in coefficients)


def batch_norm_gate(
    z: Tensor,
    weight: Tensor,
    *,
    alpha: float | Tensor = 1.5,
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
        alpha: entmax's, in [1, 2]; or a scalar tensor, as `entmax` takes it.
        eps: added to the variance.
        process_group: the ranks that share statistics; None is the default group.
        impl: "auto" or an implementation by name.

    Returns:
        a (..., N) in z's dtype, mean (N,) and the unbiased variance (N,) in float32 (float64 for float64).

    Raises:
        TypeError, ValueError, RuntimeError: as `gate`; ValueError also for fewer than two tokens.
    """
    z = _check_gate(z, weight, None, alpha, eps)
    impl = choose(impl, z)
    flat = tokens(z)
    if impl == "reference":
        s = reference.gate_logits(flat, weight)
        mean, var = reference.batch_norm_statistics(s)
    else:
        s = ops.batch_norm.gate_logits(flat, weight, impl)
        mean, var = ops.batch_norm.batch_norm_statistics(s, impl)
    mean, var, T = _synchronize(mean, var, flat.shape[0], process_group)
    if isinstance(T, int) and T < 2:
        raise ValueError(f"z: batch norm expected at least 2 tokens in training, got {T}")
    if impl == "reference" or isinstance(alpha, Tensor):
        a = _entmax(reference.batch_norm(s, mean, var, eps), alpha, impl).to(z.dtype)
    else:
        a = ops.batch_norm.batch_entmax(s, mean, torch.rsqrt(var + eps), alpha, z.dtype, impl)
    unbiased = var.detach() * (T / (T - 1))
    return untokens(a, z), mean.detach(), unbiased


def _synchronize(
    mean: Tensor, var: Tensor, T: int, group: dist.ProcessGroup | None
) -> tuple[Tensor, Tensor, int | Tensor]:
    """Mean, biased variance and number of tokens over all ranks, differentiably; a single process keeps its own.

    Ranks may hold different numbers of tokens. The variance is merged from each rank's own around the common mean.
    """
    if not (dist.is_available() and dist.is_initialized() and dist.get_world_size(group) > 1):
        return mean, var, T
    (total,) = sums([torch.full((), float(T), device=mean.device, dtype=mean.dtype)], group)
    share = T / total
    if T == 0:  # no tokens have no mean, and NaN times a share of zero would reach the others
        mean, var = torch.zeros_like(mean), torch.zeros_like(var)
    common = sum_both_ways(mean * share, group)
    merged = sum_both_ways((var + (mean - common).square()) * share, group)
    return common, merged, total

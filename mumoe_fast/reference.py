"""The specification: every formula of the library, written for reading and in torch alone.

Everything here is ordinary differentiable torch: it runs on any device, in any dtype, under autograd, and Inductor can
compile it. The kernels are judged against it (in float64), and `impl="reference"` is this file.

Letters: T tokens, I in_features, O out_features, E hierarchy levels, N_e experts of level e, R rank. `z` is the input,
`a` the expert coefficients, `y` the output; `...` stands for any leading dimensions.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

Norm = Literal["layer", "batch", "none"]
Activation = Literal["gelu", "gelu_tanh", "relu", "silu"]

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "relu": F.relu,
    "silu": F.silu,
}


NEAREST_TO_1 = 1 + 1e-6  # the least α but 1 itself: a learnt α that rounds to 1 stays finite


def at_least_float32(x: Tensor) -> Tensor:
    """The dtype that norms and entmax are computed in: float32 for the half types, x's own otherwise."""
    return x if x.dtype == torch.float64 else x.float()


def entmax(x: Tensor, alpha: float | Tensor = 1.5) -> Tensor:
    r"""α-entmax over the last dimension, for α ∈ [1, 2].

    ``a_n = [1 + (α−1)(x_n − v)]₊^{1/(α−1)}`` with v such that ``Σ a_n = 1``: softmax at α = 1 (v its log-sum-exp),
    sparsemax at α = 2. In the paper's letters ``τ = (α−1)v − 1``. A row with NaN or ±inf in it comes out NaN.

    v is found without autograd, in closed form after a sort for α = 1.5 and 2 and by bisection otherwise. One Newton
    step at that root then carries the gradient: by the implicit function theorem its derivative is v's own, with
    respect to x and to α alike.
    """
    if isinstance(alpha, float | int) and alpha == 1.0:
        a = torch.softmax(at_least_float32(x), dim=-1)
        return (a + 0 * x.amin(-1, keepdim=True)).to(x.dtype)
    dtype, x = x.dtype, at_least_float32(x)
    alpha = alpha.to(x.dtype).clamp(min=NEAREST_TO_1) if isinstance(alpha, Tensor) else max(alpha, NEAREST_TO_1)
    x = x - x.amax(-1, keepdim=True).detach()
    with torch.no_grad():
        if isinstance(alpha, float | int) and alpha in (1.5, 2.0):
            v = _threshold_by_sort(x, float(alpha))
        else:
            v = _threshold_by_bisection(x, alpha)
    residual = _entmax_at(x, v, alpha).sum(-1, keepdim=True) - 1
    slope = _entmax_at(x, v, alpha, power=2 - alpha).sum(-1, keepdim=True)
    return _entmax_at(x, v + residual / slope, alpha).to(dtype)


def _entmax_at(x: Tensor, v: Tensor, alpha: float | Tensor, power: float | Tensor = 1.0) -> Tensor:
    """a^power, ``a_n = [1 + (α−1)(x_n − v)]₊^{1/(α−1)}``, zero off the support even where power is 0."""
    base = 1 + (alpha - 1) * (x - v)
    inside = base > 0
    if isinstance(alpha, float) and alpha == 1.5:
        p = torch.where(inside, base, 0)
        p = p.square() if isinstance(power, float) and power == 1.0 else p
    else:  # near α = 1 the power form loses digits that log1p keeps
        offset = torch.where(inside, (alpha - 1) * (x - v), 0)
        p = torch.where(inside, torch.exp(torch.log1p(offset) * (power / (alpha - 1))), 0)
    return p + 0 * v  # a NaN threshold means a NaN row, although no comparison with it holds


def _threshold_by_sort(x: Tensor, alpha: float) -> Tensor:
    """v for α ∈ {1.5, 2} from running sums over the sorted row (x ≤ 0, its maximum 0)."""
    x, _ = torch.sort((alpha - 1) * x, dim=-1, descending=True)
    k = torch.arange(1, x.shape[-1] + 1, device=x.device, dtype=x.dtype)
    mean = x.cumsum(-1) / k
    if alpha == 2.0:
        tau = mean - 1 / k
    else:
        sum_of_squared_deviations = x.square().cumsum(-1) - k * mean.square()
        tau = mean - torch.sqrt(((1 - sum_of_squared_deviations) / k).clamp(min=0))
    support = (tau <= x).sum(-1, keepdim=True).clamp(min=1)
    tau = tau.gather(-1, support - 1) + 0 * x[..., -1:]
    return (tau + 1) / (alpha - 1)


def _threshold_by_bisection(x: Tensor, alpha: float | Tensor) -> Tensor:
    """v for any α ∈ [1, 2], in [0, (1 − N^{1−α})/(α−1)] (x ≤ 0, its maximum 0)."""
    alpha = torch.as_tensor(alpha, dtype=x.dtype, device=x.device)
    low = torch.zeros_like(x[..., :1])
    high = low - torch.expm1((1 - alpha) * math.log(x.shape[-1])) / (alpha - 1)
    for _ in range(50 if x.dtype == torch.float64 else 24):
        middle = (low + high) / 2
        too_low = _entmax_at(x, middle, alpha).sum(-1, keepdim=True) > 1
        low, high = torch.where(too_low, middle, low), torch.where(too_low, high, middle)
    return (low + high) / 2 + 0 * x.amin(-1, keepdim=True)


def layer_norm(s: Tensor, eps: float = 1e-5) -> Tensor:
    """``(s − mean)/√(var + eps)`` over the experts, without affine parameters, the variance by two passes."""
    s = at_least_float32(s)
    centred = s - s.mean(-1, keepdim=True)
    return centred * torch.rsqrt(centred.square().mean(-1, keepdim=True) + eps)


def batch_norm_statistics(s: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and biased variance (N,) of each expert's logits over all tokens, the variance by two passes."""
    s = at_least_float32(s).flatten(0, -2)
    mean = s.mean(0)
    return mean, (s - mean).square().mean(0)


def batch_norm(s: Tensor, mean: Tensor, var: Tensor, eps: float = 1e-5) -> Tensor:
    """``(s − mean)/√(var + eps)`` with statistics per expert (N,): the batch's in training, running ones after it."""
    return (at_least_float32(s) - mean) * torch.rsqrt(var + eps)


def gate_logits(z: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """``s = z G + b``: z (..., I), weight (N, I) = Gᵀ, bias (N,) or None, giving (..., N)."""
    return F.linear(z, weight.to(z.dtype), None if bias is None else bias.to(z.dtype))


def gate(
    z: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    norm: Norm = "layer",
    alpha: float | Tensor = 1.5,
    eps: float = 1e-5,
) -> Tensor:
    """Eq. 1's coefficients ``a = entmax(norm(z G + b))``: z (..., I), weight (N, I), giving (..., N).

    ``norm="batch"`` uses the statistics of this batch; evaluation folds the running ones into weight and bias.
    """
    s = gate_logits(z, weight, bias)
    if norm == "layer":
        x = layer_norm(s, eps)
    elif norm == "batch":
        x = batch_norm(s, *batch_norm_statistics(s), eps)
    else:
        x = at_least_float32(s)
    return entmax(x, alpha).to(z.dtype)


def topk_gate(z: Tensor, weight: Tensor, bias: Tensor | None, k: int) -> Tensor:
    """MxD's gate ``a = topk(relu(z G + b), k)``: the k largest of each row are kept, the others are zero.

    Exactly k are kept (zeros among them where fewer are positive); of equal values those of the lowest experts. A row
    with NaN or ±inf among its logits comes out NaN. z (..., I), weight (N, I), bias (N,) or None, 1 ≤ k ≤ N, giving
    (..., N).
    """
    s = gate_logits(z, weight, bias)
    x = F.relu(s)
    with torch.no_grad():
        smallest = x.topk(k, dim=-1).values[..., -1:]
        larger, equal = x > smallest, x == smallest
        room = k - larger.sum(-1, keepdim=True)
        keep = larger | (equal & (equal.cumsum(-1) <= room))
        poison = 0 * (s.amin(-1, keepdim=True) + s.amax(-1, keepdim=True))
    return torch.where(keep, x, 0) + poison


def activate(z: Tensor, activation: str | None) -> Tensor:
    """The named activation of z, or z itself."""
    return z if activation is None else ACTIVATIONS[activation](z)


def cp_modes(
    z: Tensor,
    coefficients: Sequence[Tensor],
    expert_factors: Sequence[Tensor],
    in_factor: Tensor,
    in_bias: Tensor | None,
    activation: str | None = None,
) -> tuple[Tensor, Tensor]:
    """CP's two contractions: ``A = Π_e a_e U_e`` over the expert modes and ``B = act(z) U_inᵀ + b``, each (..., R)."""
    A = coefficients[0] @ expert_factors[0]
    for a, factor in zip(coefficients[1:], expert_factors[1:], strict=True):
        A = A * (a @ factor)
    return A, F.linear(activate(z, activation), in_factor, in_bias)


def cp_experts(
    z: Tensor,
    coefficients: Sequence[Tensor],
    expert_factors: Sequence[Tensor],
    in_factor: Tensor,
    out_factor: Tensor,
    in_bias: Tensor | None = None,
    *,
    activation: str | None = None,
) -> Tensor:
    """The CP μMoE (Eq. 2, 16): ``y = U_out [(Π_e U_eᵀ a_e) ⊙ (U_in act(z) + b)]``.

    z (..., I), coefficients[e] (..., N_e), expert_factors[e] (N_e, R), in_factor (R, I), out_factor (O, R),
    in_bias (R,) or None, giving (..., O).
    """
    A, B = cp_modes(z, coefficients, expert_factors, in_factor, in_bias, activation)
    return F.linear(A * B, out_factor)


def cp_materialize(
    expert_factors: Sequence[Tensor],
    in_factor: Tensor,
    out_factor: Tensor,
    in_bias: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """The experts that CP's factors stand for: W (N_1, …, N_E, I, O) and their biases (N_1, …, N_E, O)."""
    scale = expert_factors[0]
    for factor in expert_factors[1:]:
        scale = scale.unsqueeze(-2) * factor
    W = torch.einsum("...r,ri,or->...io", scale, in_factor, out_factor)
    return W, None if in_bias is None else torch.einsum("...r,r,or->...o", scale, in_bias, out_factor)


def tr_modes(
    z: Tensor,
    coefficients: Sequence[Tensor],
    expert_cores: Sequence[Tensor],
    in_core: Tensor,
    in_bias: Tensor | None,
    activation: str | None = None,
) -> tuple[Tensor, Tensor]:
    """TR's two matrices per token: ``A = Π_e (U_e ×₂ a_e)`` (..., R_1, R_{E+1}) and ``B = U_in ×₂ act(z) + b``."""
    A, *further = (
        (a @ core.flatten(1)).unflatten(-1, core.shape[1:]) for a, core in zip(coefficients, expert_cores, strict=True)
    )
    for matrix in further:
        A = A @ matrix
    bias = None if in_bias is None else in_bias.flatten()
    B = F.linear(activate(z, activation), in_core.flatten(0, 1), bias)
    return A, B.unflatten(-1, in_core.shape[:2])


def tr_experts(
    z: Tensor,
    coefficients: Sequence[Tensor],
    expert_cores: Sequence[Tensor],
    in_core: Tensor,
    out_core: Tensor,
    in_bias: Tensor | None = None,
    *,
    activation: str | None = None,
) -> Tensor:
    """The TR μMoE (Eq. 3, 17–18): ``y_o = Σ_{r1 r} (A B)_{r1 r} U_out[o, r1, r]`` with A and B of `tr_modes`.

    z (..., I), coefficients[e] (..., N_e), expert_cores[e] (N_e, R_e, R_{e+1}), in_core (R_{E+1}, R_{E+2}, I),
    out_core (O, R_1, R_{E+2}), in_bias (R_{E+1}, R_{E+2}) or None, giving (..., O). TT is TR with R_1 = 1.
    """
    A, B = tr_modes(z, coefficients, expert_cores, in_core, in_bias, activation)
    return F.linear((A @ B).flatten(-2), out_core.flatten(1))


def tr_materialize(
    expert_cores: Sequence[Tensor],
    in_core: Tensor,
    out_core: Tensor,
    in_bias: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """The experts that TR's cores stand for: W (N_1, …, N_E, I, O) and their biases (N_1, …, N_E, O)."""
    A = expert_cores[0]
    for core in expert_cores[1:]:
        A = torch.einsum("...pq,nqr->...npr", A, core)
    W = torch.einsum("...pq,qri,opr->...io", A, in_core, out_core)
    return W, None if in_bias is None else torch.einsum("...pq,qr,opr->...o", A, in_bias, out_core)


def joint_coefficients(coefficients: Sequence[Tensor]) -> Tensor:
    """The outer product ``Π_e a_e[n_e]`` of every level's vector, flattened: (..., N_1 ⋯ N_E)."""
    joint = coefficients[0]
    for a in coefficients[1:]:
        joint = (joint.unsqueeze(-1) * a.unsqueeze(-2)).flatten(-2)
    return joint


def tucker_experts(
    z: Tensor,
    coefficients: Sequence[Tensor],
    expert_factors: Sequence[Tensor],
    in_factor: Tensor,
    core: Tensor,
    out_factor: Tensor,
    in_bias: Tensor | None = None,
    *,
    activation: str | None = None,
) -> Tensor:
    """The Tucker μMoE (D.1.3 in Eq. 1): ``y = U_out [core ×_e (U_eᵀ a_e) ×_{E+1} (U_in act(z) + b)]``.

    z (..., I), coefficients[e] (..., N_e), expert_factors[e] (N_e, R_e), in_factor (R_I, I),
    core (R_1, …, R_E, R_I, R_O), out_factor (O, R_O), in_bias (R_I,) or None, giving (..., O).
    """
    modes = [a @ factor for a, factor in zip(coefficients, expert_factors, strict=True)]
    modes.append(F.linear(activate(z, activation), in_factor, in_bias))
    return F.linear(joint_coefficients(modes) @ core.flatten(0, -2), out_factor)


def tucker_materialize(
    expert_factors: Sequence[Tensor],
    in_factor: Tensor,
    core: Tensor,
    out_factor: Tensor,
    in_bias: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """The experts that Tucker's factors stand for: W (N_1, …, N_E, I, O) and their biases (N_1, …, N_E, O)."""
    for factor in expert_factors:  # contracts the first mode and appends N_e, so that R_I and R_O lead in the end
        core = torch.einsum("r...,nr->...n", core, factor)
    W = torch.einsum("pq...,pi,oq->...io", core, in_factor, out_factor)
    return W, None if in_bias is None else torch.einsum("pq...,p,oq->...o", core, in_bias, out_factor)


def full_experts(
    z: Tensor,
    coefficients: Sequence[Tensor],
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    activation: str | None = None,
) -> Tensor:
    """The unfactorised μMoE (Eq. 1, 15), a dense MoE: ``y = Σ_n a_n (W_n act(z) + b_n)``, one expert after the other.

    z (..., I), coefficients[e] (..., N_e), weight (N_1, …, N_E, O, I), bias (N_1, …, N_E, O) or None, giving (..., O).
    The sum is kept in float32 for the half types. Nothing of size T·N·O is formed; autograd keeps every ``a_n z``.
    """
    z, joint = activate(z, activation), joint_coefficients(coefficients)
    y = at_least_float32(z.new_zeros(*z.shape[:-1], weight.shape[-2]))
    for a, expert in zip(joint.unbind(-1), weight.flatten(0, -3), strict=True):
        y = y + F.linear(a.unsqueeze(-1) * z, expert)
    return (y if bias is None else y + joint @ bias.flatten(0, -2)).to(z.dtype)


def full_materialize(weight: Tensor, bias: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
    """The experts in Eq. 1's layout: W (N_1, …, N_E, I, O) and their biases (N_1, …, N_E, O)."""
    return weight.mT, bias


def mxd_experts(
    h: Tensor, a: Tensor, expert_factors: Tensor, out_factor: Tensor, *, activation: str | None = None
) -> Tensor:
    """The Mixture of Decoders (arXiv 2505.21364): ``y = (C a) ⊙ (D act(h))``, so that ``W_n = diag(c_n) D``.

    h (..., H), a (..., N) of `topk_gate`, expert_factors (N, O) = Cᵀ, out_factor (O, H) = D, giving (..., O).
    """
    return (a @ expert_factors) * F.linear(activate(h, activation), out_factor)


def mxd_materialize(expert_factors: Tensor, out_factor: Tensor) -> Tensor:
    """The decoders that C and D stand for: W (N, H, O)."""
    return torch.einsum("no,oh->nho", expert_factors, out_factor)


def moe(z: Tensor, coefficients: Sequence[Tensor], W: Tensor, bias: Tensor | None = None) -> Tensor:
    """Eq. 1, and Eq. 15 for E levels, on materialised experts: ``y = Σ_{n_1 … n_E} Π_e a_e[n_e] (W_n z + b_n)``.

    z (..., I), coefficients[e] (..., N_e), W (N_1, …, N_E, I, O), bias (N_1, …, N_E, O) or None, giving (..., O).
    """
    joint = joint_coefficients(coefficients)
    y = torch.einsum("...n,nio,...i->...o", joint, W.flatten(0, -3), z)
    return y if bias is None else y + joint @ bias.flatten(0, -2)

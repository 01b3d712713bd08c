"""The unfactorised experts: a dense mixture of experts."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from mumoe_fast import _validation as check
from mumoe_fast import ops, reference
from mumoe_fast.functional._arguments import autocast, fitting, tensor_per_level, tokens, untokens
from mumoe_fast.ops.dispatch import choose

__all__ = ["full_experts"]


def full_experts(
    z: Tensor,
    coefficients: Sequence[Tensor],
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    activation: str | None = None,
    support_only: bool = False,
    impl: str = "auto",
) -> Tensor:
    """The unfactorised experts (Eq. 1, 15), a dense MoE: ``y = Σ_n a_n (W_n act(z) + b_n)``.

    Nothing of size (..., N, O) is formed; the levels' joint coefficients, (..., N_1 ⋯ N_E), are. The kernels save the
    arguments alone for backward. Under autocast every tensor is cast.

    Args:
        z: (..., I), floating point, any strides; with an activation, the pre-activation.
        coefficients: one (..., N_e) per hierarchy level, leading dimensions as z's.
        weight: (N_1, …, N_E, O, I): every expert as `nn.Linear` keeps its weight.
        bias: (N_1, …, N_E, O) or None.
        activation: applied to z: None, "gelu", "gelu_tanh", "relu" or "silu".
        support_only: the gradient of a coefficient that is zero may be given as zero, as in `cp_experts`.
        impl: "auto" or an implementation by name.

    Returns:
        (..., O), z's dtype (autocast's under autocast).

    Raises:
        TypeError, ValueError, RuntimeError: as `cp_experts`.
    """
    check.floating("z", z)
    tensor_per_level(coefficients=coefficients)
    for name, x in (("weight", weight), ("bias", bias)):
        if x is not None:
            check.floating(name, x)
    z, weight, bias = autocast(z, weight, bias)
    levels = autocast(*coefficients)
    check.activation(activation)
    check.shape("weight", weight, [None] * (len(levels) + 2))
    *N, O, I = weight.shape
    check.last_dimension("z", z, I, "in_features")
    for e, a in enumerate(levels):
        fitting(f"coefficients[{e}]", a, (*z.shape[:-1], N[e]), z)
    fitting("weight", weight, (*N, O, I), z)
    fitting("bias", bias, (*N, O), z)
    impl = choose(impl, z)
    if impl == "reference":
        return reference.full_experts(z, levels, weight, bias, activation=activation)
    a = reference.joint_coefficients([tokens(a) for a in levels])
    flat_bias = None if bias is None else bias.flatten(0, -2)
    options = (activation or "none", support_only, impl)
    y: Tensor = ops.full.full(tokens(z), a, weight.flatten(0, -3), flat_bias, *options)
    return untokens(y, z)

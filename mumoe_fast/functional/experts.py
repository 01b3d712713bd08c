"""The experts of the factorisations that keep tensors per hierarchy level: CP, tensor ring and train, Tucker."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import Tensor

from mumoe_fast import _validation as check
from mumoe_fast import ops, reference
from mumoe_fast.functional._arguments import autocast, fitting, needs_gradient, tensor_per_level, tokens, untokens
from mumoe_fast.ops.dispatch import choose

__all__ = ["cp_experts", "tr_experts", "tucker_experts"]


def _cast(
    z: Tensor, coefficients: Sequence[Tensor], experts_name: str, experts: Sequence[Tensor], **shared: Tensor | None
) -> tuple[Tensor, list[Tensor], list[Tensor], list[Tensor | None]]:
    """Every tensor is one, and in autocast's dtype where autocast is on."""
    check.floating("z", z)
    tensor_per_level(coefficients=coefficients, **{experts_name: experts})
    for name, x in shared.items():
        if x is not None:
            check.floating(name, x)
    z, *others = autocast(z, *shared.values())
    return z, autocast(*coefficients), autocast(*experts), others


def _check(
    z: Tensor,
    I: int,
    coefficients: Sequence[Tensor],
    experts: Sequence[Tensor],
    activation: str | None,
    shapes: dict[str, tuple[Tensor | None, tuple[int | None, ...]]],
) -> None:
    """Shapes, devices and dtypes; `shapes` are those of the factorisation's own tensors, by name."""
    check.activation(activation)
    check.last_dimension("z", z, I, "in_features")
    for e, (a, expert) in enumerate(zip(coefficients, experts, strict=True)):
        fitting(f"coefficients[{e}]", a, (*z.shape[:-1], expert.shape[0]), z)
    for name, (x, shape) in shapes.items():
        fitting(name, x, shape, z)


def _call(
    one_level: Callable[..., tuple[Tensor, ...]],
    hierarchy: Callable[..., tuple[Tensor, ...]],
    z: Tensor,
    coefficients: Sequence[Tensor],
    experts: Sequence[Tensor],
    shared: Sequence[Tensor | None],
    activation: str | None,
    support_only: bool,
    impl: str,
) -> Tensor:
    """The operator on flattened tokens: the plain one for one level of experts, else the one with lists."""
    save = needs_gradient([z, *coefficients, *experts, *shared])
    options = (*shared, activation or "none", save, support_only, impl)
    if len(experts) == 1:
        y = one_level(tokens(z), tokens(coefficients[0]), experts[0], *options)[0]
    else:
        y = hierarchy(tokens(z), [tokens(a) for a in coefficients], list(experts), *options)[0]
    return untokens(y, z)


def cp_experts(
    z: Tensor,
    coefficients: Sequence[Tensor],
    expert_factors: Sequence[Tensor],
    in_factor: Tensor,
    out_factor: Tensor,
    in_bias: Tensor | None = None,
    *,
    activation: str | None = None,
    support_only: bool = False,
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
        support_only: the gradient of a coefficient that is zero may be given as zero; enough, and with many experts
            much cheaper, where the coefficients are entmax's, whose own gradient is zero there.
        impl: "auto" or an implementation by name.

    Returns:
        (..., O), z's dtype (autocast's under autocast).

    Raises:
        TypeError: a tensor is not floating point, the dtypes differ, or the levels are not given as a list or tuple.
        ValueError: a shape, device, activation or impl is not as above.
        RuntimeError: the named impl cannot run here.
    """
    shared = {"in_factor": in_factor, "out_factor": out_factor, "in_bias": in_bias}
    z, a, experts, (in_factor, out_factor, in_bias) = _cast(  # type: ignore[assignment]
        z, coefficients, "expert_factors", expert_factors, **shared
    )
    check.shape("in_factor", in_factor, (None, None))
    R, I = in_factor.shape
    shapes: dict[str, tuple[Tensor | None, tuple[int | None, ...]]] = {
        **{f"expert_factors[{e}]": (factor, (None, R)) for e, factor in enumerate(experts)},
        "in_factor": (in_factor, (R, I)),
        "out_factor": (out_factor, (None, R)),
        "in_bias": (in_bias, (R,)),
    }
    _check(z, I, a, experts, activation, shapes)
    impl = choose(impl, z)
    if impl == "reference":
        return reference.cp_experts(z, a, experts, in_factor, out_factor, in_bias, activation=activation)
    return _call(
        ops.cp.cp, ops.cp.cp_hierarchy, z, a, experts, (in_factor, in_bias, out_factor), activation, support_only, impl
    )


def tr_experts(
    z: Tensor,
    coefficients: Sequence[Tensor],
    expert_cores: Sequence[Tensor],
    in_core: Tensor,
    out_core: Tensor,
    in_bias: Tensor | None = None,
    *,
    activation: str | None = None,
    support_only: bool = False,
    impl: str = "auto",
) -> Tensor:
    """Tensor-ring experts (Eq. 3, 17–18): ``y_o = Σ_{r1 r} (A B)_{r1 r} U_out[o, r1, r]``.

    ``A = Π_e (U_e ×₂ a_e)`` and ``B = U_in ×₂ act(z) + b`` are small matrices of each token. With R_1 = 1 this is the
    tensor train. Under autocast every tensor is cast.

    Args:
        z: (..., I), floating point, any strides; with an activation, the pre-activation: act(z) is never stored.
        coefficients: one (..., N_e) per hierarchy level, leading dimensions as z's.
        expert_cores: one (N_e, R_e, R_{e+1}) per level.
        in_core: (R_{E+1}, R_{E+2}, I).
        out_core: (O, R_1, R_{E+2}).
        in_bias: (R_{E+1}, R_{E+2}) or None.
        activation: applied to z: None, "gelu", "gelu_tanh", "relu" or "silu".
        support_only: the gradient of a coefficient that is zero may be given as zero; enough, and with many experts
            much cheaper, where the coefficients are entmax's, whose own gradient is zero there.
        impl: "auto" or an implementation by name.

    Returns:
        (..., O), z's dtype (autocast's under autocast).

    Raises:
        TypeError, ValueError, RuntimeError: as `cp_experts`.
    """
    shared = {"in_core": in_core, "out_core": out_core, "in_bias": in_bias}
    z, a, experts, (in_core, out_core, in_bias) = _cast(  # type: ignore[assignment]
        z, coefficients, "expert_cores", expert_cores, **shared
    )
    check.shape("in_core", in_core, (None, None, None))
    for e, core in enumerate(experts):
        check.shape(f"expert_cores[{e}]", core, (None, None, None))
    inner, outer, I = in_core.shape
    ranks = [*(core.shape[1] for core in experts), inner]
    shapes: dict[str, tuple[Tensor | None, tuple[int | None, ...]]] = {
        **{f"expert_cores[{e}]": (core, (None, ranks[e], ranks[e + 1])) for e, core in enumerate(experts)},
        "in_core": (in_core, (inner, outer, I)),
        "out_core": (out_core, (None, ranks[0], outer)),
        "in_bias": (in_bias, (inner, outer)),
    }
    _check(z, I, a, experts, activation, shapes)
    impl = choose(impl, z)
    if impl == "reference":
        return reference.tr_experts(z, a, experts, in_core, out_core, in_bias, activation=activation)
    operators = ops.tensor_ring.tr, ops.tensor_ring.tr_hierarchy
    return _call(*operators, z, a, experts, (in_core, in_bias, out_core), activation, support_only, impl)


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
    support_only: bool = False,
    impl: str = "auto",
) -> Tensor:
    """Tucker experts (D.1.3 in Eq. 1): ``y = U_out [core ×_e (U_eᵀ a_e) ×_{E+1} (U_in act(z) + b)]``.

    Under autocast every tensor is cast.

    Args:
        z: (..., I), floating point, any strides; with an activation, the pre-activation: act(z) is never stored.
        coefficients: one (..., N_e) per hierarchy level, leading dimensions as z's.
        expert_factors: one (N_e, R_e) per level.
        in_factor: (R_I, I).
        core: (R_1, …, R_E, R_I, R_O).
        out_factor: (O, R_O).
        in_bias: (R_I,) or None.
        activation: applied to z: None, "gelu", "gelu_tanh", "relu" or "silu".
        support_only: the gradient of a coefficient that is zero may be given as zero; enough, and with many experts
            much cheaper, where the coefficients are entmax's, whose own gradient is zero there.
        impl: "auto" or an implementation by name.

    Returns:
        (..., O), z's dtype (autocast's under autocast).

    Raises:
        TypeError, ValueError, RuntimeError: as `cp_experts`.
    """
    shared = {"in_factor": in_factor, "core": core, "out_factor": out_factor, "in_bias": in_bias}
    z, a, experts, (in_factor, core, out_factor, in_bias) = _cast(  # type: ignore[assignment]
        z, coefficients, "expert_factors", expert_factors, **shared
    )
    check.shape("in_factor", in_factor, (None, None))
    check.shape("core", core, [None] * (len(experts) + 2))
    *ranks, R_I, R_O = core.shape
    I = in_factor.shape[1]
    shapes: dict[str, tuple[Tensor | None, tuple[int | None, ...]]] = {
        **{f"expert_factors[{e}]": (factor, (None, ranks[e])) for e, factor in enumerate(experts)},
        "in_factor": (in_factor, (R_I, I)),
        "core": (core, (*ranks, R_I, R_O)),
        "out_factor": (out_factor, (None, R_O)),
        "in_bias": (in_bias, (R_I,)),
    }
    _check(z, I, a, experts, activation, shapes)
    impl = choose(impl, z)
    if impl == "reference":
        return reference.tucker_experts(z, a, experts, in_factor, core, out_factor, in_bias, activation=activation)
    operators = ops.tucker.tucker, ops.tucker.tucker_hierarchy
    return _call(*operators, z, a, experts, (in_factor, in_bias, core, out_factor), activation, support_only, impl)

"""`mumoe::cp` and `mumoe::cp_hierarchy`: CP experts ``y = U_out [(Π_e U_eᵀ a_e) ⊙ (U_in act(z) + b)]``.

One level of experts passes plain tensors, because a schema with `Tensor[]` doubles the cost of a call; the hierarchy is
the same operator with lists. Both return y with the two contractions A and B (T×R) that backward reads, or empty
tensors in their place when `save` is False.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

from mumoe_fast.ops._library import absent, define, launchers, present

Shape = Sequence[int]

_SHARED = "Tensor in_factor, Tensor? in_bias, Tensor out_factor"


def _forward(
    z: Tensor,
    coefficients: Sequence[Tensor],
    expert_factors: Sequence[Tensor],
    in_factor: Tensor,
    in_bias: Tensor | None,
    out_factor: Tensor,
    activation: str,
    save: bool,
    impl: str,
) -> tuple[Tensor, Tensor, Tensor]:
    y, A, B = launchers(impl, "cp").cp_forward(
        z, coefficients, expert_factors, in_factor, in_bias, out_factor, activation=activation, save=save
    )
    return y, A, B


def _forward_fake(
    z: Tensor,
    coefficients: Sequence[Tensor],
    expert_factors: Sequence[Tensor],
    in_factor: Tensor,
    in_bias: Tensor | None,
    out_factor: Tensor,
    activation: str,
    save: bool,
    impl: str,
) -> tuple[Tensor, Tensor, Tensor]:
    T, (O, R) = z.shape[0], out_factor.shape
    A, B = (z.new_empty(T, R), z.new_empty(T, R)) if save else (absent(z), absent(z))
    return z.new_empty(T, O), A, B


def _backward(
    dy: Tensor,
    A: Tensor,
    B: Tensor,
    z: Tensor,
    coefficients: Sequence[Tensor],
    expert_factors: Sequence[Tensor],
    in_factor: Tensor,
    in_bias: Tensor | None,
    out_factor: Tensor,
    activation: str,
    needs: Sequence[bool],
    impl: str,
) -> list[Tensor]:
    module = launchers(impl, "cp")
    dz, das, dexperts, din, dbias, dout = module.cp_backward(
        dy,
        z,
        coefficients,
        expert_factors,
        in_factor,
        in_bias,
        out_factor,
        A,
        B,
        activation=activation,
        needs=module.Needs(*needs),
    )
    E = len(coefficients)
    gradients = [dz, *(das or [None] * E), *(dexperts or [None] * E), din, dbias, dout]
    return [absent(z) if gradient is None else gradient for gradient in gradients]


def _backward_fake(
    dy: Tensor,
    A: Tensor,
    B: Tensor,
    z: Tensor,
    coefficients: Sequence[Tensor],
    expert_factors: Sequence[Tensor],
    in_factor: Tensor,
    in_bias: Tensor | None,
    out_factor: Tensor,
    activation: str,
    needs: Sequence[bool],
    impl: str,
) -> list[Tensor]:
    E = len(coefficients)
    arguments = [z, *coefficients, *expert_factors, in_factor, in_bias, out_factor]
    return [
        absent(z) if argument is None or not needed else argument.new_empty(argument.shape)
        for argument, needed in zip(arguments, spread(needs, E), strict=True)
    ]


def spread(needs: Sequence[bool], E: int) -> list[bool]:
    """One flag per tensor from one per argument: the second and third arguments hold E tensors each."""
    dz, da, dexpert, *rest = needs
    return [dz, *[da] * E, *[dexpert] * E, *rest]


def _forward_flops(
    z: Shape, coefficients: Any, factors: Sequence[Shape], in_factor: Any, in_bias: Any, out: Shape, *_: Any, **__: Any
) -> int:
    (T, I), (O, R) = z, out
    return 2 * T * R * (I + O + sum(N for N, _ in factors))


def _backward_flops(
    dy: Any, A: Any, B: Any, z: Shape, coefficients: Any, factors: Sequence[Shape], in_factor: Any, in_bias: Any,
    out: Shape, activation: str, needs: Sequence[bool], *_: Any, **__: Any,
) -> int:  # fmt: skip
    """One product with each operand of the forward ones that needs a gradient, and dh = dy U_out before them."""
    (T, I), (O, R) = z, out
    N = sum(N for N, _ in factors)
    dz, da, dexpert, din, _bias, dout = (int(needed) for needed in needs)
    recomputed = N * int(len(factors) > 1 and bool(da or dexpert))
    return 2 * T * R * (O + recomputed + I * (dz + din) + N * (da + dexpert) + O * dout)


def _one_level(function: Callable[..., Any], first: int) -> Callable[..., Any]:
    """`function` for plain tensors where it takes lists: the arguments `first` and `first + 1`."""

    def with_plain_tensors(*arguments: Any) -> Any:
        before, (a, factor), after = arguments[:first], arguments[first : first + 2], arguments[first + 2 :]
        results = function(*before, [a], [factor], *after)
        return tuple(results) if isinstance(results, list) else results

    return with_plain_tensors


def _one_level_flops(function: Callable[..., int], first: int) -> Callable[..., int]:
    plain = _one_level(function, first)
    return lambda *arguments, **_: plain(*arguments)


_BACKWARD = f"{_SHARED}, str activation, bool[] needs, str impl"
_FORWARD = f"{_SHARED}, str activation, bool save, str impl) -> (Tensor, Tensor, Tensor)"

cp_backward = define(
    f"cp_backward(Tensor dy, Tensor A, Tensor B, Tensor z, Tensor a, Tensor expert_factor, {_BACKWARD})"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    _one_level(_backward, 4),
    _one_level(_backward_fake, 4),
    flops=_one_level_flops(_backward_flops, 4),
)
cp_hierarchy_backward = define(
    f"cp_hierarchy_backward(Tensor dy, Tensor A, Tensor B, Tensor z, Tensor[] a, Tensor[] expert_factors, {_BACKWARD})"
    " -> Tensor[]",
    _backward,
    _backward_fake,
    flops=_backward_flops,
)


def _context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    z, a, factors, in_factor, in_bias, out_factor, ctx.activation, _, ctx.impl = inputs
    _, A, B = output
    ctx.mark_non_differentiable(A, B)
    ctx.levels = len(a) if isinstance(a, list | tuple) else None
    levels = [a, factors] if ctx.levels is None else [*a, *factors]
    ctx.save_for_backward(A, B, z, *levels, in_factor, in_bias, out_factor)


def _autograd(ctx: Any, dy: Tensor, *_: Any) -> tuple[Any, ...]:
    A, B, z, *levels, in_factor, in_bias, out_factor = ctx.saved_tensors
    flags = [any(need) if isinstance(need, list | tuple) else need for need in ctx.needs_input_grad[:6]]
    rest = (in_factor, in_bias, out_factor, ctx.activation, flags, ctx.impl)
    if ctx.levels is None:
        return (*present(cp_backward(dy, A, B, z, *levels, *rest), flags), None, None, None)
    E = ctx.levels
    results = cp_hierarchy_backward(dy, A, B, z, levels[:E], levels[E:], *rest)
    dz, *gradients = present(results, spread(flags, E))
    return (dz, gradients[:E], gradients[E : 2 * E], *gradients[2 * E :], None, None, None)


cp = define(
    f"cp(Tensor z, Tensor a, Tensor expert_factor, {_FORWARD}",
    _one_level(_forward, 1),
    _one_level(_forward_fake, 1),
    setup_context=_context,
    backward=_autograd,
    flops=_one_level_flops(_forward_flops, 1),
)
cp_hierarchy = define(
    f"cp_hierarchy(Tensor z, Tensor[] a, Tensor[] expert_factors, {_FORWARD}",
    _forward,
    _forward_fake,
    setup_context=_context,
    backward=_autograd,
    flops=_forward_flops,
)

__all__ = ["cp", "cp_backward", "cp_hierarchy", "cp_hierarchy_backward"]

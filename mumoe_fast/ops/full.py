"""`mumoe::full`: the unfactorised layer (Eq. 1, 15), ``y = Σ_n a_n (W_n act(z) + b_n)``, a dense MoE.

The levels are one here: `a` (T, N) holds their joint coefficients, `weight` is (N, O, I), `bias` (N, O). Backward reads
the arguments alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from mumoe_fast.ops._library import absent, define, launchers, present

Shape = Sequence[int]

_ARGUMENTS = "Tensor z, Tensor a, Tensor weight, Tensor? bias, str activation"


def _forward(
    z: Tensor, a: Tensor, weight: Tensor, bias: Tensor | None, activation: str, support_only: bool, impl: str
) -> Tensor:
    y: Tensor = launchers(impl, "full").full_forward(z, a, weight, bias, activation=activation)
    return y


def _forward_fake(z: Tensor, a: Tensor, weight: Tensor, *_: Any) -> Tensor:
    return z.new_empty(z.shape[0], weight.shape[1])


def _backward(
    dy: Tensor,
    z: Tensor,
    a: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    activation: str,
    needs: Sequence[bool],
    support_only: bool,
    impl: str,
) -> tuple[Tensor, ...]:
    options: dict[str, Any] = {"activation": activation, "needs": tuple(needs)}
    if impl == "native":  # as for the factorised experts
        options["support_only"] = support_only
    gradients = launchers(impl, "full").full_backward(dy, z, a, weight, bias, **options)
    return tuple(absent(z) if gradient is None else gradient for gradient in gradients)


def _backward_fake(
    dy: Tensor,
    z: Tensor,
    a: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    activation: str,
    needs: Sequence[bool],
    *_: Any,
) -> tuple[Tensor, ...]:
    return tuple(
        x.new_empty(x.shape) if needed and x is not None else absent(z)
        for x, needed in zip((z, a, weight, bias), needs, strict=True)
    )


def _forward_flops(z: Shape, a: Any, weight: Shape, bias: Shape | None, *_: Any, **__: Any) -> int:
    """Every parameter once per token, as `rank` counts: the bias meets the coefficients too."""
    N, O, I = weight
    return 2 * z[0] * N * O * (I + int(bias is not None))


def _backward_flops(
    dy: Any, z: Shape, a: Any, weight: Shape, bias: Shape | None, activation: Any, needs: Any, *_: Any, **__: Any
) -> int:
    """dz and da come from the same products."""
    N, O, I = weight
    need_z, need_a, need_weight, need_bias = needs
    products = I * (int(need_z or need_a) + int(need_weight))
    biases = int(bias is not None) * (int(need_a) + int(need_bias))
    return 2 * z[0] * N * O * (products + biases)


full_backward = define(
    f"full_backward(Tensor dy, {_ARGUMENTS}, bool[] needs, bool support_only, str impl)"
    " -> (Tensor, Tensor, Tensor, Tensor)",
    _backward,
    _backward_fake,
    flops=_backward_flops,
)


def _context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *tensors, ctx.activation, ctx.support_only, ctx.impl = inputs
    ctx.save_for_backward(*tensors)


def _autograd(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
    needs = list(ctx.needs_input_grad[:4])
    gradients = full_backward(dy, *ctx.saved_tensors, ctx.activation, needs, ctx.support_only, ctx.impl)
    return (*present(gradients, needs), None, None, None)


full = define(
    f"full({_ARGUMENTS}, bool support_only, str impl) -> Tensor",
    _forward,
    _forward_fake,
    setup_context=_context,
    backward=_autograd,
    flops=_forward_flops,
)

__all__ = ["full", "full_backward"]

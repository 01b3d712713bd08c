"""The operators of one factorisation's experts, made from a description of it.

Every factorisation maps tokens z (T, I) and coefficients a_e (T, N_e) to y (T, O) through one tensor of parameters per
hierarchy level and a few that the levels share. `define_experts` registers for it

    mumoe::<name>             one level; z, a and the level's tensor are plain tensors
    mumoe::<name>_hierarchy   any number of levels, in lists

and their backward operators. Two forward operators, because a schema with `Tensor[]` doubles the cost of a call. Both
return y with the two contractions that backward reads, or empty tensors in their place when `save` is False. With
`support_only` the gradient of a coefficient that is zero may be given as zero.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

from torch import Tensor

from mumoe_fast.ops._library import absent, define, launchers, present

Shape = Sequence[int]


@dataclass(frozen=True)
class Family:
    """What the operators need to know of a factorisation.

    Attributes:
        name: of the operators, and of the launchers `<name>_forward` and `<name>_backward`.
        module: with the launchers.
        shared: schema of the parameters that all levels share, in the launchers' order; a "?" marks a bias.
        out_features: O, from the shapes of the levels' tensors and of the shared ones.
        saved: the shapes, without T, of the two contractions that backward reads, from the same and the implementation;
            None for one that backward computes again.
        chain: multiply-adds per token beyond one for each parameter, from the same.
    """

    name: str
    module: str
    shared: tuple[str, ...]
    out_features: Callable[[Sequence[Shape], Sequence[Any]], int]
    saved: Callable[[Sequence[Shape], Sequence[Any], str], tuple[Shape | None, Shape | None]]
    chain: Callable[[Sequence[Shape], Sequence[Any]], int] = lambda experts, shared: 0

    def forward(
        self, z: Tensor, coefficients: Sequence[Tensor], experts: Sequence[Tensor], *rest: Any
    ) -> tuple[Tensor, ...]:
        """Call the launcher."""
        *shared, activation, save, _, impl = rest
        launcher = getattr(launchers(impl, self.module), f"{self.name}_forward")
        return tuple(launcher(z, coefficients, experts, *shared, activation=activation, save=save))

    def forward_fake(
        self, z: Tensor, coefficients: Sequence[Tensor], experts: Sequence[Tensor], *rest: Any
    ) -> tuple[Tensor, ...]:
        """Empty tensors of the right shapes."""
        *shared, _, save, _, impl = rest
        shapes = [x.shape for x in experts], [None if x is None else x.shape for x in shared]
        T, O = z.shape[0], self.out_features(*shapes)
        kept = self.saved(*shapes, impl) if save else (None, None)
        saved = [absent(z) if shape is None else z.new_empty(T, *shape) for shape in kept]
        return z.new_empty(T, O), *saved

    def backward(
        self,
        dy: Tensor,
        first: Tensor,
        second: Tensor,
        z: Tensor,
        coefficients: Sequence[Tensor],
        experts: Sequence[Tensor],
        *rest: Any,
    ) -> list[Tensor]:
        """Call the launcher; every tensor argument from z on has its place in the result."""
        *shared, activation, needs, support_only, impl = rest
        launcher = getattr(launchers(impl, self.module), f"{self.name}_backward")
        options: dict[str, Any] = {"activation": activation, "needs": tuple(needs)}
        if impl == "native":  # a tile of Triton's has all of da by one product
            options["support_only"] = support_only
        dz, da, dexperts, *dshared = launcher(dy, z, coefficients, experts, *shared, first, second, **options)
        nothing = [None] * len(experts)
        gradients = [dz, *(da or nothing), *(dexperts or nothing), *dshared]
        return [absent(z) if gradient is None else gradient for gradient in gradients]

    def backward_fake(
        self,
        dy: Tensor,
        first: Tensor,
        second: Tensor,
        z: Tensor,
        coefficients: Sequence[Tensor],
        experts: Sequence[Tensor],
        *rest: Any,
    ) -> list[Tensor]:
        """Empty tensors of the arguments' shapes, or absent ones."""
        *shared, _, needs, _, _ = rest
        arguments = [z, *coefficients, *experts, *shared]
        return [
            argument.new_empty(argument.shape) if needed and argument is not None else absent(z)
            for argument, needed in zip(arguments, spread(needs, len(experts)), strict=True)
        ]

    def _sizes(self, shared: Sequence[Any]) -> list[int]:
        """Elements of each shared parameter that takes part in a product; a bias only adds."""
        return [
            0 if shape is None or "?" in schema else prod(shape)
            for schema, shape in zip(self.shared, shared, strict=True)
        ]

    def forward_flops(self, z: Shape, coefficients: Any, experts: Sequence[Shape], *rest: Any, **_: Any) -> int:
        """Each parameter once per token, and the chain."""
        shared = rest[: len(self.shared)]
        return 2 * z[0] * (sum(map(prod, experts)) + sum(self._sizes(shared)) + self.chain(experts, shared))

    def backward_flops(
        self,
        dy: Any,
        first: Any,
        second: Any,
        z: Shape,
        coefficients: Any,
        experts: Sequence[Shape],
        *rest: Any,
        **_: Any,
    ) -> int:
        """One product for each gradient asked for, those that lead to it, and for a hierarchy its levels once more."""
        shared, needs = rest[: len(self.shared)], rest[len(self.shared) + 1]
        sizes = self._sizes(shared)
        need_z, need_a, need_experts, *need_shared = (int(needed) for needed in needs)
        levels = sum(map(prod, experts))
        again = levels * int(len(experts) > 1 and bool(need_a or need_experts))
        own = sum(size * needed for size, needed in zip(sizes, need_shared, strict=True))
        through = sizes[-1] + sizes[0] * need_z + levels * (need_a + need_experts) + again
        return 2 * z[0] * (own + through + 2 * self.chain(experts, shared))


def spread(needs: Sequence[bool], E: int) -> list[bool]:
    """One flag per tensor from one per argument: the second and third arguments hold E tensors each."""
    dz, da, dexperts, *rest = needs
    return [dz, *[da] * E, *[dexperts] * E, *rest]


def _one_level(function: Callable[..., Any], first: int) -> Callable[..., Any]:
    """`function` for plain tensors where it takes lists: the arguments `first` and `first + 1`."""

    def with_plain_tensors(*arguments: Any, **_: Any) -> Any:
        before, (a, experts), after = arguments[:first], arguments[first : first + 2], arguments[first + 2 :]
        results = function(*before, [a], [experts], *after)
        return tuple(results) if isinstance(results, list) else results

    return with_plain_tensors


def _context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    z, a, experts, *shared, ctx.activation, _, ctx.support_only, ctx.impl = inputs
    _, *saved = output
    ctx.mark_non_differentiable(*saved)
    ctx.set_materialize_grads(False)  # or each would get zeros for one
    ctx.levels = len(a) if isinstance(a, list | tuple) else None
    levels = [a, experts] if ctx.levels is None else [*a, *experts]
    ctx.save_for_backward(*saved, z, *levels, *shared)


def _autograd(one_level: Callable[..., Any], hierarchy: Callable[..., Any]) -> Callable[..., Any]:
    """The formula of both forward operators, over their backward operators."""

    def backward(ctx: Any, dy: Tensor, *_: Any) -> tuple[Any, ...]:
        first, second, z, *tensors = ctx.saved_tensors
        flags = [any(need) if isinstance(need, list | tuple) else need for need in ctx.needs_input_grad[:-4]]
        options = (ctx.activation, flags, ctx.support_only, ctx.impl)
        if ctx.levels is None:
            return (*present(one_level(dy, first, second, z, *tensors, *options), flags), None, None, None, None)
        E = ctx.levels
        a, experts, shared = tensors[:E], tensors[E : 2 * E], tensors[2 * E :]
        results = hierarchy(dy, first, second, z, a, experts, *shared, *options)
        dz, *gradients = present(results, spread(flags, E))
        return (dz, gradients[:E], gradients[E : 2 * E], *gradients[2 * E :], None, None, None, None)

    return backward


def define_experts(family: Family) -> tuple[Callable[..., Any], Callable[..., Any]]:
    """Register the family's four operators and return the two forward ones: one level, and the hierarchy."""
    name, shared = family.name, ", ".join(family.shared)
    saved = "Tensor dy, Tensor first, Tensor second"
    backward_options = "str activation, bool[] needs, bool support_only, str impl"
    forward_options = "str activation, bool save, bool support_only, str impl"
    results = ", ".join(["Tensor"] * (3 + len(family.shared)))
    one_level_backward = define(
        f"{name}_backward({saved}, Tensor z, Tensor a, Tensor experts, {shared}, {backward_options}) -> ({results})",
        _one_level(family.backward, 4),
        _one_level(family.backward_fake, 4),
        flops=_one_level(family.backward_flops, 4),
    )
    hierarchy_backward = define(
        f"{name}_hierarchy_backward({saved}, Tensor z, Tensor[] a, Tensor[] experts, {shared}, {backward_options})"
        " -> Tensor[]",
        family.backward,
        family.backward_fake,
        flops=family.backward_flops,
    )
    autograd = _autograd(one_level_backward, hierarchy_backward)
    one_level = define(
        f"{name}(Tensor z, Tensor a, Tensor experts, {shared}, {forward_options}) -> (Tensor, Tensor, Tensor)",
        _one_level(family.forward, 1),
        _one_level(family.forward_fake, 1),
        setup_context=_context,
        backward=autograd,
        flops=_one_level(family.forward_flops, 1),
    )
    hierarchy = define(
        f"{name}_hierarchy(Tensor z, Tensor[] a, Tensor[] experts, {shared}, {forward_options})"
        " -> (Tensor, Tensor, Tensor)",
        family.forward,
        family.forward_fake,
        setup_context=_context,
        backward=autograd,
        flops=family.forward_flops,
    )
    return one_level, hierarchy

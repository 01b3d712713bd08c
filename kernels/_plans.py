"""Launches that are planned once: for few tokens the host's work before a launch takes longer than the kernel.

From tensors to a launch there are strides to split, a grid and a configuration to choose, and in Triton's JIT a type
and a divisibility to find out for each of twenty arguments: tens of microseconds in Python. All of it follows from the
tensors' shapes, strides, dtypes and 16-byte alignment. So a launch is described by a function of tensors without data,
which can depend on nothing else, and the description is remembered by just that, together with the compiled kernel.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from operator import itemgetter
from typing import Any

import torch
import triton
from torch import Tensor
from triton.compiler import CompiledKernel

from mumoe_fast.kernels._common import Launch, on_device, record
from mumoe_fast.kernels.configs import architecture

MOST_PLANS = 4096  # of one launcher; then it begins anew, for whoever comes with ever other numbers of tokens
_ALIGNMENT = 16  # bytes: all that the JIT asks about a pointer
_plans: list[dict[Any, _Plan]] = []  # of every launcher


def planned(describe: Callable[..., Launch]) -> Callable[..., None]:
    """Make of a description a function that launches it, on tensors (all but the first may be None) and options.

    ``describe(*tensors, device=device, **options)`` is given stand-ins on the meta device. In the arguments of the
    `Launch` that it returns, in tuples of any depth, every tensor is a stand-in or a view that starts where one does.
    It reads no other state than its arguments and the device's architecture, or a plan would outlive its reason: who
    changes a configuration calls `forget_plans`.
    """
    plans: dict[Any, _Plan] = {}
    _plans.append(plans)

    def launch_planned(first: Tensor, *others: Tensor | None, **options: Any) -> None:
        device, tensors = first.device, (first, *others)
        if record(lambda: describe(*tensors, device=device, **options)):
            return
        runtime = triton.knobs.runtime
        key = (
            *(device, architecture(device), tuple(options.items())),
            # What else the JIT compiles a kernel anew for.
            *(runtime.debug, runtime.add_stages_inspection_hook, triton.knobs.compilation.instrumentation_mode),
            *[None if x is None else (x.dtype, x.shape, x.stride(), x.data_ptr() % _ALIGNMENT) for x in tensors],
        )
        plan = plans.get(key)
        if plan is None:
            if len(plans) >= MOST_PLANS:
                plans.clear()
            stand_ins = [None if x is None else _stand_in(x) for x in tensors]
            plan = plans[key] = _Plan(describe(*stand_ins, device=device, **options), stand_ins)
        with on_device(device):
            plan.launch(tensors)

    return launch_planned


def forget_plans() -> None:
    """Plan every launch anew, because what plans rest on, such as `configs`, has changed."""
    for plans in _plans:
        plans.clear()


def _stand_in(x: Tensor) -> Tensor:
    return torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device="meta")


class _Plan:
    """A description with places for its tensors, and its kernel once that is compiled.

    The arguments are made by a list of values: first the tensors, then one place for each tuple, filled inner ones
    first, and from the end the constants. An `itemgetter` makes a tuple of values without a step in Python.
    """

    def __init__(self, described: Launch, stand_ins: Sequence[Tensor | None]) -> None:
        self._kernel, self._grid, self._options = described.kernel, described.grid, described.options
        self._run: Callable[..., object] | None = None
        self._tuples: list[tuple[int, Callable[[Sequence[Any]], Any]]] = []
        places = {x.untyped_storage()._cdata: place for place, x in enumerate(stand_ins) if x is not None}
        constants: list[Any] = []

        def place(name: str, argument: Any) -> int:
            if isinstance(argument, Tensor):
                if argument.untyped_storage()._cdata not in places or argument.storage_offset():
                    raise ValueError(
                        f"{name}: expected one of the planned tensors, or a view that starts where it does"
                    )
                return places[argument.untyped_storage()._cdata]
            if isinstance(argument, tuple) and argument:
                getter = _tuple_of([place(name, part) for part in argument])
                self._tuples.append((len(stand_ins) + len(self._tuples), getter))
                return self._tuples[-1][0]
            constants.append(argument)
            return -len(constants)

        arguments = {**described.arguments, **described.config.blocks}
        names = self._kernel.arg_names
        if arguments.keys() != set(names):
            raise TypeError(f"{self._kernel.fn.__name__}: expected {', '.join(names)}, got {', '.join(arguments)}")
        self._arguments = _tuple_of([place(name, arguments[name]) for name in names])
        self._values = [*([None] * len(self._tuples)), *reversed(constants)]

    def launch(self, tensors: Sequence[Tensor | None]) -> None:
        """Launch on these tensors, on the current device and stream."""
        if 0 in self._grid:
            return
        values = [*tensors, *self._values]
        for place, getter in self._tuples:
            values[place] = getter(values)
        if self._run is not None:
            self._run(*self._arguments(values))
            return
        compiled = self._kernel[self._grid](*self._arguments(values), **self._options)
        if isinstance(compiled, CompiledKernel):  # not so in the interpreter
            self._run = compiled[(*self._grid, 1, 1)[:3]]


def _tuple_of(places: Sequence[int]) -> Callable[[Sequence[Any]], Any]:
    """A function of values that makes a tuple of those at the places."""
    if len(places) > 1:
        return itemgetter(*places)
    (place,) = places
    return lambda values: (values[place],)

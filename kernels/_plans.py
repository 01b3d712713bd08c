"""Launchers that are planned once: for few tokens the host's work before a launch takes longer than the kernel.

From tensors to a launch there are strides to split, a grid and a configuration to choose, results to allocate, and in
Triton's JIT a type and a divisibility to find out for each of twenty arguments: tens of microseconds in Python. All of
it follows from the tensors' shapes, strides, dtypes and 16-byte alignment. So what a launcher does with tensors of one
kind is written down while it does it, and the next ones of that kind get just that, in a row: the compiled kernels, and
what torch computes in between.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial, wraps
from typing import Any, ParamSpec, TypeVar

import triton
from torch import Tensor

from mumoe_fast.kernels._common import dot_precision, launches_are_watched, on_device
from mumoe_fast.kernels._recorder import Recorder
from mumoe_fast.kernels.configs import architecture

MOST_PLANS = 2048  # of one launcher; then it begins anew, for whoever comes with ever other numbers of tokens
_ALIGNMENT = 16  # bytes: all that the JIT asks about a pointer
_plans: dict[str, dict[Any, _Plan | None]] = {}  # of every launcher by its name, of every kind of tensors

P = ParamSpec("P")
R = TypeVar("R")


@dataclass(frozen=True)
class _Plan:
    """What gives the result for other tensors of the kind; None where that cannot be repeated blindly."""

    again: Callable[[Sequence[Tensor | None]], Any] | None


_UNHEARD_OF = _Plan(None)


def planned(launcher: Callable[P, R]) -> Callable[P, R]:
    """A launcher that remembers: a function of tensors, None, lists of tensors, and of numbers and names.

    Its first call with tensors of a kind is an ordinary one, for many kinds come once. The second is written down.
    Where that fails (see `Recorder`), every later one is ordinary too.

    It reads no state but its arguments, the device's architecture and whether TF32 is allowed, or a plan would outlive
    its reason: who changes a configuration calls `forget_plans`.
    """
    plans: dict[Any, _Plan | None] = {}
    _plans[launcher.__name__] = plans

    @wraps(launcher)
    def call(*arguments: P.args, **options: P.kwargs) -> R:
        if launches_are_watched():  # recorded, or part of a plan that is being written
            return launcher(*arguments, **options)
        tensors, key = _flat(arguments)
        key += _state(tensors[0])
        key += options
        key += [tuple(option) if isinstance(option, list) else option for option in options.values()]
        for x in tensors:
            key.append(None if x is None else (x.dtype, x.shape, x.stride(), x.data_ptr() % _ALIGNMENT))
        kind = tuple(key)
        plan = plans.get(kind, _UNHEARD_OF)
        if plan is _UNHEARD_OF:
            if len(plans) >= MOST_PLANS:
                plans.clear()
            plans[kind] = None
        elif plan is None:
            return _written(plans, kind, tensors, partial(launcher, *arguments, **options))
        elif plan.again is not None:
            with on_device(tensors[0].device):
                result: R = plan.again(tensors)
                return result
        return launcher(*arguments, **options)

    return call


def forget_plans() -> None:
    """Plan everything anew, because what plans rest on, such as `configs`, has changed."""
    for plans in _plans.values():
        plans.clear()


def unplanned() -> set[str]:
    """The names of launchers that cannot be repeated blindly with tensors of a kind that they have met twice."""
    return {name for name, plans in _plans.items() for plan in plans.values() if plan is not None and not plan.again}


def _flat(arguments: Sequence[Any]) -> tuple[list[Any], list[Any]]:
    """The tensors in one list, and what else there is: the lengths of the lists they were in, and numbers."""
    tensors: list[Any] = []
    others: list[Any] = []
    for argument in arguments:
        if isinstance(argument, (list, tuple)):
            tensors += argument
            others.append(len(argument))
        elif argument is None or isinstance(argument, Tensor):
            tensors.append(argument)
        else:
            others.append(argument)
    return tensors, others


def _state(first: Tensor) -> list[Any]:
    """What else a launcher depends on, or the JIT compiles a kernel anew for."""
    runtime, device = triton.knobs.runtime, first.device
    knobs = runtime.debug, runtime.add_stages_inspection_hook, triton.knobs.compilation.instrumentation_mode
    return [device, architecture(device), dot_precision(first.dtype), *knobs]


def _written(plans: dict[Any, _Plan | None], kind: Any, tensors: Sequence[Tensor | None], call: Callable[[], R]) -> R:
    """The call's result; a plan of it is left in `plans`."""
    given = [x._cdata for x in tensors if x is not None]
    if len(set(given)) < len(given):  # of one tensor in two places nobody sees which is read
        return call()
    recorder = Recorder(tensors)
    with recorder:
        result = call()
    plans[kind] = _Plan(recorder.repetition(result))
    return result

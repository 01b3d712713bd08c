"""What a launcher did, written down, so that it can be done again to other tensors."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from operator import itemgetter
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from triton.compiler import CompiledKernel

from mumoe_fast.kernels._common import Launch, watch_launches

Values = list[Any]  # of a repetition: the tensors it is given, what it makes, and constants
_ALLOCATIONS = {
    torch.ops.aten.empty.memory_format,
    torch.ops.aten.empty_strided.default,
    torch.ops.aten.empty_like.default,
    torch.ops.aten.new_empty.default,
    torch.ops.aten.new_empty_strided.default,
}
_SHAPED_BY_NUMBERS = {torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape}


@dataclass(frozen=True)
class _Fill:
    """A tuple with tensors in it, to be made of the values and put among them."""

    place: int
    make: Callable[[Values], tuple[Any, ...]]
    holds: set[int]


@dataclass
class _Step:
    """Something done to the values; all it does is to put a tensor in the place `makes`, unless that is None."""

    makes: int | None
    reads: set[int] = field(default_factory=set)
    fills: list[_Fill] = field(default_factory=list)  # inner ones first
    do: Callable[[Values], None] = lambda values: None


@dataclass(frozen=True)
class _Known:
    """Where among the values a tensor is, and where one that starts at the same address is: a kernel asks no more."""

    place: int
    start: int


class Recorder(TorchDispatchMode):
    """Writes down what happens while it is entered: torch's operations, as they are dispatched, and kernels.

    It cannot be repeated where an operation gives anything but one tensor, new, a view or its first argument, or one
    whose shape depends on numbers; or where a tensor appears from elsewhere.
    """

    def __init__(self, tensors: Sequence[Tensor | None]) -> None:
        super().__init__()
        self._given = len(tensors)
        self._values: Values = [None] * len(tensors)
        self._steps: list[_Step] = []
        self._possible = True
        # By what is behind a Python object. Of what was freed another may come in the place, and is noted in its turn.
        self._known = {x._cdata: _Known(place, place) for place, x in enumerate(tensors) if x is not None}
        self._watch = ExitStack()

    def __enter__(self) -> Recorder:
        self._watch.enter_context(watch_launches(self._launch))
        super().__enter__()
        return self

    def __exit__(self, *raised: Any) -> None:
        super().__exit__(*raised)
        self._watch.close()

    def __torch_dispatch__(self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Any = None) -> Any:
        """Do it, and write it down."""
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        changes = func._schema.is_mutable
        if (
            _SHAPED_BY_NUMBERS.intersection(func.tags)
            or not isinstance(result, Tensor)
            or (changes and result is not kwargs.get("out", args[0]))
        ):
            self._possible = False
            return result
        if changes:
            self._steps.append(self._computation(func, args, kwargs, None))
            return result
        place, start = self._new_place(), self._start(result, args)
        if func in _ALLOCATIONS:
            step = _Step(place, do=_allocation(result, place))
        elif start is not None:
            step = _Step(place, {start}, do=_view(result, start, place))
        else:
            step = self._computation(func, args, kwargs, place)
        self._steps.append(step)
        self._known[result._cdata] = _Known(place, place if start is None else start)
        return result

    def _computation(self, func: Any, args: Sequence[Any], kwargs: dict[str, Any], place: int | None) -> _Step:
        """A call of the operator, or of torch's function for it where that is much quicker."""
        step = _Step(place)
        arguments = [self._place(argument, step) for argument in args]
        options = {name: self._place(option, step) for name, option in kwargs.items()}
        if func is torch.ops.aten.mm.default and place is not None:
            x, y = arguments
            step.do = _product(x, y, place)
        else:
            step.do = _call(func, arguments, options, step.fills, place)
        return step

    def _start(self, result: Tensor, args: Sequence[Any]) -> int | None:
        """Where the tensor is of which `result` is a view from the first element on, if it is one."""
        storage, address = result.untyped_storage()._cdata, (result.data_ptr(), result.dtype)
        for x in args:
            if isinstance(x, Tensor) and x.untyped_storage()._cdata == storage and (x.data_ptr(), x.dtype) == address:
                known = self._known.get(x._cdata)
                return None if known is None else known.start
        return None

    def _launch(self, launch: Launch, now: Callable[[], Any]) -> None:
        """Launch it, and write it down; the interpreter uses torch itself, which is none of the launcher's doing."""
        with _disable_current_modes():
            compiled = now()
        step = _Step(None)
        named = {**launch.arguments, **launch.config.blocks}
        arguments = _tuple_of([self._place(named[name], step, start=True) for name in launch.kernel.arg_names])
        fills = [(fill.place, fill.make) for fill in step.fills]
        if isinstance(compiled, CompiledKernel):
            run = compiled[(*launch.grid, 1, 1)[:3]]
        else:  # in the interpreter
            run = partial(launch.kernel[launch.grid], **launch.options)

        def do(values: Values) -> None:
            for place, make in fills:
                values[place] = make(values)
            run(*arguments(values))

        step.do = do
        self._steps.append(step)

    def _new_place(self, value: Any = None) -> int:
        self._values.append(value)
        return len(self._values) - 1

    def _place(self, argument: Any, step: _Step, *, start: bool = False) -> int:
        """Where the argument of a step is to be found."""
        if isinstance(argument, Tensor):
            known = self._known.get(argument._cdata)
            if known is None:
                self._possible = False
                return self._new_place()
            place = known.start if start else known.place
            step.reads.add(place)
            return place
        if isinstance(argument, list | tuple) and _has_tensor(argument):
            inner = _Step(None, fills=step.fills)
            make = _tuple_of([self._place(part, inner, start=start) for part in argument])
            step.reads |= inner.reads
            step.fills.append(_Fill(self._new_place(), make, inner.reads))
            return step.fills[-1].place
        return self._new_place(argument)

    def repetition(self, result: Any) -> Callable[[Sequence[Tensor | None]], Any] | None:
        """A function of tensors that does all that and gives what then was the result; None if there is none."""
        returned = _Step(None)
        build = self._builder(result, returned)
        if not self._possible:
            return None
        steps, wanted = [], set(returned.reads)
        for step in reversed(self._steps):
            if step.makes is None or step.makes in wanted:
                wanted |= step.reads
                steps.append(step)
        actions = _freeing(steps[::-1], kept={*range(self._given), *returned.reads})
        blank = self._values[self._given :]

        def again(tensors: Sequence[Tensor | None]) -> Any:
            values = [*tensors, *blank]
            for do in actions:
                do(values)
            return build(values)

        return again

    def _builder(self, result: Any, returned: _Step) -> Callable[[Values], Any]:
        if isinstance(result, list | tuple):
            parts, kind = [self._builder(part, returned) for part in result], type(result)
            return lambda values: kind([part(values) for part in parts])
        return itemgetter(self._place(result, returned))


def _freeing(steps: Sequence[_Step], kept: set[int]) -> list[Callable[[Values], None]]:
    """What the steps do, and that a tensor is let go where it is read for the last time."""
    last = {}
    for number, step in enumerate(steps):
        last.update(dict.fromkeys(step.reads, number))
    actions = []
    for number, step in enumerate(steps):
        actions.append(step.do)
        done = {place for place, end in last.items() if end == number and place not in kept}
        if done and any(later.makes is not None for later in steps[number + 1 :]):
            tuples = [fill.place for before in steps[: number + 1] for fill in before.fills if fill.holds & done]
            actions.append(partial(_free, [*done, *tuples]))
    return actions


def _free(places: Sequence[int], values: Values) -> None:
    for place in places:
        values[place] = None


def _allocation(result: Tensor, place: int) -> Callable[[Values], None]:
    make = partial(torch.empty_strided, result.shape, result.stride(), dtype=result.dtype, device=result.device)

    def allocate(values: Values) -> None:
        values[place] = make()

    return allocate


def _view(result: Tensor, start: int, place: int) -> Callable[[Values], None]:
    """One view in the place of a chain of them."""
    shape, stride = result.shape, result.stride()

    def view(values: Values) -> None:
        values[place] = values[start].as_strided(shape, stride)

    return view


def _product(x: int, y: int, place: int) -> Callable[[Values], None]:
    def multiply(values: Values) -> None:
        values[place] = torch.mm(values[x], values[y])

    return multiply


def _call(
    func: Any, arguments: list[int], options: dict[str, int], fills: list[_Fill], place: int | None
) -> Callable[[Values], None]:
    def call(values: Values) -> None:
        for fill in fills:
            values[fill.place] = fill.make(values)
        named = {name: values[option] for name, option in options.items()}
        result = func(*[values[argument] for argument in arguments], **named)
        if place is not None:
            values[place] = result

    return call


def _has_tensor(argument: Any) -> bool:
    if isinstance(argument, list | tuple):
        return any(map(_has_tensor, argument))
    return isinstance(argument, Tensor)


def _tuple_of(places: Sequence[int]) -> Callable[[Values], tuple[Any, ...]]:
    """A function of values that makes a tuple of those at the places, without a step in Python where there are two."""
    if len(places) > 1:
        return itemgetter(*places)
    return lambda values: tuple([values[place] for place in places])

"""What the other tests of kernels stand under in the interpreter: that every kind of race and stray access is seen.

That no kernel of the library has one is held by the fixture `tiles`, and in tests/test_gpu_tiles.py for GPUs' own.
"""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
import triton
import triton.language as tl
from triton.runtime.interpreter import InterpreterError

from mumoe_fast.kernels._common import INTERPRET
from mumoe_fast.testing.races import no_races

pytestmark = pytest.mark.skipif(not INTERPRET.value, reason="accesses are seen in the interpreter")


@triton.jit
def _copy(x_ptr, y_ptr, STEP: tl.constexpr, BLOCK: tl.constexpr):
    """Programs whose blocks lie STEP apart."""
    offs = tl.program_id(0) * STEP + tl.arange(0, BLOCK)
    tl.store(y_ptr + offs, tl.load(x_ptr + offs))


@triton.jit
def _shift(x_ptr, n, BACK: tl.constexpr, BLOCK: tl.constexpr):
    """In place, from BACK entries before."""
    offs = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(x_ptr + offs, tl.load(x_ptr + offs - BACK, mask=(offs >= BACK) & (offs - BACK < n)), mask=offs < n)


@triton.jit
def _through_memory(x_ptr, y_ptr, BARRIER: tl.constexpr, BLOCK: tl.constexpr):
    """Reverses what it has stored, by loading it again."""
    offs = tl.arange(0, BLOCK)
    tl.store(y_ptr + offs, tl.load(x_ptr + offs))
    if BARRIER:
        tl.debug_barrier()
    y = tl.load(y_ptr + BLOCK - 1 - offs)
    if BARRIER:
        tl.debug_barrier()
    tl.store(y_ptr + offs, y)


@triton.jit
def _twice(x_ptr, y_ptr, BLOCK: tl.constexpr):
    offs = tl.arange(0, BLOCK)
    tl.store(y_ptr + offs, tl.load(x_ptr + offs))
    tl.store(y_ptr + BLOCK - 1 - offs, tl.load(x_ptr + offs))


@triton.jit
def _scatter(x_ptr, y_ptr, DIVISOR: tl.constexpr, BLOCK: tl.constexpr):
    offs = tl.arange(0, BLOCK)
    tl.store(y_ptr + offs // DIVISOR, tl.load(x_ptr + offs))


RIGHT: dict[str, tuple[Any, int, dict[str, Any]]] = {
    "every program its block": (_copy, 2, {"STEP": 32}),
    "over what it has loaded": (_shift, 2, {"n": 64, "BACK": 0}),
    "through memory": (_through_memory, 1, {"BARRIER": True}),
    "other places": (_scatter, 1, {"DIVISOR": 1}),
}
OVER = {"_shift": {"x_ptr"}, "_through_memory": {"y_ptr"}}  # stored over what the program had loaded
WRONG: dict[str, tuple[Any, int, dict[str, Any]]] = {
    "program 1 of _copy stores where another program stores: 64 bytes of y_ptr": (_copy, 2, {"STEP": 16}),
    "program 2 of _copy loads 32 entries outside its arguments' memory": (_copy, 3, {"STEP": 32}),
    "program 1 of _shift loads what another program stores: 128 bytes of x_ptr": (_shift, 2, {"n": 64, "BACK": 32}),
    "program 1 of _shift stores where another program loads: 64 bytes of x_ptr": (_shift, 2, {"n": 64, "BACK": -16}),
    "program 0 of _through_memory loads what it has stored with no barrier between: 128 bytes of y_ptr": (
        _through_memory,
        1,
        {"BARRIER": False},
    ),
    "program 0 of _twice stores twice with no barrier between: 128 bytes of y_ptr": (_twice, 1, {}),
    "program 0 of _scatter stores several entries of one tile to one place": (_scatter, 1, {"DIVISOR": 2}),
}


def run(kernel: Any, grid: int, options: dict[str, Any]) -> None:
    x, y = torch.arange(64.0), torch.zeros(64)
    pointers = {"x_ptr": x} if kernel is _shift else {"x_ptr": x, "y_ptr": y}
    kernel[(grid,)](**pointers, **options, BLOCK=32)


@pytest.mark.parametrize("case", RIGHT.values(), ids=RIGHT)
def test_what_is_right_passes(case: tuple[Any, int, dict[str, Any]]) -> None:
    with no_races() as seen:
        run(*case)
    name = case[0].fn.__name__
    assert seen.launches == {name: 1}
    assert seen.in_place.get(name) == OVER.get(name)


@pytest.mark.parametrize(("message", "case"), WRONG.items(), ids=WRONG)
def test_what_is_wrong_is_named(message: str, case: tuple[Any, int, dict[str, Any]]) -> None:
    with pytest.raises(InterpreterError, match=rf"{re.escape(message)} \(test_races\.py, line \d+\)"), no_races():
        run(*case)


def test_stores_outside_are_not_carried_out() -> None:
    x, y = torch.arange(64.0), torch.zeros(64)
    with pytest.raises(InterpreterError, match="stores 16 entries outside its arguments' memory"), no_races():
        _copy[(1,)](x, y[:48].clone(), STEP=32, BLOCK=64)


def test_tensors_in_one_allocation_are_named_together() -> None:
    x = torch.arange(96.0)
    message = "stores where another program loads: 64 bytes of x_ptr, y_ptr"
    with pytest.raises(InterpreterError, match=message), no_races():
        _copy[(2,)](x[16:], x, STEP=32, BLOCK=32)

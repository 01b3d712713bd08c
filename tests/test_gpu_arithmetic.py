"""The kernels by the acceptance rule with a GPU's division, roots and exponentials, which do not round correctly.

The interpreter's are numpy's and nearly exact. Here each is off by as much as NVIDIA allows its own (PTX ISA, CUDA's
table of maximum errors), always upwards, always downwards or at random; erf is left as it is. Reductions of two tiles
at once are the GPU's too, which the interpreter otherwise takes one by one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from triton.runtime.interpreter import TensorHandle, interpreter_builder

from mumoe_fast.kernels import _entmax_solver
from mumoe_fast.kernels._common import INTERPRET
from mumoe_fast.testing.acceptance import assert_accepted
from mumoe_fast.testing.cases import Case, cases

pytestmark = [
    pytest.mark.skipif(not INTERPRET.value, reason="a GPU has its own"),
    pytest.mark.usefixtures("tiles"),
]

Array = NDArray[Any]
TINY = np.finfo(np.float32).tiny
LOG2_E = np.float32(1.4426950408889634)
DIRECTIONS: dict[str, Callable[[tuple[int, ...]], Any]] = {
    "up": np.ones,
    "down": lambda shape: -np.ones(shape),
    "random": lambda shape: np.random.default_rng(0).uniform(-1, 1, shape),
}


def flushed(x: Array) -> Array:
    """Subnormal numbers as zero, which instructions with ``.ftz`` take them for."""
    return np.where(np.abs(x) < TINY, np.zeros_like(x), x)


# What computes it, from operands in float64, the largest relative error, and the (last) operand of which it is exact:
# nobody promises x / 1 and √1, but tables of reciprocals and roots begin there.
OPERATIONS: dict[str, tuple[Callable[..., Array], float, float]] = {
    "create_fdiv": (np.divide, 2.0**-22, 1),  # div.full.f32
    "create_sqrt": (lambda x: np.sqrt(flushed(x)), 2.0**-23, 1),  # sqrt.approx.ftz.f32
    "create_rsqrt": (lambda x: 1 / np.sqrt(flushed(x)), 2.0**-22.9, 1),  # rsqrt.approx.ftz.f32
    # ex2.approx.f32 of a product that is rounded
    "create_exp": (lambda x: np.exp2((x.astype(np.float32) * LOG2_E).astype(np.float64)), 2.0**-22, 0),
    "create_log": (np.log, 2.0**-23, 1),  # libdevice: one unit at the last
}


@contextmanager
def gpu_arithmetic(direction: str) -> Iterator[None]:
    """Under it the interpreter's float32 operations err as a GPU's may."""

    def approximate(name: str) -> Callable[..., TensorHandle]:
        exact = getattr(interpreter_builder, name)
        compute, error, exact_of = OPERATIONS[name]

        def operation(*operands: TensorHandle) -> TensorHandle:
            if any(x.data.dtype != np.float32 for x in operands):
                return exact(*operands)
            with np.errstate(all="ignore"):
                result = compute(*(x.data.astype(np.float64) for x in operands))
                errs = error * DIRECTIONS[direction](result.shape) * (operands[-1].data != exact_of)
            return TensorHandle((result * (1 + errs)).astype(np.float32), operands[0].dtype.scalar)

        return operation

    with patch.object(_entmax_solver, "INTERPRET", False), ExitStack() as patches:
        for name in OPERATIONS:
            patches.enter_context(patch.object(interpreter_builder, name, approximate(name)))
        yield


def tried() -> Iterator[object]:
    """Every family's quick case in float32 at random, and all where there is time: the interpreter is slow."""
    for direction in DIRECTIONS:
        for case in cases():
            if case.family != "layer" and case.dtype != torch.float16:
                often = case.quick and case.dtype == torch.float32 and direction == "random"
                yield pytest.param(case, direction, marks=() if often else pytest.mark.slow, id=f"{case}-{direction}")


@pytest.mark.parametrize(("case", "direction"), tried())
def test_with_a_gpus_arithmetic(case: Case, direction: str) -> None:
    trial = case.build(torch.device("cpu"))
    with gpu_arithmetic(direction):
        results = trial.run("triton")
    assert_accepted(trial.answer.verdicts(results))


def test_a_division_off_by_ten_units_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """So the rule is tight enough to notice arithmetic that is worse than a GPU's."""
    compute, error, exact_of = OPERATIONS["create_fdiv"]
    monkeypatch.setitem(OPERATIONS, "create_fdiv", (compute, 5 * error, exact_of))
    case = next(case for case in cases() if str(case) == "entmax/T3-N33-alpha1/float32")
    trial = case.build(torch.device("cpu"))
    with gpu_arithmetic("random"):
        verdicts = trial.answer.verdicts(trial.run("triton"))
    assert not all(verdict.passed for verdict in verdicts)

"""The same bits every time, alone and while another kernel runs: what a race or an atomic sum would change."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from mumoe_fast.testing.cases import Case, cases
from mumoe_fast.testing.trials import Trial
from tests.gpu import large_cases
from tests.gpu.stand_in import DEVICE, HERE, bits, busy_stream, on_gpu

REPEATS = 1000 if HERE else 2
SMALL = [case for case in cases() if case.quick and (case.dtype == torch.bfloat16 or case.family == "layer")]
IN_THE_INTERPRETER = [case for case in SMALL if case.family in ("gate", "cp")]


def changes(trial: Trial, repeats: int, before_each: Callable[[], None]) -> dict[str, int]:
    """How many repeats gave other bits than the first run, by the result's name; those that never did are left out."""
    first = {name: bits(x).clone() for name, x in trial.run("triton").items()}
    other = {name: torch.zeros((), dtype=torch.int64, device=DEVICE) for name in first}
    for _ in range(repeats):
        before_each()
        for name, x in trial.run("triton").items():
            other[name] += (bits(x) != first[name]).any()
    return {name: int(count) for name, count in other.items() if count}


def nothing() -> None:
    """Alone."""


@pytest.mark.parametrize("case", SMALL if HERE else IN_THE_INTERPRETER, ids=str)
@pytest.mark.parametrize("beside", ["alone", on_gpu("busy", id="beside another kernel")])
def test_small_inputs_give_the_same_bits(case: Case, beside: str) -> None:
    assert changes(case.build(DEVICE), REPEATS, nothing if beside == "alone" else busy_stream()) == {}


@pytest.mark.parametrize(
    "case", [on_gpu(case, id=str(case)) for case in large_cases.cases() if case.dtype == torch.bfloat16]
)
@pytest.mark.parametrize("beside", ["alone", "beside another kernel"])
def test_large_inputs_give_the_same_bits(case: Case, beside: str) -> None:
    assert changes(case.build(DEVICE), REPEATS // 5, nothing if beside == "alone" else busy_stream()) == {}


def test_a_change_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """A result whose last bit changes in one of the repeats, of the size that a race has."""
    from mumoe_fast.kernels import entmax

    forward, calls = entmax.entmax_forward, []

    def racing(x: torch.Tensor, alpha: float) -> torch.Tensor:
        calls.append(1)
        a = forward(x, alpha)
        if len(calls) == 3:
            bits(a)[0, 0] ^= 1
        return a

    monkeypatch.setattr(entmax, "entmax_forward", racing)
    case = next(case for case in SMALL if case.family == "entmax")
    assert changes(case.build(DEVICE), 3, nothing)["a"] == 1

"""The native unfactorised experts against float64 truth: supports of every size, and tokens in pieces."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from mumoe_fast.ops._native_library import available
from mumoe_fast.testing.problems_bilinear import (
    FULL_NEEDS,
    BilinearProblem,
    bilinear_expected,
    full_problem,
    run_full,
)
from tests.layouts import LAYOUTS, dense_coefficients

pytestmark = pytest.mark.skipif(available() is not None, reason=str(available()))

DTYPES = (torch.float32, torch.bfloat16)


def run(problem: BilinearProblem, needed: tuple[str, ...] = FULL_NEEDS, **options: bool) -> dict[str, Tensor]:
    return run_full(torch.ops.mumoe_native, problem, needed, **options)


def check(problem: BilinearProblem) -> None:
    got = run(problem)
    assert all(x.dtype == problem.dtype for x in got.values())
    bilinear_expected(problem).accept(got)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("dense", [False, True])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(("I", "O", "N"), [(1, 1, 1), (17, 15, 5), (16, 33, 40), (31, 16, 16)])
@pytest.mark.parametrize("T", [1, 19])
def test_full(T: int, I: int, O: int, N: int, bias: bool, dense: bool, dtype: torch.dtype) -> None:
    problem = full_problem(T, I, O, N, bias=bias, dtype=dtype)
    check(dense_coefficients(problem) if dense else problem)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("activation", ["gelu", "gelu_tanh", "relu", "silu"])
def test_activations(activation: str, dtype: torch.dtype) -> None:
    check(full_problem(17, 67, 9, 4, activation=activation, dtype=dtype))


@pytest.mark.parametrize("dense", [False, True])
def test_more_tokens_than_an_expert_takes_at_once(dense: bool) -> None:
    problem = full_problem(1030, 5, 3, 2, activation="gelu")
    check(dense_coefficients(problem) if dense else problem)


@pytest.mark.parametrize("needed", [*((name,) for name in FULL_NEEDS), ("z", "weight"), ()])
def test_only_what_is_needed(needed: tuple[str, ...]) -> None:
    problem = full_problem(17, 18, 9, 3, activation="relu")
    every, some = run(problem), run(problem, needed)
    assert some.keys() == {"y"} | {f"d{name}" for name in needed}
    for name, x in some.items():  # without da, dz is summed over the support alone: other GEMMs, other rounding
        torch.testing.assert_close(x, every[name], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("bias", [True, False])
def test_gradient_on_the_support_alone(bias: bool) -> None:
    problem = full_problem(19, 16, 12, 20, bias=bias)
    results, everywhere = run(problem, support_only=True), run(problem)
    support = problem.inputs["a"] != 0
    torch.testing.assert_close(results["da"][support], everywhere["da"][support], rtol=1e-5, atol=1e-5)
    assert not results["da"][~support].any()
    assert everywhere["da"][~support].all()
    torch.testing.assert_close(results["dz"], everywhere["dz"], rtol=1e-5, atol=1e-5)


def test_an_expert_that_no_token_chose() -> None:
    problem = full_problem(7, 16, 12, 5)
    problem.inputs["a"][:, 2] = 0
    results = run(problem)
    bilinear_expected(problem).accept(results)
    assert not results["dweight"][2].any()
    assert not results["dbias"][2].any()


def test_no_tokens() -> None:
    results = run(full_problem(0, 16, 12, 8, activation="gelu"))
    assert results["y"].shape == (0, 12)
    assert not any(results[name].any() for name in ("dweight", "dbias"))


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: layout.__name__)
def test_any_strides(layout: object) -> None:
    check(full_problem(17, 18, 19, 3, activation="gelu").map(layout))  # type: ignore[arg-type]


def test_twice_gives_the_same_bits_and_changes_no_argument() -> None:
    torch.set_num_threads(2)
    problem = full_problem(600, 96, 80, 6, activation="gelu")
    before, first, second = problem.map(Tensor.clone), run(problem), run(problem)
    torch.set_num_threads(1)
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert all(torch.equal(x, before.inputs[name]) for name, x in problem.inputs.items())
    assert torch.equal(problem.dy, before.dy)


@pytest.mark.parametrize("spoilt", ["z", "a"])
def test_a_bad_token_poisons_its_own_rows_only(spoilt: str) -> None:
    problem = dense_coefficients(full_problem(20, 18, 9, 3, activation="gelu"))
    clean, bad = run(problem), problem.inputs[spoilt].clone()
    bad[3, 1] = bad[18, 0] = float("nan")
    poisoned = run(replace(problem, inputs=problem.inputs | {spoilt: bad}))
    others = [t for t in range(20) if t not in (3, 18)]
    for row_of_token in ("y", "dz", "da"):
        assert torch.equal(poisoned[row_of_token][others], clean[row_of_token][others])
    assert poisoned["y"][[3, 18]].isnan().all()

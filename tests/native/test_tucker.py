"""The native Tucker experts against float64 truth."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from mumoe_fast.ops._native_library import available
from mumoe_fast.testing.problems_bilinear import (
    TUCKER_NEEDS,
    BilinearProblem,
    bilinear_expected,
    run_tucker,
    tucker_problem,
)
from tests.layouts import LAYOUTS, dense_coefficients

pytestmark = pytest.mark.skipif(available() is not None, reason=str(available()))

native = torch.ops.mumoe_native
DTYPES = (torch.float32, torch.bfloat16)


def run(problem: BilinearProblem, needed: tuple[str, ...] = TUCKER_NEEDS, **options: bool) -> dict[str, Tensor]:
    return run_tucker(native, problem, needed, **options)


def check(problem: BilinearProblem) -> None:
    got = run(problem)
    assert all(x.dtype == problem.dtype for x in got.values())
    bilinear_expected(problem).accept(got)


SHAPES = [
    ((1,), (1, 1, 1)),
    ((40,), (5, 17, 9)),
    ((40,), (16, 31, 33)),
    ((33, 4), (3, 2, 18, 16)),
    ((9, 2, 20), (4, 1, 3, 15, 7)),
    ((6, 5, 3, 4), (1, 3, 1, 2, 17, 18)),
]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("dense", [False, True])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(("N", "R"), SHAPES, ids=str)
@pytest.mark.parametrize("T", [1, 19])
def test_tucker(T: int, N: tuple[int, ...], R: tuple[int, ...], bias: bool, dense: bool, dtype: torch.dtype) -> None:
    problem = tucker_problem(T, 23, 11, N, R, bias=bias, dtype=dtype)
    check(dense_coefficients(problem) if dense else problem)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("activation", ["gelu", "gelu_tanh", "relu", "silu"])
def test_activations(activation: str, dtype: torch.dtype) -> None:
    check(tucker_problem(7, 67, 9, (20,), (4, 24, 11), activation=activation, dtype=dtype))


def test_tokens_and_modes_in_pieces() -> None:
    """130 tokens of 16,640 numbers of v, and 8 modes of 2,080 for 130 tokens, exceed what there is at a time."""
    check(tucker_problem(130, 5, 3, (6,), (8, 2080, 2)))
    check(tucker_problem(300, 5, 3, (6, 4), (5, 4, 420, 3)))


@pytest.mark.parametrize("needed", [*((name,) for name in TUCKER_NEEDS), ("z", "in_bias"), ()])
def test_only_what_is_needed(needed: tuple[str, ...]) -> None:
    problem = tucker_problem(17, 18, 9, (5, 4), (2, 3, 18, 7), activation="relu")
    every, some = run(problem), run(problem, needed)
    levels = {"coefficients": ("a_0", "a_1"), "expert_factors": ("U_0", "U_1")}
    assert some.keys() == {"y"} | {f"d{name}" for field in needed for name in levels.get(field, (field,))}
    assert all(torch.equal(some[name], every[name]) for name in some)


def test_gradient_on_the_support_alone() -> None:
    problem = tucker_problem(9, 16, 12, (64,), (5, 8, 7))
    problem = replace(problem, inputs=problem.inputs | {"a_0": problem.inputs["a_0"] * (torch.rand(9, 64) < 0.2)})
    results, everywhere = run(problem, support_only=True), run(problem)
    support = problem.inputs["a_0"] != 0
    torch.testing.assert_close(results["da_0"][support], everywhere["da_0"][support], rtol=1e-4, atol=1e-5)
    assert not results["da_0"][~support].any()
    assert everywhere["da_0"][~support].all()


def test_nothing_is_saved_where_nothing_is_needed() -> None:
    x = tucker_problem(17, 18, 9, (5,), (3, 8, 7)).inputs
    arguments = x["z"], [x["a_0"]], [x["U_0"]], x["in_factor"], x["in_bias"], x["core"], x["out_factor"]
    y, B, c = native.tucker_forward(*arguments, activation="none", save=False)
    assert B.shape == c.shape == (0,)
    assert torch.equal(y, native.tucker_forward(*arguments, activation="none", save=True)[0])


def test_no_tokens() -> None:
    results = run(tucker_problem(0, 16, 12, (8, 3), (2, 3, 21, 5), activation="gelu"))
    assert results["y"].shape == (0, 12)
    assert not any(results[name].any() for name in ("dU_0", "dU_1", "din_factor", "din_bias", "dcore", "dout_factor"))


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: layout.__name__)
def test_any_strides(layout: object) -> None:
    check(tucker_problem(17, 20, 9, (5, 3), (2, 3, 17, 7), activation="gelu").map(layout))  # type: ignore[arg-type]


def test_twice_gives_the_same_bits_and_changes_no_argument() -> None:
    torch.set_num_threads(2)
    problem = tucker_problem(300, 40, 30, (12, 3), (4, 2, 130, 33), activation="gelu")
    before, first, second = problem.map(Tensor.clone), run(problem), run(problem)
    torch.set_num_threads(1)
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert all(torch.equal(x, before.inputs[name]) for name, x in problem.inputs.items())
    assert torch.equal(problem.dy, before.dy)


@pytest.mark.parametrize("spoilt", ["z", "a_1"])
def test_a_bad_token_poisons_its_own_rows_only(spoilt: str) -> None:
    problem = tucker_problem(20, 18, 9, (5, 4), (2, 3, 8, 7), activation="gelu")
    clean, bad = run(problem), problem.inputs[spoilt].clone()
    bad[3, 1] = bad[18, 0] = float("nan")
    poisoned = run(replace(problem, inputs=problem.inputs | {spoilt: bad}))
    others = [t for t in range(20) if t not in (3, 18)]
    for row_of_token in ("y", "dz", "da_0"):
        assert torch.equal(poisoned[row_of_token][others], clean[row_of_token][others])
    assert poisoned["y"][[3, 18]].isnan().all()

"""The native TR experts against float64 truth; TT is the case R_1 = 1."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from mumoe_fast.ops._native_library import available
from mumoe_fast.testing.problems_tr import TRProblem, tr_expected, tr_problem

pytestmark = pytest.mark.skipif(available() is not None, reason=str(available()))

native = torch.ops.mumoe_native


def run(problem: TRProblem, support_only: bool = False) -> dict[str, Tensor]:
    x = problem.inputs
    arguments: tuple[Any, ...] = (
        x["z"], problem.levels("a"), problem.levels("U"), x["in_core"], x.get("in_bias"), x["out_core"],
    )  # fmt: skip
    y, A, B = native.tr_forward(*arguments, activation=problem.activation, save=True)
    dz, da, dU, d_in, d_bias, d_out = native.tr_backward(
        problem.dy, *arguments, A, B, activation=problem.activation, needs=[True] * 6, support_only=support_only
    )
    results = {"y": y, "dz": dz, "din_core": d_in, "din_bias": d_bias, "dout_core": d_out}
    results |= {f"da_{e}": d for e, d in enumerate(da)} | {f"dU_{e}": d for e, d in enumerate(dU)}
    return {name: x for name, x in results.items() if x is not None}


SHAPES = [
    ((1,), (1, 1, 1)),
    ((20,), (4, 4, 21)),
    ((20,), (1, 5, 16)),
    ((20, 3), (4, 3, 5, 17)),
    ((9, 2, 20), (2, 4, 1, 6, 7)),
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("share", [0.05, 1.0])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(("N", "ranks"), SHAPES, ids=str)
@pytest.mark.parametrize("T", [1, 7])
def test_tr(T: int, N: tuple[int, ...], ranks: tuple[int, ...], bias: bool, share: float, dtype: torch.dtype) -> None:
    problem = tr_problem(T, 18, 11, N, ranks, share=share, bias=bias, dtype=dtype)
    tr_expected(problem).accept(run(problem))


@pytest.mark.parametrize("activation", ["gelu", "gelu_tanh", "relu", "silu"])
def test_activations(activation: str) -> None:
    problem = tr_problem(7, 18, 11, (20,), (4, 4, 9), share=0.05, activation=activation)
    tr_expected(problem).accept(run(problem))


def test_gradient_on_the_support_alone() -> None:
    problem = tr_problem(7, 18, 11, (60,), (4, 4, 9), share=0.05)
    results, everywhere = run(problem, support_only=True), run(problem)
    support = problem.inputs["a_0"] != 0
    assert torch.allclose(results["da_0"][support], everywhere["da_0"][support], rtol=1e-4, atol=1e-4)
    assert not results["da_0"][~support].any()


def test_no_tokens() -> None:
    results = run(tr_problem(0, 18, 11, (20, 3), (4, 3, 5, 17), share=0.5))
    assert results["y"].shape == (0, 11)
    assert not any(results[name].any() for name in ("dU_0", "dU_1", "din_core", "din_bias", "dout_core"))

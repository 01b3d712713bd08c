"""The native CP experts against float64 truth, with coefficients over the support and dense ones."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from mumoe_fast import reference
from mumoe_fast.ops._native_library import available
from mumoe_fast.testing.problems_cp import CPProblem, cp_expected, cp_problem

pytestmark = pytest.mark.skipif(available() is not None, reason=str(available()))

native = torch.ops.mumoe_native
DTYPES = (torch.float32, torch.bfloat16)
ACTIVATIONS = ("none", "gelu", "gelu_tanh", "relu", "silu")
ALL = [True] * 6


def arguments(problem: CPProblem) -> tuple[Any, ...]:
    return (
        problem.z,
        list(problem.coefficients),
        list(problem.expert_factors),
        problem.in_factor,
        problem.in_bias,
        problem.out_factor,
    )


def run(problem: CPProblem, needs: list[bool] = ALL, support_only: bool = False) -> dict[str, Tensor]:
    y, A, B = native.cp_forward(*arguments(problem), activation=problem.activation, save=True)
    dz, da, dU, d_in, d_bias, d_out = native.cp_backward(
        problem.dy, *arguments(problem), A, B, activation=problem.activation, needs=needs, support_only=support_only
    )
    named = {"y": y, "dz": dz, "din_factor": d_in, "din_bias": d_bias, "dout_factor": d_out}
    named |= {f"da_{e}": gradient for e, gradient in enumerate(da)}
    named |= {f"dU_{e}": gradient for e, gradient in enumerate(dU)}
    return {name: x for name, x in named.items() if x is not None}


def with_support(problem: CPProblem, share: float) -> CPProblem:
    """The problem with coefficients of which `share` are nonzero, at least one in a row."""

    def thinned(a: Tensor) -> Tensor:
        kept = torch.rand(a.shape) < share
        kept[:, 0] = True
        dense = torch.rand(a.shape) * kept
        return (dense / dense.sum(-1, keepdim=True)).to(a.dtype)

    return replace(problem, coefficients=tuple(map(thinned, problem.coefficients)))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("share", [0.05, 1.0])
@pytest.mark.parametrize("N", [(40,), (33, 40), (40, 2, 33)], ids=str)
@pytest.mark.parametrize(("T", "I", "O", "R"), [(1, 1, 1, 1), (5, 17, 9, 15), (4, 16, 33, 16), (40, 24, 17, 137)])
def test_cp(T: int, I: int, O: int, R: int, N: tuple[int, ...], share: float, dtype: torch.dtype) -> None:
    problem = with_support(cp_problem(T, I, O, N, R, dtype=dtype), share)
    cp_expected(problem).accept(run(problem))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("bias", [True, False])
def test_activations(activation: str, bias: bool, dtype: torch.dtype) -> None:
    problem = cp_problem(7, 67, 9, (20,), 24, bias=bias, activation=activation, dtype=dtype)
    cp_expected(problem).accept(run(problem))


@pytest.mark.parametrize("activation", ACTIVATIONS[1:])
def test_activations_far_out(activation: str) -> None:
    z = torch.cat([torch.linspace(-12, 12, 4001), torch.tensor([-1e30, -100.0, 0.0, 100.0, 1e30])])
    one = torch.ones(1, 1)
    problem = CPProblem(z[:, None], (one.expand(len(z), 1),), (one,), one, None, one, one.expand(len(z), 1), activation)
    results = run(problem)
    exact = z.double().requires_grad_()
    y = reference.ACTIVATIONS[activation](exact)
    y.sum().backward()
    assert exact.grad is not None
    assert torch.allclose(results["y"][:, 0].double(), y, rtol=1e-5, atol=1e-7)
    assert torch.allclose(results["dz"][:, 0].double(), exact.grad, rtol=1e-5, atol=3e-7)


def test_more_tokens_than_are_activated_at_once() -> None:
    problem = cp_problem(1030, 5, 3, (12,), 4, activation="gelu")
    cp_expected(problem).accept(run(problem))


def test_gradient_on_the_support_alone() -> None:
    problem = with_support(cp_problem(9, 16, 12, (64,), 21), 0.05)
    results, everywhere = run(problem, support_only=True), run(problem)
    support = problem.coefficients[0] != 0
    assert torch.allclose(results["da_0"][support], everywhere["da_0"][support], rtol=1e-4, atol=1e-5)
    assert not results["da_0"][~support].any()
    assert everywhere["da_0"][~support].all()


@pytest.mark.parametrize("needed", range(6))
def test_returns_what_is_needed(needed: int) -> None:
    problem = cp_problem(5, 16, 12, (8, 3), 21)
    every, some = run(problem), run(problem, [i == needed for i in range(6)])
    names = [{"dz"}, {"da_0", "da_1"}, {"dU_0", "dU_1"}, {"din_factor"}, {"din_bias"}, {"dout_factor"}][needed]
    assert some.keys() == names | {"y"}
    assert all(torch.equal(some[name], every[name]) for name in names)


def test_nothing_is_saved_where_nothing_is_needed() -> None:
    problem = cp_problem(5, 16, 12, (8,), 21)
    y, A, B = native.cp_forward(*arguments(problem), activation="none", save=False)
    assert torch.equal(y, run(problem)["y"])
    assert A.numel() == B.numel() == 0


def test_no_tokens() -> None:
    results = run(cp_problem(0, 16, 12, (8,), 21, activation="gelu"))
    assert results["y"].shape == (0, 12)
    assert not any(results[name].any() for name in ("dU_0", "din_factor", "din_bias", "dout_factor"))


def test_any_strides() -> None:
    problem = cp_problem(6, 16, 12, (8, 3), 21, activation="gelu")

    def strided(x: Tensor) -> Tensor:
        return torch.stack([x, x], -1)[..., 0]

    dense, results = run(problem), run(problem.map(strided))
    transposed = run(problem.map(lambda x: x.t().contiguous().t() if x.dim() == 2 else x))
    for name, x in dense.items():
        assert torch.allclose(results[name], x, rtol=1e-4, atol=1e-4), name
        assert torch.allclose(transposed[name], x, rtol=1e-4, atol=1e-4), name


def test_arguments_are_left_alone() -> None:
    for share in (0.05, 1.0):
        problem = with_support(cp_problem(6, 16, 12, (40, 33), 21, activation="gelu"), share)
        before = problem.map(Tensor.clone)
        run(problem)
        assert all(torch.equal(x, before.inputs()[name]) for name, x in problem.inputs().items())
        assert torch.equal(problem.dy, before.dy)


def test_a_poisoned_token_stays_its_own() -> None:
    problem = with_support(cp_problem(6, 16, 12, (40,), 21, activation="gelu"), 0.05)
    problem.z[2, 3] = float("nan")
    problem.coefficients[0][4] = float("nan")
    results = run(problem)
    for name, poisoned in (("y", [2, 4]), ("dz", [2, 4]), ("da_0", [2])):
        rows = results[name].isnan().any(1).nonzero().flatten().tolist()
        assert rows == poisoned, name
    assert results["y"][[2, 4]].isnan().all()


LAYER = {"norm": "layer", "alpha": 1.5, "eps": 1e-5}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("N", [(20,), (17, 5)], ids=str)
@pytest.mark.parametrize("T", [0, 1, 3, 4, 7, 16, 17])
def test_layer_in_one_call(T: int, N: tuple[int, ...], dtype: torch.dtype) -> None:
    problem = cp_problem(T, 35, 19, N, 21, dtype=dtype)
    gates = [torch.randn(n, 35).to(dtype) / 6 for n in N]
    y = native.cp_layer(
        problem.z, gates, list(problem.expert_factors), problem.in_factor, problem.in_bias, problem.out_factor, **LAYER
    )
    assert (y.shape, y.dtype) == ((T, 19), dtype)
    a = tuple(reference.gate(problem.z.double(), gate.double()) for gate in gates)
    rounded = replace(problem, coefficients=tuple(x.to(dtype) for x in a))
    exact = reference.cp_experts(
        problem.z.double(), a, [U.double() for U in problem.expert_factors], problem.in_factor.double(),
        problem.out_factor.double(), None if problem.in_bias is None else problem.in_bias.double(),
    )  # fmt: skip
    expected = cp_expected(rounded, only=("y",))
    replace(expected, truth={"y": exact}).accept({"y": y})


@pytest.mark.parametrize("levels", [0, 2])
def test_layer_in_one_call_refuses_levels_that_do_not_pair(levels: int) -> None:
    problem = cp_problem(2, 8, 5, (6,), 3)
    gates, factors = [torch.randn(6, 8)] * levels, list(problem.expert_factors)[:levels]
    with pytest.raises(RuntimeError, match=f"for every level, got {len(gates)} and {len(factors)}"):
        native.cp_layer(problem.z, gates, factors, problem.in_factor, None, problem.out_factor, **LAYER)


DETERMINISM = """
import torch
from mumoe_fast.ops._native_library import available
from mumoe_fast.testing.problems_cp import cp_problem
assert available() is None
from tests.native.test_cp import run, with_support
torch.manual_seed(0)
torch.set_num_threads(2)
for share in (0.05, 1.0):
    problem = with_support(cp_problem(400, 64, 48, (128,), 300, activation="gelu"), share)
    first = run(problem)
    for _ in range(5):
        again = run(problem)
        assert all(torch.equal(first[name], again[name]) for name in first)
z, weight, da = torch.randn(300, 16), torch.randn(400, 16), torch.randn(300, 400)
options = {"norm": "layer", "alpha": 1.5, "eps": 1e-5}
a = torch.ops.mumoe_native.gate_forward(z, weight, None, **options)
runs = [torch.ops.mumoe_native.gate_backward(da, a, z, weight, None, **options, needs=[True] * 3) for _ in range(5)]
assert all(torch.equal(runs[0][i], other[i]) for other in runs for i in range(2))
"""


@pytest.mark.parametrize("instructions", ["default", "avx2", "avx512"])
def test_two_runs_give_the_same_bits_with_every_instruction_set(instructions: str) -> None:
    environment = os.environ | {"ATEN_CPU_CAPABILITY": instructions, "OMP_NUM_THREADS": "2"}
    subprocess.run([sys.executable, "-c", DETERMINISM], env=environment, check=True, timeout=300)


SUITE = ["-q", "-x", "-p", "no:cacheprovider", "tests/native", "-k", "not instruction_set", "-m", "not slow"]


@pytest.mark.slow
@pytest.mark.parametrize("instructions", ["default", "avx2"])
def test_every_instruction_set_passes_these_tests(instructions: str) -> None:
    environment = os.environ | {"ATEN_CPU_CAPABILITY": instructions}
    subprocess.run([sys.executable, "-m", "pytest", *SUITE], env=environment, check=True, timeout=600)

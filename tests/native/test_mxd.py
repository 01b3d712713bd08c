"""The native Mixture of Decoders: its top-k gate and its experts, against float64 truth, at the corners of vectors."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from mumoe_fast import functional, reference
from mumoe_fast.ops._native_library import available
from mumoe_fast.testing.problems_mxd import (
    MxDProblem,
    TopkProblem,
    mxd_expected,
    mxd_problem,
    topk_expected,
    topk_problem,
)

pytestmark = pytest.mark.skipif(available() is not None, reason=str(available()))

native = torch.ops.mumoe_native
DTYPES = (torch.float32, torch.bfloat16)
GATE_GRADIENTS = ("dz", "dweight", "dbias")


def run_gate(problem: TopkProblem, needs: tuple[bool, ...] | None = None) -> tuple[dict[str, Tensor], Tensor]:
    values, indices = native.topk_gate_forward(problem.z, problem.weight, problem.bias, problem.k)
    needs = needs or (True, True, problem.bias is not None)
    gradients = native.topk_gate_backward(problem.dvalues, values, indices, problem.z, problem.weight, needs=needs)
    assert [x is not None for x in gradients] == list(needs)
    named = zip(GATE_GRADIENTS, gradients, strict=True)
    return {"values": values} | {name: x for name, x in named if x is not None}, indices


def check_gate(problem: TopkProblem) -> None:
    got, indices = run_gate(problem)
    expected, experts = topk_expected(problem)
    positive = got["values"] > 0
    assert torch.equal(indices[positive], experts[positive])
    assert all(len(row.unique()) == problem.k for row in indices), "an expert was kept twice"
    assert (got["values"].diff(dim=-1) <= 0).all()
    assert (got["values"].dtype, got["dz"].dtype, indices.dtype) == (problem.z.dtype, problem.z.dtype, torch.int64)
    assert got["dweight"].dtype == torch.float32
    expected.accept(got)


def run(problem: MxDProblem, needs: tuple[bool, ...] = (True,) * 4) -> dict[str, Tensor]:
    inputs = (problem.z, problem.values, problem.indices, problem.expert_factors, problem.out_factor)
    y, A, B = native.mxd_forward(*inputs, activation=problem.activation, save=True)
    gradients = native.mxd_backward(problem.dy, A, B, *inputs, activation=problem.activation, needs=needs)
    named = zip(problem.inputs, gradients, strict=True)
    return {"y": y} | {f"d{name}": gradient for name, gradient in named if gradient is not None}


def check(problem: MxDProblem) -> None:
    got = run(problem)
    assert all(x.dtype == problem.dtype for x in got.values())
    mxd_expected(problem).accept(got)


# --- the gate ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(("T", "I", "N", "k"), [(1, 1, 1, 1), (3, 20, 11, 11), (20, 17, 16, 3), (50, 33, 17, 5)])
def test_gate(T: int, I: int, N: int, k: int, bias: bool, dtype: torch.dtype) -> None:
    check_gate(topk_problem(T, I, N, k, bias=bias, dtype=dtype))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_fewer_than_k_positive_logits(dtype: torch.dtype) -> None:
    problem = topk_problem(6, 8, 11, 9, shift=-4.0, dtype=dtype)
    assert (run_gate(problem)[0]["values"] == 0).any()
    check_gate(problem)


def test_gate_with_master_weights() -> None:
    problem = topk_problem(5, 20, 7, 3, dtype=torch.bfloat16)
    assert problem.bias is not None
    check_gate(replace(problem, weight=problem.weight.float(), bias=problem.bias.float()))


def selected(s: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The native selection from given float32 logits: those of a gate that passes them on."""
    values, indices = native.topk_gate_forward(torch.eye(len(s)), s.t().contiguous(), None, k)
    return values, indices


def by_sorting(s: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k largest of relu(s), falling, equal ones in the order of their experts."""
    values, indices = s.relu().sort(dim=-1, descending=True, stable=True)
    return values[:, :k], indices[:, :k]


ROWS: dict[str, Callable[[int], Tensor]] = {
    "normal": lambda N: torch.randn(4, N),
    "rising": lambda N: torch.arange(1, N + 1).float().expand(4, N),
    "falling": lambda N: torch.arange(N, 0, -1).float().expand(4, N),
    "ties": lambda N: torch.randn(4, N).round(),
    "all equal": lambda N: torch.full((4, N), 2.5),
    "none positive": lambda N: -torch.rand(4, N),
    "one positive": lambda N: torch.where(torch.arange(N) == N // 2, 1.0, -1.0).expand(4, N),
    "subnormal": lambda N: torch.rand(4, N) * 1e-41,
    "zeros of both signs": lambda N: torch.where(torch.arange(N) % 2 == 0, 0.0, -0.0).expand(4, N),
}


@pytest.mark.parametrize("kind", ROWS)
@pytest.mark.parametrize("N", [1, 15, 16, 17, 80, 1000])
def test_selection_is_the_stable_sorts(N: int, kind: str) -> None:
    s = ROWS[kind](N).contiguous()
    for k in {1, min(2, N), min(32, N), N // 2 or 1, N}:
        (values, indices), (expected, experts) = selected(s, k), by_sorting(s, k)
        assert torch.equal(values, expected), k
        assert torch.equal(indices, experts), k


@pytest.mark.parametrize("kind", ["normal", "ties", "one positive", "none positive"])
def test_the_experts_kept_are_the_references(kind: str) -> None:
    s = ROWS[kind](100).contiguous()
    values, indices = selected(s, 7)
    kept = torch.zeros_like(s).scatter(-1, indices, values)
    assert torch.equal(kept, reference.topk_gate(torch.eye(4), s.t().contiguous(), None, 7))


def test_tens_of_thousands_of_experts_and_more_tokens_than_fit_at_once() -> None:
    z, weight, bias = torch.randn(260, 3), torch.randn(21_500, 3), torch.randn(21_500)
    values, indices = native.topk_gate_forward(z, weight, bias, 32)
    expected, experts = by_sorting(torch.addmm(bias, z, weight.t()), 32)
    torch.testing.assert_close(values, expected)
    assert (indices == experts).float().mean() > 0.99  # beyond that, logits that rounding puts in another order


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("column", [0, 7, 36])
def test_a_bad_logit_poisons_its_own_row_only(column: int, value: float) -> None:
    s = torch.randn(4, 37)
    clean, experts = selected(s, 5)
    s[2, column] = value
    # as biases, because a NaN among the weights would meet the zeros of the identity matrix
    rows = [native.topk_gate_forward(torch.zeros(1, 1), torch.zeros(37, 1), row, 5) for row in s]
    values, indices = (torch.cat(x) for x in zip(*rows, strict=True))
    assert values[2].isnan().all()
    others = [0, 1, 3]
    assert torch.equal(values[others], clean[others])
    assert torch.equal(indices[others], experts[others])
    assert len(indices[2].unique()) == 5
    assert ((indices >= 0) & (indices < 37)).all()


def test_a_bad_token_of_the_gate_poisons_its_own_gradient_only() -> None:
    problem = topk_problem(6, 12, 9, 3)
    clean, _ = run_gate(problem)
    problem.z[2, 7] = math.nan
    poisoned, _ = run_gate(problem)
    for name in ("values", "dz"):
        assert poisoned[name][2].isnan().all()
        assert torch.equal(poisoned[name][[0, 1, 3, 4, 5]], clean[name][[0, 1, 3, 4, 5]])


@pytest.mark.parametrize("needed", range(3))
def test_only_what_is_needed_of_the_gate(needed: int) -> None:
    problem = topk_problem(5, 12, 7, 3)
    every, _ = run_gate(problem)
    some, _ = run_gate(problem, tuple(i == needed for i in range(3)))
    assert some.keys() == {"values", GATE_GRADIENTS[needed]}
    assert all(torch.equal(some[name], every[name]) for name in some)


# --- the experts ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("k", [1, 3, 4, 5, 11])
def test_experts(k: int, dtype: torch.dtype) -> None:
    for T, H, O in ((1, 1, 1), (6, 20, 15), (5, 33, 16), (7, 16, 17), (30, 24, 137)):
        check(mxd_problem(T, H, O, 11, k, dtype=dtype))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("activation", ["gelu", "gelu_tanh", "relu", "silu"])
def test_activations(activation: str, dtype: torch.dtype) -> None:
    check(mxd_problem(7, 35, 18, 7, 3, activation=activation, dtype=dtype))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_an_expert_that_every_token_chooses_twice(dtype: torch.dtype) -> None:
    problem = mxd_problem(40, 12, 18, 6, 2, dtype=dtype)
    check(replace(problem, indices=torch.full_like(problem.indices, 4)))


def test_an_expert_that_nobody_chooses_is_never_read_and_has_no_gradient() -> None:
    problem = mxd_problem(5, 12, 18, 9, 3)
    problem = replace(problem, indices=problem.indices % 4)
    clean = run(problem)
    assert not clean["dexpert_factors"][4:].any()
    problem.expert_factors[4:] = math.nan
    assert all(torch.equal(x, clean[name]) for name, x in run(problem).items())


def test_nothing_comes_through_a_zero() -> None:
    problem = mxd_problem(5, 12, 18, 9, 3)
    clean = run(problem)
    problem.values[:, 1] = 0
    for t, n in enumerate(problem.indices[:, 1].tolist()):
        alone = replace(problem, **{f: getattr(problem, f)[t : t + 1] for f in ("z", "values", "indices", "dy")})
        alone.expert_factors[n] = math.nan
        assert run(alone)["y"].isfinite().all()
        alone.expert_factors[n] = 0
    assert clean["y"].isfinite().all()


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32], ids=str)
@pytest.mark.parametrize("bad", [-1, 9])
def test_an_index_out_of_range_is_an_error(bad: int, dtype: torch.dtype) -> None:
    problem = mxd_problem(5, 12, 18, 9, 3)
    problem.indices[3, 1] = bad
    with pytest.raises(RuntimeError, match=rf"indices: expected experts in \[0, 9\), got {bad}"):
        run(replace(problem, indices=problem.indices.to(dtype)))


@pytest.mark.parametrize("needed", range(4))
def test_only_what_is_needed(needed: int) -> None:
    problem = mxd_problem(5, 12, 18, 6, 3, activation="relu")
    every, some = run(problem), run(problem, tuple(i == needed for i in range(4)))
    assert some.keys() == {"y", f"d{list(problem.inputs)[needed]}"}
    assert all(torch.equal(some[name], every[name]) for name in some)


@pytest.mark.parametrize("name", ["z", "values"])
def test_a_bad_token_poisons_its_own_row_only(name: str) -> None:
    problem = mxd_problem(6, 12, 18, 7, 3, activation="gelu")
    clean = run(problem)
    bad = problem.inputs[name].clone()
    bad[2] = math.nan
    poisoned = run(replace(problem, **{name: bad}))
    others = [0, 1, 3, 4, 5]
    assert poisoned["y"][2].isnan().all()
    for result in ("y", "dz", "dvalues"):
        assert torch.equal(poisoned[result][others], clean[result][others])


# --- both -------------------------------------------------------------------------------------------------------------


def test_no_tokens() -> None:
    gate, indices = run_gate(topk_problem(0, 12, 7, 3))
    assert indices.shape == gate["values"].shape == (0, 3)
    assert torch.equal(gate["dweight"], torch.zeros(7, 12))
    assert torch.equal(gate["dbias"], torch.zeros(7))
    experts = run(mxd_problem(0, 12, 18, 6, 3, activation="gelu"))
    assert experts["y"].shape == (0, 18)
    assert torch.equal(experts["dexpert_factors"], torch.zeros(6, 18))
    assert torch.equal(experts["dout_factor"], torch.zeros(18, 12))


def transposed(x: Tensor) -> Tensor:
    return x.t().contiguous().t()


def strided(x: Tensor) -> Tensor:
    """Every second column of every third row of something larger."""
    larger = x.new_full((3 * x.shape[0], 2 * x.shape[1]), math.nan)
    larger[::3, ::2] = x
    return larger[::3, ::2]


def inside(x: Tensor) -> Tensor:
    """Dense rows, far apart, that begin inside a larger memory."""
    larger = x.new_full((2 * x.shape[0] + 1, x.shape[1] + 3), math.nan)
    larger[1::2, 2:-1] = x
    return larger[1::2, 2:-1]


@pytest.mark.parametrize("layout", [transposed, strided, inside])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_any_strides(dtype: torch.dtype, layout: Callable[[Tensor], Tensor]) -> None:
    problem = mxd_problem(5, 18, 17, 6, 3, activation="gelu", dtype=dtype).map(layout)
    check(replace(problem, indices=transposed(problem.indices)))
    gate = topk_problem(5, 18, 7, 3, dtype=dtype)
    check_gate(replace(gate, **{name: layout(getattr(gate, name)) for name in ("z", "weight", "dvalues")}))


def test_nothing_is_saved_without_gradients() -> None:
    problem = mxd_problem(5, 12, 18, 6, 3, activation="gelu")
    inputs = (problem.z, problem.values, problem.indices, problem.expert_factors, problem.out_factor)
    y, A, B = native.mxd_forward(*inputs, activation="gelu", save=False)
    assert A.shape == B.shape == (0,)
    assert torch.equal(y, run(problem)["y"])


@pytest.mark.parametrize("threads", [1, 2])
def test_the_bits_do_not_depend_on_the_threads_and_no_argument_changes(threads: int) -> None:
    problem, gate = mxd_problem(300, 24, 300, 50, 8, activation="gelu"), topk_problem(300, 24, 50, 2)
    before = problem.map(Tensor.clone)
    expected, expected_gate = run(problem), run_gate(gate)[0]
    before_threads = torch.get_num_threads()
    try:
        torch.set_num_threads(threads)
        again, again_gate = run(problem), run_gate(gate)[0]
    finally:
        torch.set_num_threads(before_threads)
    ours = ("dvalues", "dexpert_factors")  # y, dz and dout_factor pass through ATen's GEMMs
    assert all(torch.equal(again[name], expected[name]) for name in ours)
    assert all(torch.equal(again_gate[name], expected_gate[name]) for name in expected_gate)
    assert all(torch.equal(x, before.inputs[name]) for name, x in problem.inputs.items())
    assert torch.equal(problem.dy, before.dy)


def test_auto_runs_natively_on_a_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """With the reference taken away the whole block still runs, and in one selection for all leading dimensions."""
    monkeypatch.delattr(reference, "topk_gate")
    z, weight, h = torch.randn(2, 3, 12), torch.randn(20, 12), torch.randn(2, 3, 24)
    values, indices = functional.topk_gate(z, weight, k=4)
    assert values.shape == indices.shape == (2, 3, 4)
    assert functional.mxd_experts(h, values, indices, torch.randn(20, 8), torch.randn(8, 24)).shape == (2, 3, 8)

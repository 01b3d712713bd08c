"""The native entmax whose α is a tensor, and α's gradient, by itself and in the gate, against float64 truth."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from mumoe_fast import ExpertGate, reference
from mumoe_fast.ops._native_library import available
from mumoe_fast.testing.problems_gate import entmax_problem, entmax_rows, learned_alpha_problem
from tests.native.test_gate import DTYPES

pytestmark = pytest.mark.skipif(available() is not None, reason=str(available()))

native = torch.ops.mumoe_native


def run(x: Tensor, da: Tensor, alpha: Tensor) -> dict[str, Tensor]:
    a = native.learned_entmax_forward(x, alpha)
    dx, dalpha = native.learned_entmax_backward(da, a, alpha)
    assert (a.dtype, dx.dtype, dalpha.dtype) == (x.dtype, x.dtype, torch.float32)
    assert dalpha.shape == ()
    return {"a": a, "dx": dx, "dalpha": dalpha}


def check(x: Tensor, da: Tensor, alpha: Tensor) -> None:
    results = run(x, da, alpha)
    dalpha = results.pop("dalpha")
    entmax_problem(x, da, alpha.item()).accept(results)
    shares = torch.stack([run(x[t : t + 1], da[t : t + 1], alpha)["dalpha"] for t in range(len(x))])
    learned_alpha_problem(x, da, alpha.item()).accept({"dalpha": shares})
    assert torch.equal(shares.double().sum().float(), dalpha)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("alpha", [1.001, 1.05, 1.25, 1.5, 1.9, 2.0])
@pytest.mark.parametrize("kind", ["normal", "flat", "peaked", "ties", "dense"])
def test_coefficients_and_both_gradients(kind: str, alpha: float, dtype: torch.dtype) -> None:
    for T, N in ((3, 1), (100, 15), (100, 17), (60, 131)):
        x, da = entmax_rows(kind, T, N).to(dtype), torch.randn(T, N).to(dtype)
        check(x, da, torch.tensor(alpha, dtype=torch.float64))


@pytest.mark.parametrize("alpha", [1.0, 1 + 1e-6])
def test_alphas_gradient_keeps_its_digits_at_1(alpha: float) -> None:
    """Where the paper's form divides a difference by (α − 1)².

    With p = softmax(x) the limit is −½ Σ p log²p (da − Σ p da).
    """
    x, da = entmax_rows("normal", 40, 100), torch.randn(40, 100)
    p, dp = x.double().softmax(-1), da.double()
    truth = -0.5 * (p * p.log().square() * (dp - (p * dp).sum(-1, keepdim=True))).sum()
    dalpha = run(x, da, torch.tensor(alpha, dtype=torch.float64))["dalpha"]
    torch.testing.assert_close(dalpha.double(), truth, rtol=1e-5, atol=0)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_alpha_may_have_any_dtype_and_one_dimension(dtype: torch.dtype) -> None:
    x, da = torch.randn(4, 33), torch.randn(4, 33)
    plain, vector = run(x, da, torch.tensor(1.25, dtype=dtype)), run(x, da, torch.tensor([1.25], dtype=dtype))
    assert all(torch.equal(plain[name], vector[name]) for name in plain)
    assert torch.equal(plain["a"], native.entmax_forward(x, 1.25))
    assert torch.equal(plain["dx"], native.entmax_backward(da, plain["a"], 1.25))


def test_a_poisoned_row_is_nan_and_no_other() -> None:
    x = torch.randn(4, 37)
    x[0, 36], x[2, 17] = math.nan, -math.inf
    results = run(x, torch.randn(4, 37), torch.tensor(1.3))
    for name in ("a", "dx"):
        assert results[name].isnan().all(1).tolist() == [True, False, True, False]
        assert results[name][[1, 3]].isfinite().all()
    assert results["dalpha"].isnan()


def test_no_tokens() -> None:
    results = run(torch.empty(0, 5), torch.empty(0, 5), torch.tensor(1.3))
    assert results["a"].shape == results["dx"].shape == (0, 5)
    assert results["dalpha"].item() == 0


def test_any_strides_and_arguments_are_left_alone() -> None:
    x, da, alpha = torch.randn(6, 33), torch.randn(6, 33), torch.tensor(1.4)
    dense = run(x, da, alpha)
    for strided in (lambda x: x.t().contiguous().t(), lambda x: torch.stack([x, x], -1)[..., 0]):
        results = run(strided(x), strided(da), alpha)
        assert all(torch.equal(results[name], dense[name]) for name in dense)
    again = run(x, da, alpha)
    assert all(torch.equal(again[name], dense[name]) for name in dense)
    assert alpha.item() == torch.tensor(1.4).item()


def test_the_gradient_of_alpha_does_not_depend_on_the_number_of_threads() -> None:
    x, da = torch.randn(500, 700), torch.randn(500, 700)
    one = run(x, da, torch.tensor(1.3))
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        two = run(x, da, torch.tensor(1.3))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(one[name], two[name]) for name in one)


@pytest.mark.parametrize("norm", ["layer", "batch", "none"])
def test_a_gate_that_learns_alpha_runs_natively_and_has_the_references_gradients(
    norm: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a CPU "auto" is native for it: with the reference taken away it still runs."""
    mine, theirs = (ExpertGate(12, 9, norm=norm, alpha=1.3, learn_alpha=True, impl=i) for i in ("auto", "reference"))
    nn.init.normal_(mine.weights[0])
    theirs.load_state_dict(mine.state_dict())
    x, da = torch.randn(7, 12), torch.randn(7, 9)
    gradients = []
    for gate in (theirs, mine):
        if gate is mine:
            monkeypatch.delattr(reference, "entmax")
        (a,) = gate(x)
        a.backward(da)
        gradients.append([a.detach(), gate.weights[0].grad, gate.raw_alpha.grad])
    for expected, got in zip(*gradients, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)

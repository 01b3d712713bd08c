"""The native gate and entmax against float64 truth, over the vector widths' corners: 15, 16, 17 and so on."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from mumoe_fast.ops._native_library import available
from mumoe_fast.reference import Norm
from mumoe_fast.testing.problems_gate import (
    batch_entmax_problem,
    entmax_problem,
    entmax_rows,
    gate_hierarchy_problem,
    gate_problem,
    statistics_problem,
)

pytestmark = pytest.mark.skipif(available() is not None, reason=str(available()))

native = torch.ops.mumoe_native
DTYPES = (torch.float32, torch.bfloat16)
ALPHAS = (1.0, 1.0001, 1.25, 1.5, 1.75, 2.0)
EPS = 1e-5
GRAM_T, GRAM_I, GRAM_N = 40, 8, 300  # many tokens and experts for the features: the Gram matrices' side


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("alpha", ALPHAS)
@pytest.mark.parametrize("kind", ["normal", "flat", "peaked", "ties", "far-from-zero", "dense"])
def test_entmax(kind: str, alpha: float, dtype: torch.dtype) -> None:
    for T, N in ((3, 1), (2, 15), (2, 16), (5, 17), (2, 64), (1, 131), (2, 1025)):
        x, da = entmax_rows(kind, T, N).to(dtype), torch.randn(T, N).to(dtype)
        a = native.entmax_forward(x, alpha)
        entmax_problem(x, da, alpha).accept({"a": a, "dx": native.entmax_backward(da, a, alpha)})


@pytest.mark.parametrize("alpha", ALPHAS)
def test_a_poisoned_row_is_nan_and_no_other(alpha: float) -> None:
    x = torch.randn(5, 37)
    x[0, 36], x[1, 3], x[3, 17] = math.nan, math.inf, -math.inf
    a = native.entmax_forward(x, alpha)
    dx = native.entmax_backward(torch.randn_like(x), a, alpha)
    for result in (a, dx):
        assert result.isnan().all(1).tolist() == [True, True, False, True, False]
        assert result[[2, 4]].isfinite().all()


def test_coefficients_off_the_support_are_exactly_zero_and_rows_sum_to_one() -> None:
    a = native.entmax_forward(torch.randn(64, 1000), 1.5)
    assert torch.allclose(a.sum(-1), torch.ones(64), atol=1e-5)
    assert ((a == 0).sum(-1) > 900).all()


def gate_inputs(
    T: int, I: int, N: int, dtype: torch.dtype, weight_dtype: torch.dtype | None = None, bias: bool = True
) -> tuple[Tensor, Tensor, Tensor | None, Tensor]:
    weight_dtype = weight_dtype or dtype
    weight = (torch.randn(N, I) / math.sqrt(I)).to(weight_dtype)
    return (
        torch.randn(T, I).to(dtype),
        weight,
        torch.randn(N).to(weight_dtype) if bias else None,
        torch.randn(T, N).to(dtype),
    )


def run_gate(
    z: Tensor, weight: Tensor, bias: Tensor | None, da: Tensor, norm: Norm = "layer", alpha: float = 1.5
) -> dict[str, Tensor]:
    options: dict[str, Any] = {"norm": norm, "alpha": alpha, "eps": EPS}
    a = native.gate_forward(z, weight, bias, **options)
    dz, dweight, dbias = native.gate_backward(da, a, z, weight, bias, **options, needs=[True] * 3)
    assert (a.dtype, dz.dtype, dweight.dtype) == (z.dtype, z.dtype, torch.float32)
    return {"a": a, "dz": dz, "dweight": dweight} | ({} if bias is None else {"dbias": dbias})


def check_gate(z: Tensor, weight: Tensor, bias: Tensor | None, da: Tensor, norm: Norm = "layer", alpha: float = 1.5):
    results = run_gate(z, weight, bias, da, norm, alpha)
    gate_problem(z, weight, bias, da, norm=norm, alpha=alpha, eps=EPS).accept(results)
    return results


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("norm", ["layer", "none"])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(("T", "I", "N"), [(1, 1, 1), (3, 24, 16), (5, 33, 17), (300, 24, 65)])
def test_gate(T: int, I: int, N: int, bias: bool, norm: Norm, dtype: torch.dtype) -> None:
    check_gate(*gate_inputs(T, I, N, dtype, bias=bias), norm=norm)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("alpha", ALPHAS)
def test_gate_at_every_alpha(alpha: float, dtype: torch.dtype) -> None:
    check_gate(*gate_inputs(3, 16, 40, dtype), alpha=alpha)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("alpha", [1.5, 2.0])
def test_gate_backward_by_gram_matrices(alpha: float, dtype: torch.dtype) -> None:
    check_gate(*gate_inputs(GRAM_T, GRAM_I, GRAM_N, dtype, bias=False), alpha=alpha)


@pytest.mark.parametrize(("T", "I", "N"), [(4, 16, 33), (GRAM_T, GRAM_I, GRAM_N)])
def test_fresh_gate(T: int, I: int, N: int) -> None:
    z, weight, _, da = gate_inputs(T, I, N, torch.float32, bias=False)
    results = check_gate(z, torch.zeros_like(weight), None, da)
    assert torch.allclose(results["a"], torch.full((T, N), 1 / N), rtol=1e-5)


def test_master_weights_are_rounded_first() -> None:
    z, weight, bias, da = gate_inputs(5, 24, 20, torch.bfloat16, weight_dtype=torch.float32)
    results = check_gate(z, weight, bias, da)
    assert bias is not None
    rounded = run_gate(z, weight.bfloat16(), bias.bfloat16(), da)
    assert all(torch.equal(results[name], rounded[name]) for name in rounded)


@pytest.mark.parametrize("needs", [[True, False, False], [False, True, False], [False, False, True]])
@pytest.mark.parametrize("sizes", [(5, 24, 20), (GRAM_T, GRAM_I, GRAM_N)])
def test_gate_returns_what_is_needed(needs: list[bool], sizes: tuple[int, int, int]) -> None:
    z, weight, _, da = gate_inputs(*sizes, torch.float32, bias=False)
    bias = torch.zeros(sizes[2]) if needs[2] else None
    options: dict[str, Any] = {"norm": "layer", "alpha": 1.5, "eps": EPS}
    a = native.gate_forward(z, weight, bias, **options)
    some = native.gate_backward(da, a, z, weight, bias, **options, needs=needs)
    every = native.gate_backward(da, a, z, weight, bias, **options, needs=[True] * 3)
    assert [x is not None for x in some] == needs
    assert all(torch.equal(one, other) for one, other in zip(some, every) if one is not None)


def test_no_tokens() -> None:
    results = run_gate(*gate_inputs(0, 16, 20, torch.float32))
    assert results["a"].shape == (0, 20)
    assert results["dz"].shape == (0, 16)
    assert torch.equal(results["dweight"], torch.zeros(20, 16))
    assert torch.equal(results["dbias"], torch.zeros(20))


@pytest.mark.parametrize("sizes", [(5, 24, 20), (GRAM_T, GRAM_I, GRAM_N)])
def test_gate_takes_any_strides(sizes: tuple[int, int, int]) -> None:
    inputs = gate_inputs(*sizes, torch.float32, bias=False)
    dense = run_gate(*inputs)

    def strided(x: Tensor | None) -> Tensor | None:
        return None if x is None else torch.stack([x, x], -1).transpose(0, 1).contiguous().transpose(0, 1)[..., 0]

    results = run_gate(*map(strided, inputs))
    assert all(torch.allclose(results[name], dense[name], atol=1e-5, rtol=1e-4) for name in dense)


def test_poisoned_tokens_stay_theirs() -> None:
    for sizes in ((5, 24, 20), (GRAM_T, GRAM_I, GRAM_N)):
        z, weight, _, da = gate_inputs(*sizes, torch.float32, bias=False)
        z[2, 3] = math.nan
        results = run_gate(z, weight, None, da)
        for name in ("a", "dz"):
            poisoned = results[name].isnan().any(1)
            assert poisoned.tolist() == [t == 2 for t in range(sizes[0])], name
        assert results["a"][2].isnan().all()


@pytest.mark.parametrize(("T", "N"), [(1, 1), (5, 17), (70, 130)])
def test_batch_norm_statistics(T: int, N: int) -> None:
    s, dmean, dvar = torch.randn(T, N) + 3, torch.randn(N), torch.randn(N)
    mean, var = native.batch_norm_statistics(s)
    ds = native.batch_norm_statistics_backward(dmean, dvar, s, mean)
    statistics_problem(s, dmean, dvar).accept({"mean": mean, "var": var, "ds": ds})


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("alpha", [1.0, 1.3, 1.5, 2.0])
def test_batch_entmax(alpha: float, dtype: torch.dtype) -> None:
    s, mean, rstd = torch.randn(7, 130), torch.randn(130), torch.rand(130) + 0.5
    da = torch.randn(7, 130).to(dtype)
    a = native.batch_entmax_forward(s, mean, rstd, alpha, dtype)
    ds, dmean, drstd = native.batch_entmax_backward(da, a, s, mean, rstd, alpha)
    expected = batch_entmax_problem(s, mean, rstd, da, alpha, dtype)
    expected.accept({"a": a, "ds": ds, "dmean": dmean, "drstd": drstd})


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gate_logits(dtype: torch.dtype) -> None:
    z, weight, _, ds = gate_inputs(5, 24, 20, dtype)
    s = native.gate_logits_forward(z, weight)
    dz, dweight = native.gate_logits_backward(ds.float(), z, weight)
    assert (s.dtype, dz.dtype, dweight.dtype) == (torch.float32, dtype, torch.float32)
    assert torch.allclose(s, z.float() @ weight.float().t(), atol=1e-5)
    tolerance = 1e-5 if dtype == torch.float32 else 2e-2
    assert torch.allclose(dz.float(), ds.float() @ weight.float(), atol=tolerance, rtol=tolerance)
    assert torch.allclose(dweight, ds.float().t() @ z.float(), atol=tolerance, rtol=tolerance)


def run_levels(z: Tensor, levels: list[Any], norm: Norm = "layer", needs: tuple[bool, ...] = (True,) * 3) -> Any:
    """What the operators for all levels of weight, bias and da give."""
    weights, biases, das = ([x for x in part if x is not None] for part in zip(*levels, strict=True))
    options: dict[str, Any] = {"norm": norm, "alpha": 1.5, "eps": EPS}
    a = native.gate_hierarchy_forward(z, weights, biases, **options)
    return a, *native.gate_hierarchy_backward(das, a, z, weights, biases, **options, needs=list(needs))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("norm", ["layer", "none"])
@pytest.mark.parametrize(("T", "N"), [(1, (17,)), (16, (40, 4)), (5, (3, 1, 16, 130)), (GRAM_T, (GRAM_N, 4))], ids=str)
def test_all_levels(T: int, N: tuple[int, ...], norm: Norm, dtype: torch.dtype) -> None:
    z, *_ = gate_inputs(T, GRAM_I, 1, dtype)
    levels = [gate_inputs(T, GRAM_I, n, dtype, bias=norm == "none")[1:] for n in N]
    before = z.clone(), [da.clone() for _, _, da in levels]
    a, dz, d_weights, d_biases = run_levels(z, levels, norm)
    named = (("a", a), ("dweight", d_weights), ("dbias", d_biases))
    results = {"dz": dz} | {f"{name}_{e}": x for name, tensors in named for e, x in enumerate(tensors)}
    weights, biases, das = ([x for x in part if x is not None] for part in zip(*levels, strict=True))
    gate_hierarchy_problem(z, weights, biases, das, norm=norm, alpha=1.5, eps=EPS).accept(results)
    assert all(torch.equal(x, y) for x, y in zip((z, *das), (before[0], *before[1]), strict=True))


@pytest.mark.parametrize("needs", [(True, False, False), (False, True, False), (False, False, True)])
def test_all_levels_return_what_is_needed(needs: tuple[bool, ...]) -> None:
    z, *_ = gate_inputs(5, 24, 1, torch.float32)
    levels = [gate_inputs(5, 24, n, torch.float32)[1:] for n in (20, 4)]
    _, dz, d_weights, d_biases = run_levels(z, levels, needs=needs)
    assert (dz is not None, len(d_weights), len(d_biases)) == (needs[0], 2 * needs[1], 2 * needs[2])


def test_all_levels_without_tokens() -> None:
    z, *_ = gate_inputs(0, 16, 1, torch.float32)
    a, dz, d_weights, _ = run_levels(z, [gate_inputs(0, 16, n, torch.float32)[1:] for n in (20, 4)])
    assert ([x.shape for x in a], dz.shape) == ([(0, 20), (0, 4)], (0, 16))
    assert all(torch.equal(x, torch.zeros_like(x)) for x in d_weights)

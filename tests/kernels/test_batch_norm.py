"""Batch norm's kernels against float64 truth. In the interpreter a slab is 32 tokens, a tile 8 tokens × 16 experts."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from mumoe_fast.kernels import batch_norm
from mumoe_fast.kernels.batch_norm import (
    batch_entmax_backward,
    batch_entmax_forward,
    batch_norm_statistics,
    batch_norm_statistics_backward,
    column_sums,
    gate_logits_backward,
    gate_logits_forward,
)
from mumoe_fast.testing.problems_gate import batch_entmax_problem, gate_problem, statistics_problem

pytestmark = pytest.mark.usefixtures("poisoned_memory")

EPS = 1e-5


def check_statistics(s: Tensor) -> tuple[Tensor, Tensor]:
    dmean, dvar = torch.randn(2, s.shape[1], device=s.device).unbind()
    mean, var = batch_norm_statistics(s)
    ds = batch_norm_statistics_backward(dmean, dvar, s, mean)
    statistics_problem(s.cpu(), dmean.cpu(), dvar.cpu()).accept({"mean": mean, "var": var, "ds": ds})
    return mean, var


@pytest.mark.parametrize("T", [1, 7, 8, 9, 31, 32, 33, 70])
def test_statistics_of_token_counts(T: int, device: torch.device) -> None:
    check_statistics(torch.randn(T, 5, device=device))


@pytest.mark.parametrize("N", [1, 15, 16, 17, 33])
def test_statistics_of_experts(N: int, device: torch.device) -> None:
    check_statistics(torch.randn(9, N, device=device))


def test_statistics_of_many_tokens(monkeypatch: pytest.MonkeyPatch, device: torch.device) -> None:
    """Slabs grow where there would be too many: here two of 35 tokens, which is not a multiple of a tile."""
    monkeypatch.setattr(batch_norm, "MAX_SLABS", 2)
    check_statistics(torch.randn(70, 5, device=device))


def test_a_small_spread_on_a_large_mean(device: torch.device) -> None:
    """E[s²] − μ² has no digit left here."""
    _, var = check_statistics(1e4 + 0.1 * torch.randn(70, 3, device=device))
    assert (var > 0.003).all()


def test_statistics_of_any_strides(device: torch.device) -> None:
    check_statistics(torch.randn(17, 33, device=device).t())
    check_statistics(torch.randn(33, 1, device=device).expand(33, 17))


def test_statistics_of_no_token_are_nan(device: torch.device) -> None:
    mean, var = batch_norm_statistics(torch.empty(0, 3, device=device))
    assert mean.isnan().all()
    assert var.isnan().all()
    assert batch_norm_statistics_backward(mean, var, torch.empty(0, 3, device=device), mean).shape == (0, 3)


def test_column_sums(device: torch.device) -> None:
    """Every slab, expanded and transposed inputs, and no token at all."""
    x = torch.randn(17, 70, device=device).t()
    total, weighted = column_sums(x)
    torch.testing.assert_close(total, x.sum(0))
    assert weighted is None
    torch.testing.assert_close(column_sums(x[:, :1].expand(70, 5))[0], x[:, :1].expand(70, 5).sum(0))
    assert torch.equal(column_sums(x[:0])[0], torch.zeros(17, device=device))


def check_entmax(s: Tensor, da: Tensor, alpha: float) -> None:
    N = s.shape[1]
    mean, rstd = torch.randn(N, device=s.device), torch.rand(N, device=s.device) + 0.5
    a = batch_entmax_forward(s, mean, rstd, alpha, da.dtype)
    assert a.dtype == da.dtype
    ds, dmean, drstd = batch_entmax_backward(da, a, s, mean, rstd, alpha)
    assert {ds.dtype, dmean.dtype, drstd.dtype} == {torch.float32}
    problem = batch_entmax_problem(s.cpu(), mean.cpu(), rstd.cpu(), da.cpu(), alpha, da.dtype)
    problem.accept({"a": a, "ds": ds, "dmean": dmean, "drstd": drstd})


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("N", [17, 70])
def test_entmax_in_every_dtype(N: int, dtype: torch.dtype, device: torch.device) -> None:
    check_entmax(2 * torch.randn(5, N, device=device), torch.randn(5, N, device=device).to(dtype), 1.5)


@pytest.mark.parametrize("alpha", [1.0, 1.25, 2.0])
def test_entmax_of_every_alpha(alpha: float, device: torch.device) -> None:
    check_entmax(2 * torch.randn(3, 33, device=device), torch.randn(3, 33, device=device), alpha)


@pytest.mark.parametrize("T", [1, 33])
def test_entmax_of_token_counts_and_strides(T: int, device: torch.device) -> None:
    check_entmax(2 * torch.randn(15, T, device=device).t(), torch.randn(1, 15, device=device).expand(T, 15), 1.5)


def test_entmax_of_no_token(device: torch.device) -> None:
    s, statistics = torch.empty(0, 5, device=device), torch.ones(5, device=device)
    a = batch_entmax_forward(s, statistics, statistics, 1.5, torch.float32)
    ds, dmean, drstd = batch_entmax_backward(a, a, s, statistics, statistics, 1.5)
    assert a.shape == ds.shape == (0, 5)
    assert torch.equal(dmean.abs() + drstd.abs(), torch.zeros(5, device=device))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_the_gate_with_batch_norm(dtype: torch.dtype, device: torch.device) -> None:
    """All steps in a chain are `reference.gate` with ``norm="batch"``, its gradient through the statistics included."""
    z, weight = torch.randn(33, 24).to(device, dtype), (torch.randn(17, 24) / 5).to(device)
    da = torch.randn(33, 17).to(device, dtype)
    s = gate_logits_forward(z, weight)
    mean, var = batch_norm_statistics(s)
    rstd = torch.rsqrt(var + EPS)
    a = batch_entmax_forward(s, mean, rstd, 1.5, dtype)

    ds, dmean, drstd = batch_entmax_backward(da, a, s, mean, rstd, 1.5)
    ds = ds + batch_norm_statistics_backward(dmean, -0.5 * drstd * rstd**3, s, mean)
    dz, dweight = gate_logits_backward(ds, z, weight)
    assert dz is not None
    assert dweight is not None
    assert (dz.dtype, dweight.dtype) == (dtype, torch.float32)
    problem = gate_problem(z.cpu(), weight.cpu(), None, da.cpu(), norm="batch", eps=EPS)
    problem.accept({"a": a, "dz": dz, "dweight": dweight})


def test_a_bad_token_poisons_the_batch(device: torch.device) -> None:
    s = torch.randn(9, 5, device=device)
    s[4, 2] = math.nan
    mean, var = batch_norm_statistics(s)
    assert mean.isnan().tolist() == var.isnan().tolist() == [False, False, True, False, False]
    assert batch_entmax_forward(s, mean, torch.rsqrt(var + EPS), 1.5, torch.float32).isnan().all()


def test_same_bits_again(device: torch.device) -> None:
    s, da = torch.randn(35, 17, device=device), torch.randn(35, 17, device=device)
    mean, var = batch_norm_statistics(s)
    assert all(map(torch.equal, batch_norm_statistics(s), (mean, var)))
    a = batch_entmax_forward(s, mean, var, 1.5, torch.float32)
    first, second = (batch_entmax_backward(da, a, s, mean, var, 1.5) for _ in range(2))
    assert all(map(torch.equal, first, second))

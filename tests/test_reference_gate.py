"""The gates of the specification: entmax, the norms and top-k, against code that others wrote, in float64."""

from __future__ import annotations

import functools
import math

import entmax as entmax_package
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import gradcheck

from mumoe_fast import reference

ALPHAS = (1.0, 1.25, 1.5, 1.75, 2.0)
I = 5

randn = functools.partial(torch.randn, dtype=torch.float64)
close = functools.partial(torch.testing.assert_close, rtol=1e-11, atol=1e-12)


def rows() -> Tensor:
    """Ordinary rows, ties, a uniform row, huge and tiny logits, one far winner."""
    x = randn(9, 33) * 3
    x[1] = x[1].round()
    x[2] = 0.25
    x[3] *= 1e4
    x[4] *= 1e-6
    x[5, 7] += 1e3
    x[6] += 1e6
    x[7, :5] = x[7].max() + 1
    return x


def test_entmax_is_the_packages():
    x = rows()
    close(reference.entmax(x, 1.0), torch.softmax(x, -1))
    close(reference.entmax(x, 1.5), entmax_package.entmax15(x, dim=-1), atol=1e-9)
    close(reference.entmax(x, 2.0), entmax_package.sparsemax(x, dim=-1), atol=1e-9)
    for alpha in (1.1, 1.25, 1.5, 1.75, 2.0):
        close(reference.entmax(x, alpha), entmax_package.entmax_bisect(x, alpha, dim=-1, n_iter=80), atol=1e-9)


def test_entmax_gradient_is_the_packages():
    x, upstream = randn(6, 20), randn(6, 20)
    for alpha in (1.25, 1.5, 1.75):
        ours, theirs = (x.clone().requires_grad_() for _ in range(2))
        our_alpha, their_alpha = (torch.tensor(alpha, dtype=torch.float64, requires_grad=True) for _ in range(2))
        (reference.entmax(ours, our_alpha) * upstream).sum().backward()
        (entmax_package.entmax_bisect(theirs, their_alpha, dim=-1, n_iter=80) * upstream).sum().backward()
        close(ours.grad, theirs.grad, atol=1e-9)
        close(our_alpha.grad, their_alpha.grad, atol=1e-9)


@pytest.mark.parametrize("alpha", ALPHAS)
def test_entmax_backward_needs_only_the_result(alpha):
    """``dx = g ⊙ (da − Σ g·da / Σ g)`` with ``g = a^{2−α}`` on the support: what the kernels compute."""
    x, da = randn(6, 20).requires_grad_(), randn(6, 20)
    a = reference.entmax(x, alpha)
    (dx,) = torch.autograd.grad(a, x, da)
    g = torch.where(a > 0, a ** (2 - alpha), 0)
    close(dx, g * (da - (g * da).sum(-1, keepdim=True) / g.sum(-1, keepdim=True)), atol=1e-10)


@pytest.mark.parametrize("alpha", ALPHAS)
def test_gradcheck_of_entmax(alpha):
    x = randn(3, 7, requires_grad=True)
    assert gradcheck(lambda x: reference.entmax(x, alpha), (x,))


@pytest.mark.parametrize("shape", [(), (3, 1)])
def test_gradcheck_of_entmax_in_alpha(shape):
    """One α for all, and one per row."""
    x = randn(3, 7, requires_grad=True)
    alpha = (1.2 + 0.6 * torch.rand(shape, dtype=torch.float64)).requires_grad_()
    assert gradcheck(reference.entmax, (x, alpha))


@pytest.mark.parametrize("alpha", ALPHAS)
def test_entmax_invariants(alpha):
    x = rows()
    a = reference.entmax(x, alpha)
    assert (a >= 0).all()
    close(a.sum(-1), torch.ones(9, dtype=torch.float64))
    close(reference.entmax(x + 3.0, alpha), a, atol=1e-8)  # 1e4-sized rows lose digits to the shift
    permutation = torch.randperm(33)
    close(reference.entmax(x[:, permutation], alpha), a[:, permutation])
    close(a[2], torch.full((33,), 1 / 33, dtype=torch.float64))
    assert (a[5] == F.one_hot(torch.tensor(7), 33)).all() or alpha == 1
    assert a[7, :5].unique().numel() == 1  # tied logits get the same coefficient
    if alpha > 1:
        assert ((a == 0).sum(-1) > 0)[[0, 1, 3, 5, 7]].all()


@pytest.mark.parametrize("alpha", ALPHAS)
def test_entmax_of_one_expert_and_of_no_tokens(alpha):
    assert (reference.entmax(randn(5, 1), alpha) == 1).all()
    assert reference.entmax(randn(0, 4), alpha).shape == (0, 4)
    assert reference.entmax(randn(2, 0, 4), torch.tensor(1.3)).shape == (2, 0, 4)


@pytest.mark.parametrize("alpha", ALPHAS)
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_entmax_of_a_bad_row_is_nan_there_only(alpha, bad):
    x = rows()
    clean = reference.entmax(x, alpha)
    x[4, 3] = bad
    a = reference.entmax(x, alpha)
    assert a[4].isnan().all()
    others = [0, 1, 2, 3, 5, 6, 7, 8]
    assert torch.equal(a[others], clean[others])


def test_entmax_is_continuous_in_alpha():
    """Near the special cases, where the power form would lose digits: at 1.0001 it is softmax to the first order."""
    x = randn(5, 50)
    for near, exact in ((1.0001, 1.0), (1.49999, 1.5), (1.50001, 1.5), (1.99999, 2.0)):
        distance = (reference.entmax(x, near) - reference.entmax(x, exact)).abs().max()
        assert 0 < distance < 3 * abs(near - exact)
    one_step, two_steps = (reference.entmax(x, alpha) - reference.entmax(x, 1.0) for alpha in (1.0001, 1.0002))
    assert (two_steps - 2 * one_step).abs().max() < 1e-3 * one_step.abs().max()
    assert (reference.entmax(x.float(), 1.0001) - reference.entmax(x, 1.0001)).abs().max() < 1e-6


def test_entmax_of_a_learnt_alpha_at_its_bounds():
    """1 + sigmoid(raw) rounds to 1 and to 2 for large |raw|: still finite, and softmax and sparsemax."""
    x = randn(5, 50)
    for alpha in (1.0, 2.0):
        for dtype in (torch.float64, torch.float32, torch.bfloat16):
            learnt = torch.tensor(alpha, dtype=dtype, requires_grad=True)
            logits = x.to(dtype, copy=True).requires_grad_()
            a = reference.entmax(logits, learnt)
            assert (a - reference.entmax(logits, alpha)).abs().max() < 1e-5 + torch.finfo(dtype).eps * a.max()
            a.square().sum().backward()
            assert learnt.grad.isfinite()
            assert logits.grad.isfinite().all()


def test_entmax_of_half_types_is_computed_in_float32():
    x = randn(4, 500).bfloat16()
    for alpha in ALPHAS:
        a = reference.entmax(x, alpha)
        assert a.dtype == torch.bfloat16
        close(a, reference.entmax(x.float(), alpha).bfloat16())


# The gate


def test_gate_norms_are_torchs():
    s = randn(3, 5, 11) * 2 + 1
    close(reference.layer_norm(s), F.layer_norm(s, (11,)))
    norm = torch.nn.BatchNorm1d(11, affine=False, dtype=torch.float64)
    expected = norm(s.flatten(0, 1)).unflatten(0, (3, 5))
    mean, var = reference.batch_norm_statistics(s)
    close(reference.batch_norm(s, mean, var), expected)
    close(norm.running_mean, 0.1 * mean)
    norm.eval()
    expected = norm(s.flatten(0, 1)).unflatten(0, (3, 5))
    close(reference.batch_norm(s, norm.running_mean, norm.running_var), expected)


@pytest.mark.parametrize("norm", ["layer", "batch", "none"])
@pytest.mark.parametrize("alpha", ALPHAS)
def test_gate_is_its_parts(norm, alpha):
    z, weight, bias = randn(2, 6, I), randn(9, I), randn(9)
    s = z @ weight.T + bias
    x = {
        "layer": lambda: F.layer_norm(s, (9,)),
        "batch": lambda: F.batch_norm(s.flatten(0, 1), None, None, training=True).unflatten(0, (2, 6)),
        "none": lambda: s,
    }[norm]()
    exact = torch.softmax(x, -1) if alpha == 1 else entmax_package.entmax_bisect(x, alpha, dim=-1, n_iter=80)
    close(reference.gate(z, weight, bias, norm=norm, alpha=alpha), exact, atol=1e-9)


@pytest.mark.parametrize("norm", ["layer", "batch", "none"])
@pytest.mark.parametrize("bias", [True, False])
def test_gradcheck_of_gate(norm, bias):
    inputs = [randn(4, I, requires_grad=True), randn(6, I, requires_grad=True)]
    inputs += [randn(6, requires_grad=True)] if bias else []
    alpha = torch.tensor(1.4, dtype=torch.float64, requires_grad=True)
    assert gradcheck(lambda *args: reference.gate(*args, norm=norm), inputs)
    assert gradcheck(lambda alpha, *args: reference.gate(*args, norm=norm, alpha=alpha), (alpha, *inputs))


def test_a_zero_gate_is_uniform():
    a = reference.gate(randn(3, I), torch.zeros(8, I, dtype=torch.float64))
    close(a, torch.full((3, 8), 1 / 8, dtype=torch.float64))


# MxD's gate


def test_topk_gate():
    """Against torch.topk scattered into zeros, where no values tie."""
    z, weight, bias = randn(2, 7, I), randn(40, I), randn(40)
    x = torch.relu(z @ weight.T + bias)
    values, indices = x.topk(6, dim=-1)
    expected = torch.zeros_like(x).scatter(-1, indices, values)
    a = reference.topk_gate(z, weight, bias, 6)
    close(a, expected)
    assert ((a > 0).sum(-1) == 6).all()
    close(reference.topk_gate(z, weight, bias, 40), x)


def test_topk_gate_of_ties_and_of_few_positive_logits():
    """Of equal values the lowest experts; never more than k; zeros stay zeros."""
    one = torch.eye(1, dtype=torch.float64)
    logits = torch.tensor([3.0, 1.0, 2.0, 2.0, 2.0, -1.0], dtype=torch.float64)
    assert reference.topk_gate(one, logits[:, None], None, 3).tolist() == [[3, 0, 2, 2, 0, 0]]
    assert reference.topk_gate(one, logits[:, None], None, 6).tolist() == [[3, 1, 2, 2, 2, 0]]
    assert reference.topk_gate(one, torch.full_like(logits, 2)[:, None], None, 2).tolist() == [[2, 2, 0, 0, 0, 0]]
    assert reference.topk_gate(one, -logits.abs()[:, None], None, 3).count_nonzero() == 0
    assert reference.topk_gate(one[:0], logits[:, None], None, 3).shape == (0, 6)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_topk_gate_of_a_bad_row_is_nan_there_only(bad):
    z, weight = randn(4, 3), randn(9, 3)
    clean = reference.topk_gate(z, weight, None, 4)
    z[1, 2] = bad
    a = reference.topk_gate(z, weight, None, 4)
    assert a[1].isnan().all()
    assert torch.equal(a[[0, 2, 3]], clean[[0, 2, 3]])


def test_gradcheck_of_topk_gate():
    z, weight, bias = randn(3, I, requires_grad=True), randn(8, I, requires_grad=True), randn(8, requires_grad=True)
    assert gradcheck(lambda *args: reference.topk_gate(*args, 3), (z, weight, bias))

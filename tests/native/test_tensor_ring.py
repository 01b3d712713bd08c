"""The native TR experts against float64 truth; TT is the case R_1 = 1."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from mumoe_fast import reference
from mumoe_fast.ops._native_library import available
from mumoe_fast.testing.acceptance import EXACT, Rounding
from mumoe_fast.testing.problems_gate import Expected

pytestmark = pytest.mark.skipif(available() is not None, reason=str(available()))

native = torch.ops.mumoe_native
Inputs = dict[str, Tensor]


def inputs(
    T: int, I: int, O: int, N: tuple[int, ...], ranks: tuple[int, ...], dtype: torch.dtype, share: float, bias: bool
) -> Inputs:
    """By name; ranks are R_1 … R_{E+2}, and `share` of the coefficients are nonzero, at least one in a row."""

    def coefficients(n: int) -> Tensor:
        kept = torch.rand(T, n) < share
        kept[:, :1] = True
        a = torch.rand(T, n) * kept
        return a / a.sum(-1, keepdim=True)

    E = len(N)
    named = {"z": torch.randn(T, I), "in_core": torch.randn(*ranks[E:], I)}
    named["out_core"] = torch.randn(O, ranks[0], ranks[-1])
    for e, n in enumerate(N):
        named |= {f"a_{e}": coefficients(n), f"U_{e}": torch.randn(n, ranks[e], ranks[e + 1])}
    if bias:
        named["in_bias"] = torch.randn(ranks[E:])
    return {name: x.to(dtype) for name, x in named.items()}


def levels(named: Inputs, letter: str) -> list[Tensor]:
    return [x for name, x in named.items() if name.startswith(f"{letter}_")]


def solve(named: Inputs, dy: Tensor, activation: str | None, rounding: Rounding = EXACT) -> Inputs:
    """y and all gradients by the reference's formula, rounding what the kernels store."""
    leaves = {name: x.detach().requires_grad_() for name, x in named.items()}
    z = leaves["z"] if activation is None else rounding(reference.activate(leaves["z"], activation))
    A, B = reference.tr_modes(z, levels(leaves, "a"), levels(leaves, "U"), leaves["in_core"], leaves.get("in_bias"))
    h = rounding((rounding(A) @ rounding(B)).flatten(-2))
    y = rounding(h @ leaves["out_core"].flatten(1).t())
    gradients = torch.autograd.grad(y, list(leaves.values()), dy)
    return {"y": y.detach()} | {f"d{name}": d for name, d in zip(leaves, gradients, strict=True)}


def expected(named: Inputs, dy: Tensor, activation: str | None) -> Expected:
    dtype = dy.dtype
    truth = solve({name: x.double() for name, x in named.items()}, dy.double(), activation)
    eager = solve({name: x.float() for name, x in named.items()}, dy.float(), activation, Rounding(dtype))
    size = solve({name: x.double().abs() for name, x in named.items()}, dy.double().abs(), None)
    return Expected(truth, {name: x.to(dtype) for name, x in eager.items()}, size, dtype)


def run(named: Inputs, dy: Tensor, activation: str | None = None, support_only: bool = False) -> Inputs:
    arguments: tuple[Any, ...] = (
        named["z"], levels(named, "a"), levels(named, "U"), named["in_core"], named.get("in_bias"), named["out_core"],
    )  # fmt: skip
    y, A, B = native.tr_forward(*arguments, activation=activation or "none", save=True)
    dz, da, dU, d_in, d_bias, d_out = native.tr_backward(
        dy, *arguments, A, B, activation=activation or "none", needs=[True] * 6, support_only=support_only
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
    named, dy = inputs(T, 18, 11, N, ranks, dtype, share, bias), torch.randn(T, 11).to(dtype)
    expected(named, dy, None).accept(run(named, dy))


@pytest.mark.parametrize("activation", ["gelu", "gelu_tanh", "relu", "silu"])
def test_activations(activation: str) -> None:
    named, dy = inputs(7, 18, 11, (20,), (4, 4, 9), torch.float32, 0.05, True), torch.randn(7, 11)
    expected(named, dy, activation).accept(run(named, dy, activation))


def test_gradient_on_the_support_alone() -> None:
    named, dy = inputs(7, 18, 11, (60,), (4, 4, 9), torch.float32, 0.05, True), torch.randn(7, 11)
    results, everywhere = run(named, dy, support_only=True), run(named, dy)
    support = named["a_0"] != 0
    assert torch.allclose(results["da_0"][support], everywhere["da_0"][support], rtol=1e-4, atol=1e-4)
    assert not results["da_0"][~support].any()


def test_no_tokens() -> None:
    results = run(inputs(0, 18, 11, (20, 3), (4, 3, 5, 17), torch.float32, 0.5, True), torch.randn(0, 11))
    assert results["y"].shape == (0, 11)
    assert not any(results[name].any() for name in ("dU_0", "dU_1", "din_core", "din_bias", "dout_core"))

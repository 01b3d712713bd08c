"""Every factorisation × levels × bias × norm × α × dtype × implementation, whole layers, by the acceptance rule.

The cases are data in `mumoe_fast.testing.problems_layer`; a new factorisation adds one row there and nothing here.
"""

import pytest
import torch

from mumoe_fast import rank
from mumoe_fast.layers.mumoe import EXPERTS
from mumoe_fast.ops.dispatch import obstacle
from mumoe_fast.testing.problems_layer import FACTORIZATIONS, LayerCase, layer_cases, layer_expected, run_layer

CASES = list(layer_cases())
NATIVE = [case for case in CASES if case.dtype != torch.float16]


def accepts(case: LayerCase, impl: str, device: torch.device) -> None:
    layer = case.build(impl, device)
    z = torch.randn(case.tokens, case.in_features).to(device, case.dtype)
    dy = torch.randn(case.tokens, case.out_features).to(device, case.dtype)
    expected = layer_expected(case, layer, z, dy)
    expected.accept(run_layer(layer, z, dy))


@pytest.mark.parametrize("case", CASES, ids=str)
def test_triton(case: LayerCase, device: torch.device) -> None:
    accepts(case, "triton", device)


@pytest.mark.parametrize("case", NATIVE, ids=str)
def test_native(case: LayerCase) -> None:
    hindrance = obstacle("native", torch.device("cpu"), case.dtype)
    if hindrance is not None:
        pytest.skip(hindrance)
    accepts(case, "native", torch.device("cpu"))


def test_the_suite_covers_every_factorisation_and_every_option() -> None:
    assert set(FACTORIZATIONS) == set(EXPERTS) == set(rank.FACTORIZATIONS)
    for factorization in FACTORIZATIONS:
        mine = [case for case in CASES if case.factorization == factorization]
        assert {len(case.levels) for case in mine} == {1, 2, 4}
        assert {case.norm for case in mine} == {"layer", "batch", "none"}
        assert {case.bias for case in mine} == {True, False}
        assert {case.alpha for case in mine} == {1.0, 1.25, 1.5, 2.0}
        assert {case.dtype for case in mine} == {torch.float32, torch.bfloat16, torch.float16}


def test_a_wrong_kernel_is_seen(monkeypatch: pytest.MonkeyPatch, device: torch.device) -> None:
    """The suite can fail: drop the smallest coefficient of every row, as a truncated support would."""
    from mumoe_fast.kernels import gate

    forward = gate.gate_forward

    def truncated(*arguments: object, **options: object) -> torch.Tensor:
        a = forward(*arguments, **options)
        smallest = torch.where(a > 0, a, 2).argmin(-1, keepdim=True)
        return a.scatter(-1, smallest, 0)

    monkeypatch.setattr(gate, "gate_forward", truncated)
    case = next(c for c in CASES if c.norm == "layer" and c.dtype == torch.bfloat16 and c.alpha == 1.5)
    layer = case.build("triton", device)
    z = torch.randn(case.tokens, case.in_features).to(device, case.dtype)
    dy = torch.randn(case.tokens, case.out_features).to(device, case.dtype)
    expected = layer_expected(case, layer, z, dy)
    with pytest.raises(AssertionError, match="outside the acceptance rule"):
        expected.accept(run_layer(layer, z, dy))

"""Bad input is refused by name before any kernel runs, and leading dimensions, autocast and impl are handled once."""

import pytest
import torch
from torch import Tensor

from mumoe_fast import functional as F
from mumoe_fast import reference

T, I, O, N, R = 5, 8, 6, 4, 3


def cp_arguments(**changes: object) -> dict[str, object]:
    arguments: dict[str, object] = {
        "z": torch.randn(T, I),
        "coefficients": [torch.rand(T, N)],
        "expert_factors": [torch.randn(N, R)],
        "in_factor": torch.randn(R, I),
        "out_factor": torch.randn(O, R),
        "in_bias": torch.randn(R),
    }
    return arguments | changes


CP_ERRORS = {
    "wrong last dimension": (
        {"z": torch.randn(T, I + 1)},
        ValueError,
        r"z: expected last dimension 8 .*got shape \(5, 9\)",
    ),
    "integer input": (
        {"z": torch.ones(T, I, dtype=torch.int64)},
        TypeError,
        r"z: expected a floating-point .* torch.int64",
    ),
    "not a tensor": ({"z": [1.0]}, TypeError, "z: expected a Tensor, got list"),
    "mixed dtypes": (
        {"out_factor": torch.randn(O, R).half()},
        TypeError,
        r"out_factor: expected torch.float32 as z has",
    ),
    "mixed devices": (
        {"in_bias": torch.empty(R, device="meta")},
        ValueError,
        "in_bias: expected device cpu as z has, got meta",
    ),
    "coefficients of another batch": (
        {"coefficients": [torch.rand(T + 1, N)]},
        ValueError,
        r"coefficients\[0\]: expected shape",
    ),
    "coefficients of other experts": (
        {"coefficients": [torch.rand(T, N + 1)]},
        ValueError,
        r"coefficients\[0\]: expected shape \(5, 4\)",
    ),
    "a bare tensor for the levels": (
        {"coefficients": torch.rand(T, N)},
        TypeError,
        "coefficients: expected a list or tuple",
    ),
    "levels that differ": (
        {"coefficients": [torch.rand(T, N)] * 2},
        ValueError,
        "got 2 in coefficients, 1 in expert_factors",
    ),
    "no level": ({"coefficients": [], "expert_factors": []}, ValueError, "at least one"),
    "another rank": ({"out_factor": torch.randn(O, R + 1)}, ValueError, r"out_factor: expected shape \(any, 3\)"),
    "unknown activation": (
        {"activation": "swish"},
        ValueError,
        "activation: expected one of None, 'gelu'.* got 'swish'",
    ),
    "unknown impl": ({"impl": "cuda"}, ValueError, "impl: expected one of auto, .* got 'cuda'"),
}


@pytest.mark.parametrize("case", CP_ERRORS)
def test_cp_experts_refuses(case: str) -> None:
    changes, error, message = CP_ERRORS[case]
    with pytest.raises(error, match=message):
        F.cp_experts(**cp_arguments(**changes))  # type: ignore[arg-type]


GATE_ERRORS = {
    "alpha below": ({"alpha": 0.9}, ValueError, r"alpha: expected a number in \[1, 2\], got 0.9"),
    "alpha above": ({"alpha": 2.5}, ValueError, r"alpha: expected a number in \[1, 2\], got 2.5"),
    "alpha NaN": ({"alpha": float("nan")}, ValueError, "alpha: expected"),
    "eps": ({"eps": 0.0}, ValueError, "eps: expected a positive number"),
    "a text for eps": ({"eps": "1e-5"}, ValueError, "eps: expected a positive number, got '1e-5'"),
    "norm": ({"norm": "rms"}, ValueError, "norm: expected one of 'layer', 'none', got 'rms'"),
    "zero experts": ({"weight": torch.randn(0, I)}, ValueError, "weight: expected at least one expert"),
    "weight's shape": ({"weight": torch.randn(N)}, ValueError, r"weight: expected shape \(any, any\), got \(4,\)"),
    "input": ({"weight": torch.randn(N, I + 1)}, ValueError, r"z: expected last dimension 9"),
    "dtype": (
        {"weight": torch.randn(N, I).bfloat16()},
        TypeError,
        "weight: expected torch.float32 as z has, got torch.bfloat16",
    ),
    "bias": ({"bias": torch.randn(N + 1)}, ValueError, r"bias: expected shape \(4\), got \(5,\)"),
}


@pytest.mark.parametrize("case", GATE_ERRORS)
def test_gate_refuses(case: str) -> None:
    changes, error, message = GATE_ERRORS[case]
    with pytest.raises(error, match=message):
        F.gate(**({"z": torch.randn(T, I), "weight": torch.randn(N, I)} | changes))  # type: ignore[arg-type]


def test_gates_of_all_levels_name_the_one_that_is_wrong() -> None:
    z, weights = torch.randn(T, I), [torch.randn(N, I), torch.randn(3, I)]
    with pytest.raises(TypeError, match=r"weights: expected a list or tuple .* got Tensor"):
        F.gate_hierarchy(z, weights[0])  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"z: expected last dimension 9 \(in_features of weights\[1\]\)"):
        F.gate_hierarchy(z, [weights[0], torch.randn(3, I + 1)])
    with pytest.raises(ValueError, match=r"one tensor per hierarchy level.*2 in weights, 1 in biases"):
        F.gate_hierarchy(z, weights, [torch.randn(N)])
    with pytest.raises(ValueError, match=r"biases\[1\]: expected shape \(3\), got \(2,\)"):
        F.gate_hierarchy(z, weights, [torch.randn(N), torch.randn(2)])
    with pytest.raises(ValueError, match="eps: expected a positive number"):
        F.gate_hierarchy(z, weights, eps=0.0)


def test_batch_norm_refuses_a_single_token_and_names_it() -> None:
    with pytest.raises(ValueError, match="z: batch norm expected at least 2 tokens in training, got 1"):
        F.batch_norm_gate(torch.randn(1, I), torch.randn(N, I))


def test_entmax_refuses_nothing_to_choose_from() -> None:
    with pytest.raises(ValueError, match=r"x: expected shape \(\.\.\., N\) with at least one expert, got \(3, 0\)"):
        F.entmax(torch.randn(3, 0))
    with pytest.raises(TypeError, match=r"x: expected a floating-point tensor, got torch.int32"):
        F.entmax(torch.ones(3, dtype=torch.int32))


def test_a_named_implementation_never_falls_back(monkeypatch: pytest.MonkeyPatch) -> None:
    from mumoe_fast.ops import dispatch

    with pytest.raises(
        RuntimeError, match=r'impl="triton" cannot run here: it computes in float32 and takes no torch.float64'
    ):
        F.entmax(torch.randn(3, 4, dtype=torch.float64), impl="triton")
    monkeypatch.setattr(dispatch, "_TRITON_INTERPRETS", False)
    with pytest.raises(RuntimeError, match=r"the tensors are on cpu .* TRITON_INTERPRET=1"):
        F.entmax(torch.randn(3, 4), impl="triton")
    monkeypatch.setattr(dispatch, "_TRITON_INSTALLED", False)
    with pytest.raises(RuntimeError, match=r"triton is not installed: pip install"):
        F.entmax(torch.randn(3, 4), impl="triton")


def test_float64_goes_to_the_reference() -> None:
    x = torch.randn(3, 4, dtype=torch.float64)
    assert torch.equal(F.entmax(x), reference.entmax(x))


@pytest.mark.parametrize("impl", ["reference", "triton", "native"])
@pytest.mark.parametrize("leading", [(), (3,), (2, 3), (0, 3), (2, 1, 2)])
def test_leading_dimensions_are_flattened_and_restored(
    impl: str, leading: tuple[int, ...], device: torch.device
) -> None:
    z = torch.randn(*leading, I, device=device)
    weight, factors = torch.randn(N, I, device=device), [torch.randn(N, R, device=device)]
    a = F.gate(z, weight, impl=impl)
    assert a.shape == (*leading, N)
    y = F.cp_experts(z, [a], factors, torch.randn(R, I, device=device), torch.ones(O, R, device=device), impl=impl)
    assert y.shape == (*leading, O)
    assert F.entmax(a, impl=impl).shape == a.shape


@pytest.mark.parametrize("impl", ["reference", "triton", "native"])
def test_autocast_casts_tokens_and_keeps_the_gates_weight(impl: str, device: torch.device) -> None:
    z = torch.randn(T, I, device=device, requires_grad=True)
    weight = torch.randn(N, I, device=device, requires_grad=True)
    factor = torch.randn(N, R, device=device, requires_grad=True)
    with torch.autocast(device.type, torch.bfloat16):
        a = F.gate(z, weight, impl=impl)
        y = F.cp_experts(
            z, [a], [factor], torch.randn(R, I, device=device), torch.randn(O, R, device=device), impl=impl
        )
    assert a.dtype == y.dtype == torch.bfloat16
    y.backward(torch.randn_like(y))
    for x in (z, weight, factor):
        assert isinstance(x.grad, Tensor)
        assert x.grad.dtype == torch.float32
        assert x.grad.isfinite().all()


@pytest.mark.parametrize("impl", ["reference", "triton", "native"])
def test_batch_norm_gate_agrees_with_batch_norm_over_tokens(impl: str, device: torch.device) -> None:
    z, weight = torch.randn(3, 7, I, device=device), torch.randn(N, I, device=device)
    a, mean, var = F.batch_norm_gate(z, weight, impl=impl)
    norm = torch.nn.BatchNorm1d(N, affine=False, momentum=1.0, device=device)
    expected = reference.entmax(norm((z @ weight.T).flatten(0, 1)))
    torch.testing.assert_close(a.flatten(0, 1), expected)
    assert norm.running_mean is not None
    assert norm.running_var is not None
    torch.testing.assert_close(mean, norm.running_mean)
    torch.testing.assert_close(var, norm.running_var)

"""MxD's operators by PyTorch's own tools, and its public functions: errors by name, autocast, the reference's form."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from mumoe_fast import functional, reference
from mumoe_fast.ops import mxd
from tests.layouts import elsewhere

T, I, H, O, N, K = 5, 12, 20, 18, 7, 3


def tensor(*shape: int, dtype: torch.dtype = torch.float32, grad: bool = True) -> Tensor:
    return torch.randn(*shape).to(dtype).requires_grad_(grad)


def permuted(*shape: int) -> Tensor:
    """A dense tensor whose dimensions are stored in the opposite order: fakes that assume contiguity show."""
    return torch.randn(*reversed(shape)).permute(*reversed(range(len(shape)))).requires_grad_()


def indices(T: int = T) -> Tensor:
    return torch.rand(T, N).argsort(-1)[:, :K]


def samples() -> dict[str, tuple[Callable[..., Any], tuple[Any, ...]]]:
    """Operator and arguments, by a name for the test."""
    half = torch.bfloat16
    factors = tensor(N, O), tensor(O, H)
    strided = permuted(T, H), permuted(T, K), indices().t().contiguous().t(), permuted(N, O), permuted(O, H)
    return {
        "gate": (mxd.topk_gate, (tensor(T, I), tensor(N, I), tensor(N), K)),
        "gate permuted, no bias": (mxd.topk_gate, (permuted(T, I), permuted(N, I), None, K)),
        "gate, master weight": (mxd.topk_gate, (tensor(T, I, dtype=half), tensor(N, I), tensor(N), K)),
        "gate, frozen input": (mxd.topk_gate, (tensor(T, I, grad=False), tensor(N, I), None, K)),
        "gate without tokens": (mxd.topk_gate, (tensor(0, I), tensor(N, I), None, K)),
        "mxd": (mxd.mxd, (tensor(T, H), torch.rand(T, K).requires_grad_(), indices(), *factors, "none", True)),
        "mxd permuted": (mxd.mxd, (*strided, "gelu", True)),
        "mxd, frozen input": (
            mxd.mxd,
            (tensor(T, H, grad=False), tensor(T, K), indices().int(), *factors, "relu", True),
        ),
        "mxd without tokens": (mxd.mxd, (tensor(0, H), tensor(0, K), indices(0), *factors, "none", True)),
    }


def sample(name: str, device: torch.device) -> tuple[Callable[..., Any], tuple[Any, ...]]:
    """An operator and arguments on the device."""
    operator, arguments = samples()[name]
    return operator, elsewhere(arguments, device)


NAMES = list(samples())


@pytest.mark.parametrize("impl", ["triton", "native"])
@pytest.mark.parametrize("name", NAMES)
def test_opcheck(name: str, impl: str, device: torch.device) -> None:
    operator, arguments = sample(name, device)
    torch.library.opcheck(operator, (*arguments, impl))


@pytest.mark.parametrize("impl", ["triton", "native"])
@pytest.mark.parametrize("name", ["gate", "mxd"])
def test_double_backward_is_a_clear_error(name: str, impl: str, device: torch.device) -> None:
    operator, arguments = sample(name, device)
    output = operator(*arguments, impl)[0]
    inputs = [x for x in arguments if isinstance(x, Tensor) and x.requires_grad]
    first = torch.autograd.grad(output, inputs, torch.randn_like(output).requires_grad_(), create_graph=True)
    with pytest.raises(RuntimeError, match=r"mumoe::\w+ is not differentiable: double backward is not implemented"):
        torch.autograd.grad(sum(x.square().sum() for x in first), inputs)


@pytest.mark.parametrize("impl", ["triton", "native"])
@pytest.mark.parametrize("name", ["gate", "mxd"])
def test_each_gradient_alone_is_what_it_is_among_all(name: str, impl: str, device: torch.device) -> None:
    operator, arguments = sample(name, device)
    leaves = [i for i, x in enumerate(arguments) if isinstance(x, Tensor) and x.requires_grad]
    output = operator(*arguments, impl)[0]
    upstream = torch.randn_like(output)
    together = torch.autograd.grad(output, [arguments[i] for i in leaves], upstream)
    for i, expected in zip(leaves, together, strict=True):
        frozen = [x.detach() if isinstance(x, Tensor) and j != i else x for j, x in enumerate(arguments)]
        (alone,) = torch.autograd.grad(operator(*frozen, impl)[0], [arguments[i]], upstream)
        assert torch.equal(alone, expected)


def test_flops_are_counted_on_the_support(device: torch.device) -> None:
    z, weight, h = (tensor(*shape).to(device) for shape in ((T, I), (N, I), (T, H)))
    factors = tensor(N, O).to(device), tensor(O, H).to(device)
    with FlopCounterMode(display=False) as counter:
        values, chosen = mxd.topk_gate(z, weight, None, K, "triton")
        y = mxd.mxd(h, values, chosen, *factors, "none", True, "triton")[0]
    assert counter.get_total_flops() == 2 * T * (I * N + O * (K + H))
    with FlopCounterMode(display=False) as counter:
        y.backward(torch.randn_like(y))
    assert counter.get_total_flops() == 2 * T * 2 * (K * I + O * (K + H))


# --- public functions -------------------------------------------------------------------------------------------------


def test_gradcheck_of_the_reference_on_a_support() -> None:
    z, weight, bias, h = (
        torch.randn(s, dtype=torch.float64, requires_grad=True) for s in ((4, I), (N, I), (N,), (4, H))
    )
    factors = [torch.randn(s, dtype=torch.float64, requires_grad=True) for s in ((N, O), (O, H))]

    def block(z: Tensor, weight: Tensor, bias: Tensor, h: Tensor, *factors: Tensor) -> Tensor:
        return functional.mxd_experts(h, *functional.topk_gate(z, weight, bias, k=K), *factors, activation="gelu")

    assert torch.autograd.gradcheck(block, (z, weight, bias, h, *factors))
    assert torch.autograd.gradgradcheck(lambda *few: block(z, weight, bias, *few), (h, *factors), atol=1e-4)


@pytest.mark.parametrize("impl", ["reference", "triton", "native"])
def test_a_support_stands_for_the_dense_coefficients(impl: str, device: torch.device) -> None:
    z, h, weight, bias = (torch.randn(*s, device=device) for s in ((2, 3, I), (2, 3, H), (N, I), (N,)))
    expert_factors, out_factor = torch.randn(N, O, device=device), torch.randn(O, H, device=device)
    a = reference.topk_gate(z, weight, bias, K)
    values, chosen = functional.topk_gate(z, weight, bias, k=K, impl=impl)
    assert values.shape == chosen.shape == (2, 3, K)
    assert (values.diff(dim=-1) <= 0).all()
    torch.testing.assert_close(torch.zeros_like(a).scatter(-1, chosen, values), a)
    y = functional.mxd_experts(h, values, chosen, expert_factors, out_factor, activation="relu", impl=impl)
    torch.testing.assert_close(
        y, reference.mxd_experts(h, a, expert_factors, out_factor, activation="relu"), rtol=1e-4, atol=1e-4
    )


@pytest.mark.parametrize("impl", ["reference", "triton", "native"])
def test_exactly_k_of_equal_logits_are_kept(impl: str, device: torch.device) -> None:
    z, weight = torch.ones(2, I, device=device), torch.ones(N, I, device=device)
    values, chosen = functional.topk_gate(z, weight, k=K, impl=impl)
    assert torch.equal(values, torch.full((2, K), float(I), device=device))
    assert all(len(row.unique()) == K for row in chosen)


@pytest.mark.parametrize(
    ("impl", "dtype"),
    [
        ("reference", torch.bfloat16),
        ("reference", torch.float16),
        ("triton", torch.bfloat16),
        ("triton", torch.float16),
        ("native", torch.bfloat16),
    ],
)
def test_autocast_keeps_the_gates_master_weights(impl: str, dtype: torch.dtype, device: torch.device) -> None:
    z, h, weight, bias = (tensor(*s).to(device).detach().requires_grad_() for s in ((T, I), (T, H), (N, I), (N,)))
    factors = [tensor(*s).to(device).detach().requires_grad_() for s in ((N, O), (O, H))]
    with torch.autocast(device.type, dtype):
        values, chosen = functional.topk_gate(z, weight, bias, k=K, impl=impl)
        y = functional.mxd_experts(h, values, chosen, *factors, impl=impl)
    assert values.dtype == y.dtype == dtype
    y.backward(torch.randn_like(y))
    for x in (z, h, weight, bias, *factors):
        assert x.grad is not None
        assert x.grad.dtype == torch.float32
    if impl != "reference":  # accumulated in float32, and not rounded on the way out
        assert not torch.equal(weight.grad, weight.grad.to(dtype).float())
        assert torch.equal(h.grad, h.grad.to(dtype).float())


GATE = {"z": torch.zeros(2, I), "weight": torch.zeros(N, I), "bias": torch.zeros(N), "k": K}
BAD_GATE: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "k zero": ({"k": 0}, ValueError, "k: expected at least 1, got 0"),
    "k beyond N": ({"k": N + 1}, ValueError, f"k: expected at most the {N} experts of weight, got {N + 1}"),
    "k float": ({"k": 2.0}, TypeError, "k: expected an int, got 2.0"),
    "z": ({"z": torch.zeros(2, I + 1)}, ValueError, f"z: expected last dimension {I} .*got shape"),
    "integer z": ({"z": torch.zeros(2, I).int()}, TypeError, "z: expected a floating-point tensor, got torch.int32"),
    "weight dtype": ({"weight": torch.zeros(N, I).half()}, TypeError, "weight: expected torch.float32 as z has"),
    "bias": ({"bias": torch.zeros(N + 1)}, ValueError, rf"bias: expected shape \({N}\)"),
    "no experts": ({"weight": torch.zeros(0, I)}, ValueError, "weight: expected at least one expert"),
    "impl": ({"impl": "fast"}, ValueError, "impl: expected one of auto"),
}


@pytest.mark.parametrize("case", BAD_GATE)
def test_bad_arguments_of_the_gate_are_named(case: str) -> None:
    changes, error, message = BAD_GATE[case]
    with pytest.raises(error, match=message):
        functional.topk_gate(**(GATE | changes))


EXPERTS = {
    "h": torch.zeros(2, H),
    "values": torch.zeros(2, K),
    "indices": torch.zeros(2, K, dtype=torch.int64),
    "expert_factors": torch.zeros(N, O),
    "out_factor": torch.zeros(O, H),
}
BAD_EXPERTS: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "h": ({"h": torch.zeros(2, H + 1)}, ValueError, f"h: expected last dimension {H} .*got shape"),
    "integer values": ({"values": torch.zeros(2, K).int()}, TypeError, "values: expected a floating-point tensor"),
    "values' tokens": ({"values": torch.zeros(3, K)}, ValueError, r"values: expected shape \(2, any\), got \(3, 3\)"),
    "values' dtype": ({"values": torch.zeros(2, K).half()}, TypeError, "values: expected torch.float32 as h has"),
    "indices' shape": (
        {"indices": torch.zeros(2, K + 1, dtype=torch.int64)},
        ValueError,
        r"indices: expected shape \(2, 3\), got \(2, 4\)",
    ),
    "indices' dtype": ({"indices": torch.zeros(2, K)}, TypeError, "indices: expected torch.int64 or torch.int32"),
    "indices' device": (
        {"indices": torch.zeros(2, K, dtype=torch.int64, device="meta")},
        ValueError,
        "indices: expected device cpu as h has, got meta",
    ),
    "expert_factors": (
        {"expert_factors": torch.zeros(N, O + 1)},
        ValueError,
        r"expert_factors: expected shape \(any, 18",
    ),
    "out_factor": ({"out_factor": torch.zeros(O)}, ValueError, r"out_factor: expected shape \(any, any\)"),
    "activation": ({"activation": "tanh"}, ValueError, "activation: expected one of None, 'gelu'"),
    "impl": ({"impl": "fast"}, ValueError, "impl: expected one of auto"),
}


@pytest.mark.parametrize("case", BAD_EXPERTS)
def test_bad_arguments_of_the_experts_are_named(case: str) -> None:
    changes, error, message = BAD_EXPERTS[case]
    with pytest.raises(error, match=message):
        functional.mxd_experts(**(EXPERTS | changes))

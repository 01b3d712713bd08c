"""The MxD block and the top-k gate as layers."""

from __future__ import annotations

import copy
import math
import pickle

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from mumoe_fast import ExpertGate, MxD, rank, reference

IMPLEMENTATIONS = ["reference", "triton", "native"]


def block(impl: str = "auto", **options: object) -> MxD:
    """A small block that has learned something: its D starts at zero."""
    made = MxD(12, 20, 18, num_experts=7, impl=impl, **({"k": 3} | options))  # type: ignore[arg-type]
    nn.init.normal_(made.experts.out_factor)
    return made


@pytest.mark.parametrize("activation", ["gelu", "relu"])
def test_the_block_is_equation_1_on_its_materialised_decoders(activation: str) -> None:
    made = block(activation=activation, dtype=torch.float64)
    x = torch.randn(2, 3, 12, dtype=torch.float64)
    (a,) = made.coefficients(x)
    assert a.shape == (2, 3, 7)
    torch.testing.assert_close(a, reference.topk_gate(x, made.gate.weights[0], made.gate.biases[0], 3))
    W = reference.mxd_materialize(made.experts.expert_factors, made.experts.out_factor)
    hidden = reference.activate(made.encoder(x), activation)
    torch.testing.assert_close(made(x), reference.moe(hidden, [a], W))


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_the_gate_can_read_another_input(impl: str, device: torch.device) -> None:
    made = block(impl).to(device)
    x, residual = torch.randn(4, 12, device=device), torch.randn(4, 12, device=device)
    ((values, indices),) = made.gate.support(residual)
    torch.testing.assert_close(made(x, gate_input=residual), made.experts(made.encoder(x), values, indices))
    assert not torch.allclose(made(x), made(x, gate_input=residual))


def test_a_fresh_block_is_zero_and_learns() -> None:
    made = MxD(12, 20, num_experts=300, k=5)
    x = torch.randn(6, 12)
    y = made(x)
    assert y.shape == (6, 12)
    assert not y.any()
    y.backward(torch.randn_like(y))
    assert made.experts.out_factor.grad is not None
    assert made.experts.out_factor.grad.abs().max() > 0


def test_initialisation() -> None:
    made = MxD(100, 40, 50, num_experts=300, k=4)
    factors = made.experts.expert_factors
    assert abs(factors.mean().item() - 1) < 0.05
    assert abs(factors.std().item() - 1) < 0.05
    bound = 1 / math.sqrt(100)
    for parameter in (made.gate.weights[0], made.gate.biases[0]):
        assert parameter.abs().max() <= bound
        assert parameter.abs().max() > 0.9 * bound


def test_parameters_are_those_counted_under_the_names_of_the_contract() -> None:
    shapes = {name: tuple(x.shape) for name, x in block().state_dict().items()}
    assert shapes == {
        "encoder.weight": (20, 12),
        "encoder.bias": (20,),
        "gate.weights.0": (7, 12),
        "gate.biases.0": (7,),
        "experts.expert_factors": (7, 18),
        "experts.out_factor": (18, 20),
    }
    for features, N in (((12, 20, 18), 7), ((768, 3072, 768), 21_500)):
        made = MxD(*features, num_experts=N, k=3, device="meta")
        assert sum(p.numel() for p in made.parameters()) == rank.mxd_parameters(features, N)


@pytest.mark.parametrize("impl", IMPLEMENTATIONS[1:])
def test_implementations_share_one_state_dict_and_agree(impl: str, device: torch.device) -> None:
    mine, theirs = block(impl).to(device), block("reference").to(device)
    theirs.load_state_dict(mine.state_dict())
    x = torch.randn(2, 3, 12, device=device)
    dy = torch.randn(2, 3, 18, device=device)
    results = []
    for made in (mine, theirs):
        z = x.clone().requires_grad_()
        y = made(z)
        y.backward(dy)
        results.append([y.detach(), z.grad, *(p.grad for p in made.parameters())])
    for got, expected in zip(*results, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_the_block_compiles_without_a_graph_break(impl: str, device: torch.device) -> None:
    made = block(impl).to(device)
    compiled = torch.compile(made, fullgraph=True, backend="aot_eager")
    x, dy = torch.randn(2, 3, 12, device=device), torch.randn(2, 3, 18, device=device)
    results = []
    for forward in (made, compiled):
        made.zero_grad()
        z = x.clone().requires_grad_()
        y = forward(z)
        y.backward(dy)
        results.append([y.detach(), z.grad, *(p.grad for p in made.parameters())])
    for eager, graph in zip(*results, strict=True):
        torch.testing.assert_close(graph, eager)


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_no_token_and_a_bad_one(impl: str, device: torch.device) -> None:
    made = block(impl).to(device)
    assert made(torch.randn(0, 12, device=device)).shape == (0, 18)
    x = torch.randn(4, 12, device=device)
    clean = made(x)
    x[2, 3] = float("nan")
    y = made(x)
    rows = [0, 1, 3]
    assert y[2].isnan().all()
    assert torch.equal(y[rows], clean[rows])


class LargestResult(TorchDispatchMode):
    """The most elements that any operation below it returned in one tensor."""

    largest = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        result = func(*args, **(kwargs or {}))
        for x in result if isinstance(result, tuple | list) else (result,):
            if isinstance(x, Tensor):
                self.largest = max(self.largest, x.numel())
        return result


def test_a_gpt2_sized_block_with_21500_experts_runs() -> None:
    """No (T, N, O), and no product of dense coefficients: nothing is larger than the parameters."""
    T, I, H, N = 4, 768, 3072, 21_500
    made = MxD(I, H, num_experts=N, impl="reference")
    nn.init.normal_(made.experts.out_factor, std=0.02)
    x = torch.randn(T, I, requires_grad=True)
    with LargestResult() as sizes:
        y = made(x)
        y.backward(torch.randn_like(y))
    assert sizes.largest == N * I
    assert x.grad is not None
    (a,) = made.coefficients(x)
    assert ((a > 0).sum(-1) == 32).all()
    expected = (a @ made.experts.expert_factors) * (nn.functional.gelu(made.encoder(x)) @ made.experts.out_factor.t())
    torch.testing.assert_close(y, expected)
    touched = made.experts.expert_factors.grad.abs().sum(-1) > 0  # type: ignore[union-attr]
    assert torch.equal(touched, (a > 0).any(0))


# --- the gate ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_a_topk_gate_has_levels_and_a_support(impl: str, device: torch.device) -> None:
    gate = ExpertGate(8, (6, 4), activation="topk", k=2, impl=impl).to(device)
    z = torch.randn(2, 3, 8, device=device)
    for N, a, (values, indices) in zip((6, 4), gate(z), gate.support(z), strict=True):
        assert a.shape == (2, 3, N)
        assert values.shape == indices.shape == (2, 3, 2)
        assert torch.equal(a.gather(-1, indices), values)
        assert torch.equal(a.sum(-1), values.sum(-1))


def test_the_entmax_gate_is_what_it_was() -> None:
    gate = ExpertGate(8, (6, 4))
    assert set(gate.state_dict()) == {"weights.0", "weights.1"}
    assert (gate.norm, gate.activation) == ("layer", "entmax")
    assert not any(p.any() for p in gate.parameters())
    with pytest.raises(RuntimeError, match="support: expected a gate with activation='topk', got 'entmax'"):
        gate.support(torch.randn(2, 8))


BAD = {
    "k": ({"k": 7}, ValueError, "k: expected at most 6, the experts of a level, got 7"),
    "k of the smallest level": (
        {"num_experts": (6, 4), "k": 5},
        ValueError,
        "k: expected at most 4, the experts of a level, got 5",
    ),
    "no k": ({"k": 0}, ValueError, "k: expected at least 1, got 0"),
    "norm": ({"norm": "layer"}, ValueError, "norm: expected one of 'none', got 'layer'"),
    "activation": ({"activation": "relu"}, ValueError, "activation: expected one of 'entmax', 'topk', got 'relu'"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_arguments_of_the_gate_are_named(case: str) -> None:
    changes, error, message = BAD[case]
    with pytest.raises(error, match=message):
        ExpertGate(**({"in_features": 8, "num_experts": 6, "activation": "topk", "k": 2} | changes))  # type: ignore[arg-type]


BAD_BLOCK = {
    "k": ({"k": 8}, ValueError, "k: expected at most 7, the experts of a level, got 8"),
    "activation": ({"activation": "tanh"}, ValueError, "activation: expected one of None, 'gelu'"),
    "num_experts": ({"num_experts": 0}, ValueError, "num_experts: expected at least 1, got 0"),
    "levels": ({"num_experts": (3, 4)}, TypeError, r"num_experts: expected an int, got \(3, 4\)"),
    "hidden_features": ({"hidden_features": 0}, ValueError, "hidden_features: expected at least 1, got 0"),
    "impl": ({"impl": "fast"}, ValueError, "impl: expected one of 'auto', .*got 'fast'"),
}


@pytest.mark.parametrize("case", BAD_BLOCK)
def test_bad_arguments_of_the_block_are_named(case: str) -> None:
    changes, error, message = BAD_BLOCK[case]
    with pytest.raises(error, match=message):
        MxD(**({"in_features": 8, "hidden_features": 9, "num_experts": 7, "k": 2} | changes))  # type: ignore[arg-type]


def test_copies_casts_and_repr() -> None:
    made = block("reference")
    x = torch.randn(3, 12)
    for twin in (copy.deepcopy(made), pickle.loads(pickle.dumps(made))):
        assert torch.equal(twin(x), made(x))
    assert "in_features=12, num_experts=7, activation='topk', k=3" in repr(made)
    assert "hidden_features=20, out_features=18, num_experts=7, activation='gelu'" in repr(made)
    y = made.bfloat16()(x.bfloat16())
    assert y.dtype == torch.bfloat16
    y.backward(torch.randn_like(y))
    assert all(p.grad is not None and p.grad.dtype == torch.bfloat16 for p in made.parameters())

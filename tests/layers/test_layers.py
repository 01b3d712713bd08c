"""The layers: initialisation, matched parameters, one state_dict for all implementations, and life as a module."""

import copy
import io
import math
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from mumoe_fast import CPExperts, ExpertGate, MuMoE, MuMoEMLP, MxD, reference

LEVELS = [(6,), (6, 3), (4, 2, 2, 2)]


def trained_gate(layer: MuMoE | MuMoEMLP) -> None:
    """A gate that has learned something: at zero every expert has the same coefficient."""
    for weight in layer.gate.weights:
        nn.init.normal_(weight)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("levels", LEVELS)
def test_a_layer_is_equation_1_on_its_materialised_experts(levels: tuple[int, ...], bias: bool) -> None:
    layer = MuMoE(7, 5, levels, rank=4, bias=bias, dtype=torch.float64)
    trained_gate(layer)
    x = torch.randn(2, 3, 7, dtype=torch.float64)
    experts = layer.experts
    W, b = reference.cp_materialize(
        list(experts.expert_factors), experts.in_factor, experts.out_factor, experts.in_bias
    )
    assert W.shape == (*levels, 7, 5)
    torch.testing.assert_close(layer(x), reference.moe(x, layer.coefficients(x), W, b))


def test_an_mlp_shares_one_gate_and_stores_the_activation_with_its_second_layer() -> None:
    block = MuMoEMLP(7, 9, 5, num_experts=4, rank=3, dtype=torch.float64)
    trained_gate(block)
    x = torch.randn(2, 7, dtype=torch.float64)
    a = block.coefficients(x)
    hidden = nn.functional.gelu(block.in_experts(x, a))
    second = copy.deepcopy(block.out_experts)
    second.activation = None
    torch.testing.assert_close(block(x), second(hidden, a))
    assert sum("gate" in name for name, _ in block.named_parameters()) == 1


def test_the_gate_can_read_another_input() -> None:
    layer = MuMoE(7, 5, 4, rank=3)
    trained_gate(layer)
    x, residual = torch.randn(2, 7), torch.randn(2, 7)
    torch.testing.assert_close(layer(x, gate_input=residual), layer.experts(x, layer.coefficients(residual)))
    assert not torch.allclose(layer(x), layer(x, gate_input=residual))


def test_a_fresh_gate_gives_every_expert_the_same_coefficient() -> None:
    for a, N in zip(ExpertGate(8, (5, 3))(torch.randn(4, 8)), (5, 3), strict=True):
        torch.testing.assert_close(a, torch.full((4, N), 1 / N))


def test_initialisation_is_the_papers() -> None:
    experts = CPExperts(100, 50, (300, 4), 64)
    first, second = experts.expert_factors
    assert abs(first.mean().item() - 1) < 0.05
    assert abs(first.std().item() - 1) < 0.05
    assert torch.equal(second, torch.ones(4, 64))
    for parameter, fan_in in ((experts.in_factor, 100), (experts.in_bias, 100), (experts.out_factor, 64)):
        assert parameter is not None
        bound = 1 / math.sqrt(fan_in)
        assert parameter.abs().max() <= bound
        assert parameter.abs().max() > 0.9 * bound


def test_rank_none_matches_the_parameters_of_the_dense_layers() -> None:
    assert MuMoEMLP(768, 3072, num_experts=256, device="meta").in_experts.rank == (552,)
    assert MuMoE(768, 1000, 128, device="meta").experts.rank == (352,)
    block = MuMoEMLP(96, 384, num_experts=16)
    dense = nn.Sequential(nn.Linear(96, 384), nn.GELU(), nn.Linear(384, 96))
    mine, theirs = (sum(p.numel() for p in m.parameters()) for m in (block, dense))
    assert abs(mine - theirs) <= 4 * 2 * (96 + 384 + 16 + 1)  # half of 8 in the rank, in both layers


def test_where_no_rank_fits_the_error_names_the_most_experts() -> None:
    with pytest.raises(ValueError, match=r"num_experts.*1,?000.*rank="):
        MuMoE(768, 1000, 1001)
    MuMoE(768, 1000, 1000, device="meta")
    assert MuMoE(768, 1000, 4096, rank=8, device="meta").experts.rank == (8,)


BAD = {
    "no experts": ({"num_experts": 0}, ValueError, "num_experts: expected at least 1, got 0"),
    "no experts at a level": ({"num_experts": (4, 0)}, ValueError, "num_experts: expected at least 1, got 0"),
    "no level": ({"num_experts": ()}, ValueError, "num_experts: expected an int or one int per hierarchy level"),
    "no number of experts": ({"num_experts": None}, TypeError, "num_experts: expected an int, got None"),
    "a text for alpha": ({"alpha": "1.5"}, ValueError, r"alpha: expected a number in \[1, 2\], got '1.5'"),
    "no norm": ({"norm": None}, ValueError, "norm: expected one of 'layer', 'batch', 'none', got None"),
    "float experts": ({"num_experts": (2.0,)}, TypeError, "num_experts: expected an int, got 2.0"),
    "rank": ({"rank": 0}, ValueError, "rank.*at least 1.*0"),
    "alpha": ({"alpha": 3.0}, ValueError, r"alpha: expected a number in \[1, 2\], got 3.0"),
    "norm": ({"norm": "group"}, ValueError, "norm: expected one of 'layer', 'batch', 'none', got 'group'"),
    "impl": ({"impl": "fast"}, ValueError, "impl: expected one of 'auto', .*got 'fast'"),
    "factorization": ({"factorization": "svd"}, ValueError, "factorization: expected one of .*'cp'.*got 'svd'"),
    "in_features": ({"in_features": 0}, ValueError, "in_features: expected at least 1, got 0"),
    "out_features": ({"out_features": -1}, ValueError, "out_features: expected at least 1, got -1"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_arguments_are_named(case: str) -> None:
    changes, error, message = BAD[case]
    arguments = {"in_features": 8, "out_features": 6, "num_experts": 4, "rank": 3} | changes
    with pytest.raises(error, match=message):
        MuMoE(**arguments)  # type: ignore[arg-type]


def test_sizes_may_be_integers_of_numpy() -> None:
    numpy = pytest.importorskip("numpy")
    I, O, N, R = map(numpy.int64, (8, 6, 4, 3))
    layers = (
        MuMoE(I, O, numpy.array([4, 2]), factorization="tr", rank=[numpy.int32(2), 2, 2, R]),
        MuMoEMLP(I, numpy.int32(9), O, N, factorization="tt", rank=R),
        MuMoE(I, O, torch.Size([4, 2]), rank=R),
        MxD(I, numpy.int32(9), O, num_experts=N, k=numpy.int64(2)),
    )
    for layer in layers:
        assert layer(torch.randn(3, 8)).shape == (3, 6)
        kept = [value for part in layer.modules() for value in vars(part).values()]
        flat = [x for value in kept for x in (value if isinstance(value, tuple) else [value])]
        assert not any(isinstance(x, numpy.generic) for x in flat), "a config of these would not go through json"


def test_bad_input_names_the_dimension() -> None:
    with pytest.raises(ValueError, match=r"z: expected last dimension 8 .*got shape \(2, 9\)"):
        MuMoE(8, 6, 4, rank=3)(torch.randn(2, 9))


@pytest.mark.parametrize("norm", ["layer", "batch", "none"])
def test_implementations_share_one_state_dict(norm: str, device: torch.device) -> None:
    mine = MuMoEMLP(16, 24, num_experts=(4, 2), rank=8, norm=norm, impl="triton").to(device)
    theirs = MuMoEMLP(16, 24, num_experts=(4, 2), rank=8, norm=norm, impl="reference").to(device)
    trained_gate(mine)
    missing = theirs.load_state_dict(mine.state_dict())
    assert not missing.missing_keys
    assert not missing.unexpected_keys
    x = torch.randn(5, 16, device=device)
    torch.testing.assert_close(mine(x), theirs(x), rtol=1e-4, atol=1e-5)


def test_parameters_have_the_names_of_the_contract() -> None:
    names = set(MuMoE(8, 6, (4, 2), rank=3, norm="batch").state_dict())
    assert names == {
        "gate.weights.0",
        "gate.weights.1",
        "gate.norms.0.running_mean",
        "gate.norms.0.running_var",
        "gate.norms.1.running_mean",
        "gate.norms.1.running_var",
        "experts.expert_factors.0",
        "experts.expert_factors.1",
        "experts.in_factor",
        "experts.in_bias",
        "experts.out_factor",
    }


@pytest.mark.parametrize("impl", ["reference", "triton", "native"])
def test_copies_pickles_and_casts(impl: str, device: torch.device) -> None:
    layer = MuMoE(8, 6, 4, rank=16, impl=impl).to(device)
    trained_gate(layer)
    x = torch.randn(3, 8, device=device)
    buffer = io.BytesIO()
    torch.save(layer, buffer)
    buffer.seek(0)
    copies = (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer)), torch.load(buffer, weights_only=False))
    for twin in copies:
        torch.testing.assert_close(twin(x), layer(x))
    y = layer.bfloat16()(x.bfloat16())
    assert y.dtype == torch.bfloat16
    y.backward(torch.randn_like(y))
    assert all(p.grad is not None and p.grad.dtype == torch.bfloat16 for p in layer.parameters())


def test_nothing_is_kept_on_the_module(device: torch.device) -> None:
    layer = MuMoE(8, 6, 4, rank=3, impl="triton").to(device)
    before = {name: set(vars(module)) for name, module in layer.named_modules()}
    layer(torch.randn(3, 8, device=device)).square().sum().backward()
    assert {name: set(vars(module)) for name, module in layer.named_modules()} == before


def test_factory_keywords_and_repr() -> None:
    layer = MuMoE(8, 6, (4, 2), rank=3, device="meta", dtype=torch.bfloat16)
    assert all(p.device.type == "meta" and p.dtype == torch.bfloat16 for p in layer.parameters())
    text = repr(layer)
    assert "in_features=8, num_experts=(4, 2), norm='layer', alpha=1.5" in text
    assert "in_features=8, out_features=6, num_experts=(4, 2), rank=3, bias=True" in text


@pytest.mark.parametrize("factorization", ["cp", "tr", "tt", "tucker", "full"])
def test_shapes_are_found_on_the_meta_device(factorization: str) -> None:
    block = MuMoEMLP(8, 16, 6, (4, 2), rank=None if factorization == "full" else 3, factorization=factorization)
    block.to("meta", torch.bfloat16)
    x = torch.empty(2, 3, 8, dtype=torch.bfloat16, device="meta", requires_grad=True)
    y = block(x)
    y.backward(torch.empty_like(y))
    assert (y.shape, y.dtype) == ((2, 3, 6), torch.bfloat16)
    assert all(p.grad is not None for p in (x, *block.parameters()))
    with torch.no_grad():
        assert MuMoE(8, 6, 4, rank=3, device="meta")(x.float()).shape == (2, 3, 6)


def batch_norm_reference(layer: ExpertGate, norm: nn.BatchNorm1d, x: Tensor) -> Tensor:
    return reference.entmax(norm(x @ layer.weights[0].T))


@pytest.mark.parametrize("impl", ["reference", "triton", "native"])
def test_batch_norm_in_training_and_evaluation_is_batch_norm_1d(impl: str, device: torch.device) -> None:
    layer = ExpertGate(8, 5, norm="batch", impl=impl).to(device)
    nn.init.normal_(layer.weights[0])
    norm = nn.BatchNorm1d(5, affine=False).to(device)
    for _ in range(3):
        x = torch.randn(9, 8, device=device)
        torch.testing.assert_close(layer(x)[0], batch_norm_reference(layer, norm, x))
    torch.testing.assert_close(layer.norms[0].running_mean, norm.running_mean)
    torch.testing.assert_close(layer.norms[0].running_var, norm.running_var)
    layer.eval()
    norm.eval()
    x = torch.randn(1, 8, device=device)  # one token is enough now
    torch.testing.assert_close(layer(x)[0], batch_norm_reference(layer, norm, x))


@pytest.mark.parametrize("impl", ["reference", "triton", "native"])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("norm", ["layer", "none"])
def test_a_bad_row_spoils_itself_alone(impl: str, bad: float, norm: str, device: torch.device) -> None:
    block = MuMoEMLP(16, 24, num_experts=5, rank=8, norm=norm, impl=impl).to(device)
    trained_gate(block)
    x = torch.randn(4, 16, device=device)
    clean = block(x)
    x[2, 3] = bad
    y = block(x)
    assert y[2].isnan().all()
    rows = [0, 1, 3]
    assert torch.equal(y[rows], clean[rows])


@pytest.mark.parametrize("impl", ["reference", "triton", "native"])
@pytest.mark.parametrize("norm", ["layer", "batch", "none"])
def test_a_learned_alpha_starts_as_given_and_is_trained(impl: str, norm: str, device: torch.device) -> None:
    gate = ExpertGate(8, (5, 3), norm=norm, alpha=1.3, learn_alpha=True, impl=impl).to(device)
    fixed = ExpertGate(8, (5, 3), norm=norm, alpha=1.3, impl="reference").to(device)
    for mine, theirs in zip(gate.weights, fixed.weights, strict=True):
        nn.init.normal_(mine)
        theirs.data.copy_(mine.data)
    x = torch.randn(6, 8, device=device)
    for a, expected in zip(gate(x), fixed(x), strict=True):
        torch.testing.assert_close(a, expected, rtol=1e-4, atol=1e-6)
    sum((a.square() * torch.randn_like(a)).sum() for a in gate(x)).backward()
    assert gate.raw_alpha is not None
    assert gate.raw_alpha.grad is not None
    assert (gate.raw_alpha.grad != 0).all()
    assert set(gate.state_dict()) - set(fixed.state_dict()) == {"raw_alpha"}


@pytest.mark.parametrize("alpha", [1.0, 2.0])
def test_a_learned_alpha_starts_inside_its_range(alpha: float) -> None:
    with pytest.raises(ValueError, match=r"learn_alpha: expected entmax with alpha inside \(1, 2\)"):
        ExpertGate(8, 5, alpha=alpha, learn_alpha=True)


@pytest.mark.parametrize("eps", [0.0, float("nan"), "1e-5"])
def test_a_bad_eps_is_named_when_the_gate_is_made(eps: Any) -> None:
    with pytest.raises(ValueError, match="eps: expected a positive number, got"):
        ExpertGate(8, 5, eps=eps)

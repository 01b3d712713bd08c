"""What is swapped and what of it is kept, and that it is all or nothing."""

from typing import Any

import pytest
import torch
from torch import nn

from mumoe_fast import MuMoE, MuMoEMLP, MxD, convert, rank
from tests.convert.models import Gated, GPT2Block, Mixer, TimmMlp, holding, left


def test_dtype_device_mode_dropout_and_requires_grad_are_kept() -> None:
    block = GPT2Block().to(torch.bfloat16).eval().requires_grad_(False)
    model = holding(block)
    convert(model, num_experts=4)
    new = model.get_submodule("block")
    assert {p.dtype for p in new.parameters()} == {torch.bfloat16}
    assert not any(p.requires_grad for p in new.parameters())
    assert not any(part.training for part in new.modules())
    x = torch.randn(3, 8, dtype=torch.bfloat16)
    y = new(x)
    torch.testing.assert_close(y, MuMoEMLP.forward(new, x))
    dropped = new.train()(x)
    assert ((dropped == 0) | (dropped - y / 0.75).abs().lt(0.05)).all()
    assert (dropped == 0).any()
    with torch.device("meta"):
        model = holding(TimmMlp())
    convert(model, num_experts=4)
    assert {p.device.type for p in model.parameters()} == {"meta"}
    assert all(p.requires_grad for p in model.parameters())


def test_the_state_dict_does_not_tell_whether_the_block_had_dropout() -> None:
    models = [holding(block) for block in (GPT2Block(), nn.Sequential(nn.Linear(8, 24), nn.GELU(), nn.Linear(24, 8)))]
    for model in models:
        convert(model, num_experts=4)
    assert models[0].state_dict().keys() == models[1].state_dict().keys()


def test_ranks_may_be_given_per_name() -> None:
    model = Mixer()
    convert(model, num_experts=3, rank={"mlp_tokens": 5, "mlp_channels": 7})
    assert (model.mlp_tokens.in_experts.rank, model.mlp_channels.in_experts.rank) == ((5,), (7,))
    with pytest.raises(ValueError, match="rank: expected one for every layer, got none for 'mlp_channels'"):
        convert(Mixer(), num_experts=3, rank={"mlp_tokens": 5})


def test_an_error_while_building_leaves_the_model_as_it_was() -> None:
    model = Mixer()
    modules = list(model.modules())

    def factory(name: str, module: nn.Module) -> nn.Module:
        if name == "mlp_channels":
            raise RuntimeError("out of memory")
        return nn.Identity()

    with pytest.raises(RuntimeError, match="out of memory") as error:
        convert(model, factory=factory)
    assert "'mlp_channels'; the model is unchanged" in error.value.__notes__[0]
    with pytest.raises(ValueError, match="rank=None expects a rank that fits 162 parameters") as error:
        convert(model, num_experts=40)
    assert "'mlp_tokens'" in error.value.__notes__[0]
    assert [*map(id, model.modules())] == [*map(id, modules)]


def test_a_predicate_and_a_factory_replace_anything() -> None:
    model = nn.ModuleDict({"layers": nn.ModuleList([Gated().eval(), Gated().to(torch.bfloat16)])})

    def factory(name: str, module: nn.Module) -> nn.Module:
        return MxD(8, 24, num_experts=40, k=4)

    conversion = convert(model, layers=lambda name, module: isinstance(module, Gated), factory=factory)
    first, second = model["layers"]
    assert isinstance(first, MxD)
    assert not first.training
    assert second.encoder.weight.dtype == torch.bfloat16
    assert [layer.after for layer in conversion.replaced] == ["MxD", "MxD"]
    assert conversion.replaced[0].flops_after == rank.mxd_flops((8, 24, 8), 40, 4)
    with pytest.raises(ValueError, match="a factory cannot be written"):
        conversion.to_dict()
    with pytest.raises(TypeError, match=r"factory: expected an nn.Module for 'layers\.0', got int"):
        convert(
            nn.ModuleDict({"layers": nn.ModuleList([Gated()])}), layers=["layers.0"], factory=lambda name, module: 3
        )


def test_a_predicate_takes_the_outermost_and_no_parts_of_what_it_cannot() -> None:
    model = nn.ModuleDict({"mlp": TimmMlp(), "mlp_gated": Gated(), "other": TimmMlp()})
    gated = list(model["mlp_gated"].modules())
    conversion = convert(model, layers=lambda name, module: name.startswith("mlp"), num_experts=4)
    assert [layer.name for layer in conversion.replaced] == ["mlp"]
    assert list(left(conversion)) == ["mlp_gated"]
    assert list(model["mlp_gated"].modules()) == gated
    assert isinstance(model["other"], TimmMlp)


def test_named_linear_layers_become_layers_and_only_those_named() -> None:
    model = Mixer()
    conversion = convert(model, layers=["mlp_channels", "head"], num_experts=2, alpha=2.0, norm="none")
    assert [layer.name for layer in conversion.replaced] == ["mlp_channels", "head"]
    assert isinstance(model.head, MuMoE)
    assert (model.head.gate.alpha, model.head.gate.norm) == (2.0, "none")
    assert isinstance(model.mlp_tokens, TimmMlp)


def test_what_is_ours_already_is_passed_over() -> None:
    model = Mixer()
    first = convert(model, num_experts=2)
    replaced = [model.mlp_tokens, model.mlp_channels]
    with pytest.warns(UserWarning, match="nothing in the model can be replaced for layers='mlp'"):
        second = convert(model, num_experts=2)
    assert (len(first.replaced), second.replaced, second.left_alone) == (2, (), ())
    assert [model.mlp_tokens, model.mlp_channels] == replaced
    convert(model, layers="head", num_experts=2)
    with pytest.warns(UserWarning, match="nothing"):
        convert(model, layers="head", num_experts=2)


def test_the_model_itself_cannot_be_replaced() -> None:
    with pytest.warns(UserWarning, match="it is the model itself"):
        convert(TimmMlp(), num_experts=4)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"layers": "mpl"}, "layers: expected one of 'mlp', 'head', got 'mpl'"),
        ({"layers": ["mlp_tokens", "nowhere"]}, "layers: expected names of modules of the model, got 'nowhere'"),
        ({"layers": ["norm"]}, "layers: expected names of layers that can be replaced, but norm: it has 0 linear"),
        ({"factorization": "svd"}, "factorization: expected one of"),
        ({"norm": "rms"}, "norm: expected one of"),
        ({"alpha": 3.0}, "alpha: expected"),
        ({"impl": "cuda"}, "impl: expected"),
        ({"num_experts": 0}, "num_experts: expected at least 1"),
        ({"rank": 0}, "rank must be at least 1"),
    ],
)
def test_bad_arguments_are_named_and_change_nothing(arguments: dict[str, Any], message: str) -> None:
    model = Mixer()
    modules = list(model.modules())
    with pytest.raises(ValueError, match=message):
        convert(model, **arguments)
    assert [*map(id, model.modules())] == [*map(id, modules)]


@pytest.mark.parametrize(
    ("model", "layers", "error", "message"),
    [
        ({"mlp": 1}, "mlp", TypeError, "model: expected an nn.Module, got dict"),
        (holding(nn.LazyLinear(4)), "mlp", ValueError, r"model: expected parameters with shapes.*: block\.weight"),
        (Mixer(), None, TypeError, "layers: expected 'mlp', 'head', names or a predicate, got NoneType"),
    ],
)
def test_what_is_no_model_and_no_layers_is_named(model: Any, layers: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        convert(model, layers=layers, num_experts=4)


def test_a_converted_model_trains() -> None:
    model = Mixer().double()
    convert(model, num_experts=3)
    for block in (model.mlp_tokens, model.mlp_channels):
        nn.init.normal_(block.gate.weights[0])
    y = model(torch.randn(2, 6, 8, dtype=torch.float64))
    y.backward(torch.randn_like(y))
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().max() > 0, name

"""What is found by what it computes, and what is named and left alone."""

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations

from mumoe_fast import MuMoE, MuMoEMLP, convert, rank
from mumoe_fast.convert import LeftAlone
from tests.convert.models import Functional, Gated, GPT2Block, Mixer, TimmMlp, holding, left, relu_mlp, silu_mlp


@pytest.mark.parametrize(
    ("make", "features", "activation", "bias"),
    [
        (GPT2Block, (8, 24, 8), "gelu_tanh", True),
        (TimmMlp, (8, 24, 8), "gelu", True),
        (relu_mlp, (8, 24, 8), "relu", True),
        (silu_mlp, (8, 24, 5), "silu", False),
    ],
)
def test_an_mlp_is_found_by_what_it_computes(
    make: Callable[[], nn.Module], features: tuple[int, ...], activation: str, bias: bool
) -> None:
    model = holding(make())
    dense = sum(p.numel() for p in model.parameters())
    conversion = convert(model, num_experts=(4, 2))
    block = model.get_submodule("block")
    assert isinstance(block, MuMoEMLP)
    assert (block.in_features, block.hidden_features, block.out_features) == features
    assert block.out_experts.activation == activation
    assert block.gate.num_experts == (4, 2)
    assert (block.in_experts.in_bias is not None) == bias
    assert block(torch.randn(2, 3, 8)).shape == (2, 3, features[-1])
    (layer,) = conversion.replaced
    assert layer.parameters_before == dense
    assert layer.parameters_after == sum(p.numel() for p in model.parameters()) == conversion.parameters_after
    matched = rank.match_rank(features, (4, 2), bias=bias, budget=dense)
    assert layer.rank == (matched,) == block.in_experts.rank


class Packed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.act, self.fc2 = nn.Linear(8, 48), nn.SiLU(), nn.Linear(24, 8)

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.fc1(x).chunk(2, dim=-1)
        return self.fc2(self.act(gate) * up)


class Int8Linear(nn.Linear):
    """A quantised layer that passes for an `nn.Linear`."""


class LoRALinear(nn.Module):
    """A wrapped one that does not."""

    def __init__(self) -> None:
        super().__init__()
        self.in_features, self.out_features, self.base_layer = 8, 24, nn.Linear(8, 24)

    def forward(self, x: Tensor) -> Tensor:
        return self.base_layer(x)


def with_(change: Callable[[TimmMlp], object]) -> Callable[[], nn.Module]:
    def make() -> nn.Module:
        block = TimmMlp()
        change(block)
        return block

    return make


def old_weight_norm(block: TimmMlp) -> None:
    with pytest.warns(FutureWarning):
        nn.utils.weight_norm(block.fc1)


def functional(forward: Callable[[Any, Tensor], Tensor], hidden: int = 24) -> Callable[[], nn.Module]:
    return lambda: Functional(forward, hidden)


LEFT_ALONE = {
    "gated": (Gated, "3 linear layers"),
    "packed gate": (Packed, "as in a gated MLP"),
    "gated by name": (functional(lambda b, x: b.down(F.silu(b.up(x)) * b.up(x))), "calls up, up, down; a plain MLP"),
    "subclass": (with_(lambda b: setattr(b, "fc1", Int8Linear(8, 24))), "fc1: it is .*Int8Linear, a subclass"),
    "lora": (with_(lambda b: setattr(b, "fc1", LoRALinear())), "fc1: it is .*LoRALinear, not an nn.Linear"),
    "parametrised": (with_(lambda b: parametrizations.weight_norm(b.fc2)), "fc2: its parameters are parametrised"),
    "weight norm": (with_(old_weight_norm), r"fc1: hooks .*\(WeightNorm\)"),
    "forward hook": (with_(lambda b: b.register_forward_hook(print)), r"^hooks are registered on it \(print\)"),
    "backward hook": (with_(lambda b: b.act.register_full_backward_hook(print)), "act: hooks"),
    "tensor hook": (with_(lambda b: b.fc1.weight.register_hook(print)), "fc1: hooks are registered on its weight"),
    "forward replaced": (with_(lambda b: setattr(b, "forward", print)), "forward was replaced"),
    "hidden dropout": (lambda: TimmMlp(drop1=0.1), "drop1 drops with p=0.1"),
    "functional dropout": (functional(lambda b, x: F.dropout(b.down(F.gelu(b.up(x))), training=b.training)), "output"),
    "residual": (functional(lambda b, x: x + b.down(F.gelu(b.up(x)))), "its output is not down's"),
    "scaled input": (functional(lambda b, x: b.down(F.gelu(b.up(2 * x)))), "up is not given the block's input"),
    "norm": (with_(lambda b: setattr(b, "norm", nn.LayerNorm(24))), "norm.weight, norm.bias"),
    "norm without parameters": (functional(lambda b, x: b.down(F.layer_norm(F.gelu(b.up(x)), (24,)))), "not given up"),
    "tanh": (lambda: TimmMlp(act=nn.Tanh()), "through Tanh"),
    "relu6": (lambda: TimmMlp(act=nn.ReLU6()), "through ReLU6"),
    "random": (lambda: TimmMlp(act=nn.RReLU()), "through RReLU"),
    "learned": (lambda: TimmMlp(act=nn.PReLU()), "of its own: act.weight"),
    "half": (with_(lambda b: b.fc2.half()), "differ in device or dtype"),
    "two inputs": (functional(lambda b, x: b.nothing(x)), "does not run on one tensor"),
}


@pytest.mark.parametrize("case", LEFT_ALONE)
def test_what_cannot_be_converted_is_named_and_left_alone(case: str) -> None:
    make, reason = LEFT_ALONE[case]
    good, bad = TimmMlp(), make()
    model = nn.ModuleDict({"good": good, "bad": bad})
    inside = dict(bad.named_modules())
    conversion = convert(model, num_experts=4)
    assert list(left(conversion)) == ["bad"]
    assert re.search(reason, left(conversion)["bad"]), left(conversion)
    assert model["bad"] is bad
    assert dict(bad.named_modules()) == inside
    assert [layer.name for layer in conversion.replaced] == ["good"]


def test_a_probed_block_is_not_touched() -> None:
    block = TimmMlp(act=nn.Tanh()).train()
    block.drop1.eval()
    block.act.eval()
    state, random = dict(vars(block)), torch.get_rng_state()
    children = dict(block.named_children())
    with pytest.warns(UserWarning, match="block: fc2 is not given"):
        convert(holding(block), num_experts=4)
    assert vars(block) == state
    assert dict(block.named_children()) == children
    assert not block.act.training
    assert not block.drop1.training
    assert torch.equal(torch.get_rng_state(), random)


@pytest.mark.parametrize("make", [TimmMlp, lambda: nn.Linear(8, 10)])
def test_torch_compile_would_go_on_to_call_what_it_was_given(make: Callable[[], nn.Module]) -> None:
    """Its wrapper keeps the forward of the module, not the module's name."""
    inside = make()
    model = holding(torch.compile(inside, backend="eager"))
    with pytest.warns(UserWarning, match=r"block\._orig_mod: it is inside of torch\.compile"):
        convert(model, layers="mlp" if isinstance(inside, TimmMlp) else "head", num_experts=2, rank=2)
    assert model.get_submodule("block._orig_mod") is inside
    mixer = Mixer()
    whole = torch.compile(mixer, backend="eager")
    x = torch.randn(2, 6, 8)
    before = whole.eval()(x)
    assert len(convert(whole, num_experts=3).replaced) == 2
    torch.testing.assert_close(whole(x), mixer(x))
    assert not torch.allclose(whole(x), before)


@pytest.mark.parametrize("shared", ["parameter", "module"])
def test_tied_parameters_are_left_alone(shared: str) -> None:
    first, second = TimmMlp(), TimmMlp()
    if shared == "parameter":
        second.fc1.weight = first.fc1.weight
    model = nn.ModuleList([first, second if shared == "parameter" else first])
    with pytest.warns(UserWarning, match="nothing"):
        conversion = convert(model, num_experts=4)
    assert left(conversion) == {
        "0": "its fc1.weight is tied to 1.fc1.weight",
        "1": "its fc1.weight is tied to 0.fc1.weight",
    }
    assert list(model) == [first, second if shared == "parameter" else first]


def test_a_tied_head_is_left_alone_and_a_free_one_replaced() -> None:
    model = nn.ModuleDict({"wte": nn.Embedding(20, 16), "head": nn.Linear(16, 20, bias=False)})
    conversion = convert(model, layers="head", num_experts=3)
    head = model["head"]
    assert isinstance(head, MuMoE)
    assert (head.in_features, head.out_features, head.experts.bias_in_use) == (16, 20, False)
    assert conversion.replaced[0].before == "Linear 16→20"
    model["head"] = nn.Linear(16, 20, bias=False)
    model["head"].weight = model["wte"].weight
    with pytest.warns(UserWarning, match="nothing"):
        conversion = convert(model, layers="head", num_experts=3)
    assert conversion.left_alone == (LeftAlone("head", "its weight is tied to wte.weight"),)

"""Converting models: what is found and left alone, what is kept, that it is all or nothing, and the paper's counts."""

import copy
import json
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations

from mumoe_fast import MuMoE, MuMoEMLP, MxD, convert, rank
from mumoe_fast.convert import Conversion, LeftAlone


class Conv1D(nn.Module):
    """GPT-2's linear layer, whose weight is (I, O)."""

    def __init__(self, nf: int, nx: int) -> None:
        super().__init__()
        self.nf = nf
        self.weight, self.bias = nn.Parameter(torch.randn(nx, nf)), nn.Parameter(torch.zeros(nf))

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight + self.bias


class GPT2Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.c_fc, self.c_proj, self.dropout = Conv1D(24, 8), Conv1D(8, 24), nn.Dropout(0.25)

    def forward(self, x: Tensor) -> Tensor:
        h = self.c_fc(x)
        h = 0.5 * h * (1 + torch.tanh((2 / torch.pi) ** 0.5 * (h + 0.044715 * h**3)))
        return self.dropout(self.c_proj(h))


class TimmMlp(nn.Module):
    def __init__(self, in_features: int = 8, hidden: int = 24, act: nn.Module | None = None, drop1: float = 0) -> None:
        super().__init__()
        self.fc1, self.act, self.drop1 = nn.Linear(in_features, hidden), act or nn.GELU(), nn.Dropout(drop1)
        self.norm, self.fc2, self.drop2 = nn.Identity(), nn.Linear(hidden, in_features), nn.Dropout(0.1)

    def forward(self, x: Tensor) -> Tensor:
        return self.drop2(self.fc2(self.norm(self.drop1(self.act(self.fc1(x))))))


class Functional(nn.Module):
    """Children in the order that they are not called in, and the rest of the forward as given."""

    def __init__(self, forward: Callable[[Any, Tensor], Tensor], hidden: int = 24) -> None:
        super().__init__()
        self.down, self.up = nn.Linear(hidden, 8), nn.Linear(8, hidden)
        self.calculation = forward

    def forward(self, x: Tensor) -> Tensor:
        return self.calculation(self, x)


def relu_mlp() -> nn.Module:
    return Functional(lambda block, x: block.down(block.up(x).relu()))


def silu_mlp() -> nn.Sequential:
    return nn.Sequential(nn.Linear(8, 24, bias=False), nn.SiLU(), nn.Linear(24, 5, bias=False))


class Mixer(nn.Module):
    """Token and channel MLPs of different shapes, behind norms, and a head."""

    def __init__(self, tokens: int = 6, channels: int = 8) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(channels)
        self.mlp_tokens, self.mlp_channels = TimmMlp(tokens, 12), TimmMlp(channels, 24)
        self.head = nn.Linear(channels, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.mlp_tokens(self.norm(x).transpose(1, 2)).transpose(1, 2)
        return self.head(x + self.mlp_channels(self.norm(x)))


def holding(block: nn.Module) -> nn.Module:
    return nn.ModuleDict({"block": block})


def left(conversion: Conversion) -> dict[str, str]:
    return {layer.name: layer.reason for layer in conversion.left_alone}


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


class Gated(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gate_proj, self.up_proj, self.down_proj = nn.Linear(8, 24), nn.Linear(8, 24), nn.Linear(24, 8)
        self.act_fn = nn.SiLU()

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))


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


def test_a_dry_run_changes_nothing_and_reports_the_same() -> None:
    model = Mixer()
    before, modules, random = copy.deepcopy(model.state_dict()), list(model.modules()), torch.get_rng_state()
    dry = convert(model, num_experts=3, factorization="tr", rank=5, dry_run=True)
    assert [*map(id, model.modules())] == [*map(id, modules)]
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), random)
    real = convert(model, num_experts=3, factorization="tr", rank=5)
    assert (dry.replaced, dry.left_alone, dry.to_dict()) == (real.replaced, real.left_alone, real.to_dict())
    assert real.parameters_after == dry.parameters_after == sum(p.numel() for p in model.parameters())
    assert "2 layers would be replaced" in str(dry)
    assert "2 layers replaced" in str(real)


def test_the_report_adds_up_and_prints() -> None:
    model = nn.ModuleDict({"mixer": Mixer(), "gated": Gated()})
    conversion = convert(model, num_experts=3)
    for layer, features in zip(conversion.replaced, [(6, 12, 6), (8, 24, 8)], strict=True):
        shape = rank.resolve(features, 3)
        assert layer.rank == shape.rank
        assert (layer.parameters_before, layer.flops_before) == (
            rank.dense_parameters(features),
            rank.dense_flops(features),
        )
        assert (layer.parameters_after, layer.flops_after) == (shape.parameters, shape.flops)
    assert conversion.flops_after == sum(layer.flops_after or 0 for layer in conversion.replaced)
    shown = str(conversion)
    for text in ("mixer.mlp_tokens", "TimmMlp 8→24→8, gelu", "cp N=3 R=", f"{conversion.flops_after:,}"):
        assert text in shown
    assert "left alone: gated: it has 3 linear layers (gate_proj, up_proj, down_proj)" in shown


@pytest.mark.parametrize(
    ("factorization", "given"), [("cp", None), ("tr", (2, 3, 2, 4)), ("tt", 2), ("tucker", 2), ("full", None)]
)
def test_a_conversion_goes_through_json_and_is_repeated(factorization: str, given: Any) -> None:
    def numbers(model: nn.Module) -> Tensor:
        return model.eval()(torch.linspace(-1, 1, 96).view(2, 6, 8))

    model = Mixer()
    settings = {"num_experts": (3, 2), "factorization": factorization, "rank": given, "norm": "batch", "alpha": 1.25}
    conversion = convert(model, impl="reference", **settings)
    for weight in model.parameters():
        nn.init.normal_(weight)
    again = Mixer()
    repeated = convert(again, **json.loads(json.dumps(conversion.to_dict())))
    assert repeated.replaced == conversion.replaced
    again.load_state_dict(model.state_dict())
    torch.testing.assert_close(numbers(again), numbers(model))


def test_the_ranks_that_were_matched_are_written_down() -> None:
    mixer = convert(Mixer(), num_experts=3, dry_run=True)
    ranks = {layer.name: layer.rank[0] for layer in mixer.replaced}
    assert mixer.to_dict()["rank"] == ranks
    assert ranks["mlp_tokens"] != ranks["mlp_channels"]
    alike = convert(nn.ModuleList([TimmMlp(), TimmMlp()]), num_experts=3, dry_run=True)
    assert alike.to_dict()["rank"] == ranks["mlp_channels"]


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


@pytest.mark.parametrize(
    ("settings", "in_the_mlps", "in_all"),
    [
        ({"factorization": "cp", "rank": 556}, "57.0M", "124.8M"),
        ({"factorization": "tr", "rank": (4, 4, 149)}, "57.4M", "125.2M"),
    ],
)
def test_gpt2_has_the_papers_parameters(settings: dict[str, Any], in_the_mlps: str, in_all: str) -> None:
    transformers = pytest.importorskip("transformers")
    with torch.device("meta"):
        model = transformers.GPT2LMHeadModel(transformers.GPT2Config())
    conversion = convert(model, num_experts=256, **settings)
    assert len(conversion.replaced) == 12
    assert {layer.before for layer in conversion.replaced} == {"GPT2MLP 768→3072→768, gelu_tanh"}
    assert f"{sum(layer.parameters_after for layer in conversion.replaced) / 1e6:.1f}M" == in_the_mlps
    assert f"{model.num_parameters() / 1e6:.1f}M" == in_all
    assert model.num_parameters() == conversion.parameters_after


def test_a_transformers_model_is_saved_with_its_conversion_and_comes_back(tmp_path: Any) -> None:
    transformers = pytest.importorskip("transformers")
    sizes = {"n_embd": 16, "n_layer": 2, "n_head": 2, "vocab_size": 30, "n_positions": 12}
    config = transformers.GPT2Config(**sizes, bos_token_id=0, eos_token_id=0)
    model = transformers.GPT2LMHeadModel(config).eval()
    model.config.mumoe = convert(model, num_experts=4).to_dict()
    for block in model.transformer.h:
        nn.init.normal_(block.mlp.gate.weights[0])
    model.config.save_pretrained(tmp_path)
    torch.save(model.state_dict(), tmp_path / "model.pt")

    config = transformers.GPT2Config.from_pretrained(tmp_path)
    again = transformers.GPT2LMHeadModel(config).eval()
    convert(again, **config.mumoe)
    again.load_state_dict(torch.load(tmp_path / "model.pt"))
    tokens = torch.randint(30, (2, 7))
    torch.testing.assert_close(again(tokens).logits, model(tokens).logits)
    generated = again.generate(tokens, max_new_tokens=3, do_sample=False)
    assert torch.equal(generated, model.generate(tokens, max_new_tokens=3, do_sample=False))

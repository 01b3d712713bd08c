"""What a conversion reports, what it writes down to be repeated, and the paper's counts."""

import copy
import json
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from mumoe_fast import convert, rank
from tests.convert.models import Gated, Mixer, TimmMlp


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


def test_numbers_of_numpy_go_through_json_too() -> None:
    numpy = pytest.importorskip("numpy")
    settings = {"num_experts": numpy.array([3, 2]), "rank": numpy.int64(4), "alpha": numpy.float32(1.25)}
    written = json.loads(json.dumps(convert(Mixer(), **settings).to_dict()))
    assert (written["num_experts"], written["rank"], written["alpha"]) == ([3, 2], 4, 1.25)


def test_the_ranks_that_were_matched_are_written_down() -> None:
    mixer = convert(Mixer(), num_experts=3, dry_run=True)
    ranks = {layer.name: layer.rank[0] for layer in mixer.replaced}
    assert mixer.to_dict()["rank"] == ranks
    assert ranks["mlp_tokens"] != ranks["mlp_channels"]
    alike = convert(nn.ModuleList([TimmMlp(), TimmMlp()]), num_experts=3, dry_run=True)
    assert alike.to_dict()["rank"] == ranks["mlp_channels"]


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

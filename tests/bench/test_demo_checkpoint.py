"""What the demo keeps for the benchmarks is what its blocks saw, and a gate given it computes what theirs did."""

from pathlib import Path

import pytest
import torch

from mumoe_fast.bench import demo_checkpoint
from mumoe_fast.bench.demo_checkpoint import load_activations, obstacle, restore_gate, save_activations
from mumoe_fast.examples.train_gpt import ModelConfig, build_model
from mumoe_fast.layers import ExpertGate, MuMoEMLP

pytest.importorskip("transformers")
from transformers import GPT2LMHeadModel

SHAPE = ModelConfig(experts=6, layers=2, heads=2, width=16, context=12, norm="batch")
WINDOWS = torch.arange(60).view(5, 12)


@pytest.fixture
def model() -> GPT2LMHeadModel:
    model = build_model(SHAPE, "cpu", 0)
    for block in model.transformer.h:
        assert isinstance(block.mlp, MuMoEMLP)
        torch.nn.init.normal_(block.mlp.gate.weights[0])
    return model


def test_a_restored_gate_gives_the_models_own_coefficients(
    model: GPT2LMHeadModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(demo_checkpoint, "TOKENS", 30)
    path = tmp_path / "demo.pt"
    save_activations(path, model, WINDOWS)
    assert model.training
    blocks = load_activations(path)
    assert [tuple(block.input.shape) for block in blocks] == [(30, 16), (30, 16)]
    seen: list[torch.Tensor] = []
    mlp = model.transformer.h[1].mlp
    assert isinstance(mlp, MuMoEMLP)
    mlp.gate.register_forward_hook(lambda gate, arguments, a: seen.append(a[0].flatten(0, -2)))
    with torch.no_grad():
        model.eval()(WINDOWS[:3])
        gate = ExpertGate(16, 6, norm="batch").eval()
        restore_gate(gate, blocks[1])
        (a,) = gate(blocks[1].input)
    torch.testing.assert_close(a, seen[0][:30])


def test_the_obstacle_says_what_is_missing(model: GPT2LMHeadModel, tmp_path: Path) -> None:
    path = tmp_path / "demo.pt"
    assert "`mumoe demo` writes it" in str(obstacle(path, 0, 10, 16, 6))
    save_activations(path, model, WINDOWS)
    assert obstacle(path, 1, 60, 16, 6) is None
    assert "no block 2" in str(obstacle(path, 2, 60, 16, 6))
    assert "(60, 16), expected at least 61 tokens" in str(obstacle(path, 1, 61, 16, 6))
    assert "expected 7 experts" in str(obstacle(path, 1, 60, 16, 7))


def test_a_dense_model_has_no_gates(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match="expected a μMoE MLP in block 0, got GPT2MLP"):
        save_activations(tmp_path / "demo.pt", build_model(ModelConfig("dense", layers=1, width=32), "cpu", 0), WINDOWS)

"""Experts are picked and quoted by their coefficients: constructed cases with known answers."""

import pytest
import torch

from mumoe_fast.bench.experts import collect_coefficients, cut_snippet, describe_expert, pick_experts
from mumoe_fast.examples._tokens import Corpus
from mumoe_fast.examples.train_gpt import ModelConfig, build_model

pytest.importorskip("transformers")

TEXT = "".join(f"line {i} has the letter {chr(97 + i % 26)};\n" for i in range(40)).encode()


def test_the_most_concentrated_experts_that_are_used_are_picked() -> None:
    a = torch.zeros(1000, 5)
    a[:, 0] = 0.2  # everywhere
    a[::2, 1] = 0.3  # on half of the tokens
    a[::10, 2] = 0.9  # on a tenth
    a[::12, 3] = 0.9  # on a twelfth: the most specialised
    a[17, 4] = 0.5  # on one token alone: as good as unused
    assert pick_experts(a, 3) == [3, 2, 1]
    assert pick_experts(a, 10) == [3, 2, 1, 0], "no more than are used"


def test_an_experts_text_is_where_its_coefficient_is_largest() -> None:
    a = torch.full((len(TEXT), 3), 0.01)
    positions = [300, 40, 700]
    for rank, position in enumerate(positions):
        a[position, 1] = 0.9 - 0.1 * rank
    a[:, 2] = torch.rand(len(TEXT))  # another expert's larger coefficients do not matter
    described = describe_expert(a, TEXT, 1, snippets=3)
    assert [s.coefficient for s in described.snippets] == pytest.approx([0.9, 0.8, 0.7])
    shown = {" ": "␣", "\n": "⏎"}
    assert [s.marked for s in described.snippets] == [shown.get(chr(TEXT[p]), chr(TEXT[p])) for p in positions]
    for snippet, position in zip(described.snippets, positions, strict=True):
        before = TEXT[:position].decode().replace("\n", "⏎")
        assert before.endswith(snippet.before)
        assert len(snippet.before) >= 30
    assert described.active == 1.0
    assert described.share == pytest.approx((a[:, 1].sum() / a.sum()).item())


def test_snippets_are_of_different_places() -> None:
    a = torch.zeros(len(TEXT), 1)
    a[100:104, 0] = 0.9  # neighbours: one snippet
    a[400, 0] = 0.5
    positions = describe_expert(a, TEXT, 0).snippets
    assert [s.coefficient for s in positions] == pytest.approx([0.9, 0.5])


def test_characters_of_several_bytes_are_marked_whole() -> None:
    text = "an em—dash, and more".encode()
    for position in (5, 6, 7):
        snippet = cut_snippet(text, position, 1.0)
        assert (snippet.before, snippet.marked, snippet.after) == ("an em", "—", "dash, and more")
    assert cut_snippet(b"a b", 1, 1.0).marked == "␣"


def test_collected_coefficients_are_the_gates_at_each_token() -> None:
    """Row t is the gate's output at byte t: it equals the layer's own coefficients on what the MLP receives."""
    model = build_model(ModelConfig(experts=6, impl="reference", layers=2, heads=2, width=32, context=16), "cpu", 0)
    torch.nn.init.normal_(model.transformer.h[1].mlp.gate.weights[0])  # type: ignore[union-attr,index,arg-type]
    windows, _ = Corpus.from_bytes(TEXT).held_out_windows(16)
    received = []
    handle = model.transformer.h[1].mlp.register_forward_pre_hook(lambda mlp, x: received.append(x[0]))  # type: ignore[union-attr,operator]
    collected = collect_coefficients(model, windows, layer=1, batch=3)
    handle.remove()
    assert collected.shape == (windows.numel(), 6)
    assert torch.allclose(collected.sum(-1), torch.ones(len(collected)))
    expected = model.eval().transformer.h[1].mlp.coefficients(torch.cat(received))[0].flatten(0, 1)  # type: ignore[union-attr,operator]
    assert torch.allclose(collected, expected, atol=1e-6)
    assert model.transformer.h[1].training is False
    with pytest.raises(ValueError, match="one expert gate, got 0 in block 0"):
        collect_coefficients(build_model(ModelConfig(mlp="dense", layers=1, width=32), "cpu", 0), windows, layer=0)

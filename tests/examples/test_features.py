"""Features: of fixed filters, of a model in a folder, of a file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from mumoe_fast.examples._features import Gabor, Pretrained, Rows, extract, from_file, standardised
from mumoe_fast.examples._images import gratings


def test_gabor_filters_see_orientation_and_no_brightness() -> None:
    bank = Gabor()
    x, labels = gratings(28).train[torch.arange(100)]
    features = bank(x)
    assert features.shape == (100, 768)
    by_orientation = features.view(100, bank.orientations, -1).square().sum(-1)
    assert (by_orientation.argmax(1) == labels).float().mean() > 0.9  # there are 8 of both
    inside = torch.nn.functional.conv2d(torch.full((1, 1, 28, 28), 0.7), bank.filters)
    torch.testing.assert_close(inside, torch.zeros_like(inside), rtol=0, atol=1e-5)


def test_every_image_gives_its_features_and_keeps_its_label() -> None:
    images = gratings(28)
    few = Rows(*images.train[torch.arange(130)]), Rows(*images.held_out[torch.arange(7)])
    dataset = extract(type(images)(*few, images.classes), Gabor(), "cpu")
    expected = standardised(*(Rows(Gabor()(part.features), part.labels) for part in few), images.classes)
    for part, wanted in ((dataset.train, expected.train), (dataset.held_out, expected.held_out)):
        assert len(part) == len(wanted)
        for mine, theirs in zip(part[torch.arange(len(part))], wanted[torch.arange(len(wanted))], strict=True):
            torch.testing.assert_close(mine, theirs)


def test_features_are_standardised_by_what_is_trained_on_alone() -> None:
    train, held_out = 3 * torch.randn(50, 4) + 5, torch.randn(9, 4)
    data = standardised(Rows(train, torch.arange(50) % 2), Rows(held_out, torch.arange(9) % 2), ("a", "b"))
    x, _ = data.train[torch.arange(50)]
    torch.testing.assert_close(x.mean(0), torch.zeros(4), rtol=0, atol=1e-5)
    torch.testing.assert_close(x.std(0), torch.ones(4))
    torch.testing.assert_close(data.held_out[torch.arange(9)][0], (held_out - train.mean(0)) / train.std(0))


def test_a_feature_that_never_changes_is_harmless() -> None:
    rows = Rows(torch.full((4, 2), 7.0), torch.arange(4))
    assert standardised(rows, rows, tuple("abcd")).train[torch.arange(4)][0].eq(0).all()


def test_a_file_may_say_itself_what_is_held_out(tmp_path: Path) -> None:
    saved: dict[str, Any] = {"features": torch.randn(20, 3), "labels": torch.arange(20) % 2}
    torch.save(saved, tmp_path / "f.pt")
    assert str(from_file(tmp_path / "f.pt")) == "samples 3 of 2 classes, 16 to learn from and 4 held out"
    more = {"held_out_features": torch.randn(5, 3), "held_out_labels": torch.arange(5) % 3, "classes": list("abc")}
    torch.save(saved | more, tmp_path / "f.pt")
    assert str(from_file(tmp_path / "f.pt")) == "samples 3 of 3 classes, 20 to learn from and 5 held out"


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"features": None}, r"features: expected \(n, I\) in a floating-point dtype, got <class 'NoneType'>"),
        ({"features": torch.ones(4, 3, dtype=torch.int64)}, r"got \(4, 3\) in torch.int64"),
        ({"labels": torch.arange(3)}, r"features: expected labels \(4,\) in int64"),
        ({"held_out_features": torch.randn(2, 5), "held_out_labels": torch.arange(2)}, "expected 3 held-out features"),
        ({"held_out_features": torch.randn(2, 3)}, r"expected labels \(2,\).*got NoneType"),
        ({"classes": ["one"]}, "names of at least 4 classes"),
    ],
)
def test_files_of_something_else_are_refused(tmp_path: Path, changed: dict[str, Any], message: str) -> None:
    torch.save({"features": torch.randn(4, 3), "labels": torch.arange(4)} | changed, tmp_path / "f.pt")
    with pytest.raises(ValueError, match=message):
        from_file(tmp_path / "f.pt")


def test_a_file_without_labels_is_refused(tmp_path: Path) -> None:
    torch.save({"features": torch.randn(4, 3)}, tmp_path / "f.pt")
    with pytest.raises(ValueError, match=r"features and labels in .*got the keys \['features'\]"):
        from_file(tmp_path / "f.pt")


SMALL = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}


def test_a_vision_transformer_in_a_folder_gives_its_pooled_output(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    model = transformers.ViTModel(transformers.ViTConfig(**SMALL, image_size=8, patch_size=4)).eval()
    model.save_pretrained(tmp_path)
    (tmp_path / "preprocessor_config.json").write_text(
        json.dumps({"image_mean": [0.1, 0.2, 0.3], "image_std": [2, 4, 5]})
    )
    backbone, pixels = Pretrained(tmp_path).eval(), torch.rand(2, 3, 8, 8)
    mean, deviation = (torch.tensor(values).view(3, 1, 1) for values in ((0.1, 0.2, 0.3), (2.0, 4.0, 5.0)))
    assert backbone.image_size == 8
    with torch.no_grad():
        expected = model((pixels - mean) / deviation).pooler_output
        torch.testing.assert_close(backbone(2 * pixels - 1), expected)
        grey = backbone(2 * pixels[:, :1] - 1)
        torch.testing.assert_close(grey, model((pixels[:, :1] - mean) / deviation).pooler_output)


def test_clip_in_a_folder_gives_its_image_features(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    text = SMALL | {"vocab_size": 10, "max_position_embeddings": 4}
    config = transformers.CLIPConfig(
        text_config=text, vision_config=SMALL | {"image_size": 8, "patch_size": 4}, projection_dim=6
    )
    model = transformers.CLIPModel(config).eval()
    model.save_pretrained(tmp_path)
    images = 2 * torch.rand(2, 3, 8, 8) - 1
    with torch.no_grad():
        features = Pretrained(tmp_path).eval()(images)
        expected = model.visual_projection(model.vision_model(images).pooler_output)
    assert features.shape == (2, 6)
    torch.testing.assert_close(features, expected)  # 0.5 is the mean and the deviation where nothing else is said


def test_a_folder_without_a_vision_model_is_refused(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    with pytest.raises(FileNotFoundError, match="backbone: expected gabor or a folder with a model, got 'nowhere'"):
        Pretrained(Path("nowhere"))
    transformers.GPT2Model(transformers.GPT2Config(n_embd=4, n_head=1, n_layer=1, vocab_size=8)).save_pretrained(
        tmp_path
    )
    with pytest.raises(ValueError, match="backbone: expected a vision model"):
        Pretrained(tmp_path)

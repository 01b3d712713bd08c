"""Features of images by a frozen backbone, for heads to learn from: fixed filters, a local model, or a file."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mumoe_fast.examples._classification import Batch, Dataset, Labelled, check_labels, held_out_rows

CHUNK = 64  # images at a time
Track = Callable[[Sequence[Tensor]], Iterable[Tensor]]


@dataclass(frozen=True)
class Rows:
    """Features (n, I) in float32 and labels (n,)."""

    features: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.features)

    def __getitem__(self, indices: Tensor) -> Batch:
        return self.features[indices], self.labels[indices]


def extract(dataset: Dataset, backbone: nn.Module, device: torch.device | str, track: Track = iter) -> Dataset:
    """The features of every image, by a backbone that is not trained; `track` may show how far it is."""
    backbone = backbone.to(device).eval()
    train, held_out = (_extract(images, backbone, device, track) for images in (dataset.train, dataset.held_out))
    return standardised(train, held_out, dataset.classes)


@torch.no_grad()
def _extract(images: Labelled, backbone: nn.Module, device: torch.device | str, track: Track) -> Rows:
    features, labels = [], []
    for indices in track(torch.arange(len(images)).split(CHUNK)):
        x, y = images[indices]
        features.append(backbone(x.to(device)).float().cpu())
        labels.append(y)
    return Rows(torch.cat(features), torch.cat(labels))


def standardised(train: Rows, held_out: Rows, classes: tuple[str, ...]) -> Dataset:
    """Every feature with mean 0 and deviation 1 over what is trained on."""
    mean, deviation = train.features.mean(0), train.features.std(0).clamp(min=1e-6)
    train, held_out = (Rows((part.features - mean) / deviation, part.labels) for part in (train, held_out))
    return Dataset(train, held_out, classes)


def from_file(path: Path) -> Dataset:
    """Features that a backbone of the user's made, saved by `torch.save` as a dict.

    Its "features" (n, I) and "labels" (n,) int64 are trained on, and the last fifth of every class is held out; with
    "held_out_features" and "held_out_labels" those are. "classes" may name the classes.

    Raises:
        ValueError: the file holds something else.
    """
    saved = torch.load(path, weights_only=True)
    if not isinstance(saved, dict) or not {"features", "labels"} <= saved.keys():
        found = f"the keys {sorted(saved)}" if isinstance(saved, dict) else type(saved).__name__
        raise ValueError(f"features: expected a dict with features and labels in {path}, got {found}")
    train = _rows(saved["features"], saved["labels"])
    if "held_out_features" in saved:
        held_out = _rows(saved["held_out_features"], saved.get("held_out_labels"))
        if held_out.features.shape[1] != train.features.shape[1]:
            widths = train.features.shape[1], held_out.features.shape[1]
            raise ValueError(f"features: expected {widths[0]} held-out features as trained on, got {widths[1]}")
    else:
        mask = held_out_rows(train.labels)
        train, held_out = (Rows(train.features[part], train.labels[part]) for part in (~mask, mask))
    most = int(torch.cat([train.labels, held_out.labels]).max()) + 1
    classes = tuple(map(str, saved.get("classes", range(most))))
    if len(classes) < most:
        raise ValueError(f"features: expected names of at least {most} classes in {path}, got {len(classes)}")
    return standardised(train, held_out, classes)


def _rows(features: Any, labels: Any) -> Rows:
    if not isinstance(features, Tensor) or features.dim() != 2 or not features.is_floating_point():
        found = f"{tuple(features.shape)} in {features.dtype}" if isinstance(features, Tensor) else type(features)
        raise ValueError(f"features: expected (n, I) in a floating-point dtype, got {found}")
    return Rows(features.float(), check_labels("features", labels, len(features)))


class Gabor(nn.Module):
    """No trained network at all: fixed oriented filters, their absolute value, and means over a 4×4 grid.

    That is the first layer of a scattering transform: 8 orientations × 3 wavelengths × 2 phases × 16 places = 768
    features of the image's mean over channels.
    """

    image_size = 28
    orientations = 8
    wavelengths = (4.0, 6.0, 9.0)
    grid = 4
    reach = 7  # of a filter, from its centre

    filters: Tensor

    def __init__(self) -> None:
        super().__init__()
        x = torch.arange(-self.reach, self.reach + 1.0)
        bank = []
        for k in range(self.orientations):
            angle = k * math.pi / self.orientations
            along = x * math.cos(angle) + x[:, None] * math.sin(angle)
            for wavelength in self.wavelengths:
                window = torch.exp(-2 * (x**2 + x[:, None] ** 2) / wavelength**2)
                for phase in (0, math.pi / 2):
                    wave = window * torch.cos(2 * math.pi * along / wavelength + phase)
                    wave = wave - window * wave.sum() / window.sum()  # blind to brightness
                    bank.append(wave / wave.abs().sum())
        self.register_buffer("filters", torch.stack(bank).unsqueeze(1))

    def forward(self, images: Tensor) -> Tensor:
        """Images (B, C, H, W) in [-1, 1] to (B, 768)."""
        responses = F.conv2d(images.mean(1, keepdim=True), self.filters, padding=self.reach).abs()
        return F.adaptive_avg_pool2d(responses, self.grid).sqrt().flatten(1)


class Pretrained(nn.Module):
    """A vision model of `transformers` in a local folder: CLIP's image features, or another model's pooled output.

    Args:
        path: as `save_pretrained` wrote it; nothing is downloaded.

    Raises:
        FileNotFoundError, ModuleNotFoundError, ValueError: no such folder, no `transformers`, not a vision model.
    """

    image_mean: Tensor
    image_std: Tensor

    def __init__(self, path: Path) -> None:
        super().__init__()
        if not path.is_dir():
            raise FileNotFoundError(f"backbone: expected gabor or a folder with a model, got {str(path)!r}")
        if find_spec("transformers") is None:
            raise ModuleNotFoundError(
                "backbone: a pretrained model needs transformers, which is not installed: pip install transformers"
            )
        from transformers import AutoModel

        self.model = AutoModel.from_pretrained(path, local_files_only=True)
        config = getattr(self.model.config, "vision_config", self.model.config)
        if not isinstance(getattr(config, "image_size", None), int):
            raise ValueError(f"backbone: expected a vision model with an image_size in {path}, got {type(config)}")
        self.image_size: int = config.image_size
        file = path / "preprocessor_config.json"
        preprocessing = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
        for name in ("image_mean", "image_std"):
            values = torch.tensor(preprocessing.get(name, [0.5, 0.5, 0.5])).view(-1, 1, 1)
            self.register_buffer(name, values, persistent=False)

    def forward(self, images: Tensor) -> Tensor:
        """Images (B, 1 or 3, image_size, image_size) in [-1, 1] to (B, I)."""
        x = ((images + 1) / 2 - self.image_mean) / self.image_std
        y = self.model.get_image_features(x) if hasattr(self.model, "get_image_features") else self.model(x)
        if isinstance(y, Tensor):
            return y
        pooled: Tensor = y.last_hidden_state.mean(1) if y.pooler_output is None else y.pooler_output
        return pooled.flatten(1)

"""Features of images by a frozen backbone, for heads to learn from: fixed filters, a local model, or a file."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mumoe_fast.examples._images import Dataset, Images, check_labels, held_out_rows

Backbone = Callable[[Tensor], Tensor]
Track = Callable[[range], "range | Iterator[int]"]
CHUNK = 64


@dataclass(frozen=True)
class Features:
    """Features (n, I) in float32 and labels (n,), to learn from and held out."""

    train: Tensor
    train_labels: Tensor
    held_out: Tensor
    held_out_labels: Tensor
    classes: tuple[str, ...]

    @property
    def width(self) -> int:
        """I."""
        return self.train.shape[1]


def extract(dataset: Dataset, backbone: Backbone, track: Track = iter) -> Features:
    """Run a frozen backbone once over every image; `track` shows progress over the chunks."""
    train = _extract(dataset.train, backbone, track)
    held_out = _extract(dataset.held_out, backbone, track)
    return Features(*train, *held_out, dataset.classes)


@torch.no_grad()
def _extract(images: Images, backbone: Backbone, track: Track) -> tuple[Tensor, Tensor]:
    features, labels = [], []
    for start in track(range(0, len(images), CHUNK)):
        x, y = images[torch.arange(start, min(start + CHUNK, len(images)))]
        features.append(backbone(x).float().cpu())
        labels.append(y)
    return torch.cat(features), torch.cat(labels)


class Gabor(nn.Module):
    """No trained network at all: fixed oriented filters, their absolute value, and means over a 4×4 grid.

    That is the first layer of a scattering transform: 8 orientations × 3 wavelengths × 2 phases × 16 places = 768
    features of the image's mean over channels.
    """

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

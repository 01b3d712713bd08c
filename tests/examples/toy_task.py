"""A task for tests of the trainer: a small regression through a μMoE block, with dropout where a test asks for it."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from mumoe_fast import MuMoEMLP


class Regression:
    """Learn a function of 8 numbers; sample i is drawn with i as the seed."""

    unit = "rows"
    units_per_sample = 1

    def __init__(self, dropout: float = 0.0, dtype: torch.dtype = torch.float32) -> None:
        torch.manual_seed(0)
        block = MuMoEMLP(8, 16, num_experts=4, rank=8, norm="batch" if dropout else "layer", impl="reference")
        nn.init.normal_(block.gate.weights[0])
        self.model = nn.Sequential(nn.Linear(8, 8), nn.Dropout(dropout), block).to(dtype)
        self.blocks = [block]
        self.dtype = dtype

    def batch(self, samples: range) -> Tensor:
        rows = [torch.randn(8, generator=torch.Generator().manual_seed(sample)) for sample in samples]
        return torch.stack(rows).to(self.dtype)

    def loss(self, model: nn.Module, batch: Tensor) -> Tensor:
        return nn.functional.mse_loss(model(batch), 2 * batch.cos())

    def evaluate(self, model: nn.Module, complete: bool) -> dict[str, float]:
        return {"error": self.loss(model, self.batch(range(10**6, 10**6 + (40 if complete else 20)))).item()}

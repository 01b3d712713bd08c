"""The dense layer or MLP that a μMoE stands in for: `nn.Linear`s."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn

from mumoe_fast.reference import ACTIVATIONS


class DenseMLP(nn.Module):
    """`nn.Linear(I, O)`, or two of them with an activation between: features (I, O) or (I, H, O)."""

    def __init__(self, features: Sequence[int], activation: str) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(i, o) for i, o in pairwise(features))
        self.activation = activation

    def forward(self, x: Tensor) -> Tensor:
        """x (T, I) to (T, O)."""
        first, *further = self.layers
        y: Tensor = first(x)
        for layer in further:
            y = layer(ACTIVATIONS[self.activation](y))
        return y


class DenseMLPTwin(DenseMLP):
    """The same by einsum, the bias as one more input feature that is 1."""

    def forward(self, x: Tensor) -> Tensor:
        """x (T, I) to (T, O)."""
        for index, layer in enumerate(self.layers):
            assert isinstance(layer, nn.Linear)
            if index:
                x = ACTIVATIONS[self.activation](x)
            with_bias = torch.cat((layer.weight, layer.bias.unsqueeze(1)), dim=1)
            x = torch.einsum("ti,oi->to", torch.cat((x, x.new_ones(len(x), 1)), dim=1), with_bias)
        return x

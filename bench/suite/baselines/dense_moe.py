"""The dense ("soft") mixture of experts: every expert computes for every token, `y = Σ_n softmax(zG)_n MLP_n(z)`."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mumoe_fast.reference import ACTIVATIONS


class DenseMoE(nn.Module):
    """N linear layers (I, O) or MLPs (I, H, O) under a softmax gate.

    The weighted sum over the experts is part of one last matrix product, of the weighted inputs of all experts side by
    side, so that only (T, N·I) or (T, N·H) is formed and nothing of size T·N·O.

    Parameters:
        gate: (N, I).
        weights[l]: (N, d_in, d_out) of every expert's layer l, and biases[l]: (N, d_out).
    """

    def __init__(self, features: Sequence[int], num_experts: int, activation: str) -> None:
        super().__init__()
        self.activation = activation
        self.gate = nn.Parameter(torch.empty(num_experts, features[0]))
        self.weights = nn.ParameterList(torch.empty(num_experts, i, o) for i, o in pairwise(features))
        self.biases = nn.ParameterList(torch.empty(num_experts, o) for o in features[1:])
        nn.init.normal_(self.gate, std=features[0] ** -0.5)
        for width, *parameters in zip(features, self.weights, self.biases, strict=False):
            for parameter in parameters:
                nn.init.uniform_(parameter, -(width**-0.5), width**-0.5)

    def coefficients(self, x: Tensor) -> Tensor:
        """Softmax over the experts, in float32 or better: (T, N)."""
        logits = F.linear(x, self.gate)
        return torch.softmax(logits, -1, dtype=torch.promote_types(logits.dtype, torch.float32)).to(x.dtype)

    def forward(self, x: Tensor) -> Tensor:
        """x (T, I) to (T, O)."""
        a = self.coefficients(x)
        if len(self.weights) == 1:
            inputs = x.unsqueeze(1)
        else:
            weight = self.weights[0].transpose(0, 1).flatten(1)  # (I, N·H)
            inputs = torch.addmm(self.biases[0].flatten(), x, weight).unflatten(-1, self.biases[0].shape)
            inputs = ACTIVATIONS[self.activation](inputs)
        weighted = (a.unsqueeze(-1) * inputs).flatten(1)
        return torch.addmm(a @ self.biases[-1], weighted, self.weights[-1].flatten(0, 1))


class DenseMoETwin(DenseMoE):
    """The same, one expert after the other."""

    def forward(self, x: Tensor) -> Tensor:
        """x (T, I) to (T, O)."""
        a, y = self.coefficients(x), torch.zeros((), dtype=x.dtype, device=x.device)
        for n in range(len(self.gate)):
            output = x
            for index, (weight, bias) in enumerate(zip(self.weights, self.biases, strict=True)):
                if index:
                    output = ACTIVATIONS[self.activation](output)
                output = output @ weight[n] + bias[n]
            y = y + a[:, n : n + 1] * output
        return y

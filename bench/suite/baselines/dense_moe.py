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

    All experts read the same input, so their first layers are one matrix product; those after it are a batched one.

    Parameters:
        gate: (N, I).
        weights[l]: (N, d_out, d_in) of every expert's layer l, and biases[l]: (N, d_out).
    """

    def __init__(self, features: Sequence[int], num_experts: int, activation: str) -> None:
        super().__init__()
        self.activation = activation
        self.gate = nn.Parameter(torch.empty(num_experts, features[0]))
        self.weights = nn.ParameterList(torch.empty(num_experts, o, i) for i, o in pairwise(features))
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
        first, bias = self.weights[0], self.biases[0]
        outputs = F.linear(x, first.flatten(0, 1), bias.flatten()).unflatten(-1, bias.shape)  # (T, N, H or O)
        for weight, bias in zip(list(self.weights)[1:], list(self.biases)[1:], strict=True):
            hidden = ACTIVATIONS[self.activation](outputs).transpose(0, 1)
            outputs = torch.baddbmm(bias.unsqueeze(1), hidden, weight.mT).transpose(0, 1)
        y: Tensor = self.coefficients(x).unsqueeze(1) @ outputs
        return y.squeeze(1)


class DenseMoETwin(DenseMoE):
    """The same, one expert after the other."""

    def coefficients(self, x: Tensor) -> Tensor:
        """Softmax by its logarithm."""
        logits = torch.einsum("ti,ni->tn", x, self.gate).to(torch.promote_types(x.dtype, torch.float32))
        return torch.exp(logits - torch.logsumexp(logits, -1, keepdim=True)).to(x.dtype)

    def forward(self, x: Tensor) -> Tensor:
        """x (T, I) to (T, O)."""
        layers = [zip(w.unbind(), b.unbind(), strict=True) for w, b in zip(self.weights, self.biases, strict=True)]
        y = torch.zeros((), dtype=x.dtype, device=x.device)
        for a, expert in zip(self.coefficients(x).unbind(-1), zip(*layers, strict=True), strict=True):
            output = x
            for index, (weight, bias) in enumerate(expert):
                if index:
                    output = ACTIVATIONS[self.activation](output)
                output = torch.einsum("ti,oi->to", output, weight) + bias
            y = y + a.unsqueeze(-1) * output
        return y

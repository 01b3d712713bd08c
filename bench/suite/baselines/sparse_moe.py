"""Sparse top-K mixtures of experts by the strongest means there are, all with one router and one layout of parameters.

Against a layer (I, O): N experts of that size, of which each token takes one. Against an MLP (I, H, O): N experts with
a hidden width of H / 8, of which each token takes eight. Both have the experts and the active FLOPs of the μMoE, whose
own are matched to the dense one's; many small experts are how today's sparse models are built. No biases, as in those.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mumoe_fast.reference import ACTIVATIONS

FINE = 8  # experts of an MLP per token, each of an eighth of its hidden width


def top_k_of(features: Sequence[int], num_experts: int) -> int:
    """K: 1 against a layer, 8 against an MLP, or all of fewer experts."""
    return 1 if len(features) == 2 else min(FINE, num_experts)


def expert_features(features: Sequence[int], num_experts: int, gated: bool) -> tuple[int, ...]:
    """The features of one expert: the layer's own, or the MLP's with a K-th of the hidden width.

    A gated expert (SwiGLU) has three matrices in place of two: two thirds of that, to a multiple of 8.
    """
    if len(features) == 2:
        return tuple(features)
    in_features, hidden, out_features = features
    width = hidden / top_k_of(features, num_experts)
    width = max(8 * round(width * 2 / 3 / 8), 8) if gated else round(width)
    return in_features, width, out_features


class SparseMoE(nn.Module):
    """The router and the parameters; a subclass says how the chosen experts compute.

    The coefficients are the K largest of a softmax over all experts, as they are. The router works in float32, as is
    usual: in bfloat16 many logits are equal.

    Parameters:
        gate: (N, I).
        weights[l]: (N, d_out, d_in) of every expert's layer l; a gated expert's first is (N, 2 d, I), gate before up.
    """

    gated = False

    def __init__(self, features: Sequence[int], num_experts: int, activation: str) -> None:
        super().__init__()
        self.activation, self.top_k = activation, top_k_of(features, num_experts)
        sizes = expert_features(features, num_experts, self.gated)
        self.gate = nn.Parameter(torch.empty(num_experts, features[0]))
        self.weights = nn.ParameterList(
            torch.empty(num_experts, o * (2 if self.gated and layer == 0 else 1), i)
            for layer, (i, o) in enumerate(pairwise(sizes))
        )
        nn.init.normal_(self.gate, std=features[0] ** -0.5)
        for weight in self.weights:
            nn.init.uniform_(weight, -(weight.shape[-1] ** -0.5), weight.shape[-1] ** -0.5)

    def logits(self, x: Tensor) -> Tensor:
        """The router's, in float32 or better: (T, N)."""
        dtype = torch.promote_types(x.dtype, torch.float32)
        return F.linear(x.to(dtype), self.gate.to(dtype))

    def route(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Coefficients and indices of every token's experts, each (T, K)."""
        values, chosen = torch.softmax(self.logits(x), -1).topk(self.top_k, dim=-1)
        return values.to(x.dtype), chosen

    def activate(self, x: Tensor) -> Tensor:
        """What stands between an expert's two layers."""
        if not self.gated:
            return ACTIVATIONS[self.activation](x)
        gate, up = x.chunk(2, dim=-1)
        return F.silu(gate) * up

    def by_expert(self, x: Tensor, through: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
        """Sort the tokens by expert, let `through(rows, counts)` compute, put the results back and sum them up."""
        coefficients, chosen = self.route(x)
        order = chosen.flatten().argsort(stable=True)
        counts = chosen.flatten().bincount(minlength=len(self.gate))
        outputs = through(x[order // self.top_k], counts)
        back = torch.empty_like(order)
        back[order] = torch.arange(len(order), device=order.device)
        y: Tensor = outputs[back].unflatten(0, chosen.shape) * coefficients.unsqueeze(-1)
        return y.sum(1)


class GroupedSparseMoE(SparseMoE):
    """All experts of a layer in one `torch.nn.functional.grouped_mm`."""

    def forward(self, x: Tensor) -> Tensor:
        """x (T, I) to (T, O)."""
        return self.by_expert(x, self._grouped)

    def _grouped(self, rows: Tensor, counts: Tensor) -> Tensor:
        ends = counts.cumsum(0, dtype=torch.int32)
        for layer, weight in enumerate(self.weights):
            if layer:
                rows = self.activate(rows)
            rows = F.grouped_mm(rows, weight.mT, offs=ends)
        return rows


class LoopSparseMoE(SparseMoE):
    """One expert after the other, on its own tokens."""

    def forward(self, x: Tensor) -> Tensor:
        """x (T, I) to (T, O)."""
        return self.by_expert(x, self._one_by_one)

    def _one_by_one(self, rows: Tensor, counts: Tensor) -> Tensor:
        experts = zip(*(weight.unbind() for weight in self.weights), strict=True)
        outputs = []
        for group, expert in zip(rows.split(counts.tolist()), experts, strict=True):
            if len(group):
                for layer, weight in enumerate(expert):
                    group = F.linear(self.activate(group) if layer else group, weight)
                outputs.append(group)
        return torch.cat(outputs)


class SparseMoETwin(SparseMoE):
    """The same by a table of coefficients (T, N), zero off the choice, expert by expert over the rows that it is not.

    The choice itself is discontinuous, and in float64 a near tie may fall the other way; so a twin takes the choice
    that it is given, of which `misrouted` says whether it was right.
    """

    chosen: Tensor

    def logits(self, x: Tensor) -> Tensor:
        """The router's, in float32 or better: (T, N)."""
        dtype = torch.promote_types(x.dtype, torch.float32)
        return torch.einsum("ti,ni->tn", x.to(dtype), self.gate.to(dtype))

    def activate(self, x: Tensor) -> Tensor:
        """What stands between an expert's two layers."""
        if not self.gated:
            return ACTIVATIONS[self.activation](x)
        half = x.shape[-1] // 2
        gate, up = x[..., :half], x[..., half:]
        return gate * torch.sigmoid(gate) * up

    def forward(self, x: Tensor) -> Tensor:
        """x (T, I) to (T, O)."""
        logits = self.logits(x)
        probabilities = torch.exp(logits - torch.logsumexp(logits, -1, keepdim=True)).to(x.dtype)
        table = probabilities * torch.zeros_like(probabilities).scatter(-1, self.chosen, 1)
        y = x.new_zeros(len(x), self.weights[-1].shape[1])
        experts = zip(*(weight.unbind() for weight in self.weights), strict=True)
        for n, expert in enumerate(experts):
            rows = (self.chosen == n).any(-1).nonzero().squeeze(-1)
            outputs = x.index_select(0, rows)
            for layer, weight in enumerate(expert):
                outputs = torch.einsum("ti,oi->to", self.activate(outputs) if layer else outputs, weight)
            y = y.index_add(0, rows, table[rows, n, None] * outputs)
        return y

    def misrouted(self, x: Tensor) -> str | None:
        """Whether the choice leaves out a logit that is larger by more than rounding in float32 explains."""
        logits, K = self.logits(x), self.top_k
        if self.chosen.shape != (len(x), K) or (self.chosen.sort(-1).values.diff() == 0).any():
            return f"expected {K} different experts for each token"
        least = logits.topk(K, dim=-1).values[:, -1:]
        missed = (least - logits.gather(-1, self.chosen)).max().item()
        allowed = x.shape[1] * 2.0**-24 * F.linear(x.abs(), self.gate.abs()).max().item()
        return None if missed <= allowed else f"a chosen expert's logit is {missed:.1e} below the K-th largest"


class GatedSparseMoETwin(SparseMoETwin):
    """The twin of gated experts."""

    gated = True

"""The gate: expert coefficients for every level of the hierarchy."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn

from mumoe_fast import _validation as check
from mumoe_fast.functional import batch_norm_gate, gate, gate_hierarchy, topk_gate
from mumoe_fast.layers.experts import uniform_


class RunningStatistics(nn.Module):
    """Batch norm's running mean and variance of one level's logits, as `nn.BatchNorm1d` keeps them.

    Buffers: running_mean (N_e,), running_var (N_e,).
    """

    running_mean: Tensor
    running_var: Tensor

    def __init__(
        self,
        num_experts: int,
        momentum: float = 0.1,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.momentum = momentum
        self.register_buffer("running_mean", torch.zeros(num_experts, device=device, dtype=dtype))
        self.register_buffer("running_var", torch.ones(num_experts, device=device, dtype=dtype))

    def reset_running_stats(self) -> None:
        """Back to mean 0 and variance 1."""
        self.running_mean.zero_()
        self.running_var.fill_(1)

    @torch.no_grad()
    def update(self, mean: Tensor, var: Tensor) -> None:
        """Move towards the statistics of a batch (var unbiased)."""
        self.running_mean.lerp_(mean.to(self.running_mean.dtype), self.momentum)
        self.running_var.lerp_(var.to(self.running_var.dtype), self.momentum)


class ExpertGate(nn.Module):
    """Expert coefficients ``a_e = entmax(norm(G_eᵀ z))`` (Eq. 1), one set per hierarchy level.

    The weights start at zero, as the paper authors' do, so that every expert begins with coefficient 1/N.

    With `activation="topk"` the coefficients are those of the Mixture of Decoders (arXiv 2505.21364), ``a_e =
    topk(relu(G_eᵀ z + b_e), k)``: at most k of a row are positive, without summing to one, and `support` gives those
    alone. Its weights and biases start as `nn.Linear`'s, since relu has no gradient at zero.

    Args:
        in_features: I.
        num_experts: N, or one N_e per hierarchy level.
        activation: of the logits: "entmax" or "topk".
        k: how many coefficients top-k keeps, at most the experts of every level.
        norm: over the logits, without affine parameters: "layer" (over the experts), "batch" (over the tokens, with
            running statistics for evaluation, synchronised across ranks) or "none". None is "layer" for entmax and
            "none" for top-k, which has no other.
        alpha: entmax's, in [1, 2]; the paper's is 1.5.
        learn_alpha: make α a parameter of every level, starting from `alpha`, which is then inside (1, 2).
        eps: added to the norm's variance.
        process_group: the ranks that share batch norm's statistics; None is the default group.
        impl: "auto" or an implementation by name.
        device: of the parameters.
        dtype: of the parameters.

    Parameters:
        weights[e]: (N_e, I).
        biases[e]: (N_e,), with top-k only.
        raw_alpha: (E,), with `learn_alpha` only: ``α_e = 1 + sigmoid(raw_alpha_e)``.

    Raises:
        TypeError, ValueError: an argument is not as above, by name.
    """

    def __init__(
        self,
        in_features: int,
        num_experts: int | Sequence[int],
        *,
        activation: str = "entmax",
        k: int = 32,
        norm: str | None = None,
        alpha: float = 1.5,
        learn_alpha: bool = False,
        eps: float = 1e-5,
        process_group: dist.ProcessGroup | None = None,
        impl: str = "auto",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        in_features = check.positive("in_features", in_features)
        check.one_of("activation", activation, ("entmax", "topk"))
        if norm is None:
            norm = "layer" if activation == "entmax" else "none"
        check.one_of("norm", norm, check.NORMS if activation == "entmax" else ("none",))
        check.alpha(alpha)
        if learn_alpha and (not 1 < alpha < 2 or activation != "entmax"):
            raise ValueError(f"learn_alpha: expected entmax with alpha inside (1, 2), got {activation} with {alpha!r}")
        check.eps(eps)
        check.impl(impl)
        self.in_features = in_features
        self.num_experts = check.levels(num_experts)
        if activation == "topk":
            k = check.positive("k", k)
            if k > min(self.num_experts):
                raise ValueError(f"k: expected at most {min(self.num_experts)}, the experts of a level, got {k}")
        self.activation, self.k = activation, k
        self.norm, self.alpha, self.eps, self.impl = norm, float(alpha), eps, impl
        self.process_group = process_group
        self.weights = nn.ParameterList(
            torch.empty(N, in_features, device=device, dtype=dtype) for N in self.num_experts
        )
        self.biases = nn.ParameterList(
            torch.empty(N, device=device, dtype=dtype) for N in self.num_experts if activation == "topk"
        )
        self.raw_alpha = (
            nn.Parameter(torch.empty(len(self.num_experts), device=device, dtype=dtype)) if learn_alpha else None
        )
        self.norms = nn.ModuleList(
            RunningStatistics(N, device=device, dtype=dtype) for N in self.num_experts if norm == "batch"
        )
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Zero weights: every expert starts with the same coefficient. For top-k, what `nn.Linear` starts with."""
        for weight in self.weights:
            if self.activation == "entmax":
                nn.init.zeros_(weight)
            else:
                uniform_(weight, self.in_features)
        for bias in self.biases:
            uniform_(bias, self.in_features)
        if self.raw_alpha is not None:
            nn.init.constant_(self.raw_alpha, math.log((self.alpha - 1) / (2 - self.alpha)))
        for statistics in self.norms:
            assert isinstance(statistics, RunningStatistics)
            statistics.reset_running_stats()

    def forward(self, z: Tensor) -> tuple[Tensor, ...]:
        """z (..., I) to one (..., N_e) per level, each row of entmax summing to one."""
        if self.activation == "topk":
            return tuple(
                values.new_zeros(*values.shape[:-1], N).scatter(-1, indices, values)
                for N, (values, indices) in zip(self.num_experts, self.support(z), strict=True)
            )
        E = len(self.num_experts)
        if E == 1 or self.raw_alpha is not None or (self.norm == "batch" and self.training):
            return tuple(self._level(z, e) for e in range(E))
        weights, biases = zip(*(self._folded(e) for e in range(E)), strict=True)
        return gate_hierarchy(
            z,
            weights,
            biases if self.norm == "batch" else None,
            norm=self._folded_norm,
            alpha=self.alpha,
            eps=self.eps,
            impl=self.impl,
        )

    def support(self, z: Tensor) -> tuple[tuple[Tensor, Tensor], ...]:
        """z (..., I) to top-k's values and their experts' indices per level, each (..., k): see `topk_gate`."""
        if self.activation != "topk":
            raise RuntimeError(f"support: expected a gate with activation='topk', got {self.activation!r}")
        levels = zip(self.weights, self.biases, strict=True)
        return tuple(topk_gate(z, weight, bias, k=self.k, impl=self.impl) for weight, bias in levels)

    def _level(self, z: Tensor, e: int) -> Tensor:
        """One level's coefficients by itself, (..., N_e)."""
        alpha = self.alpha if self.raw_alpha is None else 1 + torch.sigmoid(self.raw_alpha[e].float())
        if self.norm == "batch" and self.training:
            a, mean, var = batch_norm_gate(
                z, self.weights[e], alpha=alpha, eps=self.eps, process_group=self.process_group, impl=self.impl
            )
            self._statistics(e).update(mean, var)
            return a
        weight, bias = self._folded(e)
        return gate(z, weight, bias, norm=self._folded_norm, alpha=alpha, eps=self.eps, impl=self.impl)

    @property
    def _folded_norm(self) -> str:
        """The norm that is left after batch norm with given statistics is folded into the weights."""
        return "none" if self.norm == "batch" else self.norm

    def _folded(self, e: int) -> tuple[Tensor, Tensor | None]:
        """A level's weight (N_e, I) and bias (N_e,), where no other token has a part in it.

        With its statistics given, batch norm is a scale and a shift of the logits: fold them into the weight, in the
        weight's dtype, which under FSDP's mixed precision is not the statistics'.
        """
        weight = self.weights[e]
        if self.norm != "batch":
            return weight, None
        statistics = self._statistics(e)
        scale = torch.rsqrt(statistics.running_var + self.eps)
        folded = (weight * scale.unsqueeze(1)).to(weight.dtype)
        return folded, (-statistics.running_mean * scale).to(weight.dtype)

    def _statistics(self, e: int) -> RunningStatistics:
        statistics = self.norms[e]
        assert isinstance(statistics, RunningStatistics)
        return statistics

    def extra_repr(self) -> str:
        """The sizes and options, as `nn.Linear` shows its own."""
        experts = self.num_experts[0] if len(self.num_experts) == 1 else self.num_experts
        options = f"norm={self.norm!r}, alpha={self.alpha}{'' if self.raw_alpha is None else ' (learned)'}"
        if self.activation == "topk":
            options = f"activation='topk', k={self.k}"
        return f"in_features={self.in_features}, num_experts={experts}, {options}, impl={self.impl!r}"

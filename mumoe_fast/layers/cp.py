"""Experts as a CP factorisation."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from mumoe_fast import _validation as check
from mumoe_fast.functional import cp_experts
from mumoe_fast.rank import resolve_rank


class CPExperts(nn.Module):
    """CP experts ``y = U_out [(Π_e U_eᵀ a_e) ⊙ (U_in act(z) + b)]`` (Eq. 2, 16) for given coefficients.

    Args:
        in_features: I.
        out_features: O.
        num_experts: N, or one N_e per hierarchy level.
        rank: R.
        bias: with the input mode's bias (the paper's footnote 2: a row of the input factor).
        activation: applied to the input: None, "gelu", "gelu_tanh", "relu" or "silu".
        impl: "auto", "triton" or "reference".
        device: of the parameters.
        dtype: of the parameters.

    Parameters:
        expert_factors[e]: (N_e, R), N(1, 1) for the first level and 1 for the others.
        in_factor: (R, I), and in_bias (R,), both U[−1/√I, 1/√I].
        out_factor: (O, R), U[−1/√R, 1/√R].

    Raises:
        TypeError, ValueError: an argument is not as above, by name.
    """

    in_bias: nn.Parameter | None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        num_experts: int | Sequence[int],
        rank: int | Sequence[int],
        *,
        bias: bool = True,
        activation: str | None = None,
        impl: str = "auto",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        check.positive("in_features", in_features)
        check.positive("out_features", out_features)
        check.activation(activation)
        check.impl(impl)
        self.in_features, self.out_features = in_features, out_features
        self.num_experts = check.levels(num_experts)
        (rank,) = resolve_rank("cp", rank, self.num_experts)
        self.rank = rank
        self.activation, self.impl = activation, impl

        def parameter(*shape: int) -> nn.Parameter:
            return nn.Parameter(torch.empty(shape, device=device, dtype=dtype))

        self.expert_factors = nn.ParameterList(parameter(N, rank) for N in self.num_experts)
        self.in_factor = parameter(rank, in_features)
        self.in_bias = parameter(rank) if bias else None
        self.out_factor = parameter(out_features, rank)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """The paper's initialisation (F.2): one dense layer, replicated along the expert modes with noise."""
        first, *further = self.expert_factors
        nn.init.normal_(first, mean=1.0, std=1.0)
        for factor in further:
            nn.init.ones_(factor)
        fan_ins = ((self.in_factor, self.in_features), (self.in_bias, self.in_features), (self.out_factor, self.rank))
        for weight, fan_in in fan_ins:
            if weight is not None:
                nn.init.uniform_(weight, -1 / math.sqrt(fan_in), 1 / math.sqrt(fan_in))

    def forward(self, z: Tensor, coefficients: Sequence[Tensor]) -> Tensor:
        """z (..., I) and one (..., N_e) per level to (..., O)."""
        return cp_experts(
            z,
            coefficients,
            list(self.expert_factors),
            self.in_factor,
            self.out_factor,
            self.in_bias,
            activation=self.activation,
            impl=self.impl,
        )

    def extra_repr(self) -> str:
        """The sizes and options, as `nn.Linear` shows its own."""
        experts = self.num_experts[0] if len(self.num_experts) == 1 else self.num_experts
        activation = "" if self.activation is None else f", activation={self.activation!r}"
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, num_experts={experts}, "
            f"rank={self.rank}, bias={self.in_bias is not None}{activation}, impl={self.impl!r}"
        )

"""Experts without a factorisation: a dense mixture of experts."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from mumoe_fast.functional import full_experts
from mumoe_fast.layers.experts import Experts, uniform_


class FullExperts(Experts):
    """Unfactorised experts ``y = Σ_n a_n (W_n act(z) + b_n)`` (Eq. 1, 15), a dense MoE, for given coefficients.

    Args:
        in_features: I.
        out_features: O.
        num_experts: N, or one N_e per hierarchy level.
        rank: None: there is none.
        bias: with one bias per expert.
        activation: applied to the input: None, "gelu", "gelu_tanh", "relu" or "silu".
        impl: "auto" or an implementation by name.
        device: of the parameters.
        dtype: of the parameters.

    Parameters:
        weight: (N_1, …, N_E, O, I), and bias (N_1, …, N_E, O), both U[−1/√I, 1/√I]: every expert as `nn.Linear`.

    Raises:
        TypeError, ValueError: an argument is not as above, by name.
    """

    factorization = "full"
    weight: nn.Parameter
    bias: nn.Parameter | None

    def reset_parameters(self) -> None:
        """Every expert as `nn.Linear` (F.2)."""
        uniform_(self.weight, self.in_features)
        uniform_(self.bias, self.in_features)

    def forward(self, z: Tensor, coefficients: Sequence[Tensor], *, support_only: bool = False) -> Tensor:
        """z (..., I) and one (..., N_e) per level to (..., O)."""
        return full_experts(
            z,
            coefficients,
            self.weight,
            self.bias,
            activation=self.activation,
            support_only=support_only,
            impl=self.impl,
        )

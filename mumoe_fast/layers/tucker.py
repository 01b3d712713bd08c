"""Experts as a Tucker factorisation."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from mumoe_fast.functional import tucker_experts
from mumoe_fast.layers.experts import Experts, uniform_


class TuckerExperts(Experts):
    """Tucker experts ``y = U_out [core ×_e (U_eᵀ a_e) ×_{E+1} (U_in act(z) + b)]`` (D.1.3) for given coefficients.

    Args:
        in_features: I.
        out_features: O.
        num_experts: N, or one N_e per hierarchy level.
        rank: (R_1, …, R_E, R_I, R_O), or one int for R_I = R_O with R_e = min(N_e, 16).
        bias: with the input mode's bias (the paper's footnote 2: a row of the input factor).
        activation: applied to the input: None, "gelu", "gelu_tanh", "relu" or "silu".
        impl: "auto" or an implementation by name.
        device: of the parameters.
        dtype: of the parameters.

    Parameters:
        expert_factors[e]: (N_e, R_e), N(1, 1) for the first level and 1 for the others.
        in_factor: (R_I, I), and in_bias (R_I,), both U[−1/√I, 1/√I].
        core: (R_1, …, R_E, R_I, R_O), U[−1/√R_I, 1/√R_I].
        out_factor: (O, R_O), U[−1/√R_O, 1/√R_O].

    Raises:
        TypeError, ValueError: an argument is not as above, by name.
    """

    factorization = "tucker"
    level_parameters = "expert_factors"
    shared_parameters = ("in_factor", "in_bias", "core", "out_factor")
    expert_factors: nn.ParameterList
    in_factor: nn.Parameter
    in_bias: nn.Parameter | None
    core: nn.Parameter
    out_factor: nn.Parameter

    def reset_parameters(self) -> None:
        """The paper's initialisation (F.2): one dense layer, replicated along the expert modes with noise."""
        first, *further = self.expert_factors
        nn.init.normal_(first, mean=1.0, std=1.0)
        for factor in further:
            nn.init.ones_(factor)
        *_, R_I, R_O = self.rank
        uniform_(self.in_factor, self.in_features)
        uniform_(self.in_bias, self.in_features)
        uniform_(self.core, R_I)
        uniform_(self.out_factor, R_O)

    def forward(self, z: Tensor, coefficients: Sequence[Tensor], *, support_only: bool = False) -> Tensor:
        """z (..., I) and one (..., N_e) per level to (..., O)."""
        return tucker_experts(
            z,
            coefficients,
            list(self.expert_factors),
            self.in_factor,
            self.core,
            self.out_factor,
            self.in_bias,
            activation=self.activation,
            support_only=support_only,
            impl=self.impl,
        )

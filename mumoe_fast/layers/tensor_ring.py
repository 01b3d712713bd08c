"""Experts as a tensor ring, or as a tensor train."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from mumoe_fast.functional import tr_experts
from mumoe_fast.layers.experts import Experts, uniform_


class TRExperts(Experts):
    """Tensor-ring experts ``y_o = Σ_{r1 r} (A B)_{r1 r} U_out[o, r1, r]`` (Eq. 3, 17–18) for given coefficients.

    ``A = Π_e (U_e ×₂ a_e)`` and ``B = U_in ×₂ act(z) + b`` are small matrices of each token.

    Args:
        in_features: I.
        out_features: O.
        num_experts: N, or one N_e per hierarchy level.
        rank: (R_1, …, R_{E+2}), one per core, or one int that means (4, …, 4, int), the paper's choice.
        bias: with the input mode's bias (the paper's footnote 2: a row of the input core).
        activation: applied to the input: None, "gelu", "gelu_tanh", "relu" or "silu".
        impl: "auto" or an implementation by name.
        device: of the parameters.
        dtype: of the parameters.

    Parameters:
        expert_cores[e]: (N_e, R_e, R_{e+1}), each expert's slice diagonal: N(1, 1) on it for the first level, 1 for the
            others.
        in_core: (R_{E+1}, R_{E+2}, I), and in_bias (R_{E+1}, R_{E+2}), both U[−1/√I, 1/√I].
        out_core: (O, R_1, R_{E+2}), U[−√k, √k] with k = 1/(R_1 R_{E+2}).

    Raises:
        TypeError, ValueError: an argument is not as above, by name.
    """

    factorization = "tr"
    level_parameters = "expert_cores"
    shared_parameters = ("in_core", "in_bias", "out_core")
    expert_cores: nn.ParameterList
    in_core: nn.Parameter
    in_bias: nn.Parameter | None
    out_core: nn.Parameter

    def reset_parameters(self) -> None:
        """The paper's initialisation (F.2): one dense layer, replicated along the expert modes with noise."""
        for e, core in enumerate(self.expert_cores):
            nn.init.zeros_(core)
            diagonal = core.diagonal(dim1=1, dim2=2)
            if e == 0:
                nn.init.normal_(diagonal, mean=1.0, std=1.0)
            else:
                nn.init.ones_(diagonal)
        uniform_(self.in_core, self.in_features)
        uniform_(self.in_bias, self.in_features)
        uniform_(self.out_core, self.rank[0] * self.rank[-1])

    def forward(self, z: Tensor, coefficients: Sequence[Tensor], *, support_only: bool = False) -> Tensor:
        """z (..., I) and one (..., N_e) per level to (..., O)."""
        return tr_experts(
            z,
            coefficients,
            list(self.expert_cores),
            self.in_core,
            self.out_core,
            self.in_bias,
            activation=self.activation,
            support_only=support_only,
            impl=self.impl,
        )


class TTExperts(TRExperts):
    """Tensor-train experts: a tensor ring that is not closed, R_1 = 1.

    Arguments and parameters are `TRExperts`'; one int for the rank means (1, 4, …, 4, int).
    """

    factorization = "tt"

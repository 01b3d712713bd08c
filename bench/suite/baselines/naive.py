"""The μMoE layer as Eq. 1 is written: form every expert's matrix from the factors, then sum over the experts."""

from __future__ import annotations

from torch import Tensor

from mumoe_fast import reference
from mumoe_fast.layers import MuMoE, MuMoEMLP
from mumoe_fast.layers.cp import CPExperts
from mumoe_fast.layers.experts import Experts
from mumoe_fast.layers.tensor_ring import TRExperts
from mumoe_fast.layers.tucker import TuckerExperts


def materialize(experts: Experts) -> tuple[Tensor, Tensor | None]:
    """W (N_1, …, N_E, I, O) and the experts' biases (N_1, …, N_E, O)."""
    if isinstance(experts, CPExperts):
        factors = list(experts.expert_factors)
        return reference.cp_materialize(factors, experts.in_factor, experts.out_factor, experts.in_bias)
    if isinstance(experts, TRExperts):
        return reference.tr_materialize(list(experts.expert_cores), experts.in_core, experts.out_core, experts.in_bias)
    if isinstance(experts, TuckerExperts):
        factors = list(experts.expert_factors)
        return reference.tucker_materialize(
            factors, experts.in_factor, experts.core, experts.out_factor, experts.in_bias
        )
    raise TypeError(f"experts: expected a factorisation, got {type(experts).__name__}")


class NaiveMuMoE(MuMoE):
    """`MuMoE` by materialised experts."""

    def forward(self, x: Tensor, gate_input: Tensor | None = None) -> Tensor:
        """x (..., I) to (..., O)."""
        coefficients = self.gate(x if gate_input is None else gate_input)
        return reference.moe(x, coefficients, *materialize(self.experts))


class NaiveMuMoEMLP(MuMoEMLP):
    """`MuMoEMLP` by materialised experts."""

    def forward(self, x: Tensor, gate_input: Tensor | None = None) -> Tensor:
        """x (..., I) to (..., O)."""
        coefficients = self.gate(x if gate_input is None else gate_input)
        hidden = reference.moe(x, coefficients, *materialize(self.in_experts))
        hidden = reference.ACTIVATIONS[self.activation](hidden)
        return reference.moe(hidden, coefficients, *materialize(self.out_experts))

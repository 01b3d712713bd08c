"""The Mixture of Decoders (arXiv 2505.21364): an MLP whose second layer is tens of thousands of sparse experts."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from mumoe_fast import _validation as check
from mumoe_fast.functional import mxd_experts
from mumoe_fast.layers.gate import ExpertGate


class MxDExperts(nn.Module):
    """Decoders ``y = (C a) ⊙ (D act(h))``, the experts ``W_n = diag(c_n) D``, for coefficients given as their support.

    Args:
        hidden_features: H.
        out_features: O.
        num_experts: N.
        activation: applied to the input: None, "gelu", "gelu_tanh", "relu" or "silu".
        impl: "auto" or an implementation by name.
        device: of the parameters.
        dtype: of the parameters.

    Parameters:
        expert_factors: (N, O), Cᵀ, one row per expert: N(1, 1), as a first expert mode.
        out_factor: (O, H), D: zero, so that the block begins as y = 0.

    Raises:
        TypeError, ValueError: an argument is not as above, by name.
    """

    def __init__(
        self,
        hidden_features: int,
        out_features: int,
        num_experts: int,
        *,
        activation: str | None = None,
        impl: str = "auto",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        hidden_features = check.positive("hidden_features", hidden_features)
        out_features = check.positive("out_features", out_features)
        num_experts = check.positive("num_experts", num_experts)
        check.activation(activation)
        check.impl(impl)
        self.hidden_features, self.out_features, self.num_experts = hidden_features, out_features, num_experts
        self.activation, self.impl = activation, impl
        self.expert_factors = nn.Parameter(torch.empty(num_experts, out_features, device=device, dtype=dtype))
        self.out_factor = nn.Parameter(torch.empty(out_features, hidden_features, device=device, dtype=dtype))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """One decoder that is zero, scaled for every expert with noise."""
        nn.init.normal_(self.expert_factors, mean=1.0, std=1.0)
        nn.init.zeros_(self.out_factor)

    def forward(self, h: Tensor, values: Tensor, indices: Tensor) -> Tensor:
        """h (..., H) and the support's values and indices (..., k) to (..., O)."""
        return mxd_experts(
            h, values, indices, self.expert_factors, self.out_factor, activation=self.activation, impl=self.impl
        )

    def extra_repr(self) -> str:
        """The sizes and options, as `nn.Linear` shows its own."""
        activation = "" if self.activation is None else f", activation={self.activation!r}"
        return (
            f"hidden_features={self.hidden_features}, out_features={self.out_features}, "
            f"num_experts={self.num_experts}{activation}, impl={self.impl!r}"
        )


class MxD(nn.Module):
    """A Mixture of Decoders in place of an MLP: ``y = (C a) ⊙ (D h)`` with ``h = act(E x + e)``.

    The coefficients ``a = topk(relu(G x + b), k)`` are sparse: a token uses k of tens of thousands of experts, each a
    linear map of h of full rank, ``diag(c_n) D``, that costs the I + 1 + O parameters of its gate and its row of C.

    Args:
        in_features: I.
        hidden_features: H.
        out_features: O; None is I.
        num_experts: N.
        k: how many experts a token uses, in [1, N].
        activation: of the hidden layer: "gelu", "gelu_tanh", "relu" or "silu".
        impl: "auto" or an implementation by name.
        device: of the parameters.
        dtype: of the parameters.

    Parameters, by their names in the state_dict:
        encoder.weight: (H, I), and encoder.bias (H,), as `nn.Linear`.
        gate.weights.0: (N, I), and gate.biases.0 (N,), as `nn.Linear`.
        experts.expert_factors: (N, O), N(1, 1).
        experts.out_factor: (O, H), zero.

    Raises:
        TypeError, ValueError: an argument is not as above, by name.
    """

    def __init__(
        self,
        in_features: int,
        hidden_features: int,
        out_features: int | None = None,
        *,
        num_experts: int,
        k: int = 32,
        activation: str = "gelu",
        impl: str = "auto",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        out_features = in_features if out_features is None else out_features
        in_features = check.positive("in_features", in_features)
        hidden_features = check.positive("hidden_features", hidden_features)
        out_features = check.positive("out_features", out_features)
        num_experts = check.positive("num_experts", num_experts)
        self.in_features, self.hidden_features, self.out_features = in_features, hidden_features, out_features
        self.encoder = nn.Linear(in_features, hidden_features, device=device, dtype=dtype)
        self.gate = ExpertGate(in_features, num_experts, activation="topk", k=k, impl=impl, device=device, dtype=dtype)
        self.experts = MxDExperts(
            hidden_features,
            out_features,
            num_experts,
            activation=activation,
            impl=impl,
            device=device,
            dtype=dtype,
        )

    def coefficients(self, x: Tensor) -> tuple[Tensor]:
        """The gate's coefficients for x (..., I) as a row of all experts, (..., N), at most k of them positive."""
        (a,) = self.gate(x)
        return (a,)

    def forward(self, x: Tensor, gate_input: Tensor | None = None) -> Tensor:
        """x (..., I) to (..., O); the gate reads `gate_input` (..., I) where it is given, else x."""
        ((values, indices),) = self.gate.support(x if gate_input is None else gate_input)
        y: Tensor = self.experts(self.encoder(x), values, indices)
        return y

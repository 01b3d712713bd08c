"""The two layers that replace dense ones: `MuMoE` for a linear layer, `MuMoEMLP` for the two of an MLP."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from mumoe_fast import _validation as check
from mumoe_fast import rank as counts
from mumoe_fast.functional.one_call import layer_in_one_call
from mumoe_fast.layers.cp import CPExperts
from mumoe_fast.layers.experts import Experts
from mumoe_fast.layers.full import FullExperts
from mumoe_fast.layers.gate import ExpertGate
from mumoe_fast.layers.tensor_ring import TRExperts, TTExperts
from mumoe_fast.layers.tucker import TuckerExperts

EXPERTS: dict[str, type[Experts]] = {
    layer.factorization: layer for layer in (CPExperts, TRExperts, TTExperts, TuckerExperts, FullExperts)
}
_EVERY_MODULES_HOOKS = nn.modules.module._global_forward_hooks, nn.modules.module._global_forward_pre_hooks
_IN_ONE_CALL = (CPExperts, TRExperts, TTExperts, TuckerExperts)


class MuMoE(nn.Module):
    """A μMoE layer in place of `nn.Linear`: an `ExpertGate`, then experts kept as a tensor factorisation.

    ``y = Σ_n a_n (W_n z + b_n)`` with ``a = entmax(norm(Gᵀz))`` (Eq. 1), over experts that are never formed.

    Args:
        in_features: I.
        out_features: O.
        num_experts: N, or one N_e per hierarchy level.
        factorization: "cp", "tr" (tensor ring), "tt" (tensor train), "tucker" or "full" (none: a dense MoE).
        rank: as the factorisation's layer takes it, an int or one int per core or mode; None matches the parameters of
            `nn.Linear(in_features, out_features)`, gate and bias counted, to the nearest multiple of 8 ("full": none).
        bias: with the input mode's bias, or for "full" one bias per expert.
        norm: of the gate: "layer", "batch" or "none".
        alpha: of the gate's entmax, in [1, 2].
        impl: "auto" or an implementation by name.
        device: of the parameters.
        dtype: of the parameters.

    Raises:
        TypeError, ValueError: an argument is not as above, by name; no rank fits the parameters of the dense layer.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        num_experts: int | Sequence[int],
        *,
        factorization: str = "cp",
        rank: int | Sequence[int] | None = None,
        bias: bool = True,
        norm: str = "layer",
        alpha: float = 1.5,
        impl: str = "auto",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        in_features = check.positive("in_features", in_features)
        out_features = check.positive("out_features", out_features)
        check.one_of("factorization", factorization, list(EXPERTS))
        check.one_of("norm", norm, check.NORMS)
        shape = counts.resolve((in_features, out_features), check.levels(num_experts), factorization, rank, bias)
        levels, rank = shape.num_experts, shape.rank or None  # "full" has none
        self.in_features, self.out_features = in_features, out_features
        self.factorization = factorization
        self.gate = ExpertGate(in_features, levels, norm=norm, alpha=alpha, impl=impl, device=device, dtype=dtype)
        self.experts = EXPERTS[factorization](
            in_features, out_features, levels, rank, bias=bias, impl=impl, device=device, dtype=dtype
        )

    def coefficients(self, x: Tensor) -> tuple[Tensor, ...]:
        """The gate's coefficients for x (..., I): one (..., N_e) per level."""
        coefficients: tuple[Tensor, ...] = self.gate(x)
        return coefficients

    def forward(self, x: Tensor, gate_input: Tensor | None = None) -> Tensor:
        """x (..., I) to (..., O); the gate reads `gate_input` (..., I) where it is given, else x."""
        gate, experts = self.gate, self.experts
        if gate_input is None and _in_one_call(gate, experts):
            tensors = _tensors(gate, experts)
            if tensors is not None:
                weights, levels, shared = tensors
                y: Tensor | None = layer_in_one_call(
                    experts.factorization,
                    x,
                    weights,
                    levels,
                    shared,
                    norm=gate.norm,
                    alpha=gate.alpha,
                    eps=gate.eps,
                    impl=gate.impl,
                )
                if y is not None:
                    return y
        y = experts(x, gate(x if gate_input is None else gate_input), support_only=True)
        return y


@cache
def _names(E: int) -> tuple[str, ...]:
    """The names of a list's parameters."""
    return tuple(map(str, range(E)))


def _tensors(gate: ExpertGate, experts: Experts) -> tuple[list[Any], list[Any], list[Any]] | None:
    """Gate weights, the levels' tensors and the shared ones, without `nn.Module`'s attributes and iterators.

    Those are a tenth of the layer's time for one token. None where a tensor is not a parameter under its own name and
    only an attribute finds it: parametrised, pruned, or taken out of its module by FSDP1.
    """
    names = _names(len(gate.num_experts))
    weights: dict[str, Any] = gate._modules["weights"]._parameters  # type: ignore[union-attr]
    levels: dict[str, Any] = experts._modules[experts.level_parameters]._parameters  # type: ignore[union-attr]
    parameters = experts._parameters
    try:
        return (
            [weights[name] for name in names],
            [levels[name] for name in names],
            [parameters[name] for name in experts.shared_parameters],
        )
    except KeyError:
        return None


def _in_one_call(gate: ExpertGate, experts: Experts) -> bool:
    """Whether gate and experts may run as one operator: nobody asked to see or to differentiate what is in between.

    Compiled code keeps the two, since who has exported it may train it.
    """
    return (
        not torch.is_grad_enabled()
        and not torch.compiler.is_compiling()
        and not torch._C._are_functorch_transforms_active()  # vmap falls back for operators without lists alone
        and type(gate) is ExpertGate  # a subclass may have a forward of its own
        and type(experts) in _IN_ONE_CALL
        and experts.activation is None
        and gate.activation == "entmax"
        and gate.norm != "batch"
        and gate.raw_alpha is None
        and gate.impl == experts.impl
        and not (_EVERY_MODULES_HOOKS[0] or _EVERY_MODULES_HOOKS[1])
        and not (gate._forward_hooks or gate._forward_pre_hooks)
        and not (experts._forward_hooks or experts._forward_pre_hooks)
        and not ("forward" in gate.__dict__ or "forward" in experts.__dict__)  # replaced on the instance
    )


class MuMoEMLP(nn.Module):
    """A μMoE block in place of an MLP's two linear layers: two expert layers that share one gate.

    The activation belongs to the second layer's input, so that only the pre-activation is ever stored.

    Args:
        in_features: I.
        hidden_features: H.
        out_features: O; None is I.
        num_experts: N, or one N_e per hierarchy level.
        activation: between the two: "gelu", "gelu_tanh", "relu" or "silu".
        factorization: "cp", "tr" (tensor ring), "tt" (tensor train), "tucker" or "full" (none: a dense MoE).
        rank: of both expert layers, as the factorisation's layer takes it, an int or one int per core or mode; None
            matches the parameters of the two linear layers, gate and biases counted, to the nearest multiple of 8
            ("full": none).
        bias: with the input modes' biases, or for "full" one bias per expert.
        norm: of the gate: "layer", "batch" or "none".
        alpha: of the gate's entmax, in [1, 2].
        impl: "auto" or an implementation by name.
        device: of the parameters.
        dtype: of the parameters.

    Raises:
        TypeError, ValueError: an argument is not as above, by name; no rank fits the parameters of the dense layers.
    """

    def __init__(
        self,
        in_features: int,
        hidden_features: int,
        out_features: int | None = None,
        num_experts: int | Sequence[int] = 64,
        *,
        activation: str = "gelu",
        factorization: str = "cp",
        rank: int | Sequence[int] | None = None,
        bias: bool = True,
        norm: str = "layer",
        alpha: float = 1.5,
        impl: str = "auto",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        out_features = in_features if out_features is None else out_features
        in_features = check.positive("in_features", in_features)
        hidden_features = check.positive("hidden_features", hidden_features)
        out_features = check.positive("out_features", out_features)
        check.one_of("factorization", factorization, list(EXPERTS))
        check.one_of("norm", norm, check.NORMS)
        features = (in_features, hidden_features, out_features)
        shape = counts.resolve(features, check.levels(num_experts), factorization, rank, bias)
        levels, rank = shape.num_experts, shape.rank or None  # "full" has none
        self.in_features, self.hidden_features, self.out_features = in_features, hidden_features, out_features
        self.factorization, self.activation = factorization, activation
        experts = EXPERTS[factorization]
        self.gate = ExpertGate(in_features, levels, norm=norm, alpha=alpha, impl=impl, device=device, dtype=dtype)
        self.in_experts = experts(
            in_features, hidden_features, levels, rank, bias=bias, impl=impl, device=device, dtype=dtype
        )
        self.out_experts = experts(
            hidden_features,
            out_features,
            levels,
            rank,
            bias=bias,
            activation=activation,
            impl=impl,
            device=device,
            dtype=dtype,
        )

    def coefficients(self, x: Tensor) -> tuple[Tensor, ...]:
        """The gate's coefficients for x (..., I): one (..., N_e) per level."""
        coefficients: tuple[Tensor, ...] = self.gate(x)
        return coefficients

    def forward(self, x: Tensor, gate_input: Tensor | None = None) -> Tensor:
        """x (..., I) to (..., O); the gate reads `gate_input` (..., I) where it is given, else x."""
        coefficients = self.gate(x if gate_input is None else gate_input)
        h = self.in_experts(x, coefficients, support_only=True)
        y: Tensor = self.out_experts(h, coefficients, support_only=True)
        return y

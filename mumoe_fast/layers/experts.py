"""What the expert layers of all factorisations share: arguments, parameters by their counted shapes, initialisation."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor, nn

from mumoe_fast import _validation as check
from mumoe_fast.rank import ExpertShape, resolve_rank


class Experts(nn.Module, ABC):
    """Experts I → O kept as a tensor factorisation, for coefficients that a gate gives.

    A subclass names its factorisation, initialises the parameters and calls its function; `mumoe_fast.rank` says which
    parameters there are, and so what is counted is what is allocated. One with parameters for every level names their
    list, and those that the levels share in the order in which its operator takes them.
    """

    factorization: ClassVar[str]
    level_parameters: ClassVar[str]
    shared_parameters: ClassVar[tuple[str, ...]]

    def __init__(
        self,
        in_features: int,
        out_features: int,
        num_experts: int | Sequence[int],
        rank: int | Sequence[int] | None = None,
        *,
        bias: bool = True,
        activation: str | None = None,
        impl: str = "auto",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        in_features = check.positive("in_features", in_features)
        out_features = check.positive("out_features", out_features)
        check.activation(activation)
        check.impl(impl)
        self.in_features, self.out_features = in_features, out_features
        self.num_experts = check.levels(num_experts)
        self.rank = resolve_rank(self.factorization, rank, self.num_experts)
        self.bias_in_use, self.activation, self.impl = bias, activation, impl
        self._make_parameters(device, dtype)
        self.reset_parameters()

    def _make_parameters(self, device: torch.device | str | None, dtype: torch.dtype | None) -> None:
        """One parameter per counted tensor, under its name; those of the levels in a list; None for absent biases."""
        named = ExpertShape(self.in_features, self.out_features, self.num_experts, self.factorization, self.rank)
        for name, size in named.tensors().items():
            group, _, level = name.partition(".")
            wanted = self.bias_in_use or group not in ("in_bias", "bias")
            parameter = nn.Parameter(torch.empty(size, device=device, dtype=dtype)) if wanted else None
            if not level:
                self.register_parameter(name, parameter)
            elif parameter is not None:
                if level == "0":
                    setattr(self, group, nn.ParameterList())
                getattr(self, group).append(parameter)

    @abstractmethod
    def reset_parameters(self) -> None:
        """The paper's initialisation (F.2)."""

    @abstractmethod
    def forward(self, z: Tensor, coefficients: Sequence[Tensor], *, support_only: bool = False) -> Tensor:
        """z (..., I) and one (..., N_e) per level to (..., O).

        With `support_only` the gradient of a coefficient that is zero may be given as zero: enough for a gate's.
        """

    def extra_repr(self) -> str:
        """The sizes and options, as `nn.Linear` shows its own."""
        experts = self.num_experts[0] if len(self.num_experts) == 1 else self.num_experts
        rank = f"rank={self.rank[0] if len(self.rank) == 1 else self.rank}, " if self.rank else ""
        activation = "" if self.activation is None else f", activation={self.activation!r}"
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, num_experts={experts}, "
            f"{rank}bias={self.bias_in_use}{activation}, impl={self.impl!r}"
        )


def uniform_(parameter: Tensor | None, fan_in: int) -> None:
    """U[−√k, √k] with k = 1/fan_in, as PyTorch initialises linear layers; an absent parameter needs none."""
    if parameter is not None:
        nn.init.uniform_(parameter, -1 / math.sqrt(fan_in), 1 / math.sqrt(fan_in))

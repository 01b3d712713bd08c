"""Sparse mixtures of experts by packages that compute on GPUs alone, where they are installed.

Each is given the experts and the choice of our own router, so that all sparse sides compute one function of one set of
parameters (the gated one another) and are judged by the same twin.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from importlib.util import find_spec

import torch
from torch import Tensor

from mumoe_fast.bench.suite.baselines.sparse_moe import SparseMoE
from mumoe_fast.bench.suite.workloads import Workload


class PackagedSparseMoE(SparseMoE, ABC):
    """Experts computed by another package, which is imported when it is first called.

    Attributes:
        package: what is imported.
        project: what it is called.
    """

    package: str
    project: str

    @classmethod
    def hindrance(cls, workload: Workload, dtype: torch.dtype, device: torch.device) -> str | None:
        """Why it cannot run on this workload; None if it should."""
        if find_spec(cls.package) is None:
            return f"the package {cls.project} is not installed"
        if device.type != "cuda":
            return f"{cls.project} computes on GPUs, not on {device.type}"
        return cls.misfit(workload, dtype, device)

    @classmethod
    def misfit(cls, workload: Workload, dtype: torch.dtype, device: torch.device) -> str | None:
        """What the package does not compute of what the workload asks for."""
        return None

    def forward(self, x: Tensor) -> Tensor:
        """x (T, I) to (T, O).

        Raises:
            RuntimeError: the package has failed, in whatever way.
        """
        coefficients, chosen = self.route(x)
        try:
            return self.experts(x, coefficients, chosen)
        except Exception as error:  # a foreign interface may fail in any way, and one side's failure ends no run
            raise RuntimeError(f"{self.project}: {type(error).__name__}: {error}") from error

    @abstractmethod
    def experts(self, x: Tensor, coefficients: Tensor, chosen: Tensor) -> Tensor:
        """The chosen experts' results, weighted and summed: x (T, I), coefficients and chosen (T, K) to (T, O)."""


def _not_an_mlp(workload: Workload) -> bool:
    return len(workload.features) == 2 or workload.features[0] != workload.features[-1]


class LigerSparseMoE(PackagedSparseMoE):
    """liger-kernel's fused MoE of SwiGLU experts, for I = O."""

    gated = True
    package, project = "liger_kernel", "liger-kernel"

    @classmethod
    def misfit(cls, workload: Workload, dtype: torch.dtype, device: torch.device) -> str | None:
        """It has no other experts than SwiGLU MLPs."""
        return "its experts are SwiGLU MLPs with as many outputs as inputs" if _not_an_mlp(workload) else None

    def experts(self, x: Tensor, coefficients: Tensor, chosen: Tensor) -> Tensor:
        """By its autograd function, which computes in x's dtype."""
        from liger_kernel.ops import LigerFusedMoEFunction

        y: Tensor = LigerFusedMoEFunction.apply(x, *self.weights, chosen.int(), coefficients)
        return y


class ScatterSparseMoE(PackagedSparseMoE):
    """ScatterMoE: grouped GEMMs that gather their rows and scatter their results themselves."""

    package, project = "scattermoe", "ScatterMoE"

    def experts(self, x: Tensor, coefficients: Tensor, chosen: Tensor) -> Tensor:
        """One `parallel_linear` per layer: the first reads tokens where they are, the last sums up their experts."""
        from scattermoe.parallel_experts import flatten_sort_count, parallel_linear

        order = flatten_sort_count(chosen, num_experts=len(self.gate))
        last = len(self.weights) - 1
        for layer, weight in enumerate(self.weights):
            x = parallel_linear(
                self.activate(x) if layer else x,
                weight.mT,
                1 if layer else self.top_k,
                *order,
                gates=coefficients if layer == last else None,
                grouped_in=layer > 0,
                grouped_out=layer < last,
            )
        return x


class SonicSparseMoE(PackagedSparseMoE):
    """SonicMoE: fused grouped GEMMs for NVIDIA's Hopper generation, in bfloat16, for I = O."""

    package, project = "sonicmoe", "SonicMoE"

    @classmethod
    def misfit(cls, workload: Workload, dtype: torch.dtype, device: torch.device) -> str | None:
        """Its kernels are of one generation and one dtype."""
        if torch.cuda.get_device_capability(device)[0] != 9:
            return "SonicMoE computes on compute capability 9 alone"
        if dtype != torch.bfloat16:
            return f"SonicMoE takes bfloat16, not {dtype}"
        if _not_an_mlp(workload) or workload.activation != "gelu":
            return "its experts are MLPs with as many outputs as inputs, here of GELU"
        return None

    def experts(self, x: Tensor, coefficients: Tensor, chosen: Tensor) -> Tensor:
        """By its function for a choice that was made elsewhere: pairs of token and expert, sorted by token."""
        from sonicmoe.enums import ActivationType
        from sonicmoe.functional import moe_general_routing_inputs

        tokens = torch.arange(len(x), device=x.device, dtype=torch.int32).repeat_interleave(self.top_k)
        first, second = (weight.permute(1, 2, 0) for weight in self.weights)
        y: Tensor
        y, _ = moe_general_routing_inputs(
            x,
            coefficients.float().flatten(),
            tokens,
            chosen.int().flatten(),
            first,
            None,
            second,
            None,
            len(self.gate),
            torch.cuda.current_stream(x.device).cuda_stream,
            ActivationType.GELU,
            not self.training,
        )
        return y

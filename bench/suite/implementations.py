"""Who takes part, as data: ours by every implementation, the reference, the dense layer, dense and sparse MoE.

An implementation is a way to build a module for a workload, a second way to compute the same from the same parameters
(its twin, by which `check` judges it), a formula for its FLOPs, and reasons why it may have to stay away.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from math import prod

import torch
import torch.nn.functional as F
from torch import nn

from mumoe_fast import rank
from mumoe_fast.bench.demo_checkpoint import restore_gate
from mumoe_fast.bench.suite.baselines.dense_mlp import DenseMLP, DenseMLPTwin
from mumoe_fast.bench.suite.baselines.dense_moe import DenseMoE, DenseMoETwin
from mumoe_fast.bench.suite.baselines.naive import NaiveMuMoE, NaiveMuMoEMLP
from mumoe_fast.bench.suite.baselines.sparse_moe import (
    GatedSparseMoETwin,
    GroupedSparseMoE,
    LoopSparseMoE,
    SparseMoE,
    SparseMoETwin,
    expert_features,
    top_k_of,
)
from mumoe_fast.bench.suite.baselines.sparse_moe_packages import (
    LigerSparseMoE,
    PackagedSparseMoE,
    ScatterSparseMoE,
    SonicSparseMoE,
)
from mumoe_fast.bench.suite.workloads import COMPILED, MOE, NAIVE, WORKLOADS, Workload
from mumoe_fast.layers import ExpertGate, MuMoE, MuMoEMLP
from mumoe_fast.ops import dispatch

DENSE = "dense"
PACKAGED: tuple[type[PackagedSparseMoE], ...] = (LigerSparseMoE, ScatterSparseMoE, SonicSparseMoE)
KINDS = ("ours", "reference", "dense", "dense MoE", "sparse MoE")
LABELS = {"cp": "CP", "tr": "TR", "tt": "TT", "tucker": "Tucker", "full": "full"}

MEMORY_SHARE = 1 / 16  # of the device's memory: the check in float64, with gradients, takes several times as much
MULTIPLY_ADDS_ON_A_CPU = 250e9  # of one forward pass, which takes about a second
Obstacle = Callable[[Workload, torch.dtype, torch.device], str | None]


def _no_hindrance(workload: Workload, dtype: torch.dtype, device: torch.device) -> None:
    return None


def _no_scratch(workload: Workload) -> int:
    return 0


@dataclass(frozen=True)
class Implementation:
    """One side of the comparison.

    Attributes:
        name: unique.
        kind: one of `KINDS`.
        make: the module for a workload, float32 on the CPU.
        twin: another module with the same state_dict and results, computed differently.
        flops: of a forward pass on the workload's tokens by formula, a multiply-add counted as 1.
        factorization: of ours, of the reference and of the naive forward.
        hindrance: why it cannot run, beyond what it costs.
        scratch: elements that a forward pass forms beside parameters, input and output, where they are many.
        extra: what it asks patience for (`Selection.extras`); torch.compile's sides are compiled by it.
        impl: of ours, the library's name for it.
        needs_gpu: whether it computes on GPUs alone.
    """

    name: str
    kind: str
    make: Callable[[Workload], nn.Module]
    twin: Callable[[Workload], nn.Module]
    flops: Callable[[Workload], int]
    factorization: str | None = None
    hindrance: Obstacle = _no_hindrance
    scratch: Callable[[Workload], int] = _no_scratch
    extra: str | None = None
    impl: str | None = None
    needs_gpu: bool = False

    @property
    def reference(self) -> str | None:
        """Name of the eager reference of its factorisation, which it is meant to beat."""
        return None if self.factorization is None else f"{LABELS[self.factorization]} reference"

    def applies(self, workload: Workload) -> bool:
        """Whether the workload asks for it at all."""
        return self.factorization is None or self.factorization in dict(workload.ranks)

    def obstacle(self, workload: Workload, dtype: torch.dtype, device: torch.device) -> str | None:
        """Why it is left out on this workload; None if it can run."""
        return workload.obstacle() or self.hindrance(workload, dtype, device) or self._too_costly(workload, device)

    def _too_costly(self, workload: Workload, device: torch.device) -> str | None:
        with torch.device("meta"):
            parameters = sum(p.numel() for p in self.make(workload).parameters())
        needed, free = 4 * (parameters + self.scratch(workload)), MEMORY_SHARE * memory(device)
        if needed > free:
            return (
                f"it needs {needed / 1e9:.1f} GB in float32, more than {free / 1e9:.1f} GB, a sixteenth of the memory"
            )
        if device.type == "cpu" and (cost := self.flops(workload)) > MULTIPLY_ADDS_ON_A_CPU:
            return f"a forward pass takes {cost / 1e9:,.0f} billion multiply-adds, too many for a CPU"
        return None

    def build(self, workload: Workload, dtype: torch.dtype, device: torch.device) -> nn.Module:
        """The module; one seed, so that all implementations of a factorisation have the same parameters."""
        torch.manual_seed(0)
        module = self.make(workload)
        if isinstance(module, MuMoE | MuMoEMLP):
            train_gate(module.gate, workload)
            _tell_experts_apart(module)
        module = module.to(device, dtype)
        if self.extra == COMPILED:
            module.compile()  # in place: the parameters keep their names
        return module


def memory(device: torch.device) -> int:
    """All bytes of the device."""
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).total_memory)
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def train_gate(gate: ExpertGate, workload: Workload) -> None:
    """Make a gate as training leaves it, of sparse coefficients; a new one has weights of zero."""
    recorded = workload.recorded()
    if recorded is not None:
        restore_gate(gate, recorded)
        return
    for weight in gate.weights:
        nn.init.normal_(weight, std=workload.features[0] ** -0.5)


@torch.no_grad()
def _tell_experts_apart(module: MuMoE | MuMoEMLP) -> None:
    """Give further levels experts that differ: they start equal, and their gate's gradient would be rounding alone."""
    for name, parameter in module.named_parameters():
        *_, group, level = name.rsplit(".", 2)
        if group in ("expert_factors", "expert_cores") and level != "0":
            parameter.add_(torch.randn_like(parameter), alpha=0.5)


def _mumoe(workload: Workload, factorization: str, impl: str, naive: bool = False) -> nn.Module:
    rank_of_ours, N = dict(workload.ranks)[factorization], workload.num_experts
    if len(workload.features) == 2:
        layer = NaiveMuMoE if naive else MuMoE
        I, O = workload.features
        return layer(I, O, N, factorization=factorization, rank=rank_of_ours, norm=workload.norm, impl=impl)
    block = NaiveMuMoEMLP if naive else MuMoEMLP
    I, H, O = workload.features
    return block(
        I,
        H,
        O,
        N,
        activation=workload.activation,
        factorization=factorization,
        rank=rank_of_ours,
        norm=workload.norm,
        impl=impl,
    )


def _mumoe_flops(workload: Workload, factorization: str) -> int:
    return workload.tokens * workload.shape(factorization).flops


def _dense(workload: Workload) -> nn.Module:
    return DenseMLP(workload.features, workload.activation)


def _dense_twin(workload: Workload) -> nn.Module:
    return DenseMLPTwin(workload.features, workload.activation)


def _dense_flops(workload: Workload) -> int:
    return workload.tokens * rank.dense_flops(workload.features)


def _dense_moe(workload: Workload) -> nn.Module:
    return DenseMoE(workload.features, workload.total_experts, workload.activation)


def _dense_moe_twin(workload: Workload) -> nn.Module:
    return DenseMoETwin(workload.features, workload.total_experts, workload.activation)


def _dense_moe_flops(workload: Workload) -> int:
    N = workload.total_experts
    return workload.tokens * (rank.sparse_moe_flops(workload.features, N, N) + N * workload.features[-1])


def _dense_moe_scratch(workload: Workload) -> int:
    """The widest outputs of all experts, before and after the activation."""
    return 2 * workload.tokens * workload.total_experts * max(workload.features[1:])


def _sparse_moe(workload: Workload, kind: type[SparseMoE]) -> nn.Module:
    return kind(workload.features, workload.total_experts, workload.activation)


def _sparse_moe_flops(workload: Workload, kind: type[SparseMoE]) -> int:
    N = workload.total_experts
    K, sizes = top_k_of(workload.features, N), expert_features(workload.features, N, kind.gated)
    ungated = rank.sparse_moe_flops(sizes, N, K)
    return workload.tokens * (ungated + (K * sizes[0] * sizes[1] if kind.gated else 0))


def _grouped_hindrance(workload: Workload, dtype: torch.dtype, device: torch.device) -> str | None:
    if not hasattr(F, "grouped_mm"):
        return "this PyTorch has no torch.nn.functional.grouped_mm"
    if device.type == "cuda" and dtype != torch.bfloat16:
        return f"grouped_mm takes bfloat16 on a GPU, not {dtype}"
    sizes = expert_features(workload.features, workload.total_experts, gated=False)
    odd = [size for size in sizes if size * dtype.itemsize % 16]
    return f"grouped_mm takes rows of whole 16 bytes, and {odd[0]} × {dtype} is none" if odd else None


def _sparse_moes() -> Iterator[Implementation]:
    kinds: tuple[tuple[str, type[SparseMoE], Obstacle], ...] = (
        ("sparse MoE, grouped_mm", GroupedSparseMoE, _grouped_hindrance),
        ("sparse MoE, loop", LoopSparseMoE, _no_hindrance),
        *((f"sparse MoE, {kind.project}", kind, kind.hindrance) for kind in PACKAGED),
    )
    for name, kind, hindrance in kinds:
        yield Implementation(
            name,
            "sparse MoE",
            partial(_sparse_moe, kind=kind),
            partial(_sparse_moe, kind=GatedSparseMoETwin if kind.gated else SparseMoETwin),
            partial(_sparse_moe_flops, kind=kind),
            hindrance=hindrance,
            extra=MOE,
            needs_gpu=issubclass(kind, PackagedSparseMoE),
        )


def _naive_flops(workload: Workload, factorization: str) -> int:
    """Table 8's "original" count, but every expert's matrix is formed once for all tokens."""
    shape = workload.shape(factorization)
    total = workload.tokens * shape.gate_parameters
    for layer in shape.experts:
        every_expert = prod(layer.num_experts) * (layer.in_features + layer.bias) * layer.out_features
        total += layer.naive_flops + (workload.tokens - 1) * every_expert
    return total


def _naive_scratch(workload: Workload, factorization: str) -> int:
    """Every expert's matrix, what it is contracted from, and each token's own matrix."""
    largest = 0
    for layer in workload.shape(factorization).experts:
        matrices = prod(layer.num_experts) * layer.in_features
        between = layer.rank[0] * (layer.rank[-1] if factorization in ("tr", "tt") else 1) if layer.rank else 0
        largest = max(
            largest, matrices * (layer.out_features + between) + workload.tokens * prod(workload.features[:2])
        )
    return largest


def _kernel_hindrance(workload: Workload, dtype: torch.dtype, device: torch.device, impl: str) -> str | None:
    if impl == "triton" and device.type == "cpu":
        return "Triton compiles for GPUs; its interpreter is for tests and no speed"
    return dispatch.obstacle(impl, device, dtype)


def _of_factorization(factorization: str) -> Iterator[Implementation]:
    label, reference = LABELS[factorization], partial(_mumoe, factorization=factorization, impl="reference")
    flops = partial(_mumoe_flops, factorization=factorization)
    for impl in ("triton", "native"):
        make = partial(_mumoe, factorization=factorization, impl=impl)
        hindrance = partial(_kernel_hindrance, impl=impl)
        yield Implementation(
            f"{label} {impl}",
            "ours",
            make,
            reference,
            flops,
            factorization,
            hindrance,
            impl=impl,
            needs_gpu=impl == "triton",
        )
    yield Implementation(f"{label} reference", "reference", reference, reference, flops, factorization)
    name = f"{label} reference, torch.compile"
    yield Implementation(name, "reference", reference, reference, flops, factorization, extra=COMPILED)
    if factorization != "full":  # which is Eq. 1 as it stands
        yield Implementation(
            f"{label} naive",
            "reference",
            partial(_mumoe, factorization=factorization, impl="reference", naive=True),
            reference,
            partial(_naive_flops, factorization=factorization),
            factorization,
            scratch=partial(_naive_scratch, factorization=factorization),
            extra=NAIVE,
        )


IMPLEMENTATIONS: tuple[Implementation, ...] = (
    *(implementation for factorization in LABELS for implementation in _of_factorization(factorization)),
    Implementation(DENSE, "dense", _dense, _dense_twin, _dense_flops),
    Implementation(
        "dense MoE", "dense MoE", _dense_moe, _dense_moe_twin, _dense_moe_flops, scratch=_dense_moe_scratch, extra=MOE
    ),
    *_sparse_moes(),
)


@dataclass(frozen=True)
class Case:
    """One row of the suite: what is checked and measured."""

    workload: Workload
    implementation: Implementation
    dtype: torch.dtype
    direction: str


def cases(suite: str) -> Iterator[Case]:
    """Everything that a suite asks for, whether or not it can run here, workload by workload."""
    for workload in WORKLOADS:
        selection = workload.selection(suite)
        if selection is None:
            continue
        for dtype in selection.dtypes:
            for direction in selection.directions:
                for implementation in IMPLEMENTATIONS:
                    if implementation.applies(workload) and selection.includes(
                        implementation.factorization, implementation.extra
                    ):
                        yield Case(workload, implementation, dtype, direction)

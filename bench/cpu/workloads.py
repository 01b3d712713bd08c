"""What the native CPU kernels are timed on, against what, and what is asked of them: the rows of the table, as data.

A side is a factory of a module, called after the same seed as all the others, so that ours, the reference and the exact
one have the same parameters.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from mumoe_fast.functional import entmax
from mumoe_fast.layers import MuMoE, MuMoEMLP

FORWARD = "forward"  # without gradients
STEP = "forward+backward"  # the gradients of the input and of every parameter
MEMORY = "peak memory"  # of a step

OURS = "native"
Factory = Callable[[], nn.Module]


@dataclass(frozen=True)
class Goal:
    """At least `limit` times faster than a peer, or else at most `limit` times its cost; None: nothing is asked."""

    peer: str
    limit: float | None
    faster: bool
    gemm: str | None = None  # asked only where the native kernels use this GEMM

    def ratio(self, ours: float, theirs: float) -> float:
        """The figure that the goal is about."""
        return theirs / ours if self.faster else ours / theirs

    def met(self, ratio: float) -> bool | None:
        """Whether that is enough; None where nothing is asked."""
        if self.limit is None:
            return None
        return ratio >= self.limit if self.faster else ratio <= self.limit

    def __str__(self) -> str:
        if self.limit is None:
            return ""
        return f"{'≥' if self.faster else '≤'} {self.limit:g}×"


faster, within = partial(Goal, faster=True), partial(Goal, faster=False)


@dataclass(frozen=True)
class Workload:
    """Our side, its peers and its exact counterpart on one input, and the goals of each direction."""

    name: str
    dtype: torch.dtype
    input_size: tuple[int, int]  # T, I
    ours: Factory
    exact: Factory  # evaluated in float64
    peers: Mapping[str, Factory]
    goals: Mapping[str, tuple[Goal, ...]]
    gemm: str | None = None  # None: as chosen by the library
    calls: int = 1  # timed together, where one is too short for the clock

    def asked(self, direction: str, gemm: str | None) -> tuple[Goal, ...]:
        """The goals of a direction, on the GEMM that the native kernels use."""
        return tuple(goal for goal in self.goals[direction] if goal.gemm in (None, gemm))


class Function(nn.Module):
    """A function as a module without parameters."""

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        """The function."""
        return self.function(x)


def entmax_of(impl: str) -> nn.Module:
    """entmax-1.5 of this library."""
    return Function(partial(entmax, alpha=1.5, impl=impl))


def entmax_by_sort() -> nn.Module:
    """entmax-1.5 of the entmax package, which must be installed."""
    from entmax import entmax15

    return Function(partial(entmax15, dim=-1))


def softmax() -> nn.Module:
    """torch's softmax."""
    return nn.Softmax(dim=-1)


def trained(layer: MuMoE | MuMoEMLP) -> MuMoE | MuMoEMLP:
    """The layer with a gate as training leaves it, of sparse coefficients; a new one has weights of zero."""
    for weight in layer.gate.weights:
        nn.init.normal_(weight, std=layer.in_features**-0.5)
    return layer


def layer(impl: str, num_experts: int, rank: int) -> nn.Module:
    """The final layer of an ImageNet classifier."""
    return trained(MuMoE(768, 1000, num_experts, rank=rank, impl=impl))


def linear() -> nn.Module:
    """The dense final layer."""
    return nn.Linear(768, 1000)


def new_block(impl: str, **options: object) -> MuMoEMLP:
    """GPT-2's μMoE block as it is initialised: every expert of every token is active."""
    return MuMoEMLP(768, 3072, num_experts=256, impl=impl, **options)  # type: ignore[arg-type]


def block(impl: str, **options: object) -> nn.Module:
    """GPT-2's μMoE block with a trained gate."""
    return trained(new_block(impl, **options))


def dense_block() -> nn.Module:
    """GPT-2's dense block."""
    return nn.Sequential(nn.Linear(768, 3072), nn.GELU(), nn.Linear(3072, 768))


def compiled(factory: Factory) -> nn.Module:
    """A side under torch.compile."""
    module: nn.Module = torch.compile(factory())  # type: ignore[assignment]
    return module


def products_alone(width: int) -> nn.Module:
    """The matrix products of a block whose contractions with the input modes have `width` columns, and nothing else."""
    sizes = ((768, width), (width, 3072), (3072, width), (width, 768))
    return nn.Sequential(*(nn.Linear(i, o, bias=False) for i, o in sizes))


REFERENCE, COMPILED, DENSE, PRODUCTS = "reference", "torch.compile", "dense MLP", "its matrix products alone"


def _block(
    name: str,
    dtype: torch.dtype,
    tokens: int,
    goals: Mapping[str, tuple[Goal, ...]],
    options: Mapping[str, object],
    width: int,
    gemm: str | None = None,
) -> Workload:
    ours, reference = partial(block, OURS, **options), partial(block, "reference", **options)
    peers: dict[str, Factory] = {REFERENCE: reference, COMPILED: partial(compiled, reference), DENSE: dense_block}
    peers[PRODUCTS] = partial(products_alone, width)
    beside = {
        direction: asked if direction == MEMORY else (*asked, Goal(PRODUCTS, None, faster=False))
        for direction, asked in goals.items()
    }
    return Workload(name, dtype, (tokens, 768), ours, reference, peers, beside, gemm)


def _final_layer(num_experts: int, forward: float, step: float) -> Workload:
    ours, reference = partial(layer, OURS, num_experts, 512), partial(layer, "reference", num_experts, 512)
    goals = {FORWARD: (faster(REFERENCE, forward),), STEP: (faster(REFERENCE, step),)}
    name = f"final layer 768→1000, R = 512, 256 inputs, N = {num_experts:,}"
    return Workload(name, torch.float32, (256, 768), ours, reference, {REFERENCE: reference}, goals)


def _workloads() -> list[Workload]:
    f32, bf16 = torch.float32, torch.bfloat16
    cp: dict[str, object] = {"rank": 552}
    # One goal where oneDNN is the faster GEMM and the native kernels use it, another on the dense layers' own GEMM.
    float32_goals = (within(DENSE, 0.6, gemm="onednn"), within(DENSE, 1.04, gemm="aten"))
    both_ways = {FORWARD: float32_goals, STEP: float32_goals}
    sort, one_layer = "entmax package (sort)", partial(layer, num_experts=128, rank=354)
    return [
        Workload(
            "entmax-1.5, 2048×1024",
            f32,
            (2048, 1024),
            partial(entmax_of, OURS),
            partial(entmax_of, "reference"),
            {sort: entmax_by_sort, "torch.softmax": softmax},
            {
                FORWARD: (faster(sort, 60), within("torch.softmax", 1.5)),
                STEP: (faster(sort, 30), within("torch.softmax", 1.8)),
            },
            calls=3,
        ),
        Workload(
            "one input, 768→1000, N = 128, R = 354",
            f32,
            (1, 768),
            partial(one_layer, OURS),
            partial(one_layer, "reference"),
            {REFERENCE: partial(one_layer, "reference"), "nn.Linear": linear},
            {FORWARD: (faster(REFERENCE, 8), within("nn.Linear", 0.7))},
            calls=100,
        ),
        _block(
            "GPT-2 block, 2,048 tokens",
            bf16,
            2048,
            {
                FORWARD: (faster(REFERENCE, 1.8), faster(COMPILED, 1.4), within(DENSE, 1.03)),
                STEP: (faster(REFERENCE, 1.35), faster(COMPILED, 1.2), within(DENSE, 1.04)),
                MEMORY: (within(DENSE, 1.05),),
            },
            cp,
            552,
        ),
        _block("GPT-2 block, 1,024 tokens, the same GEMM", f32, 1024, both_ways, cp, 552, "aten"),
        _block("GPT-2 block, 1,024 tokens, the chosen GEMM", f32, 1024, both_ways, cp, 552),
        _block("GPT-2 block, 2,048 tokens", f32, 2048, {MEMORY: (within(DENSE, 0.92),)}, cp, 552),
        _final_layer(2048, forward=6, step=3.5),
        _final_layer(8192, forward=12, step=5),
        Workload(
            "GPT-2 block, 2,048 tokens, new gate",
            bf16,
            (2048, 768),
            partial(new_block, OURS, **cp),
            partial(new_block, "reference", **cp),
            {"trained gate": partial(block, OURS, **cp)},
            {STEP: (within("trained gate", 1.15),)},
        ),
        _block(
            "GPT-2 TR block (4, 4, 144), 2,048 tokens",
            bf16,
            2048,
            {STEP: (faster(REFERENCE, 2), faster(COMPILED, 1.2))},
            {"factorization": "tr", "rank": (4, 4, 144)},
            4 * 144,
        ),
    ]


WORKLOADS = _workloads()

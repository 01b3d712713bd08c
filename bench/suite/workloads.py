"""What the suite measures on, as data: layers and blocks of the paper's models, and how far they are scaled.

A workload is a dense layer (I, O) or MLP (I, H, O) to be replaced, and numbers of tokens and experts. What stands in
for the dense one, and by which means, is the business of `implementations`.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product
from math import prod

import torch
from torch import Tensor

from mumoe_fast.bench.demo_checkpoint import CHECKPOINT, Activations, load_activations, obstacle
from mumoe_fast.bench.step import FORWARD, STEP, random_tokens
from mumoe_fast.rank import MoEShape, resolve

COMPILED, NAIVE, MOE = "torch.compile", "naive", "MoE"  # sides that take long to begin, to run or to check

Ranks = tuple[tuple[str, int | None], ...]  # of ours, per factorisation; None matches the dense one's parameters
MATCHED: Ranks = (("cp", None), ("tr", None))
FIXED: Ranks = (("cp", 512), ("tr", 512))  # Tables 8 and 10, and the paper's CLIP layers
ALL: Ranks = (*MATCHED, ("tt", None), ("tucker", None), ("full", None))

HALF = (torch.bfloat16,)
SINGLE = (torch.float32,)
BOTH = (torch.float32, torch.bfloat16)


@dataclass(frozen=True)
class Selection:
    """What of a workload a suite measures.

    Attributes:
        dtypes: of parameters and input.
        directions: "forward", "forward+backward".
        factorizations: of the workload's; None is all.
        extras: with the sides that need patience: `COMPILED`, `NAIVE` and `MOE`.
    """

    dtypes: tuple[torch.dtype, ...] = BOTH
    directions: tuple[str, ...] = (FORWARD, STEP)
    factorizations: tuple[str, ...] | None = None
    extras: tuple[str, ...] = (COMPILED, NAIVE, MOE)

    def includes(self, factorization: str | None, extra: str | None) -> bool:
        """Whether it wants an implementation of this factorisation and this extra (None: neither)."""
        wanted = factorization is None or self.factorizations is None or factorization in self.factorizations
        return wanted and (extra is None or extra in self.extras)


@dataclass(frozen=True)
class Workload:
    """A dense layer or MLP to replace, on a number of tokens.

    Attributes:
        name: unique.
        group: the heading under which it is shown, and over which its plot runs.
        tokens: T.
        features: (I, O) of a layer, (I, H, O) of an MLP.
        num_experts: one per hierarchy level.
        ranks: of the factorisations that stand in for it.
        norm: of the gate.
        activation: of an MLP.
        full: what the full suite measures.
        quick: what the quick one does; None is nothing.
        block: of the demo's checkpoint, whose input and gate it takes; None is random input and a random gate.
    """

    name: str
    group: str
    tokens: int
    features: tuple[int, ...]
    num_experts: tuple[int, ...]
    ranks: Ranks = MATCHED
    norm: str = "layer"
    activation: str = "gelu"
    full: Selection = Selection()
    quick: Selection | None = None
    block: int | None = None

    @property
    def suites(self) -> frozenset[str]:
        """The suites that it belongs to."""
        return frozenset(("full",) if self.quick is None else ("quick", "full"))

    def selection(self, suite: str) -> Selection | None:
        """What a suite measures of it; None is nothing."""
        return {"quick": self.quick, "full": self.full}[suite]

    @property
    def total_experts(self) -> int:
        """Over all levels."""
        return prod(self.num_experts)

    def shape(self, factorization: str) -> MoEShape:
        """The μMoE layer or block of this factorisation, for counting."""
        return resolve(self.features, self.num_experts, factorization, dict(self.ranks)[factorization])

    def obstacle(self) -> str | None:
        """Why it cannot be measured here; None if it can."""
        if self.block is None:
            return None
        return obstacle(CHECKPOINT, self.block, self.tokens, self.features[0], self.total_experts)

    def input(self, dtype: torch.dtype, device: torch.device | str = "cpu") -> Tensor:
        """(T, I), the same for every implementation: the checkpoint's activations, or standard normal."""
        recorded = self.recorded()
        if recorded is None:
            return random_tokens(self.tokens, self.features[0], dtype=dtype, device=device)
        return recorded.input[: self.tokens].to(device, dtype)

    def recorded(self) -> Activations | None:
        """The input and gate of the checkpoint's block, if the workload takes them from there."""
        return None if self.block is None else load_activations(CHECKPOINT)[self.block]


def _table_6() -> Iterator[Workload]:
    quick = {
        1: Selection(SINGLE, (FORWARD,), ("cp", "tr"), (MOE,)),
        256: Selection(SINGLE, (FORWARD,), ("cp", "tr"), ()),
    }
    for T in (1, 16, 256, 4096):
        name = f"Table 6 layer, {'one input' if T == 1 else f'{T:,} inputs'}"
        full = Selection(directions=(FORWARD,)) if T == 1 else Selection()
        yield Workload(name, "Table 6 layer", T, (768, 1000), (128,), ALL, full=full, quick=quick.get(T))


def _gpt_2() -> Iterator[Workload]:
    quick = {
        512: Selection(HALF, factorizations=("cp",), extras=(MOE,)),
        2048: Selection(HALF, factorizations=("cp",), extras=(COMPILED,)),
    }
    for T in (1, 16, 128, 512, 2048, 8192, 24576):
        yield Workload(f"GPT-2 block, T = {T:,}", "GPT-2 block", T, (768, 3072, 768), (256,), quick=quick.get(T))


def _decoding() -> Iterator[Workload]:
    features, N = (768, 3072, 768), (256,)
    for T in (1, 2, 4, 8, 16, 32, 64):
        quick = Selection(SINGLE, (FORWARD,), ("cp",), ()) if T in (1, 8, 64) else None
        name = f"decoding, GPT-2 block, T = {T}"
        yield Workload(name, "Decoding", T, features, N, full=Selection(directions=(FORWARD,)), quick=quick)


def _mixer() -> Iterator[Workload]:
    """S/16: 196 patches, 512 channels, hidden 256 and 2,048; tokens of a batch of 1 and 8 images."""
    for what, features, rows in (("token", (196, 256, 196), 512), ("channel", (512, 2048, 512), 196)):
        for images in (1, 8):
            name = f"Mixer S/16 {what} block, {images} image{'s' if images > 1 else ''}"
            quick = Selection(SINGLE, (STEP,), ("cp",), ()) if images == 1 else None
            group = f"Mixer S/16 {what} block"
            yield Workload(name, group, images * rows, features, (64,), norm="batch", quick=quick)


def _clip() -> Iterator[Workload]:
    for N in (32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384):
        quick = Selection(SINGLE, factorizations=("cp",), extras=()) if N in (2048, 8192) else None
        name = f"CLIP final layer, N = {N:,}"
        yield Workload(name, "CLIP final layer over experts", 256, (768, 1000), (N,), FIXED, quick=quick)


def _hierarchies() -> Iterator[Workload]:
    for levels in ((128,), (128, 2), (128, 2, 2), (128, 2, 2, 2), (128, 4), (128, 4, 4), (128, 4, 4, 4)):
        quick = Selection(SINGLE, (FORWARD,), ("cp",), ()) if levels == (128, 4, 4) else None
        name = f"Table 10 layer, N = {' × '.join(map(str, levels))}"
        yield Workload(name, "Table 10 hierarchies", 256, (768, 1000), levels, FIXED, quick=quick)


def _expert_scaling() -> Iterator[Workload]:
    for N in (128, 512, 2048, 8192, 32768, 65536):
        name = f"expert scaling, N = {N:,}"
        yield Workload(name, "Expert scaling at R = 512", 1024, (768, 768), (N,), FIXED)


def _real() -> Iterator[Workload]:
    """The demo's GPT: what its blocks' MLPs see of held-out text, and the gates that it learnt."""
    for block, T in product((0, 3), (1024,)):
        name = f"trained gate, demo's block {block}, T = {T:,}"
        quick = Selection(SINGLE, factorizations=("cp",), extras=()) if block == 3 else None
        group = "Trained gates"
        yield Workload(name, group, T, (256, 1024, 256), (64,), norm="batch", quick=quick, block=block)


WORKLOADS: tuple[Workload, ...] = (
    *_table_6(),
    *_gpt_2(),
    *_decoding(),
    *_mixer(),
    *_clip(),
    *_hierarchies(),
    *_expert_scaling(),
    *_real(),
)

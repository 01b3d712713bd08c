"""What the Triton kernels are timed on, on a GPU, against what, and what is asked of them: the rows, as data."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from mumoe_fast.bench.goals.goal import (
    MEMORY,
    PARAMETERS,
    REPLAY,
    Factory,
    Workload,
    at_most,
    compiled,
    faster,
    within,
)
from mumoe_fast.bench.goals.sides import (
    CLASSIFIER,
    COMPILED,
    DENSE,
    GPT2,
    LINEAR,
    REFERENCE,
    Function,
    block,
    dense_block,
    entmax_of,
    layer,
    linear,
)
from mumoe_fast.bench.step import FORWARD, STEP
from mumoe_fast.bench.suite.baselines.sparse_moe import GroupedSparseMoE, SparseMoE
from mumoe_fast.bench.suite.baselines.sparse_moe_packages import LigerSparseMoE

OURS, DTYPE = "triton", torch.bfloat16
COPY, GROUPED, LIGER = "copy of the same size", "sparse MoE, grouped_mm", "sparse MoE, liger-kernel"
FACTORIZATIONS = ("cp", "tr")


@dataclass(frozen=True)
class Sizes:
    """How large the workloads are; the tests have their own.

    Attributes:
        classifier, classifier_experts: Table 6's layer.
        block, block_experts, block_tokens: GPT-2's.
        rows: (T, N) of entmax.
        final_rank, final_experts, final_tokens: final layers of a fixed rank.
        moe_experts: of blocks beside sparse ones of as many experts, on `final_tokens`.
    """

    classifier: tuple[int, int] = CLASSIFIER
    classifier_experts: int = 128
    block: tuple[int, int] = GPT2
    block_experts: int = 256
    block_tokens: int = 24_576
    rows: tuple[tuple[int, int], ...] = ((24_576, 256), (8192, 8192))
    final_rank: int = 512
    final_experts: tuple[int, ...] = (2048, 16_384)
    final_tokens: int = 8192
    moe_experts: tuple[int, ...] = (64, 256, 2048)


def copy_of(x: Tensor) -> Tensor:
    """As many bytes read and written as entmax reads and writes."""
    return x.clone()


def sparse_block(kind: type[SparseMoE], features: tuple[int, int], num_experts: int) -> nn.Module:
    """A sparse block of as many experts and active FLOPs as ours."""
    I, H = features
    return kind((I, H, I), num_experts, "gelu")


def _one_input(sizes: Sizes, impl: str) -> Iterator[Workload]:
    """Table 6: 1.05 ms (CP) and 0.94 ms (TR) in the paper, where sparse MoE took 0.80 and dense MoE 1.17 ms."""
    features, N = sizes.classifier, sizes.classifier_experts
    for factorization in FACTORIZATIONS:
        make = partial(layer, features=features, num_experts=N, factorization=factorization)
        ours, reference = partial(make, impl), partial(make, "reference")
        yield Workload(
            f"one input, {features[0]}→{features[1]}, N = {N}, {factorization.upper()}",
            DTYPE,
            (1, features[0]),
            impl,
            ours,
            reference,
            {REFERENCE: reference, LINEAR: partial(linear, features)},
            {
                FORWARD: (at_most(impl, 50e-6), faster(REFERENCE, 20), within(LINEAR, None)),
                REPLAY: (at_most(impl, 15e-6), within(LINEAR, None)),
            },
            calls=100,
            host_clock=True,
        )


def _blocks(sizes: Sizes, impl: str) -> Iterator[Workload]:
    I, _ = sizes.block
    for factorization in FACTORIZATIONS:
        make = partial(block, features=sizes.block, num_experts=sizes.block_experts, factorization=factorization)
        ours, reference = partial(make, impl), partial(make, "reference")
        dense = partial(dense_block, sizes.block)
        peers: dict[str, Factory] = {REFERENCE: reference, COMPILED: compiled(reference), DENSE: dense}
        yield Workload(
            f"GPT-2 block, {factorization.upper()}, N = {sizes.block_experts}, {sizes.block_tokens:,} tokens",
            DTYPE,
            (sizes.block_tokens, I),
            impl,
            ours,
            reference,
            peers,
            {
                FORWARD: (within(DENSE, None), faster(REFERENCE, None), faster(COMPILED, None)),
                STEP: (within(DENSE, 1.10), faster(REFERENCE, 3), faster(COMPILED, 1.5)),
                MEMORY: (within(DENSE, 1.0), within(REFERENCE, 0.4)),
            },
        )


def _rows(sizes: Sizes, impl: str) -> Iterator[Workload]:
    for T, N in sizes.rows:
        yield Workload(
            f"entmax-1.5, {T:,}×{N:,}",
            DTYPE,
            (T, N),
            impl,
            partial(entmax_of, impl),
            partial(entmax_of, "reference"),
            {COPY: partial(Function, copy_of)},
            {REPLAY: (faster(COPY, 0.85),)},
            inputs=8,  # one call takes a few µs, as long as beginning and ending do
        )


def _final_layers(sizes: Sizes, impl: str) -> Iterator[Workload]:
    for N in sizes.final_experts:
        make = partial(layer, features=sizes.classifier, num_experts=N, rank=sizes.final_rank)
        ours, reference = partial(make, impl), partial(make, "reference")
        yield Workload(
            f"final layer, R = {sizes.final_rank}, N = {N:,}, {sizes.final_tokens:,} inputs",
            DTYPE,
            (sizes.final_tokens, sizes.classifier[0]),
            impl,
            ours,
            reference,
            {REFERENCE: reference, COMPILED: compiled(reference)},
            {STEP: (faster(REFERENCE, 3), faster(COMPILED, 2))},
        )


def _beside_sparse(sizes: Sizes, impl: str) -> Iterator[Workload]:
    for N in sizes.moe_experts:
        make = partial(block, features=sizes.block, num_experts=N)
        ours, reference = partial(make, impl), partial(make, "reference")
        peers: dict[str, Factory] = {
            GROUPED: partial(sparse_block, GroupedSparseMoE, sizes.block, N),
            LIGER: partial(sparse_block, LigerSparseMoE, sizes.block, N),
        }
        quicker, smaller = tuple(faster(peer, 1) for peer in peers), tuple(within(peer, 1) for peer in peers)
        yield Workload(
            f"GPT-2 block beside sparse MoE, N = {N:,}, {sizes.final_tokens:,} tokens",
            DTYPE,
            (sizes.final_tokens, sizes.block[0]),
            impl,
            ours,
            reference,
            peers,
            {FORWARD: quicker, STEP: quicker, MEMORY: smaller, PARAMETERS: smaller},
        )


def workloads(sizes: Sizes | None = None, impl: str = OURS) -> list[Workload]:
    """All rows, of our side by an implementation."""
    parts = (_one_input, _rows, _blocks, _final_layers, _beside_sparse)  # what takes seconds before what is compiled
    return [workload for part in parts for workload in part(sizes or Sizes(), impl)]


WORKLOADS = workloads()

"""What the native CPU kernels are timed on, against what, and what is asked of them: the rows of the table, as data."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial

import torch
from torch import nn

from mumoe_fast.bench.goals.goal import MEMORY, Factory, Goal, Workload, compiled, faster, within
from mumoe_fast.bench.goals.sides import (
    CLASSIFIER,
    COMPILED,
    DENSE,
    GPT2,
    LINEAR,
    PRODUCTS,
    REFERENCE,
    Function,
    block,
    dense_block,
    entmax_of,
    layer,
    linear,
    new_block,
    products_alone,
)
from mumoe_fast.bench.step import FORWARD, STEP

OURS = "native"


def entmax_by_sort() -> nn.Module:
    """entmax-1.5 of the entmax package, which must be installed."""
    from entmax import entmax15

    return Function(partial(entmax15, dim=-1))


def softmax() -> nn.Module:
    """torch's softmax."""
    return nn.Softmax(dim=-1)


def _block(
    name: str,
    dtype: torch.dtype,
    tokens: int,
    goals: Mapping[str, tuple[Goal, ...]],
    options: Mapping[str, object],
    width: int,
    gemm: str | None = None,
) -> Workload:
    ours, reference = (partial(block, impl, GPT2, 256, **options) for impl in (OURS, "reference"))
    peers: dict[str, Factory] = {REFERENCE: reference, COMPILED: compiled(reference)}
    peers |= {DENSE: partial(dense_block, GPT2), PRODUCTS: partial(products_alone, GPT2, width)}
    beside = {
        direction: asked if direction == MEMORY else (*asked, within(PRODUCTS, None))
        for direction, asked in goals.items()
    }
    return Workload(name, dtype, (tokens, 768), OURS, ours, reference, peers, beside, gemm)


def _final_layer(num_experts: int, forward: float, step: float) -> Workload:
    ours, reference = (partial(layer, impl, CLASSIFIER, num_experts, rank=512) for impl in (OURS, "reference"))
    goals = {FORWARD: (faster(REFERENCE, forward),), STEP: (faster(REFERENCE, step),)}
    name = f"final layer 768→1000, R = 512, 256 inputs, N = {num_experts:,}"
    return Workload(name, torch.float32, (256, 768), OURS, ours, reference, {REFERENCE: reference}, goals)


def _workloads() -> list[Workload]:
    f32, bf16 = torch.float32, torch.bfloat16
    cp: dict[str, object] = {"rank": 552}
    # One goal where oneDNN is the faster GEMM and the native kernels use it, another on the dense layers' own GEMM.
    float32_goals = (within(DENSE, 0.6, gemm="onednn"), within(DENSE, 1.04, gemm="aten"))
    both_ways = {FORWARD: float32_goals, STEP: float32_goals}
    sort, one_layer = "entmax package (sort)", partial(layer, features=CLASSIFIER, num_experts=128, rank=354)
    return [
        Workload(
            "entmax-1.5, 2048×1024",
            f32,
            (2048, 1024),
            OURS,
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
            OURS,
            partial(one_layer, OURS),
            partial(one_layer, "reference"),
            {REFERENCE: partial(one_layer, "reference"), LINEAR: partial(linear, CLASSIFIER)},
            {FORWARD: (faster(REFERENCE, 8), within(LINEAR, 0.7))},
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
            OURS,
            partial(new_block, OURS, GPT2, 256, **cp),
            partial(new_block, "reference", GPT2, 256, **cp),
            {"trained gate": partial(block, OURS, GPT2, 256, **cp)},
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

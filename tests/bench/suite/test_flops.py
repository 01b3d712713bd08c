"""Three counts of FLOPs agree, or their difference is taken apart; the floor is what it says it is."""

import sys
from dataclasses import replace
from unittest.mock import patch

import pytest
import torch

from mumoe_fast.bench.step import FORWARD, STEP
from mumoe_fast.bench.suite import flops
from mumoe_fast.bench.suite.flops import count, floor, grouped_mm_flops, support
from mumoe_fast.bench.suite.implementations import DENSE, IMPLEMENTATIONS, Implementation
from mumoe_fast.bench.suite.workloads import Workload
from tests.bench.suite.tiny import BLOCK, HIERARCHY, LAYER, TINY

CPU = torch.device("cpu")
BY_NAME = {implementation.name: implementation for implementation in IMPLEMENTATIONS}
COUNTED = [i for i in IMPLEMENTATIONS if i.extra != "torch.compile" and not i.needs_gpu]


@pytest.mark.parametrize("implementation", COUNTED, ids=lambda implementation: implementation.name)
@pytest.mark.parametrize("workload", TINY, ids=lambda workload: workload.name)
def test_the_counters_agree_or_the_difference_is_explained(implementation: Implementation, workload: Workload) -> None:
    if implementation.obstacle(workload, torch.float32, CPU) is not None:
        pytest.skip("it does not run here")
    for direction in (FORWARD, STEP):
        found = count(workload, implementation, direction)
        assert "not explained" not in found.explanation
        assert found.torch
        agreed = found.formula == found.torch and found.fvcore in (None, found.torch)
        assert agreed == (not found.explanation)
        assert (found.fvcore is None) == (direction == STEP)
        if implementation.extra != "naive":  # where einsum's order is torch's or fvcore's own
            assert found.fvcore in (None, found.torch)


def test_the_formula_is_the_papers_count() -> None:
    table_8 = Workload("Table 8", "tiny", 1, (768, 768), (512,), (("cp", 512), ("tr", 512)))
    cp = count(table_8, BY_NAME["CP reference"], FORWARD)
    assert cp.formula == 2 * 1_442_304
    assert cp.formula - (cp.torch or 0) == 2 * 512  # the bias
    assert BY_NAME["CP naive"].flops(table_8) == 768 * 512 + 155_122_532_352
    further = BY_NAME["CP naive"].flops(replace(table_8, tokens=3)) - BY_NAME["CP naive"].flops(table_8)
    assert further == 2 * (768 * 512 + 512 * 769 * 768)  # the experts' matrices are formed once


def test_a_count_at_many_tokens_is_exact() -> None:
    implementation = BY_NAME["dense MoE"]
    many = replace(BLOCK, name="many", tokens=70)
    assert count(many, implementation, FORWARD).torch == flops._by_torch(
        implementation.make(many), many.input(torch.float32), FORWARD
    )


def test_without_fvcore_there_are_two_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "fvcore.nn", None)  # importing it raises
    monkeypatch.setattr(flops, "find_spec", lambda name: None)
    found = count.__wrapped__(LAYER, BY_NAME[DENSE], FORWARD)
    assert found.fvcore is None
    assert found.formula == found.torch == 2 * 33 * 32 * 24


def test_a_difference_without_a_reason_is_said_to_have_none() -> None:
    with patch.object(flops, "_known_differences", return_value=iter(())):
        found = count.__wrapped__(LAYER, BY_NAME["CP reference"], FORWARD)
    assert found.explanation == f"torch: {-2 * 33 * 6:+,} not explained; fvcore: {-2 * 33 * 6:+,} not explained"


@pytest.mark.parametrize(
    ("a", "b", "expected"),
    [
        ((10, 4), (3, 4, 5), 2 * 10 * 4 * 5),  # rows in groups
        ((4, 10), (10, 5), 2 * 4 * 10 * 5),  # the sum in groups: weights' gradient
        ((3, 7, 4), (3, 4, 5), 2 * 3 * 7 * 4 * 5),
        ((3, 7, 4), (4, 10), 2 * 7 * 4 * 10),  # columns in groups
    ],
)
def test_grouped_products(a: tuple[int, ...], b: tuple[int, ...], expected: int) -> None:
    assert grouped_mm_flops(a, b) == expected


def test_the_floor_of_a_dense_layer() -> None:
    need = floor(LAYER, BY_NAME[DENSE], torch.bfloat16, FORWARD)
    assert need.flops == 2 * 33 * 32 * 24
    assert need.bytes == 2 * (33 * 24 + 33 * (32 + 24))  # weight and bias, x and y
    need = floor(LAYER, BY_NAME[DENSE], torch.float32, STEP)
    assert need.flops == 6 * 33 * 32 * 24
    assert need.bytes == 4 * (2 * 33 * 24 + 2 * 33 * (32 + 24))  # as much again for gradients


def test_the_floor_leaves_out_coefficients_that_are_zero() -> None:
    wide = replace(LAYER, name="wide", tokens=2, num_experts=(512,))
    (active,) = support(wide)
    assert 2 < active < 60
    need, shape = floor(wide, BY_NAME["CP reference"], torch.float32, FORWARD), wide.shape("cp")
    assert need.flops == 2 * (2 * shape.flops - round(2 * (512 - active) * 6))
    assert need.bytes == 4 * (shape.parameters - round((512 - 2 * active) * 6) + 2 * (32 + 24))


@pytest.mark.parametrize("workload", TINY, ids=lambda workload: workload.name)
@pytest.mark.parametrize("implementation", COUNTED, ids=lambda implementation: implementation.name)
def test_no_floor_is_above_what_is_done(implementation: Implementation, workload: Workload) -> None:
    for direction in (FORWARD, STEP):
        need = floor(workload, implementation, torch.float32, direction)
        assert 0 < need.flops <= 2 * implementation.flops(workload) * (1 if direction == FORWARD else 3)
        assert need.bytes > 4 * workload.tokens * (workload.features[0] + workload.features[-1])


def test_a_hierarchys_support_is_counted_level_by_level() -> None:
    active = support(HIERARCHY)
    assert len(active) == 3
    assert all(1 <= used <= N for used, N in zip(active, HIERARCHY.num_experts, strict=True))

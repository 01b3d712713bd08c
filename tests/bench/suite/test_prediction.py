"""Predictions follow from what would be launched, at full size and without computing it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from mumoe_fast.bench.step import FORWARD, STEP
from mumoe_fast.bench.suite.flops import Need
from mumoe_fast.bench.suite.implementations import IMPLEMENTATIONS, Case
from mumoe_fast.bench.suite.prediction import (
    GPUS,
    LAUNCH_SECONDS,
    PROGRAM_BYTES_PER_SECOND,
    Kernel,
    Operation,
    absent,
    excess,
    predict,
    trace,
)
from mumoe_fast.bench.suite.records import Ceilings
from mumoe_fast.bench.suite.roofline import floor_at
from mumoe_fast.bench.suite.workloads import Workload
from tests.bench.suite.test_records import RUN

T, I, H, N, R = 4096, 768, 3072, 256, 512
BLOCK = Workload("block", "Block", T, (I, H, I), (N,), (("cp", R), ("tr", 64), ("tucker", 64), ("full", None)))
SMALL = replace(BLOCK, features=(32, 64, 32), tokens=64)
SIDES = {side.factorization: side for side in IMPLEMENTATIONS if side.impl == "triton"}
BF16 = torch.bfloat16


def test_the_floor_is_the_longer_of_arithmetic_and_memory() -> None:
    ceilings = Ceilings(bytes_per_second=10.0, flops_per_second=100.0)
    assert floor_at(Need(flops=1000, bytes=20), ceilings).seconds == 10
    assert floor_at(Need(flops=100, bytes=20), ceilings).seconds == 2


def test_an_operation_takes_the_longest_of_three() -> None:
    ceilings = Ceilings(bytes_per_second=1e9, flops_per_second=1e12)
    assert Operation("x", int(3e12), 2e9, 1).seconds(ceilings) == 3
    assert Operation("x", int(1e12), 2e9, 1).seconds(ceilings) == 2
    assert Operation("x", 0, 0, 7).seconds(ceilings) == pytest.approx(7 * LAUNCH_SECONDS)


def test_few_programs_do_not_draw_the_machines_bandwidth() -> None:
    ceilings = Ceilings(bytes_per_second=100 * PROGRAM_BYTES_PER_SECOND, flops_per_second=1e12)
    size = 1000 * PROGRAM_BYTES_PER_SECOND
    for programs, seconds in ((1, 1000), (50, 20), (100, 10), (10_000, 10)):
        kernel = Kernel(size, programs)
        assert Operation("x", 0, size, 1, (kernel,)).seconds(ceilings) == pytest.approx(seconds)
        # With as many bytes of someone else's, and twice, one after the other.
        both = Operation("x", 0, 3 * size, 3, (kernel, kernel))
        assert both.seconds(ceilings) == pytest.approx(2 * seconds + 10)


def test_a_launch_is_as_wide_as_its_grid() -> None:
    """The weights of a layer are megabytes for one token too, and there are few programs to draw them."""
    layer = replace(BLOCK, features=(I, 1000), num_experts=(2048,))
    few, many = (
        trace(Case(replace(layer, tokens=tokens), SIDES["cp"], BF16, FORWARD), "sm_90")[-1] for tokens in (1, T)
    )
    (h200,) = [gpu for gpu in GPUS if "H200" in gpu.name]
    (*_, narrow), (*_, wide) = few.kernels, many.kernels  # after the gate's
    assert narrow.programs < 84 < wide.programs
    assert wide.seconds(h200.bytes_per_second) == wide.bytes / h200.bytes_per_second
    assert narrow.seconds(h200.bytes_per_second) > narrow.bytes / h200.bytes_per_second
    # U_1, U_in and b, next to nothing of the token's own, and what the kernel was counted to move beyond that.
    assert narrow.bytes == pytest.approx(excess()["_cp_forward_kernel"] * 2 * R * (2048 + I + 1), rel=0.01)
    assert narrow.bytes < few.bytes


def test_a_forward_pass_is_three_operators_with_the_operations_of_the_formula() -> None:
    gate, up, down = trace(Case(BLOCK, SIDES["cp"], BF16, FORWARD), "sm_90")
    assert [operation.name for operation in (gate, up, down)] == ["mumoe.gate.default", *["mumoe.cp.default"] * 2]
    assert gate.flops == 2 * T * I * N
    assert up.flops == down.flops == 2 * T * R * (N + I + H)
    assert gate.launches == 1
    # The gate reads tokens and weights and writes coefficients, in two bytes each.
    assert gate.bytes == pytest.approx(2 * (T * I + N * I + T * N), rel=0.01)
    # An expert layer: one kernel from z and a to h, and the GEMM from h to y.
    kernel = excess()["_cp_forward_kernel"] * (T * (I + N) + R * (I + N + 1) + T * R)
    gemm = T * R + R * H + T * H
    assert up.bytes == pytest.approx(2 * (kernel + gemm), rel=0.01)
    assert up.launches == 2


@pytest.mark.parametrize("factorization", ["cp", "tr", "tucker", "full"])
def test_every_factorisation_and_direction_is_traced(factorization: str) -> None:
    forward, step = (trace(Case(SMALL, SIDES[factorization], BF16, way), "sm_80") for way in (FORWARD, STEP))
    assert sum(operation.flops for operation in step) > 2 * sum(operation.flops for operation in forward)
    assert {operation.name for operation in forward} <= {operation.name for operation in step}
    assert any(operation.name.endswith("_backward.default") for operation in step)


def test_half_types_are_not_charged_for_the_copies_that_only_a_cpu_makes() -> None:
    """The gate's weight gradient is a GEMM of half tensors on a GPU; without one the library converts them first."""
    half = trace(Case(BLOCK, SIDES["cp"], BF16, STEP), "sm_90")
    single = trace(Case(BLOCK, SIDES["cp"], torch.float32, STEP), "sm_90")
    backward = [sum(o.bytes for o in found if o.name == "mumoe.gate_backward.default") for found in (half, single)]
    assert backward[0] == pytest.approx(backward[1] / 2, rel=0.05)  # a little more: the weight gradient is float32


def test_predictions_are_labelled_and_hold_for_every_gpu() -> None:
    reference = next(side for side in IMPLEMENTATIONS if side.kind == "reference")
    cases = [Case(BLOCK, side, BF16, FORWARD) for side in (SIDES["cp"], reference)]
    records = list(predict(cases, RUN))
    assert [record.predicted_for for record in records] == [gpu.name for gpu in GPUS]
    for record in records:
        assert record.predicted
        assert record.peak_bytes is not None
        assert record.peak_bytes > 0
        assert record.latency is None
        assert record.over_floor is not None
        assert record.over_floor >= 1
    a100, h100, h200 = (record.predicted_seconds for record in records)
    assert a100 > h100 >= h200 > 0  # type: ignore[operator]
    few = next(predict([Case(replace(BLOCK, tokens=1), SIDES["cp"], BF16, FORWARD)], RUN))
    assert few.predicted_seconds == pytest.approx(5 * LAUNCH_SECONDS, rel=0.5), "for one token launches are the cost"


def test_nothing_is_predicted_for_a_workload_whose_input_is_not_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)  # where no demo was run
    assert list(predict([Case(replace(BLOCK, block=0), SIDES["cp"], BF16, FORWARD)], RUN)) == []


def test_the_gpu_that_is_here_is_measured_and_not_predicted(monkeypatch: pytest.MonkeyPatch) -> None:
    assert absent(torch.device("cpu")) == list(GPUS)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H100 80GB HBM3")
    assert [gpu.name for gpu in absent(torch.device("cuda"))] == ["NVIDIA A100 SXM 80GB", "NVIDIA H200 SXM"]

"""The implementations: what can run builds, what cannot says why, and a factorisation has one set of parameters."""

from dataclasses import replace

import pytest
import torch

from mumoe_fast.bench.suite import implementations
from mumoe_fast.bench.suite.baselines import sparse_moe_packages
from mumoe_fast.bench.suite.baselines.sparse_moe import SparseMoE
from mumoe_fast.bench.suite.implementations import DENSE, IMPLEMENTATIONS, KINDS, Implementation, cases
from mumoe_fast.bench.suite.workloads import WORKLOADS, Workload
from tests.bench.suite.tiny import BLOCK, HIERARCHY, LAYER, TINY

CPU = torch.device("cpu")
BY_NAME = {implementation.name: implementation for implementation in IMPLEMENTATIONS}
LIGER, SCATTER, SONIC = (BY_NAME[f"sparse MoE, {name}"] for name in ("liger-kernel", "ScatterMoE", "SonicMoE"))


def named(workload: str) -> Workload:
    return next(w for w in WORKLOADS if w.name == workload)


def test_names_are_unique_and_references_exist() -> None:
    assert len(BY_NAME) == len(IMPLEMENTATIONS)
    assert {implementation.kind for implementation in IMPLEMENTATIONS} == set(KINDS)
    for implementation in IMPLEMENTATIONS:
        assert implementation.reference is None or BY_NAME[implementation.reference].kind == "reference"
        assert (implementation.impl is not None) == (implementation.kind == "ours")


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS, ids=lambda implementation: implementation.name)
@pytest.mark.parametrize("workload", TINY, ids=lambda workload: workload.name)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_every_implementation_builds_or_says_its_obstacle(
    implementation: Implementation, workload: Workload, dtype: torch.dtype
) -> None:
    obstacle = implementation.obstacle(workload, dtype, CPU)
    if obstacle is not None:
        assert len(obstacle) > 20
        return
    if implementation.extra == "torch.compile":
        return  # is the eager reference until it is called, and takes long then
    module = implementation.build(workload, dtype, CPU)
    assert {parameter.dtype for parameter in module.parameters()} == {dtype}
    with torch.no_grad():
        y = module(workload.input(dtype))
    assert y.shape == (workload.tokens, workload.features[-1])
    assert y.dtype == dtype


def test_what_can_run_on_a_cpu_does() -> None:
    running = {i.name for i in IMPLEMENTATIONS if i.obstacle(BLOCK, torch.float32, CPU) is None}
    assert {"CP reference", "TR naive", "full reference", DENSE, "dense MoE", "sparse MoE, loop"} <= running
    assert "sparse MoE, grouped_mm" in {
        i.name for i in IMPLEMENTATIONS if i.obstacle(LAYER, torch.float32, CPU) is None
    }


@pytest.mark.parametrize(
    ("name", "workload", "device", "reason"),
    [
        ("CP triton", LAYER, "cpu", "Triton compiles for GPUs"),
        ("CP native", LAYER, "cuda", "for CPU tensors"),
        ("sparse MoE, grouped_mm", replace(LAYER, features=(30, 24)), "cpu", "rows of whole 16 bytes"),
        ("sparse MoE, grouped_mm", LAYER, "cuda", "takes bfloat16"),
        ("dense MoE", named("GPT-2 block, T = 2,048"), "cpu", "more than"),
        ("dense MoE", named("Table 6 layer, 4,096 inputs"), "cpu", "more than"),
        ("CP naive", named("CLIP final layer, N = 2,048"), "cpu", "more than"),
    ],
)
def test_an_obstacle_names_its_reason(name: str, workload: Workload, device: str, reason: str) -> None:
    assert reason in str(BY_NAME[name].obstacle(workload, torch.float32, torch.device(device)))


def test_too_many_operations_are_an_obstacle_on_a_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(implementations, "MULTIPLY_ADDS_ON_A_CPU", 1e4)
    assert "billion multiply-adds" in str(BY_NAME[DENSE].obstacle(LAYER, torch.float32, CPU))


def test_packages_ask_to_be_installed_for_a_gpu_and_for_what_they_compute(monkeypatch: pytest.MonkeyPatch) -> None:
    square, cuda = replace(BLOCK, features=(32, 48, 32)), torch.device("cuda")
    monkeypatch.setattr(sparse_moe_packages, "find_spec", lambda name: None)
    for side in (LIGER, SCATTER, SONIC):
        assert "not installed" in str(side.obstacle(square, torch.float32, CPU))
    monkeypatch.setattr(sparse_moe_packages, "find_spec", lambda name: object())
    monkeypatch.setattr(implementations, "memory", lambda device: 1 << 40)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    for side, reason in ((LIGER, "SwiGLU"), (SONIC, "takes bfloat16")):
        assert "on GPUs" in str(side.obstacle(square, torch.float32, CPU))
        assert reason in str(side.obstacle(LAYER, torch.float32, cuda))
        assert side.obstacle(square, torch.bfloat16, cuda) is None
    assert SCATTER.obstacle(LAYER, torch.float32, cuda) is None
    assert "as many outputs" in str(SONIC.obstacle(LAYER, torch.bfloat16, cuda))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    assert "compute capability 9" in str(SONIC.obstacle(square, torch.bfloat16, cuda))


@pytest.mark.parametrize("workload", TINY, ids=lambda workload: workload.name)
def test_one_seed_gives_a_factorisation_one_set_of_parameters(workload: Workload) -> None:
    for name in ("CP native", "CP naive", "CP reference, torch.compile"):
        ours = BY_NAME[name].build(workload, torch.float32, CPU).state_dict()
        reference = BY_NAME["CP reference"].build(workload, torch.float32, CPU).state_dict()
        assert ours.keys() == reference.keys()
        assert all(torch.equal(ours[key], reference[key]) for key in ours)
    gate = BY_NAME["CP reference"].build(workload, torch.float32, CPU).get_parameter("gate.weights.0")
    assert gate.std() > 0.1, "a fresh gate, of zeros, has every coefficient in use"


def test_a_sparse_moe_has_the_active_operations_of_the_dense_layer() -> None:
    workload = named("GPT-2 block, T = 512")
    gate = workload.tokens * 256 * 768
    dense = BY_NAME[DENSE].flops(workload)
    assert BY_NAME["sparse MoE, loop"].flops(workload) == dense + gate
    assert LIGER.flops(workload) == dense + gate  # 3 · 256 in place of 2 · 384
    with torch.device("meta"):
        module = BY_NAME["sparse MoE, loop"].make(workload)
    assert isinstance(module, SparseMoE)
    assert (len(module.gate), module.top_k) == (256, 8)


def test_a_suite_is_its_workloads_selections() -> None:
    quick, full = list(cases("quick")), list(cases("full"))
    assert {case.workload for case in full} == set(WORKLOADS)
    assert len(full) > 5 * len(quick)
    compiled = {case.workload.name for case in quick if case.implementation.extra == "torch.compile"}
    assert compiled == {"GPT-2 block, T = 2,048"}
    assert {case.implementation.kind for case in quick} == set(KINDS)
    assert all(case.implementation.applies(case.workload) for case in full)
    assert HIERARCHY not in {case.workload for case in full}

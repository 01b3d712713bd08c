"""The workloads: those that the paper measures are there, with its ranks, and their input is as they say."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from mumoe_fast.bench import demo_checkpoint
from mumoe_fast.bench.step import FORWARD, STEP
from mumoe_fast.bench.suite import workloads
from mumoe_fast.bench.suite.workloads import MOE, WORKLOADS, Selection, Workload
from tests.bench.suite.tiny import BLOCK


def named(name: str) -> Workload:
    (found,) = [workload for workload in WORKLOADS if workload.name == name]
    return found


def test_names_are_unique_and_suites_are_known() -> None:
    assert len({workload.name for workload in WORKLOADS}) == len(WORKLOADS)
    for workload in WORKLOADS:
        assert "full" in workload.suites
        assert (workload.selection("quick") is not None) == ("quick" in workload.suites)
    with pytest.raises(KeyError):
        WORKLOADS[0].selection("slow")


def test_the_ranges_are_those_of_the_issue() -> None:
    def over(group: str) -> list[Workload]:
        return [workload for workload in WORKLOADS if workload.group == group]

    tokens = [workload.tokens for workload in over("GPT-2 block")]
    assert (min(tokens), max(tokens)) == (1, 24576)
    experts = [workload.total_experts for workload in over("CLIP final layer over experts")]
    assert (min(experts), max(experts)) == (32, 16384)
    experts = [workload.total_experts for workload in over("Expert scaling at R = 512")]
    assert (min(experts), max(experts)) == (128, 65536)
    tokens = [workload.tokens for workload in over("Decoding")]
    assert (min(tokens), max(tokens)) == (1, 64)
    assert {workload.norm for workload in WORKLOADS if workload.group.startswith("Mixer")} == {"batch"}


def test_parameters_are_the_papers() -> None:
    table_10 = {  # CP's and TR's, by levels
        (128,): (1_069_568, 3_723_264),
        (128, 2, 2, 2): (1_077_248, 3_727_968),
        (128, 4, 4, 4): (1_084_928, 3_732_672),
    }
    for levels, (cp, tr) in table_10.items():
        workload = named(f"Table 10 layer, N = {' × '.join(map(str, levels))}")
        assert (workload.shape("cp").parameters, workload.shape("tr").parameters) == (cp, tr)
    assert named("GPT-2 block, T = 2,048").shape("cp").rank == (552,)
    assert named("expert scaling, N = 512").shape("cp").flops == 1_442_304  # Table 8
    assert named("expert scaling, N = 512").shape("tr").flops == 3_557_376


def test_the_input_is_the_same_whatever_the_dtype() -> None:
    x = BLOCK.input(torch.float32)
    assert x.shape == (33, 32)
    assert 0.8 < x.std() < 1.2
    assert torch.equal(BLOCK.input(torch.bfloat16), x.bfloat16())


def test_a_real_input_comes_from_the_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, workload = tmp_path / "demo.pt", replace(BLOCK, block=1, tokens=9)
    monkeypatch.setattr(workloads, "CHECKPOINT", path)
    assert "mumoe demo" in str(workload.obstacle())
    gate = {
        "weights.0": torch.randn(8, 32),
        "norms.0.running_mean": torch.zeros(8),
        "norms.0.running_var": torch.ones(8),
    }
    blocks = [{"input": torch.randn(11, 32), "gate": gate} for _ in range(2)]
    torch.save({"blocks": blocks}, path)
    assert workload.obstacle() is None
    assert torch.equal(workload.input(torch.float32), blocks[1]["input"][:9])
    recorded = workload.recorded()
    assert recorded is not None
    assert torch.equal(recorded.gate["weights.0"], gate["weights.0"])
    assert demo_checkpoint.CHECKPOINT.name == "demo.pt"


def test_a_selection_leaves_out_what_it_does_not_name() -> None:
    selection = Selection(directions=(FORWARD, STEP), factorizations=("cp",), extras=(MOE,))
    assert selection.includes("cp", None)
    assert selection.includes(None, MOE)
    assert not selection.includes("tr", None)
    assert not selection.includes("cp", "torch.compile")

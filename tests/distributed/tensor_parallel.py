"""Rank-sharded layers in two and four processes: what one process computes, by the collectives that are promised."""

from __future__ import annotations

import copy
from itertools import product
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.debug import CommDebugMode
from torch.distributed.tensor.experimental import implicit_replication

from distributed.problems import Case, all_processes, alone, assert_same, full, step
from mumoe_fast import MuMoE, MxD
from mumoe_fast.distributed import RankShardedTTExperts, parallelize
from mumoe_fast.ops.dispatch import NATIVE_READY

IMPLS = ("reference", "native") if NATIVE_READY else ("reference",)


def same_step_as_one_process(_: Path) -> None:
    mesh = all_processes()
    cases = [
        Case(mlp, factorization, levels, impl)
        for factorization, levels, mlp, impl in product(("cp", "tr"), ((5,), (5, 3)), (False, True), IMPLS)
    ]
    cases += [Case(False, "tt"), Case(True, "cp", norm="batch", bias=False), Case(False, "tr", norm="batch")]
    for case in cases:
        expected = step(alone(case.build()), case.tokens(), case.upstream())
        # Other processes start from other values: those of the first hold.
        sharded = parallelize(case.build(seed=dist.get_rank()), mesh)
        assert_same(step(sharded, case.tokens(), case.upstream()), expected)


def same_evaluation_as_one_process(_: Path) -> None:
    for impl in IMPLS:
        case = Case(False, impl=impl)
        with torch.no_grad():  # few tokens without gradients: where one process makes a single call
            torch.testing.assert_close(
                parallelize(case.build(), all_processes())(case.tokens()), case.build()(case.tokens())
            )


def parameters_are_divided(_: Path) -> None:
    mesh = all_processes()
    layer = parallelize(Case(False, "tr").build(), mesh)
    columns = -(-7 // mesh.size())
    mine = min(columns, 7 - columns * mesh.get_local_rank())
    local = {name: tuple(p.to_local().shape) for name, p in layer.experts.named_parameters()}
    assert local == {
        "expert_cores.0": (5, 3, 2),
        "in_core": (2, mine, 10),
        "in_bias": (2, mine),
        "out_core": (10, 3, mine),
    }
    assert list(layer.state_dict()) == list(Case(False, "tr").build().state_dict())
    assert f"processes={mesh.size()}" in repr(layer)
    assert isinstance(parallelize(Case(False, "tt").build(), mesh).experts, RankShardedTTExperts)


def collectives_are_those_promised(_: Path) -> None:
    mesh = all_processes()
    for factorization, levels, mlp in product(("cp", "tr"), ((5,), (5, 3)), (False, True)):
        case = Case(mlp, factorization, levels, columns=8)
        layer, layers, E = parallelize(case.build(), mesh), 1 + mlp, len(levels)
        x = case.tokens().requires_grad_()
        with CommDebugMode() as forward:
            y = layer(x)
        assert forward.get_total_counts() == layers
        with CommDebugMode() as backward:
            y.backward(case.upstream())
        assert backward.get_total_counts() == layers * (1 + E + (E if factorization == "tr" else 0))
        sharded = [p for p in layer.parameters() if isinstance(p, DTensor)]
        assert [p.grad.placements for p in sharded] == [p.placements for p in sharded]
        with CommDebugMode() as frozen:
            layer.requires_grad_(False)(case.tokens()).square()
        assert frozen.get_total_counts() == layers


def copies_are_sharded_alike(_: Path) -> None:
    case = Case(True, "tr")
    layer = parallelize(case.build(), all_processes())
    twin = copy.deepcopy(layer)
    assert_same(step(twin, case.tokens(), case.upstream()), step(layer, case.tokens(), case.upstream()))


def same_training_as_one_process(_: Path) -> None:
    case = Case(True, "tr", (5, 3))
    losses = []
    for layer in (case.build(), parallelize(case.build(), all_processes())):
        model = nn.Sequential(nn.Linear(10, 10, dtype=case.dtype), layer)
        nn.init.ones_(model[0].weight)
        nn.init.zeros_(model[0].bias)
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.03)
        history = []
        for _ in range(5):
            loss = nn.functional.mse_loss(model(case.tokens()), case.upstream())
            optimizer.zero_grad()
            loss.backward()
            with implicit_replication():
                norm = nn.utils.clip_grad_norm_(model.parameters(), 0.1)
                optimizer.step()
            history += [loss.detach(), full(norm)]
        losses.append(torch.stack(history))
    assert losses[0][-2] < losses[0][0]
    torch.testing.assert_close(losses[1], losses[0])


def one_graph_when_compiled(_: Path) -> None:
    for case in (Case(True, "cp", impl=IMPLS[-1]), Case(True, "tr", (5, 3), norm="batch")):
        expected = step(alone(case.build()), case.tokens(), case.upstream())
        compiled = torch.compile(parallelize(case.build(), all_processes()), fullgraph=True, backend="aot_eager")
        actual = step(compiled, case.tokens(), case.upstream())
        assert_same({name.replace("_orig_mod.", ""): x for name, x in actual.items()}, expected)


def bad_arguments_are_named_and_change_nothing(_: Path) -> None:
    mesh, options = all_processes(), {"rank": (2, 2, 2), "factorization": "tucker"}
    processes = mesh.size()
    narrow = MuMoE(4, 4, 3, rank=processes - 1)
    twice = parallelize(MuMoE(4, 4, 3, rank=8), mesh)
    late = fully_shard(MuMoE(4, 4, 3, rank=8), mesh=mesh)
    cases = [
        (nn.Linear(4, 4), mesh, "module: expected μMoE layers to shard, found none in Linear"),
        (
            nn.Sequential(MuMoE(4, 4, 3, rank=8), MuMoE(4, 4, 3, **options)),
            mesh,
            r"module\.1\.experts: .*TuckerExperts",
        ),
        (MxD(4, 8, num_experts=6, k=2), mesh, r"module\.experts: expected CPExperts, .*got MxDExperts"),
        (narrow, mesh, rf"module\.experts: expected a rank that leaves columns for {processes} processes, got"),
        (late, mesh, r"module\.experts: expected plain parameters, got DTensors; parallelize before fully_shard"),
        (twice, mesh, r"module\.experts: expected CPExperts, .*got RankShardedCPExperts"),
        (narrow, init_device_mesh("cpu", (1, processes)), r'mesh: expected one dimension, such as mesh\["tp"\], got 2'),
    ]
    for module, given, message in cases:
        before = {name: type(child) for name, child in module.named_modules()}
        with pytest.raises(ValueError, match=message):
            parallelize(module, given)
        assert {name: type(child) for name, child in module.named_modules()} == before


def tokens_and_rank_are_both_divided(_: Path) -> None:
    mesh = init_device_mesh("cpu", (2, dist.get_world_size() // 2), mesh_dim_names=("data", "tp"))
    mine = slice(mesh["data"].get_local_rank(), None, 2)
    for case in (Case(True, "cp", norm="batch"), Case(True, "tr", (5, 3))):
        expected = step(alone(case.build()), case.tokens(), case.upstream())
        layer = parallelize(case.build(), mesh["tp"], data_group=mesh["data"].get_group())
        fully_shard(layer, mesh=mesh["data"])
        actual = step(layer, case.tokens()[mine], case.upstream()[mine])
        for name in ("y", "dx"):
            expected[name] = expected[name][mine]
        # fully_shard averages over the processes with other tokens; these gradients are sums.
        scaled = {name: 2 * x if name.startswith("d") and name != "dx" else x for name, x in actual.items()}
        assert_same(scaled, expected)


def batch_norm_needs_to_know_who_holds_other_tokens(_: Path) -> None:
    mesh = init_device_mesh("cpu", (2, dist.get_world_size() // 2), mesh_dim_names=("data", "tp"))
    layer = Case(False, norm="batch").build()
    with pytest.raises(ValueError, match="data_group: expected the processes that hold other tokens"):
        parallelize(layer, mesh["tp"])
    parallelize(layer, mesh["tp"], data_group=mesh["data"].get_group())
    assert layer.gate.process_group is mesh["data"].get_group()

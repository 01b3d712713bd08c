"""DDP and FSDP2 around the layers: what one process computes on all the tokens."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

from distributed.problems import Case, all_processes, alone, assert_same, full, step
from mumoe_fast import convert
from mumoe_fast.ops.dispatch import NATIVE_READY

CASES = [Case(True, "cp", norm="batch"), Case(True, "tr", (5, 3), norm="layer")]
CASES += [Case(True, "cp", (5, 3), impl="native", norm="batch")] if NATIVE_READY else []


def model_of(case: Case) -> nn.Sequential:
    block = case.build()
    model = nn.Sequential(nn.Linear(10, 10, dtype=case.dtype), block)
    generator = torch.Generator().manual_seed(4)
    for parameter in model[0].parameters():
        nn.init.normal_(parameter, std=0.3, generator=generator)
    return model


def mine(tokens: Tensor) -> Tensor:
    """This process's part, of one batch."""
    return tokens.chunk(dist.get_world_size())[dist.get_rank()]


def train(model: nn.Module, x: Tensor, target: Tensor, steps: int = 3) -> list[Tensor]:
    """Train, and return the losses over all processes."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    losses = []
    for _ in range(steps):
        loss = nn.functional.mse_loss(model(x).to(target.dtype), target)  # PyTorch 2.11 mixes no dtypes there
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
    return losses


def averaged(losses: list[Tensor]) -> Tensor:
    total = torch.stack(losses)
    dist.all_reduce(total)
    return total / dist.get_world_size()


def state(model: nn.Module) -> dict[str, Tensor]:
    return {name.removeprefix("module."): full(x) for name, x in model.state_dict().items()}


def ddp_is_not_converted(_: Path) -> None:
    block = nn.Sequential(nn.Linear(10, 12), nn.GELU(), nn.Linear(12, 10))
    wrapped = nn.parallel.DistributedDataParallel(nn.Sequential(block))
    for model, where in ((wrapped, "it"), (nn.Sequential(wrapped), "module '0'")):
        with pytest.raises(ValueError, match=f"model: expected one that .* wrap later, but {where} is wrapped"):
            convert(model, num_experts=4)
    assert wrapped.module[0] is block


def ddp_trains_as_one_process(_: Path) -> None:
    for case in CASES:
        single = alone(model_of(case))
        expected = torch.stack(train(single, case.tokens(), case.upstream()))
        model = nn.parallel.DistributedDataParallel(model_of(case))
        actual = averaged(train(model, mine(case.tokens()), mine(case.upstream())))
        torch.testing.assert_close(actual, expected)
        assert_same(state(model), state(single))


def fsdp_trains_as_one_process(_: Path) -> None:
    for case in CASES:
        single = alone(model_of(case))
        expected = torch.stack(train(single, case.tokens(), case.upstream()))
        model = model_of(case)
        fully_shard(model[1], mesh=all_processes())
        fully_shard(model, mesh=all_processes())
        actual = averaged(train(model, mine(case.tokens()), mine(case.upstream())))
        torch.testing.assert_close(actual, expected)
        assert_same(state(model), state(single))


def fsdp_computes_in_bfloat16_and_keeps_float32(_: Path) -> None:
    for case in CASES:
        model = model_of(case).float()
        expected = torch.stack(train(alone(model_of(case)).float(), case.tokens().float(), case.upstream().float()))
        policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
        fully_shard(model, mesh=all_processes(), mp_policy=policy)
        seen = []
        model[1].gate.register_forward_hook(lambda module, inputs, outputs, seen=seen: seen.append(outputs[0].dtype))
        actual = averaged(train(model, mine(case.tokens().float()), mine(case.upstream().float())))
        assert set(seen) == {torch.bfloat16}
        assert {p.dtype for p in model.parameters()} == {torch.float32}
        torch.testing.assert_close(actual.float(), expected, rtol=0.02, atol=0)  # bfloat16 has 8 bits


def batch_norm_over_processes_compiles_to_one_graph(_: Path) -> None:
    for case in CASES[-1:]:
        x, dy = mine(case.tokens()), mine(case.upstream())
        expected = step(case.build(), x, dy)
        compiled = torch.compile(case.build(), fullgraph=True, backend="aot_eager")
        actual = step(compiled, x, dy)
        assert_same({name.replace("_orig_mod.", ""): tensor for name, tensor in actual.items()}, expected)

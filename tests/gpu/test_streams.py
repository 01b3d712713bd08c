"""Kernels run where the caller's tensors and stream are: late inputs, CUDA graphs, a device that is not current."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from mumoe_fast.bench.suite.timing import captured
from mumoe_fast.testing.acceptance import assert_accepted
from mumoe_fast.testing.cases import Case, cases
from tests.gpu.stand_in import DEVICE, HERE, IMPL, late_stream, needs_gpu, on_device
from tests.test_compatibility import LAYERS

QUICK = [case for case in cases() if case.quick and (case.dtype == torch.bfloat16 or case.family == "layer")]
T = 64


@pytest.mark.parametrize("case", QUICK, ids=str)
def test_the_current_stream_is_honoured(case: Case) -> None:
    """Inputs that are written late, on a stream of their own: who launched elsewhere would read NaN."""
    trial = case.build(DEVICE)
    expected = trial.run(IMPL)

    def unwritten(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        return {name: torch.full_like(x, float("nan")) for name, x in tensors.items()}

    late = replace(trial, inputs=unwritten(trial.inputs), upstream=unwritten(trial.upstream))
    with late_stream():
        for written, source in ((late.inputs, trial.inputs), (late.upstream, trial.upstream)):
            for name, x in written.items():
                x.copy_(source[name])
        results = late.run(IMPL)
    assert results.keys() == expected.keys()
    for name, x in expected.items():
        torch.testing.assert_close(results[name], x)


def replay_of(action: Callable[[], list[Tensor]]) -> Callable[[], list[Tensor]]:
    """The action captured in a CUDA graph, whose results every replay writes anew; the action for the stand-in."""
    results: list[Tensor] = []

    def act() -> None:
        results[:] = action()

    replay = captured(act) if HERE else act

    def again() -> list[Tensor]:
        replay()
        return results

    return again


def layer_of(name: str) -> nn.Module:
    """A layer with nothing at zero."""
    layer = LAYERS[name](impl=IMPL).to(DEVICE)
    for parameter in layer.parameters():
        nn.init.normal_(parameter, std=0.5)
    return layer


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("tokens", [1, T])
def test_a_forward_pass_is_captured_and_replayed_on_new_inputs(name: str, tokens: int) -> None:
    layer, x = layer_of(name).eval(), torch.randn(tokens, 12, device=DEVICE)

    @torch.no_grad()
    def forward() -> list[Tensor]:
        return [layer(x)]

    replay = replay_of(forward)
    for _ in range(3):
        x.copy_(torch.randn_like(x))
        torch.testing.assert_close(replay(), forward())


@pytest.mark.parametrize("name", LAYERS)
def test_a_training_step_is_captured_and_replayed_on_new_inputs(name: str) -> None:
    """Batch norm's running statistics too: every replay moves them once."""
    layer = layer_of(name)
    x, dy = torch.randn(T, 12, device=DEVICE).requires_grad_(), torch.randn(T, 12, device=DEVICE)
    wanted = [x, *layer.parameters()]

    def step() -> list[Tensor]:
        y = layer(x)
        return [y.detach(), *torch.autograd.grad(y, wanted, dy)]

    replay = replay_of(step)
    buffers = {name: buffer.clone() for name, buffer in layer.named_buffers()}
    for _ in range(3):
        with torch.no_grad():
            x.copy_(torch.randn_like(x))
            dy.copy_(torch.randn_like(dy))
        results = []
        for run in (replay, step):
            layer.load_state_dict(buffers, strict=False)
            results.append([tensor.clone() for tensor in (*run(), *layer.buffers())])
        torch.testing.assert_close(*results)


@needs_gpu
def test_only_a_replay_changes_results() -> None:
    """What the tests above rest on."""
    layer, x = layer_of("cp"), torch.ones(2, 12, device=DEVICE)
    replay = replay_of(lambda: [layer(x).detach()])
    (y,) = replay()
    before = y.clone()
    x.mul_(2)
    assert torch.equal(y, before)
    replay()
    assert not torch.equal(y, before)


SEVERAL = pytest.param(1, marks=pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs"))


@pytest.mark.parametrize("case", QUICK, ids=str)
@pytest.mark.parametrize("index", [0, SEVERAL])
def test_the_tensors_device_need_not_be_the_current_one(case: Case, index: int) -> None:
    device = torch.device("cuda", index) if HERE else DEVICE
    with on_device(0):
        assert_accepted(case.build(device).judge(IMPL))

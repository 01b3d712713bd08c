"""Twenty steps of training by the kernels and by the reference, from one seed, give the same losses."""

import pytest
import torch
from torch import nn

from mumoe_fast import MuMoEMLP
from mumoe_fast.layers import ExpertGate
from mumoe_fast.testing.acceptance import judge


def losses(impl: str, norm: str, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Linear(12, 16), MuMoEMLP(16, 24, num_experts=(5, 2), rank=16, norm=norm, impl=impl), nn.Linear(16, 3)
    ).to(device, dtype)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    generator = torch.Generator().manual_seed(1)
    history = []
    for _ in range(20):
        x = torch.randn(24, 12, generator=generator).to(device, dtype)
        target = x[:, :3] * x[:, 3:6]
        loss = nn.functional.mse_loss(model(x), target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        history.append(loss.detach())
    return torch.stack(history)


@pytest.mark.parametrize("norm", ["layer", "batch"])
def test_losses_agree_within_the_rule(norm: str, device: torch.device) -> None:
    kernels, eager, truth = (
        losses(impl, norm, dtype, device)
        for impl, dtype in (("triton", torch.float32), ("reference", torch.float32), ("reference", torch.float64))
    )
    assert truth[-1] < truth[0]
    verdict = judge("losses", kernels, eager, truth, truth, torch.float32)
    assert verdict.passed, str(verdict)


def test_float32_statistics_go_with_bfloat16_weights() -> None:
    """As under FSDP, whose mixed precision casts parameters and leaves buffers as they are."""
    gate = ExpertGate(16, 5, norm="batch", impl="reference")
    nn.init.normal_(gate.weights[0])
    x = torch.randn(24, 16)
    gate(x)
    (expected,) = gate.eval()(x)
    gate.weights[0].data = gate.weights[0].data.bfloat16()
    (a,) = gate(x.bfloat16())
    assert a.dtype == torch.bfloat16
    assert gate.norms[0].running_var.dtype == torch.float32
    torch.testing.assert_close(a.float(), expected, rtol=0, atol=0.05)

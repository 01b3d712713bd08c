"""pytest-benchmark cases: the gate's and the experts' kernels, and whole layers, forward and with backward.

Names are stable, so that `pytest-benchmark compare` finds the same case in two saved runs.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture
from torch import Tensor, nn

from mumoe_fast.bench.step import FORWARD, STEP, action, random_tokens
from mumoe_fast.functional import entmax
from mumoe_fast.layers import MuMoE, MuMoEMLP
from mumoe_fast.ops import dispatch

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
T = 512
OPERATORS = {"cp": "cp", "tr": "tensor_ring", "tucker": "tucker"}


class Entmax(nn.Module):
    """entmax-1.5 of a row of logits per token."""

    def __init__(self, impl: str) -> None:
        super().__init__()
        self.impl = impl

    def forward(self, x: Tensor) -> Tensor:
        return entmax(x, alpha=1.5, impl=self.impl)


class GateAlone(nn.Module):
    """A layer's gate of one level."""

    def __init__(self, layer: MuMoE | MuMoEMLP) -> None:
        super().__init__()
        self.gate = layer.gate

    def forward(self, x: Tensor) -> Tensor:
        (a,) = self.gate(x)
        return a


class ExpertsAlone(nn.Module):
    """A layer's experts, on coefficients that were computed before."""

    def __init__(self, layer: MuMoE, coefficients: tuple[Tensor, ...]) -> None:
        super().__init__()
        self.experts, self.coefficients = layer.experts, coefficients

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.experts(x, self.coefficients)
        return y


def trained(layer: MuMoE | MuMoEMLP) -> MuMoE | MuMoEMLP:
    """With a gate of sparse coefficients, as training leaves it."""
    for weight in layer.gate.weights:
        nn.init.normal_(weight, std=layer.in_features**-0.5)
    return layer


def time(benchmark: BenchmarkFixture, module: nn.Module, features: int, dtype: torch.dtype, direction: str) -> None:
    act = action(module.to(DEVICE, dtype), random_tokens(T, features, dtype=dtype, device=DEVICE), direction)
    benchmark(_waited_for(act))


def _waited_for(act: Callable[[], object]) -> Callable[[], object]:
    if DEVICE.type == "cpu":
        return act

    def act_and_wait() -> None:
        act()
        torch.cuda.synchronize()

    return act_and_wait


def require(impl: str, dtype: torch.dtype) -> None:
    hindrance = dispatch.obstacle(impl, DEVICE, dtype)
    if hindrance is not None:
        pytest.skip(hindrance)


@pytest.mark.parametrize("direction", [FORWARD, STEP])
@pytest.mark.parametrize("N", [256, 2048])
def test_entmax(benchmark: BenchmarkFixture, N: int, direction: str, impl: str, dtype: torch.dtype) -> None:
    require(impl, dtype)
    time(benchmark, Entmax(impl), N, dtype, direction)


@pytest.mark.parametrize("direction", [FORWARD, STEP])
def test_gate(benchmark: BenchmarkFixture, direction: str, impl: str, dtype: torch.dtype) -> None:
    require(impl, dtype)
    time(benchmark, GateAlone(trained(MuMoE(768, 8, 256, rank=8, impl=impl))), 768, dtype, direction)


@pytest.mark.parametrize("direction", [FORWARD, STEP])
@pytest.mark.parametrize("factorization", ["cp", "tr", "tucker"])
def test_experts(
    benchmark: BenchmarkFixture, factorization: str, direction: str, impl: str, dtype: torch.dtype
) -> None:
    require(impl, dtype)
    layer = trained(MuMoE(768, 1000, 128, factorization=factorization, impl=impl))
    assert isinstance(layer, MuMoE)
    x = random_tokens(T, 768, dtype=dtype, device=DEVICE)
    with torch.no_grad():
        coefficients = layer.to(DEVICE, dtype).coefficients(x)
    time(benchmark, ExpertsAlone(layer, coefficients), 768, dtype, direction)


@pytest.mark.parametrize("direction", [FORWARD, STEP])
@pytest.mark.parametrize("factorization", ["cp", "tr"])
def test_gpt_2_block(
    benchmark: BenchmarkFixture, factorization: str, direction: str, impl: str, dtype: torch.dtype
) -> None:
    require(impl, dtype)
    block = trained(MuMoEMLP(768, 3072, num_experts=256, factorization=factorization, impl=impl))
    time(benchmark, block, 768, dtype, direction)

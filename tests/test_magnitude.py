"""t̄ of whole layers and blocks is the contraction on absolute values, and bounds what any order of summing gives."""

import pytest
import torch
from torch import Tensor, nn

from mumoe_fast.layers import MuMoE, MuMoEMLP
from mumoe_fast.testing.magnitude import block_magnitudes

T, I, H, O, N, R = 9, 7, 11, 5, 6, 4


def exact(module: MuMoE | MuMoEMLP) -> MuMoE | MuMoEMLP:
    nn.init.normal_(module.gate.weights[0])
    return module.double()


def inputs() -> tuple[Tensor, Tensor]:
    return torch.randn(T, I, dtype=torch.float64), torch.randn(T, O, dtype=torch.float64)


def test_a_cp_layers_by_hand() -> None:
    layer, (x, dy) = exact(MuMoE(I, O, N, rank=R, impl="reference")), inputs()
    found, experts = block_magnitudes(layer, x, dy), layer.experts
    (a,), U = layer.gate(x), experts.expert_factors[0].abs()
    B = x.abs() @ experts.in_factor.abs().T + experts.in_bias.abs()
    dh = dy.abs() @ experts.out_factor.abs()
    torch.testing.assert_close(found["y"], ((a @ U) * B) @ experts.out_factor.abs().T)
    torch.testing.assert_close(found["dexperts.expert_factors.0"], a.T @ (dh * B))
    torch.testing.assert_close(found["dexperts.out_factor"], dy.abs().T @ ((a @ U) * B))
    torch.testing.assert_close(found["dexperts.in_factor"], (dh * (a @ U)).T @ x.abs())


@pytest.mark.parametrize("factorization", ["cp", "tr", "tucker", "full"])
def test_no_gradient_of_a_block_is_larger(factorization: str) -> None:
    rank = {"cp": R, "tr": (2, 3, R), "tucker": (3, R, R), "full": None}[factorization]
    block = exact(MuMoEMLP(I, H, O, N, factorization=factorization, rank=rank, impl="reference"))
    x, dy = inputs()
    found = block_magnitudes(block, x, dy)
    named = {f"d{name}": p for name, p in block.named_parameters() if not name.startswith("gate.")}
    gradients = torch.autograd.grad(block(x), list(named.values()), dy)
    assert found.keys() == {"y", "dx", *named}
    for name, gradient in zip(named, gradients, strict=True):
        assert found[name].shape == gradient.shape
        assert (gradient.abs() <= found[name] * (1 + 1e-9)).all(), name

"""The modules that both tables compare, by their sizes: functions, layers and blocks, ours, dense and sparse."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from torch import Tensor, nn

from mumoe_fast.functional import entmax
from mumoe_fast.layers import MuMoE, MuMoEMLP

REFERENCE, COMPILED = "reference", "torch.compile"
DENSE, LINEAR, PRODUCTS = "dense MLP", "nn.Linear", "its matrix products alone"
GPT2 = (768, 3072)  # in = out, hidden
CLASSIFIER = (768, 1000)  # the final layer of an ImageNet classifier


class Function(nn.Module):
    """A function as a module without parameters."""

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        """The function."""
        return self.function(x)


def entmax_of(impl: str) -> nn.Module:
    """entmax-1.5 of this library."""
    return Function(partial(entmax, alpha=1.5, impl=impl))


def trained(layer: MuMoE | MuMoEMLP) -> MuMoE | MuMoEMLP:
    """The layer with a gate as training leaves it, of sparse coefficients; a new one has weights of zero."""
    for weight in layer.gate.weights:
        nn.init.normal_(weight, std=layer.in_features**-0.5)
    return layer


def layer(impl: str, features: tuple[int, int], num_experts: int, **options: object) -> nn.Module:
    """A μMoE layer with a trained gate."""
    return trained(MuMoE(*features, num_experts, impl=impl, **options))  # type: ignore[arg-type]


def linear(features: tuple[int, int]) -> nn.Module:
    """The dense layer."""
    return nn.Linear(*features)


def new_block(impl: str, features: tuple[int, int], num_experts: int, **options: object) -> MuMoEMLP:
    """A μMoE block as it is initialised: every expert of every token is active."""
    return MuMoEMLP(*features, num_experts=num_experts, impl=impl, **options)  # type: ignore[arg-type]


def block(impl: str, features: tuple[int, int], num_experts: int, **options: object) -> nn.Module:
    """A μMoE block with a trained gate."""
    return trained(new_block(impl, features, num_experts, **options))


def dense_block(features: tuple[int, int]) -> nn.Module:
    """The dense block."""
    I, H = features
    return nn.Sequential(nn.Linear(I, H), nn.GELU(), nn.Linear(H, I))


def products_alone(features: tuple[int, int], width: int) -> nn.Module:
    """The matrix products of a block whose contractions with the input modes have `width` columns, and nothing else."""
    I, H = features
    sizes = ((I, width), (width, H), (H, width), (width, I))
    return nn.Sequential(*(nn.Linear(i, o, bias=False) for i, o in sizes))

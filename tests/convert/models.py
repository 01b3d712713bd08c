"""Models and blocks that are converted, of the kinds that there are."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from mumoe_fast.convert import Conversion


class Conv1D(nn.Module):
    """GPT-2's linear layer, whose weight is (I, O)."""

    def __init__(self, nf: int, nx: int) -> None:
        super().__init__()
        self.nf = nf
        self.weight, self.bias = nn.Parameter(torch.randn(nx, nf)), nn.Parameter(torch.zeros(nf))

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight + self.bias


class GPT2Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.c_fc, self.c_proj, self.dropout = Conv1D(24, 8), Conv1D(8, 24), nn.Dropout(0.25)

    def forward(self, x: Tensor) -> Tensor:
        h = self.c_fc(x)
        h = 0.5 * h * (1 + torch.tanh((2 / torch.pi) ** 0.5 * (h + 0.044715 * h**3)))
        return self.dropout(self.c_proj(h))


class TimmMlp(nn.Module):
    def __init__(self, in_features: int = 8, hidden: int = 24, act: nn.Module | None = None, drop1: float = 0) -> None:
        super().__init__()
        self.fc1, self.act, self.drop1 = nn.Linear(in_features, hidden), act or nn.GELU(), nn.Dropout(drop1)
        self.norm, self.fc2, self.drop2 = nn.Identity(), nn.Linear(hidden, in_features), nn.Dropout(0.1)

    def forward(self, x: Tensor) -> Tensor:
        return self.drop2(self.fc2(self.norm(self.drop1(self.act(self.fc1(x))))))


class Functional(nn.Module):
    """Children in the order that they are not called in, and the rest of the forward as given."""

    def __init__(self, forward: Callable[[Any, Tensor], Tensor], hidden: int = 24) -> None:
        super().__init__()
        self.down, self.up = nn.Linear(hidden, 8), nn.Linear(8, hidden)
        self.calculation = forward

    def forward(self, x: Tensor) -> Tensor:
        return self.calculation(self, x)


def relu_mlp() -> nn.Module:
    return Functional(lambda block, x: block.down(block.up(x).relu()))


def silu_mlp() -> nn.Sequential:
    return nn.Sequential(nn.Linear(8, 24, bias=False), nn.SiLU(), nn.Linear(24, 5, bias=False))


class Mixer(nn.Module):
    """Token and channel MLPs of different shapes, behind norms, and a head."""

    def __init__(self, tokens: int = 6, channels: int = 8) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(channels)
        self.mlp_tokens, self.mlp_channels = TimmMlp(tokens, 12), TimmMlp(channels, 24)
        self.head = nn.Linear(channels, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.mlp_tokens(self.norm(x).transpose(1, 2)).transpose(1, 2)
        return self.head(x + self.mlp_channels(self.norm(x)))


def holding(block: nn.Module) -> nn.Module:
    return nn.ModuleDict({"block": block})


def left(conversion: Conversion) -> dict[str, str]:
    return {layer.name: layer.reason for layer in conversion.left_alone}


class Gated(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gate_proj, self.up_proj, self.down_proj = nn.Linear(8, 24), nn.Linear(8, 24), nn.Linear(24, 8)
        self.act_fn = nn.SiLU()

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))

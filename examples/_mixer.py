"""MLP-Mixer (Tolstikhin et al., 2021): patches, then blocks that mix over tokens and over channels by an MLP each."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor, nn

import mumoe_fast

Kind = Literal["dense", "cp", "tr", "tt", "tucker", "full"]


@dataclass(frozen=True)
class MixerConfig:
    """The Mixer's shape; the images are square."""

    image: int
    patch: int
    width: int
    blocks: int
    token_hidden: int
    channel_hidden: int
    stochastic_depth: float = 0.0  # probability with which the last block is left out; linear in depth, 0 for the first
    channels: int = 3
    classes: int = 1000

    def __post_init__(self) -> None:
        if self.image % self.patch:
            raise ValueError(f"image: expected a multiple of the patch size {self.patch}, got {self.image}")

    @property
    def tokens(self) -> int:
        """Patches per image."""
        return (self.image // self.patch) ** 2


class StochasticDepth(nn.Module):
    """While training, leaves a residual branch (B, …) out with probability p, per image, and scales up the rest."""

    def __init__(self, p: float) -> None:
        super().__init__()
        self.p = p

    def forward(self, x: Tensor) -> Tensor:
        """x to the same shape."""
        if not self.training or self.p == 0:
            return x
        keep = torch.rand(len(x), *[1] * (x.dim() - 1), device=x.device) >= self.p
        return x * keep / (1 - self.p)


def mlp(width: int, hidden: int) -> nn.Sequential:
    """A dense block, as `mumoe_fast.convert` finds and replaces it."""
    return nn.Sequential(nn.Linear(width, hidden), nn.GELU(), nn.Linear(hidden, width))


class MixerBlock(nn.Module):
    """Mixes every channel over the tokens, then every token over its channels."""

    def __init__(self, config: MixerConfig, stochastic_depth: float) -> None:
        super().__init__()
        self.token_norm = nn.LayerNorm(config.width)
        self.token_mlp: nn.Module = mlp(config.tokens, config.token_hidden)
        self.channel_norm = nn.LayerNorm(config.width)
        self.channel_mlp: nn.Module = mlp(config.width, config.channel_hidden)
        self.skip = StochasticDepth(stochastic_depth)

    def forward(self, x: Tensor) -> Tensor:
        """x (B, tokens, width) to the same."""
        x = x + self.skip(self.token_mlp(self.token_norm(x).transpose(1, 2)).transpose(1, 2))
        return x + self.skip(self.channel_mlp(self.channel_norm(x)))  # type: ignore[no-any-return]


class Patches(nn.Module):
    """Images (B, channels, image, image) to one token per patch (B, tokens, width): a linear layer on its pixels."""

    def __init__(self, config: MixerConfig) -> None:
        super().__init__()
        self.unshuffle = nn.PixelUnshuffle(config.patch)
        self.linear = nn.Linear(config.channels * config.patch**2, config.width)

    def forward(self, images: Tensor) -> Tensor:
        """The tokens, row by row."""
        return self.linear(self.unshuffle(images).flatten(2).transpose(1, 2))  # type: ignore[no-any-return]


class Mixer(nn.Module):
    """Images (B, channels, image, image) to logits (B, classes)."""

    def __init__(self, config: MixerConfig) -> None:
        super().__init__()
        self.config = config
        self.patches = Patches(config)
        depths = torch.linspace(0, config.stochastic_depth, config.blocks, device="cpu").tolist()
        self.blocks = nn.ModuleList(MixerBlock(config, p) for p in depths)
        self.norm = nn.LayerNorm(config.width)
        self.head = nn.Linear(config.width, config.classes)

    def forward(self, images: Tensor) -> Tensor:
        """Logits of every class."""
        x = self.patches(images)
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x).mean(1))  # type: ignore[no-any-return]


@dataclass(frozen=True)
class MLPs:
    """What the blocks' MLPs are. A rank of None matches the dense MLP's parameters."""

    kind: Kind = "cp"
    experts: tuple[int, ...] = (64,)  # one number per hierarchy level
    token_rank: int | None = None
    channel_rank: int | None = None
    impl: str = field(default="auto", compare=False)


def build(config: MixerConfig, mlps: MLPs, seed: int) -> Mixer:
    """The Mixer that `seed` starts with: dense and μMoE ones are the same but for their MLPs.

    The gates have batch norm, as the paper has it for vision.

    Raises:
        ValueError: as `mumoe_fast.convert`.
    """
    torch.manual_seed(seed)
    model = Mixer(config)
    if mlps.kind != "dense":
        ranks = {}
        for index in range(config.blocks):
            ranks[f"blocks.{index}.token_mlp"] = mlps.token_rank
            ranks[f"blocks.{index}.channel_mlp"] = mlps.channel_rank
        mumoe_fast.convert(
            model, num_experts=mlps.experts, factorization=mlps.kind, rank=ranks, norm="batch", impl=mlps.impl
        )
    return model

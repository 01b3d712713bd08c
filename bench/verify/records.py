"""What verify found, as rows, and as JSON lines: one about the run, then one for every case and implementation."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from itertools import groupby
from pathlib import Path

import torch

from mumoe_fast.bench.measure import describe_machine
from mumoe_fast.ops.dispatch import triton_version
from mumoe_fast.testing.acceptance import Verdict
from mumoe_fast.testing.cases import Case

FIGURES = ("error", "eager_error", "allowance")  # of every result in a line, in this order


@dataclass(frozen=True)
class Row:
    """One result or gradient of one case by one implementation.

    Args:
        case: the case's name.
        result: the result's; empty where the case gave none.
        impl: the implementation.
        device: the type of the device it ran on.
        error: the largest error; infinite for a result that is not finite and for a case that gave none.
        eager_error: that of eager torch.
        allowance: what the acceptance rule allows.
        failure: why the case gave no result.
    """

    case: str
    result: str
    impl: str
    device: str
    error: float
    eager_error: float = math.nan
    allowance: float = 0.0
    failure: str = ""

    @staticmethod
    def of(case: Case, impl: str, device: torch.device, verdict: Verdict) -> Row:
        """The row of a verdict."""
        error = verdict.error if verdict.finite else math.inf
        return Row(case.name, verdict.name, impl, device.type, error, verdict.eager_error, verdict.allowance)

    def __str__(self) -> str:
        what = self.failure or f"error {self.error:.2e} is {self.of_allowance:.2f} of the allowed {self.allowance:.2e}"
        return f"{self.name} by {self.impl}: {what}"

    @property
    def name(self) -> str:
        """Family, input, dtype and result: what ``--only`` searches."""
        return f"{self.case}/{self.result}"

    @property
    def family(self) -> str:
        """The operator family."""
        return self.case.split("/")[0]

    @property
    def dtype(self) -> str:
        """The dtype's name."""
        return self.case.split("/")[-1]

    @property
    def of_allowance(self) -> float:
        """The error as a multiple of what the acceptance rule allows: at most 1 passes."""
        if self.allowance:
            return self.error / self.allowance
        return math.inf if self.error else 0.0

    @property
    def of_eager(self) -> float:
        """The error as a multiple of eager's own."""
        if self.eager_error:
            return self.error / self.eager_error
        return math.inf if self.error else 0.0

    @property
    def passed(self) -> bool:
        """Whether it is within the rule."""
        return self.of_allowance <= 1


def worst_first(rows: Iterable[Row]) -> list[Row]:
    """By the multiple of the allowance, then by that of eager's error."""
    return sorted(rows, key=lambda row: (-row.of_allowance, -row.of_eager, row.name))


def facts(devices: Iterable[torch.device]) -> dict[str, str]:
    """What the numbers were computed with; the operating system, which they do not depend on, left out."""
    machine = {name: fact for device in devices for name, fact in describe_machine(device) if name != "system"}
    interpreted = ", interpreted" if os.environ.get("TRITON_INTERPRET") == "1" else ""
    return {
        **machine,
        "vector instructions": torch.backends.cpu.get_cpu_capability(),
        "triton": f"{triton_version() or 'not installed'}{interpreted}",
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def json_lines(rows: Iterable[Row], about: Mapping[str, str]) -> str:
    """The run's facts, then a line for every case and implementation, with three digits of every figure."""

    def records() -> Iterator[dict[str, object]]:
        yield {"run": dict(about), "figures": FIGURES}
        for (case, impl, device), group in groupby(rows, key=lambda row: (row.case, row.impl, row.device)):
            found = list(group)
            failure = next(({"failure": row.failure} for row in found if row.failure), {})
            results = {row.result: [_short(getattr(row, name)) for name in FIGURES] for row in found if row.result}
            yield {"case": case, "impl": impl, "device": device, **failure, "results": results}

    return "".join(json.dumps(record, ensure_ascii=False, allow_nan=False) + "\n" for record in records())


def _short(value: float) -> float | None:
    """JSON has no infinity."""
    return float(f"{value:.3g}") if math.isfinite(value) else None


def load(path: Path) -> list[Row]:
    """The rows of a file that `json_lines` wrote.

    Raises:
        ValueError: a line is not such a record; file and line are named.
    """
    rows: list[Row] = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        try:
            record = json.loads(line)
            if "run" not in record:
                rows += _rows(record)
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{path}:{number}: expected a record of mumoe verify --save: {error!r}") from error
    return rows


def _rows(record: Mapping[str, object]) -> Iterator[Row]:
    place = str(record["case"]), str(record["impl"]), str(record["device"])
    case, impl, device = place
    if "failure" in record:
        yield Row(case, "", impl, device, math.inf, failure=str(record["failure"]))
    results = record["results"]
    if not isinstance(results, dict):
        raise TypeError(f"results: expected an object, got {results!r}")
    for result, figures in results.items():
        error, eager_error, allowance = (math.inf if value is None else float(value) for value in figures)
        yield Row(case, result, impl, device, error, eager_error, allowance)

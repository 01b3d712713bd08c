"""What the suite writes and everything else reads: one record per measurement, one JSON object per line.

A line stands on its own: it carries the machine, the versions and the date. Operations count a multiply-add as 2, as
torch and the data sheets of GPUs do; the paper and fvcore count it as 1. Times are seconds, memory is bytes.
"""

from __future__ import annotations

import json
import types
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, is_dataclass
from pathlib import Path
from typing import Any, Union, get_args, get_origin, get_type_hints

FORMAT = 1  # grows when a reader of the old lines would misread the new ones


class RecordError(ValueError):
    """A line is not a record; says which line of which file and what was expected."""


@dataclass(frozen=True)
class Latency:
    """Seconds of one call: quantiles and the minimum over bursts of calls that took turns with the other sides'."""

    p20: float
    p50: float
    p80: float
    minimum: float
    bursts: int


@dataclass(frozen=True)
class Flops:
    """Operations of one call in one direction, counted three ways, and why where the three differ.

    None: that counter cannot count this implementation.
    """

    formula: int | None
    torch: int | None
    fvcore: int | None
    explanation: str = ""

    @property
    def best(self) -> int | None:
        """The formula's count, or else torch's, or else fvcore's."""
        return next((count for count in (self.formula, self.torch, self.fvcore) if count is not None), None)


@dataclass(frozen=True)
class Floor:
    """The fewest operations and bytes that the workload needs, and the seconds that they take at the ceilings."""

    flops: int
    bytes: int
    seconds: float


@dataclass(frozen=True)
class Ceilings:
    """What the machine reaches: copied bytes per second, read and written, and a large GEMM's FLOP/s in the dtype."""

    bytes_per_second: float
    flops_per_second: float


@dataclass(frozen=True)
class Run:
    """When, where and with what it was measured."""

    date: str  # ISO 8601, UTC
    commit: str  # "" outside a checkout; "+" at the end: with changes that are not committed
    seed: int
    machine: Mapping[str, str]  # "device", "CPU", "threads", …: by name
    versions: Mapping[str, str]  # "mumoe-fast", "torch", …: by package


@dataclass(frozen=True)
class Record:
    """One implementation on one workload in one dtype and direction.

    `refused` says why there is nothing else: the implementation cannot run here, or (`wrong`) its results are wrong and
    it was not timed. A prediction for a GPU that is not there names it in `predicted_for` and has `predicted_seconds`
    in place of a latency, and a peak that was counted.
    """

    workload: str
    group: str  # the heading under which the workload is shown
    tokens: int
    num_experts: int  # over all levels
    implementation: str
    kind: str  # "ours", "reference", "dense", "dense MoE" or "sparse MoE"
    factorization: str | None
    dtype: str  # without torch's prefix
    direction: str  # "forward" or "forward+backward"
    run: Run
    refused: str | None = None
    wrong: bool = False
    error_of_allowance: float | None = None  # the largest error found by the check, as a share of what it may be
    latency: Latency | None = None
    graph_latency: Latency | None = None  # the same call replayed from a CUDA graph
    peak_bytes: int | None = None  # beyond parameters and input
    parameters: int | None = None
    flops: Flops | None = None
    floor: Floor | None = None
    ceilings: Ceilings | None = None
    predicted_for: str | None = None
    predicted_seconds: float | None = None
    format: int = FORMAT

    @property
    def predicted(self) -> bool:
        """Whether this is a prediction and nothing was measured."""
        return self.predicted_for is not None

    @property
    def key(self) -> tuple[str, str, str, str, str]:
        """What makes two records of two runs comparable."""
        return self.workload, self.implementation, self.dtype, self.direction, self.predicted_for or ""

    @property
    def seconds(self) -> float | None:
        """The median latency, or the prediction."""
        return self.latency.p50 if self.latency is not None else self.predicted_seconds

    @property
    def flops_per_second(self) -> float | None:
        """Operations of the call by its median latency."""
        flops = None if self.flops is None else self.flops.best
        return None if flops is None or self.latency is None else flops / self.latency.p50

    @property
    def bytes_per_second(self) -> float | None:
        """The fewest bytes that the workload needs by the median latency: what is moved besides counts as slowness."""
        return None if self.floor is None or self.latency is None else self.floor.bytes / self.latency.p50

    @property
    def fraction_of_flops(self) -> float | None:
        """Achieved FLOP/s as a share of the machine's measured GEMM rate."""
        rate = self.flops_per_second
        return None if rate is None or self.ceilings is None else rate / self.ceilings.flops_per_second

    @property
    def fraction_of_bytes(self) -> float | None:
        """Achieved bytes/s as a share of the machine's measured copy bandwidth."""
        rate = self.bytes_per_second
        return None if rate is None or self.ceilings is None else rate / self.ceilings.bytes_per_second

    @property
    def over_floor(self) -> float | None:
        """How many times the floor's seconds the median latency, or the prediction, takes."""
        return None if self.floor is None or self.seconds is None else self.seconds / self.floor.seconds

    def as_json(self) -> dict[str, Any]:
        """Plain data, with the derived figures for readers that are not this module."""
        return {**asdict(self), **{name: getattr(self, name) for name in DERIVED}}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Record:
        """The record that `as_json` described.

        Raises:
            RecordError: a field is missing, unknown or of another type, or the format is another.
        """
        given = {name: value for name, value in _object(data, "record").items() if name not in DERIVED}
        if given.get("format") != FORMAT:
            raise RecordError(f"format: expected {FORMAT}, got {given.get('format')!r}")
        record = _decode(cls, given, "record")
        assert isinstance(record, cls)
        return record


DERIVED = ("predicted", "flops_per_second", "bytes_per_second", "fraction_of_flops", "fraction_of_bytes", "over_floor")


def write_records(records: Iterable[Record], path: Path) -> Iterator[Record]:
    """Pass the records on, each when it is in the file, one JSON object per line, in place of what the file held.

    A run that ends early has written what it had measured.
    """
    with path.open("w", encoding="utf-8") as file:
        for record in records:
            file.write(json_line(record))
            file.flush()
            yield record


def json_line(record: Record) -> str:
    """A record as a line of text."""
    return json.dumps(record.as_json(), ensure_ascii=False, allow_nan=False) + "\n"


def read_records(path: Path) -> list[Record]:
    """The records of a file; empty lines are skipped.

    Raises:
        RecordError: the file cannot be read or has no records, or a line is none; names the file and the line.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise RecordError(f"{path}: expected a file of records: {error}") from error
    records = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            records.append(Record.from_json(json.loads(line)))
        except json.JSONDecodeError as error:
            raise RecordError(f"{path}, line {number}: expected JSON: {error}") from error
        except RecordError as error:
            raise RecordError(f"{path}, line {number}: {error}") from error
    if not records:
        raise RecordError(f"{path}: expected at least one record, got none")
    return records


def measured(records: Sequence[Record]) -> list[Record]:
    """The records with a latency."""
    return [record for record in records if record.latency is not None]


def _decode(expected: Any, value: Any, where: str) -> Any:
    """`value` as the annotated type, which is built of dataclasses, mappings, unions with None and plain types."""
    if get_origin(expected) in (Union, types.UnionType):
        if value is None:
            return None
        (expected,) = (option for option in get_args(expected) if option is not type(None))
    if is_dataclass(expected):
        return _decode_dataclass(expected, value, where)
    if get_origin(expected) is Mapping:
        of = get_args(expected)[1]
        return {name: _decode(of, entry, f"{where}.{name}") for name, entry in _object(value, where).items()}
    if expected is float and type(value) is int:
        return float(value)
    if type(value) is not expected:
        raise RecordError(f"{where}: expected {expected.__name__}, got {value!r}")
    return value


def _decode_dataclass(expected: Any, value: Any, where: str) -> Any:
    given, hints = _object(value, where), get_type_hints(expected)
    known = [field.name for field in fields(expected)]
    if unknown := sorted(given.keys() - set(known)):
        raise RecordError(f"{where}: expected only {', '.join(known)}, got {', '.join(unknown)} too")
    if missing := [name for name in known if name not in given]:
        raise RecordError(f"{where}: expected {', '.join(missing)}, which it lacks")
    return expected(**{name: _decode(hints[name], entry, f"{where}.{name}") for name, entry in given.items()})


def _object(value: Any, where: str) -> Mapping[str, Any]:
    if not isinstance(value, Mapping):
        raise RecordError(f"{where}: expected an object, got {value!r}")
    return value

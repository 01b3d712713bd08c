"""Plots of records: latency and memory over tokens or experts, or implementation by implementation."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from mumoe_fast.bench.charts import Axis, Plot, Series, chart
from mumoe_fast.bench.report import Markup, paragraph
from mumoe_fast.bench.suite.records import Record

COLOURS = {"ours": (0, 4), "reference": (1, 6), "dense": (7,), "dense MoE": (3,), "sparse MoE": (2, 5)}
SCALES = {"tokens": "tokens", "num_experts": "experts"}  # what a group of workloads may run over, and what it is called


@dataclass(frozen=True)
class Measure:
    """A figure of a record that is plotted, with its spread and its floor where it has them."""

    axis: Axis
    value: Callable[[Record], float | None]
    spread: Callable[[Record], tuple[float, float] | None]
    floor: Callable[[Record], float | None]


def _seconds_spread(record: Record) -> tuple[float, float] | None:
    return None if record.latency is None else (record.latency.p20, record.latency.p80)


LATENCY = Measure(
    Axis("latency", "s", "log"),
    lambda record: record.seconds,
    _seconds_spread,
    lambda record: None if record.floor is None else record.floor.seconds,
)
MEMORY = Measure(
    Axis("peak memory", "B", "log"),
    lambda record: record.peak_bytes or None,  # none at all has no place on a log axis
    lambda record: None,
    lambda record: None,
)


def plots(records: Sequence[Record], title: str) -> Iterator[Markup]:
    """Of one group, dtype and direction: latency beside peak memory, factorisation by factorisation.

    Over tokens or experts where the workloads differ in those, otherwise workload by workload.
    """
    scale = scale_of(records)
    if scale is None:
        for workload in dict.fromkeys(record.workload for record in records):
            rows = [record for record in records if record.workload == workload]
            yield paragraph(workload)
            yield chart(_ranking(rows, LATENCY), _ranking(rows, MEMORY), title=f"{title}, {workload}")
        return
    for factorization in dict.fromkeys(r.factorization for r in records if r.factorization is not None):
        rows = [record for record in records if record.factorization in (None, factorization)]
        yield chart(_curves(rows, LATENCY, scale), _curves(rows, MEMORY, scale), title=f"{title}, {factorization}")


def scale_of(records: Sequence[Record]) -> str | None:
    """The field over which the workloads can be plotted: each has another value of it, and there are at least three."""
    workloads = {record.workload: record for record in records}.values()
    for name in SCALES:
        values = {getattr(record, name) for record in workloads}
        if len(values) == len(workloads) >= 3:
            return name
    return None


def _curves(records: Sequence[Record], measure: Measure, scale: str) -> Plot:
    """One curve per implementation, and the floor of ours."""
    series: list[Series] = []
    for place, name in enumerate(dict.fromkeys(record.implementation for record in records)):
        rows = sorted((r for r in records if r.implementation == name), key=lambda r: int(getattr(r, scale)))
        series.append(_series(records, rows, measure, place, lambda row: getattr(row, scale)))
    floors = {getattr(r, scale): floor for r in records if r.factorization and (floor := measure.floor(r)) is not None}
    if floors:
        series.append(Series("floor of the μMoE", sorted(floors.items()), COLOURS["dense"][0], "dotted"))
    return Plot(series, Axis(SCALES[scale], scale="log2"), measure.axis)


def _series(
    records: Sequence[Record],
    rows: Sequence[Record],
    measure: Measure,
    place: int,
    x: Callable[[Record], float],
) -> Series:
    """One implementation's curve; colours and lines tell the kinds apart, markers all of them."""
    first = rows[0]
    same_kind = dict.fromkeys(record.implementation for record in records if record.kind == first.kind)
    among, colours = list(same_kind).index(first.implementation), COLOURS[first.kind]
    found = [(x(row), value, measure.spread(row)) for row in rows if (value := measure.value(row)) is not None]
    return Series(
        first.implementation,
        [(at, value) for at, value, _ in found],
        colours[among % len(colours)],
        "dashed" if among >= len(colours) else "solid",
        place,
        [(value, value) if spread is None else spread for _, value, spread in found],
    )


def _ranking(records: Sequence[Record], measure: Measure) -> Plot:
    """One line per implementation, fastest first; a marker per kind."""
    rows = sorted(records, key=lambda record: record.seconds or 0.0)
    axis = Axis("", categories=[row.implementation for row in rows])
    series = []
    for place, (kind, colours) in enumerate(COLOURS.items()):
        found = [
            (value, float(at), measure.spread(row))
            for at, row in enumerate(rows)
            if row.kind == kind and (value := measure.value(row)) is not None
        ]
        if found:
            points = [(value, at) for value, at, _ in found]
            spread = [(value, value) if spread is None else spread for value, _, spread in found]
            series.append(Series(kind, points, colours[0], "none", place, spread))
    floors = [(floor, float(at)) for at, row in enumerate(rows) if (floor := measure.floor(row)) is not None]
    if floors:
        series.append(Series("floor", floors, COLOURS["dense"][0], "none", len(COLOURS)))
    return Plot(series, measure.axis, axis)


def over_floor(records: Sequence[Record], title: str) -> Markup:
    """Of one dtype and direction: how many times the floor the best of each kind takes, workload by workload."""
    workloads = list(dict.fromkeys(record.workload for record in records))
    series = []
    for place, kind in enumerate(("ours", "reference", "dense")):
        points = [
            (min(times), float(at))
            for at, workload in enumerate(workloads)
            if (times := [r.over_floor for r in records if r.workload == workload and r.kind == kind and r.over_floor])
        ]
        if points:
            series.append(Series(kind, points, COLOURS[kind][0], "none", place))
    axis = Axis("times the floor", scale="log")
    return chart(Plot(series, axis, Axis("", categories=workloads)), title=title)

"""The suite's report: one page with what was measured beside what, and how far that is from what the machine can do."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import groupby
from pathlib import Path
from statistics import median

from mumoe_fast.bench import report as html
from mumoe_fast.bench.report import Markup, interval, quantity
from mumoe_fast.bench.suite.plots import over_floor, plots
from mumoe_fast.bench.suite.records import Record, measured
from mumoe_fast.bench.suite.rivals import Rivals, fastest
from mumoe_fast.bench.suite.table import left_out

TITLE = "μMoE layers beside what they could replace"
RATIOS = ("×\u00a0dense", "×\u00a0reference", "×\u00a0floor")
HOW_TO_READ = (
    "Latencies are medians of calls that took turns with the other sides' in random order, with the spread from the "
    "20th to the 80th percentile of the bursts; forward is without gradients, forward+backward with those of the input "
    "and of every parameter. × dense and × reference: that latency over the dense layer's, and over the fastest "
    "reference's of the same factorisation; below 1 is faster. × floor: over the least time in which the machine could "
    "do it, the fewest operations at the rate of a large GEMM or the fewest bytes at copying speed, whichever is "
    "longer. Peak memory: what one call holds beyond parameters and input."
)
PREDICTED = (
    "Nothing in this section was measured. For GPUs that are not here, the time is predicted from operations, bytes "
    "and launches at the rates of their data sheets, which nothing reaches: a GPU is slower than this. "
    "The peak of memory is counted from what a call allocates."
)


def write_report(records: Sequence[Record], path: Path) -> None:
    """Write the page."""
    path.write_text(page(records), encoding="utf-8")


def page(records: Sequence[Record]) -> str:
    """The report on the records of one or several runs."""
    here, elsewhere = measured(records), [record for record in records if record.predicted]
    return html.page(
        TITLE,
        html.paragraph(lead(records, here), "lead"),
        *(html.paragraph(text, "warning") for text in wrong(records)),
        html.section("In short", html.card(summary(here)), html.paragraph(HOW_TO_READ, "note")),
        *(group_section(group, rows) for group, rows in parts(here, lambda record: record.group)),
        html.section("How far from the floor", *floor_cards(here)),
        html.section("Left out", *left_out_part(records)),
        *([predictions(elsewhere)] if elsewhere else []),
        html.section("Machine", *machines(records)),
    )


def parts(records: Sequence[Record], key: Callable[[Record], str]) -> Iterator[tuple[str, list[Record]]]:
    """Records that share a key, in the order in which the keys come first."""
    order = list(dict.fromkeys(map(key, records)))
    for name, rows in groupby(sorted(records, key=lambda record: order.index(key(record))), key):
        yield name, list(rows)


def side(record: Record) -> str:
    """The dtype and direction, under which latencies can be compared."""
    return f"{record.dtype}, {record.direction}"


def lead(records: Sequence[Record], here: Sequence[Record]) -> str:
    """What was measured where."""
    if not records:
        return "Nothing was measured."
    run = records[0].run
    where = f"{run.machine.get('device', 'an unnamed device')}, {run.date[:10]}"
    workloads, sides = len({record.workload for record in here}), len({record.implementation for record in here})
    dtypes = ", ".join(dict.fromkeys(record.dtype for record in here))
    return f"{len(here)} measurements: workloads {workloads}, implementations {sides}, in {dtypes}; {where}."


def wrong(records: Sequence[Record]) -> Iterator[str]:
    """What was not timed because its results are wrong."""
    for reason, rows in parts([r for r in records if r.wrong], lambda r: f"{r.implementation}: {r.refused}"):
        where = "; ".join(f"{record.workload}, {side(record)}" for record in rows)
        yield f"Wrong, and therefore not timed: {reason} ({where})"


def summary(here: Sequence[Record]) -> Markup:
    """The best of ours in every group, dtype and direction: the middle workload, and the range over the workloads."""
    rivals, rows = Rivals(here), list[list[str]]()
    for group, of_group in parts(here, lambda record: record.group):
        rows.append([group])
        for name, of_side in parts(of_group, side):
            best = [fastest(one, "ours") for _, one in parts(of_side, lambda record: record.workload)]
            ours = [record for record in best if record is not None]
            ratios = (rivals.times_dense, rivals.times_reference, lambda record: record.over_floor)
            rows.append([name, f"{len(ours)}", *(spread_of([ratio(record) for record in ours]) for ratio in ratios)])
    return html.table(("best of ours", "workloads", *RATIOS), rows)


def spread_of(ratios: Sequence[float | None]) -> str:
    """The median, and between which values all lie."""
    known = [ratio for ratio in ratios if ratio is not None]
    if not known:
        return "–"
    middle = times(median(known))
    return middle if len(known) == 1 else f"{middle} ({times(min(known))}–{times(max(known))})"


def group_section(group: str, records: Sequence[Record]) -> Markup:
    """Plots and figures of one group of workloads."""
    rivals = Rivals(records)
    cards = [
        html.card(
            html.heading(name),
            *plots(rows, f"{group}, {name}"),
            html.folded("Every figure", latency_table(rows, rivals)),
        )
        for name, rows in parts(records, side)
    ]
    return html.section(group, *cards, html.card(html.folded("FLOPs, counted three ways", *flops_part(records))))


def latency_table(records: Sequence[Record], rivals: Rivals) -> Markup:
    """Latency, its ratios, and memory."""
    replayed = any(record.graph_latency for record in records)
    headers = ["", "median", "p20–p80", "minimum", *(["CUDA graph"] if replayed else [])]
    headers += [*RATIOS, "GEMM rate", "copy rate", "peak memory"]
    rows: list[list[str]] = []
    for workload, of_workload in parts(records, lambda record: record.workload):
        rows.append([workload])
        for record in of_workload:
            latency, graph = record.latency, record.graph_latency
            assert latency is not None
            rows.append(
                [
                    record.implementation,
                    quantity(latency.p50, "s"),
                    interval(latency.p20, latency.p80, "s"),
                    quantity(latency.minimum, "s"),
                    *(
                        [shown(None if graph is None else graph.p50, lambda value: quantity(value, "s"))]
                        if replayed
                        else []
                    ),
                    shown(rivals.times_dense(record), times),
                    shown(rivals.times_reference(record), times),
                    shown(record.over_floor, times),
                    shown(record.fraction_of_flops, "{:.0%}".format),
                    shown(record.fraction_of_bytes, "{:.0%}".format),
                    shown(record.peak_bytes, lambda value: quantity(value, "B")),
                ]
            )
    return html.table(headers, rows)


def shown(value: float | None, text: Callable[[float], str]) -> str:
    """A value as text; a dash where there is none."""
    return "–" if value is None else text(value)


def times(ratio: float) -> str:
    """A ratio to three digits."""
    return f"{ratio:.3g}" if ratio < 999.5 else f"{ratio:,.0f}"


def flops_part(records: Sequence[Record]) -> Iterator[Markup]:
    """Parameters and operations of one call, the same in every dtype; and why counts differ where they do."""
    rows, explained = list[list[str]](), dict[tuple[str, str], list[str]]()
    distinct = {(r.workload, r.direction, r.implementation): r for r in records if r.flops is not None}
    for title, of_title in parts(list(distinct.values()), lambda record: f"{record.workload}, {record.direction}"):
        rows.append([title])
        for record in of_title:
            assert record.flops is not None
            counts = (record.flops.formula, record.flops.torch, record.flops.fvcore)
            shares = (record.parameters, *counts)
            rows.append([record.implementation, *(shown(count, "{:,.0f}".format) for count in shares)])
            if record.flops.explanation:
                sides = explained.setdefault((title, record.flops.explanation), [])
                sides.append(record.implementation)
    yield html.table(("a multiply-add counts as 2", "parameters", "by formula", "by torch", "by fvcore"), rows)
    for (title, text), sides in explained.items():
        yield html.paragraph(f"{title}, {', '.join(sides)}: {text}", "note")


def floor_cards(here: Sequence[Record]) -> Iterator[Markup]:
    """The best of each kind over its floor, dtype by dtype and direction by direction."""
    for name, rows in parts([record for record in here if record.over_floor is not None], side):
        yield html.card(html.heading(name), over_floor(rows, f"Times the floor, {name}"))
    yield html.paragraph(
        "The floor: the fewest operations at the measured rate of a large GEMM in the dtype, or the fewest bytes "
        "(parameters, input, output and what the backward pass needs, once each) at the measured copying speed. Each "
        "kind is set against the floor of its own layer. Below 1: from call to call its bytes stay in the caches, "
        "unlike those of the copy.",
        "note",
    )


def left_out_part(records: Sequence[Record]) -> Iterator[Markup]:
    """What could not run here, and why."""
    rows = [[name, reason, "; ".join(workloads)] for (name, reason), workloads in left_out(records).items()]
    if rows:
        yield html.card(html.table(("implementation", "why", "where"), rows, names=3))
    else:
        yield html.paragraph("Everything that was asked for was measured.")


def predictions(records: Sequence[Record]) -> Markup:
    """Times on GPUs that are not here (how many times the floor that is), and the memory that a call takes."""
    gpus = list(dict.fromkeys(record.predicted_for or "" for record in records))
    rows: list[list[str]] = []
    for workload, of_workload in parts(records, lambda record: record.workload):
        rows.append([workload])
        for name, of_name in parts(of_workload, lambda record: f"{record.implementation}, {side(record)}"):
            found = {record.predicted_for: record for record in of_name}
            peak = max((record.peak_bytes or 0 for record in of_name), default=0)
            rows.append([name, *(predicted(found.get(gpu)) for gpu in gpus), quantity(peak, "B") if peak else "–"])
    card = html.card(html.table(("predicted (× floor)", *gpus, "peak memory"), rows))
    return html.section("Predicted, not measured", html.paragraph(PREDICTED, "warning"), card)


def predicted(record: Record | None) -> str:
    """A prediction as text."""
    if record is None or record.predicted_seconds is None:
        return "–"
    return f"{quantity(record.predicted_seconds, 's')} ({shown(record.over_floor, times)})"


def machines(records: Sequence[Record]) -> Iterator[Markup]:
    """Every run's machine, versions and ceilings."""
    for _, rows in parts(records, lambda record: repr(record.run)):
        run = rows[0].run
        ceilings = {
            record.dtype: record.ceilings for record in rows if record.ceilings is not None and not record.predicted
        }
        facts = [
            ("date", run.date),
            ("commit", run.commit or "not known"),
            ("seed", str(run.seed)),
            *run.machine.items(),
            ("versions", ", ".join(f"{name} {version}" for name, version in run.versions.items())),
            *((f"GEMM, {dtype}", quantity(found.flops_per_second, "FLOP/s")) for dtype, found in ceilings.items()),
            *(("copying", quantity(found.bytes_per_second, "B/s")) for found in list(ceilings.values())[:1]),
        ]
        yield html.card(html.definitions(facts))

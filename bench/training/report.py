"""The figures of training steps: a table for people and JSON lines for programs."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict

from rich import box
from rich.console import Console
from rich.table import Table

from mumoe_fast.bench.report import quantity
from mumoe_fast.bench.training.steps import Result
from mumoe_fast.bench.training.workloads import DENSE, GOAL, NATIVE, Precision

HEADERS = (
    "model",
    "MLPs",
    "paper",
    "in all",
    "paper",
    "step",
    "tokens/s",
    "of dense (quartiles)",
    "goal",
    "peak memory",
)
LEGEND = (
    "Whole steps of next-token training: forward, loss, backward, AdamW (fused), one context of {context:,} random "
    "tokens a step, {turns} steps of every model in turns and in random order, in one process. step and tokens/s: "
    "medians; of dense: tokens/s over the dense model's of the same turn, median and quartiles. peak memory: what a "
    "step holds beyond parameters and the optimiser's state, in a process of its own. Gates are random, as sparse as "
    "trained ones."
)
FORMS = {
    Precision.AUTOCAST: "bfloat16 by autocast, parameters in float32",
    Precision.BFLOAT16: "bfloat16 throughout, parameters too",
}


def show(results: Sequence[Result], console: Console) -> None:
    """A table for each precision, and which of them the goal is about."""
    for precision in dict.fromkeys(result.precision for result in results):
        chosen = [result for result in results if result.precision == precision]
        table = Table(title=FORMS[precision], title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
        for place, header in enumerate(HEADERS):
            table.add_column(header, justify="right" if place else "left")
        for result in chosen:
            table.add_row(*row(result), style="bold" if result.side.impl == NATIVE else None)
        console.print(table)
        for result in chosen:
            if result.refused is not None:
                console.print(f"{result.side}: {result.refused}", style="bold red", markup=False, highlight=False)
    first = results[0]
    turns = max(len(result.seconds) for result in results)
    console.print(LEGEND.format(context=first.shape.context, turns=turns), style="dim", highlight=False)
    console.print(f"The goal is about the precision in which the dense model is faster: {best_precision(results)}.")


def best_precision(results: Sequence[Result]) -> Precision:
    """The one in which the dense model has most tokens per second."""
    dense = [result for result in results if result.side.variant == DENSE]
    return max(dense, key=Result.tokens_per_second).precision


def row(result: Result) -> tuple[str, ...]:
    """One line of the table."""
    paper = [f"{millions:.1f} M" for millions in result.side.variant.paper or ()] or ["", ""]
    counts = [f"{number / 1e6:.1f} M" for number in (result.mlp_parameters, result.parameters)]
    start = (str(result.side), counts[0], paper[0], counts[1], paper[1])
    if result.refused is not None:
        return (*start, "refused", "", "", "", "")
    share = f"{result.of_dense():.3f} ({result.of_dense(0.25):.3f}–{result.of_dense(0.75):.3f})"
    goal = "" if result.met is None else f"≥ {GOAL:g}: {'yes' if result.met else 'no'}"
    seconds = quantity(result.shape.context / result.tokens_per_second(), "s")
    memory = quantity(result.peak_bytes or 0, "B")
    dense = result.side.variant == DENSE
    return (*start, seconds, f"{result.tokens_per_second():,.0f}", "" if dense else share, goal, memory)


def record(result: Result, facts: Mapping[str, str]) -> dict[str, object]:
    """One side in one precision."""
    common = {
        "workload": "training step",
        "model": result.side.variant.name,
        "implementation": result.side.impl,
        "precision": str(result.precision),
        "shape": asdict(result.shape),
        "parameters": result.parameters,
        "mlp_parameters": result.mlp_parameters,
        "paper_millions": result.side.variant.paper,
        "error_of_allowance": result.error_of_allowance,
    }
    if result.refused is not None:
        return {**common, "refused": result.refused, **facts}
    return {
        **common,
        "seconds": list(result.seconds),
        "tokens_per_second": result.tokens_per_second(),
        "of_dense": {f"p{round(100 * q)}": result.of_dense(q) for q in (0.25, 0.5, 0.75)},
        "goal": None if result.met is None else GOAL,
        "met": result.met,
        "peak_bytes": result.peak_bytes,
        **facts,
    }


def json_lines(results: Sequence[Result], facts: Mapping[str, str]) -> str:
    """All records, one a line."""
    return "".join(json.dumps(record(result, facts), ensure_ascii=False) + "\n" for result in results)

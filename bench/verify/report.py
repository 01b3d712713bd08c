"""What verify found, for people: the worst of every family, the worst rows, and how to see one of them again."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence

from rich import box
from rich.console import Console
from rich.table import Table

from mumoe_fast.bench.verify.compare import FACTOR, FLOOR, Comparison
from mumoe_fast.bench.verify.records import Row, worst_first

MOST_FAILED, MOST_PASSED = 30, 10  # rows shown
MOST_COMMANDS = 3
LEGEND = (
    "Largest error against float64, as a multiple of what the acceptance rule allows (1 passes); "
    "× eager: as a multiple of the error of eager torch."
)


def show(rows: Sequence[Row], console: Console, device: str | None = None) -> None:
    """The worst of every family, then the worst rows: those outside the rule or, if there are none, within it."""
    impls = list(dict.fromkeys(row.impl for row in rows))
    for impl in impls:
        console.print(_families([row for row in rows if row.impl == impl], impl))
    ordered = worst_first(rows)
    failed = [row for row in ordered if not row.passed]
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, collapse_padding=True, title="Worst first", title_justify="left")
    for header in ("case and result", "impl", "error", "× eager", "× allowed"):
        table.add_column(header, justify="left" if header in ("case and result", "impl") else "right", overflow="fold")
    shown = failed[:MOST_FAILED] or ordered[:MOST_PASSED]
    for row in shown:
        style = None if row.passed else "bold red"
        figures = f"{row.error:.2e}", _multiple(row.of_eager), _multiple(row.of_allowance)
        table.add_row(row.name, row.impl, *figures, style=style)
        if row.failure:
            table.add_row(f"  {row.failure}", "", "", "", "", style=style)
    console.print(table)
    console.print(LEGEND, style="dim", highlight=False)
    console.print("To see one of them again:", style="dim")
    for row in shown[: MOST_COMMANDS if failed else 1]:
        _command(row, device, console)
    verdict = (
        f"{len(failed)} of {len(rows)} results are outside the rule" if failed else f"All {len(rows)} results pass"
    )
    console.print(f"{verdict} ({', '.join(impls)}).", style="bold red" if failed else "bold green", highlight=False)


def _families(rows: Sequence[Row], impl: str) -> Table:
    """The worst multiple of the allowance of each family in each dtype, and how many results there are."""
    dtypes = list(dict.fromkeys(row.dtype for row in rows))
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, collapse_padding=True, title=impl, title_justify="left")
    table.add_column("family")
    for header in (*dtypes, "results"):
        table.add_column(header, justify="right")
    for family in dict.fromkeys(row.family for row in rows):
        mine = [row for row in rows if row.family == family]
        table.add_row(family, *(_worst(mine, dtype) for dtype in dtypes), f"{len(mine):,}")
    return table


def _worst(rows: Iterable[Row], dtype: str) -> str:
    multiples = [row.of_allowance for row in rows if row.dtype == dtype]
    if not multiples:
        return ""
    worst = max(multiples)
    return _multiple(worst) if worst <= 1 else f"[bold red]{_multiple(worst)}[/]"


def _multiple(value: float) -> str:
    return f"{value:.2f}" if value < 1000 else f"{value:.1e}"


def reproduce(row: Row, device: str | None = None) -> str:
    """The command that gives this row alone; `device` is the one that was asked for, if any was."""
    interpreted = "TRITON_INTERPRET=1 " if os.environ.get("TRITON_INTERPRET") == "1" and row.impl == "triton" else ""
    place = "" if device is None else f" --device {device}"
    pattern = row.name.replace(".", r"\.")
    return f"{interpreted}mumoe verify --impl {row.impl}{place} --only '^{pattern}{'' if row.failure else '$'}'"


def _command(row: Row, device: str | None, console: Console) -> None:
    console.print(f"  {reproduce(row, device)}", markup=False, highlight=False, soft_wrap=True)


def show_comparison(comparison: Comparison, console: Console, device: str | None = None) -> None:
    """What got worse and what is gone, by name."""
    for row, earlier in comparison.worse:
        line = f"worse: {row.impl} {row.name}: {earlier:.2f} of the allowance before, {row.of_allowance:.2f} now"
        console.print(line, style="bold red", markup=False, highlight=False, soft_wrap=True)
        _command(row, device, console)
    for name in comparison.gone:
        console.print(f"gone: {name}", style="bold red", markup=False, highlight=False, soft_wrap=True)
    verdict = "Something got worse" if not comparison.passed else "Nothing got worse"
    new = f", {comparison.new} are new" if comparison.new else ""
    meaning = f"beyond {FACTOR:g} times the earlier multiple of the allowance, and beyond {FACTOR * FLOOR:g}"
    console.print(
        f"{verdict}: {comparison.compared} results compared{new}. Worse is {meaning}.",
        style="bold green" if comparison.passed else "bold red",
        highlight=False,
    )

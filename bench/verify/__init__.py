"""The numerics suite as a command: every operator in every dtype, forward and every gradient, against float64.

    mumoe verify                                    # every implementation that runs here
    mumoe verify --impl native --only '^cp/.*/dz$'  # rows whose name matches
    mumoe verify --save before.jsonl                # … change a kernel, a compiler, a GPU …
    mumoe verify --compare before.jsonl             # names what got worse
    mumoe verify --compare baseline                 # against the runs that come with the library

The cases are data in `mumoe_fast.testing.cases`, the rule is `mumoe_fast.testing.acceptance`. `run` runs them,
`records` keeps the rows, `compare` says what worse means, `report` shows it. `quick_verify` is for other programs.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import torch
import typer

if TYPE_CHECKING:
    from collections.abc import Collection, Sequence

    from mumoe_fast.bench.verify.records import Row

BASELINE = "baseline"


def quick_verify(
    impl: str, device: torch.device | None = None, dtypes: Sequence[torch.dtype] | None = None
) -> list[Row]:
    """What of the quick cases is outside the acceptance rule, worst first: nothing, if the implementation is right.

    Seconds, but for Triton's interpreter, which takes half a minute. Families and dtypes that the implementation does
    not have are left out.

    Args:
        impl: an implementation by name.
        device: where; the GPU if there is one, the CPU for native kernels.
        dtypes: all that it has, if not given.

    Raises:
        ValueError, RuntimeError: the implementation is unknown or cannot run here.
    """
    from mumoe_fast.bench.verify import run
    from mumoe_fast.bench.verify.records import worst_first

    where = run.places([impl], device)
    chosen = [(case, names) for case, names in run.selected(quick=True) if dtypes is None or case.dtype in dtypes]
    return worst_first(row for case, names in chosen for row in run.rows(case, names, where) if not row.passed)


def verify(
    impl: Annotated[
        list[str] | None, typer.Option(help="One or more of triton, native, reference; all that run.")
    ] = None,
    quick: Annotated[bool, typer.Option(help="Only a few cases of every family: seconds.")] = False,
    only: Annotated[str, typer.Option(help='A regular expression searched in "family/input/dtype/result".')] = "",
    device: Annotated[str | None, typer.Option(help="cpu or cuda; the GPU if there is one.")] = None,
    save: Annotated[Path | None, typer.Option(dir_okay=False, help="Write every row as JSON lines.")] = None,
    earlier: Annotated[
        str | None,
        typer.Option("--compare", help=f'A saved file, or "{BASELINE}": name what got worse since, and exit with 1.'),
    ] = None,
) -> None:
    """Check every operator's numerics, forward and every gradient, against float64 and the acceptance rule."""
    from rich.console import Console
    from rich.progress import MofNCompleteColumn, Progress, TimeElapsedColumn

    from mumoe_fast.bench.verify import run
    from mumoe_fast.bench.verify.compare import compare
    from mumoe_fast.bench.verify.records import facts, json_lines
    from mumoe_fast.bench.verify.report import show, show_comparison

    try:
        where = run.places(impl or (), None if device is None else torch.device(device))
        chosen = run.selected(only, quick)
        before = None if earlier is None else _load(earlier, where)
    except re.error as error:
        raise typer.BadParameter(f"--only: expected a regular expression, got {only!r}: {error}") from error
    except (ValueError, RuntimeError, OSError) as error:
        raise typer.BadParameter(str(error)) from error
    console = Console()
    found: list[Row] = []
    with Progress(*Progress.get_default_columns(), MofNCompleteColumn(), TimeElapsedColumn(), console=console) as bar:
        task = bar.add_task("", total=len(chosen))
        for case, names in chosen:
            bar.update(task, description=case.name)
            found += run.rows(case, names, where)
            bar.advance(task)
    if not found:
        raise typer.BadParameter(f"--only: no result of {', '.join(where)} matches {only!r}")
    show(found, console, device)
    passed = all(row.passed for row in found)
    if before is not None:
        tried = {case.name for case, _ in chosen} if quick else None
        comparison = compare(found, _within(before, where, only, tried))
        show_comparison(comparison, console, device)
        passed = passed and comparison.passed
    if save is not None:
        save.write_text(json_lines(found, facts(set(where.values()))), encoding="utf-8")
    if not passed:
        raise typer.Exit(1)


def _load(source: str, impls: Collection[str]) -> list[Row]:
    """A file's rows, or those of the implementations' baselines."""
    from mumoe_fast.bench.verify.compare import BASELINES
    from mumoe_fast.bench.verify.records import load

    if source != BASELINE:
        return load(Path(source))
    return [row for impl in impls for row in load(BASELINES / f"{impl}.jsonl")]


def _within(rows: Sequence[Row], impls: Collection[str], only: str, cases: Collection[str] | None) -> list[Row]:
    """The rows that a run of these implementations, this pattern and these cases (all, if None) should have."""
    return [
        row for row in rows if row.impl in impls and re.search(only, row.name) and (cases is None or row.case in cases)
    ]

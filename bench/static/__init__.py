"""Evidence without a GPU: compile every kernel for every architecture, read the binaries, count the bytes, judge.

    mumoe static            # bfloat16 for every architecture, and every dtype for sm_90
    mumoe static --quick    # one column: sm_90, bfloat16
    mumoe static --whole    # every dtype for every architecture, and whether every exemption is still needed

`bytes` defines what is counted, `rules` what must hold, `cases` what is checked, `launches` how many a layer takes,
`memory` what a block holds.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import torch
import typer

if TYPE_CHECKING:
    from mumoe_fast.bench.static.report import Report

DTYPES = ("float32", "float16", "bfloat16")
ARCHITECTURES = ("sm_80", "sm_90", "sm_100", "gfx942")
QUICK_DTYPE, QUICK_ARCHITECTURE = "bfloat16", "sm_90"


def run(
    grid: Mapping[str, Sequence[str]],
    *,
    processes: int | None = None,
    on_start: Callable[[int], None] = lambda total: None,
    on_done: Callable[[], None] = lambda: None,
) -> Report:
    """Compile each dtype for its architectures and count bytes.

    `on_start` gets the number of steps, `on_done` is called after each.
    """
    from mumoe_fast.bench.static.bytes import count
    from mumoe_fast.bench.static.cases import cases
    from mumoe_fast.bench.static.compile import Job, collect, compile_all
    from mumoe_fast.bench.static.report import Report

    jobs: dict[str, Job] = {}
    for dtype, architectures in grid.items():
        for job in collect(cases([getattr(torch, dtype)]), architectures):
            known = jobs.setdefault(job.key, job)
            if known is not job:  # some kernels are the same for every dtype
                known.uses.extend(job.uses)
    on_start(len(jobs) + len(grid))
    with ThreadPoolExecutor(1) as thread:  # each count is a process of its own, beside the compilers
        counts = [thread.submit(count, getattr(torch, dtype)) for dtype in grid]
        for counting in counts:
            counting.add_done_callback(lambda _: on_done())
        results = compile_all(list(jobs.values()), processes=processes, on_done=on_done)
        whole = all({*grid.get(dtype, ())} >= {*ARCHITECTURES} for dtype in DTYPES)
        return Report(results, [traffic for counting in counts for traffic in counting.result()], whole)


def static(
    quick: Annotated[bool, typer.Option("--quick", help="Only sm_90 in bfloat16.")] = False,
    whole: Annotated[bool, typer.Option("--whole", help="Every dtype for every target; an hour on two cores.")] = False,
    dtype: Annotated[list[str] | None, typer.Option(help=f"One or more of {', '.join(DTYPES)}.")] = None,
    target: Annotated[list[str] | None, typer.Option(help=f"One or more of {', '.join(ARCHITECTURES)}.")] = None,
    processes: Annotated[int | None, typer.Option(min=1, help="Compilers at a time; one per core.")] = None,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write every finding as JSON.")] = None,
    excess_file: Annotated[
        Path | None, typer.Option("--excess", help="Write how many times the least each kernel moves, as JSON.")
    ] = None,
    markdown_file: Annotated[Path | None, typer.Option("--markdown", help="Write the tables as Markdown.")] = None,
) -> None:
    """Compile every kernel for GPUs that need not be here, and check registers, instructions and bytes."""
    if find_spec("triton") is None:
        raise typer.BadParameter("Triton is not installed: pip install 'mumoe-fast[triton]'")
    from rich.console import Console
    from rich.progress import MofNCompleteColumn, Progress, TimeElapsedColumn

    from mumoe_fast.bench.static import launches, memory
    from mumoe_fast.bench.static.bytes import worst_excess
    from mumoe_fast.bench.static.report import markdown, print_report

    dtypes = _chosen("--dtype", dtype, DTYPES, [QUICK_DTYPE] if quick else DTYPES)
    architectures = _chosen("--target", target, ARCHITECTURES, [QUICK_ARCHITECTURE] if quick else ARCHITECTURES)
    everywhere = whole or bool(dtype) or bool(target)  # else the other dtypes on the architecture that matters most
    grid = {name: architectures if everywhere or name == QUICK_DTYPE else [QUICK_ARCHITECTURE] for name in dtypes}
    console = Console()
    with Progress(*Progress.get_default_columns(), MofNCompleteColumn(), TimeElapsedColumn(), console=console) as bar:
        task = bar.add_task("compile and count", total=None)
        report = run(
            grid,
            processes=processes,
            on_start=lambda total: bar.update(task, total=total),
            on_done=lambda: bar.advance(task),
        )
    console.print(launches.table())
    console.print(memory.table())
    print_report(report, console)
    if json_file is not None:
        json_file.write_text(json.dumps(report.as_json(), indent=1))
    if excess_file is not None:
        excess_file.write_text(json.dumps(worst_excess(report.traffics), indent=1) + "\n")
    if markdown_file is not None:
        markdown_file.write_text(f"{launches.markdown()}\n{memory.markdown()}\n{markdown(report)}")
    if report.violations or report.stale:
        raise typer.Exit(1)


def _chosen(option: str, given: Sequence[str] | None, known: Sequence[str], default: Sequence[str]) -> Sequence[str]:
    for name in given or ():
        if name not in known:
            raise typer.BadParameter(f"{option}: expected one of {', '.join(known)}, got {name}")
    return given or default

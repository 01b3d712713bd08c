"""Looks for faster settings on this GPU: tiles, and the sizes from which the vendor's GEMM contracts.

    mumoe tune                          # everything, most important first
    mumoe tune --only CP --out found.json

Tiles (`search`): steps away from a kernel's configuration, as long as a step pays. Then crossovers (`crossover`): both
ways at several sizes. A candidate is judged by the acceptance rule on few tokens before it is timed, and one that does
not compile, does not fit or is wrong is passed over. What was found holds for what is looked for after it, and is
printed in the form of `kernels.configs`, for a person to put there.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import torch
import typer

if TYPE_CHECKING:
    from rich.console import Console

    from mumoe_fast.bench.tune.crossover import Contest
    from mumoe_fast.bench.tune.entries import Entry


def command(
    only: Annotated[str, typer.Option(help='A regular expression searched in "table and sizes".')] = "",
    out: Annotated[Path | None, typer.Option(dir_okay=False, help="Write what was found as JSON.")] = None,
) -> None:
    """Look for faster settings of the Triton kernels on the current GPU."""
    from rich.console import Console

    from mumoe_fast.bench.tune.crossover import CONTESTS
    from mumoe_fast.bench.tune.entries import ENTRIES

    entries = [entry for entry in ENTRIES if re.search(only, entry.name, re.IGNORECASE)]
    contests = [contest for contest in CONTESTS if re.search(only, contest.name, re.IGNORECASE)]
    if not entries and not contests:
        raise typer.BadParameter(f"--only: nothing matches {only!r}")
    if not torch.cuda.is_available():
        raise typer.BadParameter("expected a GPU, and PyTorch finds none")
    records = []
    for record in _found(entries, contests, Console()):
        records.append(record)
        if out is not None:  # after each, so that an end before the last keeps the others
            out.write_text(json.dumps(records, indent=1), encoding="utf-8")


def _found(entries: list[Entry], contests: list[Contest], console: Console) -> Iterator[dict[str, object]]:
    """One record for each, printed as it comes."""
    from mumoe_fast.bench.suite.timing import clock_of
    from mumoe_fast.bench.tune.ahead import compiling_ahead
    from mumoe_fast.bench.tune.crossover import contest
    from mumoe_fast.bench.tune.search import tune
    from mumoe_fast.kernels.configs import architecture

    device = torch.device("cuda")
    name, clock = architecture(device), clock_of(device)
    with ExitStack() as settings, console.status("") as status:
        with compiling_ahead(device) as ahead:
            for entry in entries:
                one = tune(entry, device, clock, ahead, lambda what: status.update(what))
                settings.enter_context(entry.using(name, one.after))
                console.print(str(one), markup=False, highlight=False)
                yield one.record(name)
        for each in contests:
            status.update(each.name)
            crossing = contest(each, device, clock)
            settings.enter_context(each.using(name, crossing.after(each.current(name))))
            console.print(str(crossing), markup=False, highlight=False)
            yield crossing.record(name)

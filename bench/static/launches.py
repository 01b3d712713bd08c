"""Launches of whole layers on a GPU, forward and in a training step: what few tokens cost there.

Counted from a trace without data (`suite.prediction`): our kernels, and PyTorch's own operators that are no views.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from rich.table import Table

from mumoe_fast.bench.markdown import table as markdown_table
from mumoe_fast.bench.step import FORWARD, STEP
from mumoe_fast.bench.suite.implementations import IMPLEMENTATIONS, LABELS, Case
from mumoe_fast.bench.suite.prediction import trace
from mumoe_fast.bench.suite.workloads import ALL, Workload

ARCHITECTURE, DTYPE = "sm_90", torch.bfloat16
WORKLOADS = (
    Workload("layer 768→1000, N = 128", "launches", 1, (768, 1000), (128,), ALL),
    Workload("layer 768→1000, N = 128 × 4", "launches", 1, (768, 1000), (128, 4), ALL),
    Workload("GPT-2 block, N = 256", "launches", 1, (768, 3072, 768), (256,), ALL),
)
TITLE = f"Launches of one input, {ARCHITECTURE}, bfloat16: forward / forward+backward"

Counts = Mapping[str, tuple[int, int]]  # forward, forward+backward by factorisation


def count(workload: Workload) -> Counts:
    """The launches of a workload by the Triton kernels."""
    found = {}
    for side in IMPLEMENTATIONS:
        if side.impl == "triton" and side.factorization is not None and side.applies(workload):
            forward, step = (
                sum(operation.launches for operation in trace(Case(workload, side, DTYPE, direction), ARCHITECTURE))
                for direction in (FORWARD, STEP)
            )
            found[side.factorization] = forward, step
    return found


def rows() -> list[list[str]]:
    """The table's cells: a row for each workload, a column for each factorisation."""
    counts = {workload.name: count(workload) for workload in WORKLOADS}
    return [[name, *(f"{f} / {s}" for f, s in (found[each] for each in LABELS))] for name, found in counts.items()]


def table() -> Table:
    """For the terminal."""
    made = Table("one input", *LABELS.values(), title=TITLE, title_justify="left")
    for row in rows():
        made.add_row(*row)
    return made


def markdown() -> str:
    """For the README."""
    return f"{TITLE}.\n\n{markdown_table(('one input', *LABELS.values()), rows())}"

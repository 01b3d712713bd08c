"""The most memory that a training step of a block holds at once on a GPU: ours, the reference's and the dense one's.

Counted without a GPU and without data (`suite.allocation`), beyond parameters and input.
"""

from __future__ import annotations

from rich.table import Table

from mumoe_fast.bench.markdown import table as markdown_table
from mumoe_fast.bench.report import quantity
from mumoe_fast.bench.static.launches import ARCHITECTURE, DTYPE
from mumoe_fast.bench.step import STEP
from mumoe_fast.bench.suite.allocation import peak_bytes
from mumoe_fast.bench.suite.implementations import DENSE, IMPLEMENTATIONS, LABELS, Case
from mumoe_fast.bench.suite.workloads import Workload

RANKS = (("cp", None), ("tr", None), ("tt", None), ("tucker", None))
WORKLOAD = Workload("GPT-2 block, N = 256, 24,576 tokens", "memory", 24_576, (768, 3072, 768), (256,), RANKS)
TITLE = f"Peak memory of a training step of a {WORKLOAD.name}, {ARCHITECTURE}, bfloat16"
COLUMNS = ("factorisation", "ours", "× dense", "× reference")


def rows() -> list[list[str]]:
    """The table's cells: a row for each factorisation, and the dense block's."""
    sides = {side.name: side for side in IMPLEMENTATIONS}

    def peak(name: str) -> int:
        return peak_bytes(Case(WORKLOAD, sides[name], DTYPE, STEP), ARCHITECTURE)

    dense, found = peak(DENSE), []
    for factorization, _ in RANKS:
        ours, reference = (peak(f"{LABELS[factorization]} {impl}") for impl in ("triton", "reference"))
        shares = f"{ours / dense:.2f}", f"{ours / reference:.2f}"
        found.append([LABELS[factorization], quantity(ours, "B"), *shares])
    return [*found, [DENSE, quantity(dense, "B"), "", ""]]


def table() -> Table:
    """For the terminal."""
    made = Table(*COLUMNS, title=TITLE, title_justify="left")
    for row in rows():
        made.add_row(*row)
    return made


def markdown() -> str:
    """For the README."""
    return f"{TITLE}.\n\n{markdown_table(COLUMNS, rows())}"

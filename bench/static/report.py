"""The findings: a table for the terminal, JSON with every compilation, Markdown for the README."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import triton
from rich.console import Console
from rich.table import Table

from mumoe_fast.bench.markdown import table as markdown_table
from mumoe_fast.bench.static.bytes import ARCHITECTURE, Traffic
from mumoe_fast.bench.static.compile import Job, Result, blocks_of
from mumoe_fast.bench.static.occupancy import ARCHITECTURES, occupancy
from mumoe_fast.bench.static.rules import Exemption, Violation, judge_binary, judge_bytes, stale
from mumoe_fast.bench.static.sass import Binary


@dataclass(frozen=True)
class Report:
    """Everything that was found; `whole` is whether on every architecture and in every dtype."""

    results: Sequence[Result]
    traffics: Sequence[Traffic]
    whole: bool = False

    @property
    def findings(self) -> list[Violation]:
        """Broken rules, excused or not."""
        found = [violation for result in self.results for violation in judge_binary(result)]
        return [*found, *judge_bytes(self.traffics, ARCHITECTURE)]

    @property
    def violations(self) -> list[Violation]:
        """Broken rules without a reason."""
        return [violation for violation in self.findings if violation.reason is None]

    @property
    def stale(self) -> list[Exemption]:
        """Exemptions without need; of a part of the grid none can be known to be."""
        return stale(self.findings) if self.whole else []

    def summary(self) -> list[Row]:
        """One row per kernel, architecture and dtype: the most registers and shared memory, the least occupancy."""
        groups: dict[tuple[str, str, str], list[tuple[Job, Binary]]] = defaultdict(list)
        for result in self.results:
            if result.binary is not None:
                for dtype in sorted({use.dtype for use in result.job.uses}):
                    groups[result.job.kernel, result.job.architecture, dtype].append((result.job, result.binary))
        return [Row.of(*key, binaries) for key, binaries in groups.items()]

    def as_json(self) -> dict[str, Any]:
        """Plain data, every compilation and every launch."""
        return {
            "triton": triton.__version__,
            "binaries": [_as_json(result) for result in self.results],
            "bytes": [{**asdict(traffic), "excess": traffic.excess} for traffic in self.traffics],
            "findings": [asdict(finding) for finding in self.findings],
        }


def _occupancy(job: Job, binary: Binary) -> float:
    return occupancy(ARCHITECTURES[job.architecture], blocks_of(job, binary), job.warps)


def _short(kernel: str) -> str:
    return kernel.removeprefix("_").removesuffix("_kernel")


def _workload(case: str) -> str:
    return case.rpartition(": ")[2]


@dataclass(frozen=True)
class Row:
    """One line of the table: the worst over a kernel's specialisations."""

    kernel: str
    architecture: str
    dtype: str
    compilations: int
    registers: int
    spilled: int
    shared: int
    blocks: int
    occupancy: float
    tensor_core: str
    wide_share: float

    @classmethod
    def of(cls, kernel: str, architecture: str, dtype: str, binaries: Sequence[tuple[Job, Binary]]) -> Row:
        """Summarise."""
        kinds = sorted({kind for _, binary in binaries for kind in binary.tensor_core})
        return cls(
            kernel,
            architecture,
            dtype,
            len(binaries),
            max(binary.registers for _, binary in binaries),
            max(binary.spilled for _, binary in binaries),
            max(binary.shared for _, binary in binaries),
            min(blocks_of(job, binary) for job, binary in binaries),
            min(_occupancy(job, binary) for job, binary in binaries),
            ", ".join(kinds) or "–",
            max(binary.wide_share for _, binary in binaries),
        )

    def cells(self) -> list[str]:
        """For either table."""
        return [
            _short(self.kernel),
            self.architecture,
            self.dtype,
            str(self.compilations),
            str(self.registers),
            str(self.spilled),
            f"{self.shared / 1024:.0f}",
            str(self.blocks),
            f"{self.occupancy:.0%}",
            self.tensor_core,
            f"{self.wide_share:.0%}",
        ]


RESOURCE_COLUMNS = (
    *("kernel", "target", "dtype", "built", "registers", "spilled", "shared KiB"),
    *("blocks/SM", "occupancy", "tensor cores", "16-byte loads"),
)
BYTE_COLUMNS = ("kernel", "workload", "dtype", "dot", "asked KiB", "tiling KiB", "distinct KiB", "excess")


def _as_json(result: Result) -> dict[str, Any]:
    job, binary = result.job, result.binary
    row: dict[str, Any] = {
        "kernel": job.kernel,
        "architecture": job.architecture,
        "blocks": dict(job.blocks),
        "options": dict(job.options),
        "uses": [asdict(use) for use in job.uses],
        "error": result.error,
    }
    if binary is not None:
        resident = {"resident_blocks": blocks_of(job, binary), "occupancy": _occupancy(job, binary)}
        row |= {**asdict(binary), "wide_share": binary.wide_share, **resident}
    return row


def _byte_cells(traffics: Iterable[Traffic]) -> list[list[str]]:
    """The worst launch of every kernel and workload."""
    worst: dict[tuple[str, str], Traffic] = {}
    for traffic in traffics:
        key = traffic.kernel, _workload(traffic.case)
        if key not in worst or traffic.excess > worst[key].excess:
            worst[key] = traffic
    return [
        [
            _short(traffic.kernel),
            _workload(traffic.case),
            traffic.dtype,
            "yes" if traffic.has_dot else "no",
            *(f"{number / 1024:,.0f}" for number in (traffic.requested, traffic.per_program, traffic.distinct)),
            f"{traffic.excess:.2f}×",
        ]
        for traffic in worst.values()
    ]


def _reasons(findings: Iterable[Violation]) -> list[str]:
    """The excused findings, one line per rule, kernel and reason."""
    places: dict[tuple[str, str, str], set[str]] = defaultdict(set)
    for finding in findings:
        if finding.reason is not None:
            places[finding.rule, _short(finding.kernel), finding.reason].add(f"{finding.architecture} {finding.dtype}")
    return [
        f"{rule}, {kernel} ({', '.join(sorted(where))}): {reason}" for (rule, kernel, reason), where in places.items()
    ]


def _grouped(violations: Iterable[Violation]) -> list[str]:
    """One line per rule, kernel, target, dtype and detail, with the cases where it happens."""
    cases: dict[tuple[str, ...], list[str]] = defaultdict(list)
    for one in violations:
        cases[one.rule, one.kernel, one.architecture, one.dtype, one.detail].append(one.case)
    return [
        f"{rule}: {kernel} on {architecture}, {dtype}: {detail}; in {'; '.join(where)}"
        for (rule, kernel, architecture, dtype, detail), where in cases.items()
    ]


def print_report(report: Report, console: Console) -> None:
    """Tables, then reasons, then violations."""
    for title, columns, rows in (
        ("Compiled kernels: the worst over all sizes", RESOURCE_COLUMNS, [row.cells() for row in report.summary()]),
        (f"Bytes on few tiles, {ARCHITECTURE} blocks", BYTE_COLUMNS, _byte_cells(report.traffics)),
    ):
        table = Table(*columns, title=title, title_justify="left")
        for row in rows:
            table.add_row(*row)
        console.print(table)
    for reason in _reasons(report.findings):
        console.print(f"allowed: {reason}", style="yellow", highlight=False, markup=False)
    for violation in _grouped(report.violations):
        console.print(f"VIOLATION {violation}", style="bold red", highlight=False, markup=False)
    for exemption in report.stale:
        console.print(f"STALE {exemption}: excuses nothing there", style="bold red", highlight=False, markup=False)
    kinds = f"{len(report.results)} compilations, {len(report.traffics)} counted launches"
    console.print(f"{kinds}, {len(report.violations)} violations, {len(report.stale)} stale exemptions")


def markdown(report: Report, dtypes: Sequence[str] = ("bfloat16",)) -> str:
    """The same tables for the README, of the dtypes that matter there."""
    resources = [row.cells() for row in report.summary() if row.dtype in dtypes]
    lines = [
        f"Triton {triton.__version__}; for each kernel the worst over all sizes.",
        "",
        markdown_table(RESOURCE_COLUMNS, resources),
        f"Bytes of one launch on few tiles, with the blocks of {ARCHITECTURE}.",
        "",
        markdown_table(BYTE_COLUMNS, _byte_cells(report.traffics)),
    ]
    if reasons := _reasons(report.findings):
        lines += [f"- {reason}" for reason in reasons]
    return "\n".join(lines) + "\n"

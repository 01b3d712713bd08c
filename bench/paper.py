"""`mumoe bench paper`: the paper's parameter and FLOP counts beside ours, and its Figure 8."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich import box
from rich.console import Console
from rich.table import Table

from mumoe_fast import rank
from mumoe_fast.bench import report as html
from mumoe_fast.bench.charts import Axis, Plot, Series, chart
from mumoe_fast.bench.paper_tables import Entry, PaperTable, tables

HEADERS = ("", "count", "paper", "here", "here − paper", "agrees")
LEGEND = (
    "agrees: our count rounds to the figure that the paper prints, or is the value of the formula that it prints. "
    "A multiply-add is one FLOP; parameters and FLOPs include gate and bias where a table does not say otherwise."
)
CHANNEL = (512, 2048)  # the first layer of Mixer S/16's channel-mixing block
CHANNEL_RANK = {"cp": (384,), "tr": (4, 4, 97)}  # Table 4's, matched to the block at N = 64


def paper(
    out: Annotated[Path | None, typer.Option(file_okay=False, help="A folder for paper.html, with Figure 8.")] = None,
) -> None:
    """Show the parameter and FLOP counts of the paper's Tables 4, 5, 6, 8 and 10 beside the library's own."""
    console = Console()
    found = tables()
    for one in found:
        show(one, console)
    console.print(LEGEND, style="dim", highlight=False)
    console.print(figure_8_remark(), highlight=False)
    if out is not None:
        out.mkdir(parents=True, exist_ok=True)
        file = out / "paper.html"
        file.write_text(page(found), encoding="utf-8")
        console.print(f"The tables and Figure 8 are in {file}", markup=False, highlight=False)


def show(one: PaperTable, console: Console) -> None:
    """One table on the console, with its remarks and the notes on what differs."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for header in HEADERS:
        table.add_column(header, justify="left" if header in HEADERS[:2] else "right")
    for entry in one.entries:
        table.add_row(*cells(entry), style="yellow" if entry.agrees is False else None)
    console.print(f"{one.name}. {one.caption}", style="bold", highlight=False)
    console.print(table)
    for remark in (*one.remarks, *notes(one)):
        console.print(remark, markup=False, highlight=False)
    console.print()


def cells(entry: Entry) -> list[str]:
    """An entry as text, one cell for each of `HEADERS`."""
    difference = "" if entry.difference is None else number(entry.difference, sign=True)
    verdict = {True: "yes", False: "no", None: ""}[entry.agrees]
    return [entry.row, entry.column, entry.printed, number(entry.ours), difference, verdict]


def number(value: float, sign: bool = False) -> str:
    """Whole numbers in full, others to two decimals."""
    plus = "+" if sign and value else ""
    return f"{value:{plus},.0f}" if value == round(value) else f"{value:{plus},.2f}"


def notes(one: PaperTable) -> list[str]:
    """What is to be said about single figures."""
    return [f"{entry.row}, {entry.column}: {entry.note}" for entry in one.entries if entry.note]


def page(found: list[PaperTable]) -> str:
    """All of it as one page."""
    return html.page(
        "The paper's counts, and ours",
        html.paragraph("Multilinear Mixture of Experts, arXiv 2402.12550: Tables 4, 5, 6, 8, 10 and Figure 8.", "lead"),
        html.paragraph(LEGEND, "note"),
        *(
            html.section(
                f"{one.name}. {one.caption}",
                html.card(html.table(HEADERS, [cells(entry) for entry in one.entries], names=2)),
                *(html.paragraph(note, "warning") for note in notes(one)),
                *(html.paragraph(remark, "note") for remark in one.remarks),
            )
            for one in found
        ),
        html.section(
            "Figure 8. Parameters as a function of the number of experts",
            html.card(
                chart(
                    Plot(figure_8(), Axis("experts N", scale="log2"), Axis("parameters", scale="log")),
                    title="Figure 8",
                )
            ),
            html.paragraph(figure_8_remark(), "note"),
        ),
    )


def figure_8() -> list[Series]:
    """Parameters of one layer over N from 2 to 16,384, without gate and bias."""
    experts = [2**power for power in range(1, 15)]
    curves = {"dense/sparse MoE": "full", "CPμMoE": "cp", "TRμMoE": "tr"}
    series = [
        Series(name, [(N, layer(factorization, N)) for N in experts], colour, marker=colour)
        for colour, (name, factorization) in enumerate(curves.items())
    ]
    linear = rank.dense_parameters(CHANNEL, bias=False)
    return [*series, Series("linear layer", [(N, linear) for N in experts], 7, "dashed")]


def layer(factorization: str, N: int) -> int:
    """Parameters of Figure 8's layer."""
    return rank.ExpertShape(*CHANNEL, (N,), factorization, CHANNEL_RANK.get(factorization, ()), bias=False).parameters


def figure_8_remark() -> str:
    """What Figure 8 is drawn for, and where its curves cross."""
    crossing = next(N for N in range(2, 16_385) if layer("tr", N) < layer("cp", N))
    return (
        "Figure 8: the first layer of Mixer S/16's channel-mixing block, 512 → 2048, without gate and bias, at the "
        f"ranks of Table 4 (CP {CHANNEL_RANK['cp'][0]}, TR {CHANNEL_RANK['tr']}; the paper names R₁ = R₂ = 4 alone). "
        f"TR has fewer parameters than CP from N = {crossing} on; the paper suggests it from about 128. At N = 16,384 "
        f"a dense MoE has {layer('full', 16_384) / layer('cp', 16_384):,.0f} times CP's parameters and "
        f"{layer('full', 16_384) / layer('tr', 16_384):,.0f} times TR's."
    )

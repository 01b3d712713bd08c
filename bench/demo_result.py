"""What the demonstration found out, and how it is shown: on the console and as a page of HTML."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from rich import box
from rich.console import Console
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from mumoe_fast.bench import report as html
from mumoe_fast.bench.charts import Axis, Plot, Series, chart
from mumoe_fast.bench.experts import ExpertText
from mumoe_fast.examples._training import Record, TrainConfig
from mumoe_fast.examples.train_gpt import WINDOWS, ModelConfig

SAME = "same"  # in place of a figure: this row is the implementation of the row above and was not measured again


@dataclass(frozen=True)
class Row:
    """One contender of the table; without figures it is the same implementation as the row above."""

    name: str
    parameters: int
    flops_per_token: float | None = None
    tokens_per_second: tuple[float, float, float] | None = None  # quartiles
    peak_bytes: int | None = None
    held_out: float | None = None

    def cells(self, quartiles: bool = False) -> list[str]:
        """The row as text, one cell for each of `HEADERS`."""
        speed = SAME
        if self.tokens_per_second is not None:
            low, middle, high = self.tokens_per_second
            speed = f"{middle:,.0f} ({low:,.0f}–{high:,.0f})" if quartiles else f"{middle:,.0f}"
        return [
            self.name,
            f"{self.parameters:,}",
            SAME if self.flops_per_token is None else f"{self.flops_per_token / 1e6:,.2f} M",
            speed,
            SAME if self.peak_bytes is None else f"{self.peak_bytes / 1e6:,.0f} MB",
            SAME if self.held_out is None else f"{self.held_out:.4f}",
        ]


HEADERS = ["MLPs", "parameters", "FLOPs/token", "tokens/s", "peak memory", "held-out loss"]
LEGEND = (
    "FLOPs: of the matrix products forward, a multiply-add counted as 2. Tokens/s: of training steps, the contenders "
    "taking turns in short bursts, median. Peak memory: of a training step, with parameters and optimiser state. "
    "Loss: nats per byte on all of the held-out text."
)


@dataclass(frozen=True)
class Demo:
    """Everything that the demonstration found out."""

    model: ModelConfig
    training: TrainConfig
    text_bytes: tuple[int, int]  # trained on, held out
    done: int  # steps; training.steps were asked for
    records: dict[str, list[Record]]
    rows: list[Row]
    remarks: list[str]
    layer: int
    experts: list[ExpertText]
    machine: list[tuple[str, str]]

    @property
    def interruption(self) -> str | None:
        """What to say of a run that was stopped early."""
        if self.done == self.training.steps:
            return None
        return f"Training was stopped after {self.done} of {self.training.steps} steps; all that follows is for those."


def title(expert: ExpertText) -> str:
    """A line above an expert's text."""
    return f"Expert {expert.expert}: active on {expert.active:.1%} of the bytes, {expert.share:.1%} of all coefficients"


def show(demo: Demo, console: Console) -> None:
    """The table and the experts, on the console."""
    if demo.interruption:
        console.print(demo.interruption, style="bold yellow", highlight=False)
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, collapse_padding=True)
    for header in HEADERS:
        table.add_column(header, justify="left" if header == HEADERS[0] else "right")
    for row in demo.rows:
        table.add_row(*row.cells())
    console.print(table)
    console.print(LEGEND, style="dim", highlight=False)
    for remark in demo.remarks:
        console.print(remark, markup=False, highlight=False)
    if demo.experts:
        console.print(f"\nThree experts of layer {demo.layer}, and the held-out text with their largest coefficients:")
    for expert in demo.experts:
        lines = Text("\n").join(
            Text.assemble(
                (f"{snippet.coefficient:.2f}  ", "dim"), snippet.before, (snippet.marked, "bold reverse"), snippet.after
            )
            for snippet in expert.snippets
        )
        console.print(Panel(lines, title=title(expert), title_align="left", border_style="dim"))


def page(demo: Demo) -> str:
    """The report."""
    model, training = demo.model, demo.training
    lead = (
        f"Two GPTs of {model.layers} layers and width {model.width}, one with dense MLPs and one with μMoE MLPs of "
        f"{model.experts} experts and the same parameter count, trained side by side on the same batches: "
        f"{training.batch} × {model.context} bytes a step, {demo.done} steps; {demo.text_bytes[0]:,} bytes of text to "
        f"train on and {demo.text_bytes[1]:,} held out."
    )
    losses = Plot(loss_curves(demo.records), Axis("step"), Axis("loss, nats per byte"))
    return html.page(
        "μMoE and dense, side by side",
        html.paragraph(lead, "lead"),
        *([html.paragraph(demo.interruption, "warning")] if demo.interruption else []),
        html.section(
            "Results",
            html.card(html.table(HEADERS, [row.cells(quartiles=True) for row in demo.rows])),
            *(html.paragraph(remark) for remark in demo.remarks),
            html.paragraph(LEGEND + " Quartiles in brackets.", "note"),
        ),
        html.section(
            "Loss",
            html.card(chart(losses, title="Loss curves")),
            html.paragraph(
                "Training loss is a running mean, drawn from a twentieth of the steps on; held-out loss is on "
                f"{WINDOWS} windows spread over the held-out text.",
                "note",
            ),
        ),
        html.section(
            f"What experts of layer {demo.layer} respond to",
            html.paragraph(
                "Of the experts that are used, the three whose coefficients sit on the fewest bytes, and the held-out "
                "text where each one's coefficient (the number in front) is largest, at the marked byte.",
                "note",
            ),
            *map(expert_card, demo.experts),
        ),
        html.section("Machine", html.card(html.definitions(demo.machine))),
    )


def expert_card(expert: ExpertText) -> html.Markup:
    """One expert's text."""
    lines = [html.marked_text(f"{s.coefficient:.2f}", s.before, s.marked, s.after) for s in expert.snippets]
    return html.card(html.heading(title(expert)), *lines)


def loss_curves(run: Mapping[str, Sequence[Record]]) -> list[Series]:
    """Smoothed training loss and held-out points of each model.

    The first twentieth of the steps, in which the loss falls from that of a uniform guess, would squeeze all others.
    """
    curves = []
    for colour, (name, records) in enumerate(run.items()):
        smooth = running_mean([record.loss for record in records])
        drawn = list(zip(records, smooth, strict=True))[len(records) // 20 :]
        train = [(float(record.step), value) for record, value in drawn]
        points = [(float(record.step), record.figures["held_out"]) for record in records if record.figures]
        curves.append(Series(f"{name}, training", train, colour, "faint"))
        curves.append(Series(f"{name}, held out", points, colour, marker=0))
    return curves


def running_mean(values: Sequence[float], memory: float = 0.9) -> list[float]:
    """An exponential running mean without bias towards its start."""
    means, total, weight = [], 0.0, 0.0
    for value in values:
        total, weight = memory * total + value, memory * weight + 1
        means.append(total / weight)
    return means

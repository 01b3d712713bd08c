"""Charts as inline SVG: drawn by matplotlib, coloured and lettered by the page that they stand in, light or dark.

matplotlib draws with placeholder colours, one for each colour of the page's style sheet; in the SVG they become that
style sheet's variables. Text stays text. Every marked point tells its values on hover.
"""

from __future__ import annotations

import io
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import sha256
from importlib.util import find_spec
from itertools import chain
from typing import TYPE_CHECKING, Any, Literal
from xml.etree import ElementTree

from mumoe_fast.bench.report import COLOURS, FONTS, SERIES_COLOURS, Markup, paragraph, quantity

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

WIDTH, WIDE, HEIGHT = 760, 960, 380  # user units of the SVG, in which text is 12 high; wide: of several plots
ROW_HEIGHT = 26  # of one category
MARKERS = "oDs^v<>p"
MISSING = "Charts need matplotlib: pip install matplotlib."


@dataclass(frozen=True)
class Series:
    """One curve: how its points are joined and, by a number of `MARKERS`, marked.

    `spread` is the interval around each point's value: along y, or along x where the y axis has categories.
    """

    name: str
    points: Sequence[tuple[float, float]]
    colour: int
    line: Literal["solid", "faint", "dashed", "dotted", "none"] = "solid"
    marker: int | None = None
    spread: Sequence[tuple[float, float]] = ()


@dataclass(frozen=True)
class Axis:
    """What one direction shows; `unit` is written with SI prefixes, "" is a plain number.

    "log" has ticks at powers of ten, "log2" at powers of two. With `categories` the values are places in that list,
    which is read from the top.
    """

    label: str
    unit: str = ""
    scale: Literal["linear", "log", "log2"] = "linear"
    categories: Sequence[str] = ()

    def show(self, value: float) -> str:
        """A value of this axis for people."""
        if self.categories:
            return self.categories[round(value)]
        return quantity(value, self.unit) if self.unit else f"{value:,.5g}" if value % 1 else f"{value:,.0f}"


@dataclass(frozen=True)
class Plot:
    """Curves over one pair of axes."""

    series: Sequence[Series]
    x: Axis
    y: Axis

    @property
    def empty(self) -> bool:
        """Whether there is nothing to draw."""
        return not any(one.points for one in self.series)


def chart(*plots: Plot, title: str) -> Markup:
    """Panels side by side under one legend; where there is nothing to draw or to draw with, a line that says so.

    A name that several plots have is one entry of the legend. Plots with categories have the same ones.
    """
    plots = tuple(plot for plot in plots if not plot.empty)
    if not plots:
        return paragraph("Nothing was recorded.", "note")
    if find_spec("matplotlib") is None:
        return paragraph(MISSING, "warning")
    return _inline(_draw(plots), plots, title)


# Drawing


def standalone(drawn: Markup) -> str | None:
    """A chart as a file of its own, in the reader's light or dark colours; None where nothing was drawn."""
    if not drawn.startswith("<svg"):
        return None
    style = f"<style>{COLOURS} svg {{ background: var(--card); {FONTS} }}</style>"
    head, rest = drawn.split(">", 1)
    return f'{head} xmlns="http://www.w3.org/2000/svg">{style}{rest}'


_PLACEHOLDERS = {  # a colour that matplotlib is given: the page's variable
    "#010101": "--ink",
    "#020202": "--soft",
    "#030303": "--line",
    "#040404": "--card",
    **{f"#0501{i:02x}": f"--series{i}" for i in range(SERIES_COLOURS)},
}
_INK, _SOFT, _LINE, _CARD, *_SERIES = _PLACEHOLDERS
_STYLE: dict[Any, Any] = {  # matplotlib spells out every key's type
    "svg.fonttype": "none",
    "svg.hashsalt": "mumoe-fast",
    "font.size": 12,
    "text.parse_math": False,
    "text.color": _SOFT,
    "axes.labelcolor": _SOFT,
    "axes.edgecolor": _LINE,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": _LINE,
    "xtick.color": _LINE,
    "ytick.color": _LINE,
    "xtick.labelcolor": _SOFT,
    "ytick.labelcolor": _SOFT,
    "legend.frameon": False,
}


def _draw(plots: Sequence[Plot]) -> str:
    """The chart as matplotlib writes it."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    names = {one.name for plot in plots for one in plot.series}
    categories = plots[0].y.categories
    width = WIDTH if len(plots) == 1 else WIDE
    fitting = max(1, width // (58 + 8 * max(map(len, names))))
    rows = math.ceil(len(names) / fitting)
    columns = math.ceil(len(names) / rows)  # no more than those rows need: it is filled column by column
    height = 20 * rows + (70 + ROW_HEIGHT * len(categories) if categories else HEIGHT)
    with rc_context(_STYLE):
        figure = Figure(figsize=(width / 72, height / 72), dpi=72, layout="constrained")
        handles = {}
        every = figure.subplots(1, len(plots), sharey=bool(categories), squeeze=False)[0]
        for number, (plot, axes) in enumerate(zip(plots, every)):
            points = [point for one in plot.series for point in one.points]
            _set_axis(axes, "x", plot.x, [x for x, _ in points])
            _set_axis(axes, "y", plot.y, [y for _, y in points])
            for place, one in enumerate(plot.series):
                (handle,) = _plot(axes, one, sideways=bool(categories))
                layer = 3 if one.line == "faint" else 4  # and in each the first on top; spreads are below, at 2
                handle.set(gid=_group(number, place), zorder=layer - place / len(plot.series))
                handles[one.name] = handle
        if len(handles) > 1 or not categories:
            figure.legend(handles.values(), handles, loc="outside upper left", ncols=columns, handlelength=2.2)
        return _svg(figure)


def _group(plot: int, place: int) -> str:
    """What the group of a series' marks is called in the SVG."""
    return f"plot{plot}-series{place}"


def _set_axis(axes: Axes, name: Literal["x", "y"], axis: Axis, values: Sequence[float]) -> None:
    from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, MaxNLocator, NullLocator

    ruler = axes.xaxis if name == "x" else axes.yaxis
    axes.set(**{f"{name}label": axis.label})
    if axis.categories:
        ruler.set_major_locator(FixedLocator(range(len(axis.categories))))
        axes.set(**{f"{name}lim": (len(axis.categories) - 0.5, -0.5)})
    elif axis.scale == "linear":
        ruler.set_major_locator(MaxNLocator(8, steps=[1, 2, 5, 10]))
    else:
        low, high = min(values), max(values)
        base, room = (2, 1.15) if axis.scale == "log2" else (10, max(1.4, 1.8 / math.sqrt(high / low)))
        axes.set(**{f"{name}scale": "log", f"{name}lim": (low / room, high * room)})
        few = axis.scale == "log" and high / low < 1e3
        ruler.set_major_locator(LogLocator(base, subs=(1, 2, 5) if few else (1,), numticks=7))
        ruler.set_minor_locator(NullLocator())
    ruler.set_major_formatter(FuncFormatter(lambda value, _: axis.show(value)))


def _plot(axes: Axes, one: Series, sideways: bool) -> list[Line2D]:
    """One series, with its spread behind it."""
    colour, faint = _SERIES[one.colour % len(_SERIES)], one.line == "faint"
    x, y = [x for x, _ in one.points], [y for _, y in one.points]
    drawn = axes.plot(
        x,
        y,
        label=one.name,
        color=colour,
        linewidth=1.2 if faint else 1.8,
        alpha=0.5 if faint else None,
        linestyle="solid" if faint else one.line,
        marker=None if one.marker is None else MARKERS[one.marker % len(MARKERS)],
        markersize=8,
        markeredgecolor=_CARD,
        markeredgewidth=1.2,
        clip_on=False,
    )
    if one.spread:
        lines, at = (axes.hlines, y) if sideways else (axes.vlines, x)
        low, high = zip(*one.spread)
        lines(at, low, high, colors=colour, linewidth=4, alpha=0.35, zorder=2)
    return drawn


def _svg(figure: Figure) -> str:
    written = io.StringIO()
    metadata = dict.fromkeys(("Date", "Creator", "Format", "Type"))
    figure.savefig(written, format="svg", transparent=True, metadata=metadata)
    return written.getvalue()


# From matplotlib's file to a part of the page


def _inline(source: str, plots: Sequence[Plot], title: str) -> Markup:
    """matplotlib's SVG without its head, its colours and its fonts, and with what the points tell on hover."""
    root = ElementTree.fromstring(source)
    for element in root.iter():
        element.tag = _local(element.tag)
        element.attrib = {_local(name): _page_style(value) for name, value in element.attrib.items()}
        for style in element.findall("{*}style"):
            element.remove(style)  # it is about every element of the page
    for number, plot in enumerate(plots):
        for place, one in enumerate(plot.series):
            _tell_values(root, _group(number, place), one, plot)
    _keep_used_ids(root, sha256(f"{title}{source}".encode()).hexdigest()[:8])
    root.attrib = {"class": "chart", "viewBox": root.attrib["viewBox"], "role": "img", "aria-label": title}
    return Markup(re.sub(r"\d+\.\d{3,}", lambda found: f"{float(found[0]):.2f}", ElementTree.tostring(root, "unicode")))


def _local(name: str) -> str:
    """A name without its namespace."""
    return name.rpartition("}")[2]


def _page_style(style: str) -> str:
    style = re.sub(r"(; )?font-family: [^;]*", "", style)
    return re.sub(r"#0[0-9a-f]{5}\b", lambda found: f"var({_PLACEHOLDERS[found[0]]})", style)


def _tell_values(root: ElementTree.Element, group: str, one: Series, plot: Plot) -> None:
    drawn = root.find(f".//g[@id='{group}']")
    assert drawn is not None
    for mark, point in zip(drawn.iter("use"), one.points):
        told = ElementTree.SubElement(mark, "title")
        told.text = f"{one.name}: {plot.y.show(point[1])} at {plot.x.show(point[0])}"


def _keep_used_ids(root: ElementTree.Element, prefix: str) -> None:
    """Only the ids that something refers to, made unique by a prefix."""
    values = chain.from_iterable(element.attrib.values() for element in root.iter())
    used = set(re.findall(r"#([\w-]+)", " ".join(values)))
    for element in root.iter():
        for name, value in element.attrib.items():
            element.attrib[name] = re.sub(r"^#|(?<=url\()#", f"#{prefix}-", value)
        if (given := element.attrib.pop("id", None)) in used:
            element.set("id", f"{prefix}-{given}")

"""Reports: one self-contained HTML file with tables and inline SVG charts, no scripts and nothing loaded from anywhere.

Every text argument is plain text and is escaped here; only what these functions return is markup (`Markup`).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from typing import Literal, NewType

Markup = NewType("Markup", str)

STYLE = """
:root { color-scheme: light dark; --ink: #1d2330; --soft: #5c6575; --line: #d9dde5; --page: #fbfbfc; --card: #ffffff;
  --mark: #ffe2a8; --series0: #3567b0; --series1: #c9541a; --series2: #2c8a5b; --series3: #8a4fb0; }
@media (prefers-color-scheme: dark) { :root { --ink: #e6e9ef; --soft: #9aa4b5; --line: #333b49; --page: #14171d;
  --card: #1b2028; --mark: #7a5410; --series0: #7fabeb; --series1: #f39a62; --series2: #6cc79a; --series3: #c79be6; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--page); color: var(--ink); line-height: 1.5;
  font-family: system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", sans-serif; }
main { max-width: 60rem; margin: 0 auto; padding: 2.5rem 1.25rem 4rem; }
h1 { font-size: 1.7rem; line-height: 1.2; margin: 0 0 .4rem; }
h2 { font-size: 1.15rem; margin: 2.4rem 0 .7rem; }
h3 { font-size: 1rem; margin: 0 0 .5rem; }
p { margin: .5rem 0; } .lead, .note { color: var(--soft); } .note { font-size: .88rem; }
.warning { border-left: 4px solid var(--series1); padding: .3rem .8rem; background: var(--card); }
.card { background: var(--card); border: 1px solid var(--line); border-radius: .6rem; padding: 1rem 1.1rem;
  margin: .8rem 0; overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; font-size: .93rem; }
th { color: var(--soft); font-weight: 600; font-size: .82rem; vertical-align: bottom; }
th, td { padding: .45rem .7rem; text-align: right; border-bottom: 1px solid var(--line); }
th:first-child, td:first-child { text-align: left; padding-left: 0; } tr:last-child td { border-bottom: 0; }
dl { display: grid; grid-template-columns: max-content 1fr; gap: .25rem 1.2rem; margin: 0; font-size: .93rem; }
dt { color: var(--soft); } dd { margin: 0; }
pre { margin: .35rem 0; font: .85rem/1.5 ui-monospace, SFMono-Regular, Menlo, Consolas, monospace;
  white-space: pre-wrap; overflow-wrap: anywhere; }
mark { background: var(--mark); color: inherit; border-radius: .2rem; padding: .05rem .1rem; font-weight: 700; }
.weight { color: var(--soft); margin-right: .8rem; }
svg { display: block; width: 100%; height: auto; font-size: 12px; } svg text { fill: var(--soft); }
.grid { stroke: var(--line); } .curve { fill: none; stroke-width: 1.8; stroke-linejoin: round; }
.faint { opacity: .45; stroke-width: 1.4; } .dot { stroke: var(--card); stroke-width: 1.5; }
""" + "\n".join(f".s{i} {{ stroke: var(--series{i}); }} .f{i} {{ fill: var(--series{i}); }}" for i in range(4))


@dataclass(frozen=True)
class Series:
    """One curve of a chart: "line", a "faint" line behind the others, or "dots" joined by a line."""

    name: str
    points: Sequence[tuple[float, float]]
    colour: int
    kind: Literal["line", "faint", "dots"] = "line"


@dataclass(frozen=True)
class Axis:
    """Maps values to pixels along one direction, with round numbers as ticks."""

    low: float
    high: float
    start: float
    end: float

    def __call__(self, value: float) -> float:
        """The pixel of a value."""
        return self.start + (value - self.low) / (self.high - self.low) * (self.end - self.start)

    def ticks(self, about: int = 6) -> list[float]:
        """Multiples of 1, 2 or 5 times a power of ten inside the axis, roughly `about` of them."""
        rough = (self.high - self.low) / about
        power = 10.0 ** math.floor(math.log10(rough))
        step = min((power * m for m in (1, 2, 5, 10)), key=lambda s: abs(s - rough))
        first, last = math.ceil(self.low / step - 1e-9), math.floor(self.high / step + 1e-9)
        return [round(i * step, 10) for i in range(first, last + 1)]


def join(*parts: Markup) -> Markup:
    """Markup one after another."""
    return Markup("\n".join(parts))


def paragraph(value: str, kind: Literal["", "lead", "note", "warning"] = "") -> Markup:
    """A paragraph."""
    return Markup(f'<p class="{kind}">{escape(value)}</p>' if kind else f"<p>{escape(value)}</p>")


def heading(value: str) -> Markup:
    """A small heading inside a card."""
    return Markup(f"<h3>{escape(value)}</h3>")


def card(*parts: Markup) -> Markup:
    """A framed box."""
    return Markup(f'<div class="card">{join(*parts)}</div>')


def section(title: str, *parts: Markup) -> Markup:
    """A titled part of the page."""
    return Markup(f"<section><h2>{escape(title)}</h2>\n{join(*parts)}</section>")


def table(headers: Sequence[str], rows: Sequence[Sequence[str]]) -> Markup:
    """A table: the first column is names, the others are numbers."""
    head = "".join(f"<th>{escape(header)}</th>" for header in headers)
    body = "\n".join("<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>" for row in rows)
    return Markup(f"<table><thead><tr>{head}</tr></thead>\n<tbody>{body}</tbody></table>")


def definitions(pairs: Sequence[tuple[str, str]]) -> Markup:
    """A list of names with what they are."""
    items = "\n".join(f"<dt>{escape(name)}</dt><dd>{escape(value)}</dd>" for name, value in pairs)
    return Markup(f"<dl>{items}</dl>")


def marked_text(weight: str, before: str, marked: str, after: str) -> Markup:
    """A line of text with one part of it marked, and a number in front."""
    line = f'<span class="weight">{escape(weight)}</span>{escape(before)}<mark>{escape(marked)}</mark>{escape(after)}'
    return Markup(f"<pre>{line}</pre>")


def line_chart(series: Sequence[Series], *, title: str, x_label: str, y_label: str) -> Markup:
    """Curves over a grid, with a legend; every dot tells its values on hover."""
    points = [point for one in series for point in one.points]
    if not points:
        return paragraph("Nothing was recorded.", "note")
    width, height = 760, 380
    x = _axis([p[0] for p in points] + [0.0], 60, width - 16, margin=0.0)
    y = _axis([p[1] for p in points], height - 48, 40, margin=0.04)
    drawn = [_grid(x, y, x_label, y_label, width, height), _legend(series, 60), *(_curve(one, x, y) for one in series)]
    label = escape(title, quote=True)
    return Markup(f'<svg viewBox="0 0 {width} {height}" role="img" aria-label="{label}">\n{join(*drawn)}\n</svg>')


def _axis(values: Sequence[float], start: float, end: float, margin: float) -> Axis:
    low, high = min(values), max(values)
    room = margin * (high - low) if high > low else max(abs(high), 1.0) / 2
    return Axis(low - room, high + room, start, end)


def _grid(x: Axis, y: Axis, x_label: str, y_label: str, width: int, height: int) -> Markup:
    parts = []
    for tick in y.ticks():
        at = f"{y(tick):.1f}"
        parts.append(f'<line class="grid" x1="{x.start:g}" x2="{x.end:g}" y1="{at}" y2="{at}"/>')
        parts.append(f'<text x="{x.start - 8:g}" y="{at}" dy=".35em" text-anchor="end">{tick:g}</text>')
    for tick in x.ticks(8):
        parts.append(f'<text x="{x(tick):.1f}" y="{y.start + 18:g}" text-anchor="middle">{tick:g}</text>')
    middle = (x.start + x.end) / 2
    parts.append(f'<text x="{middle:g}" y="{height - 8}" text-anchor="middle">{escape(x_label)}</text>')
    centre = (y.start + y.end) / 2
    parts.append(
        f'<text transform="translate(14 {centre:g}) rotate(-90)" text-anchor="middle">{escape(y_label)}</text>'
    )
    return Markup("\n".join(parts))


def _legend(series: Sequence[Series], left: float) -> Markup:
    parts, at = [], left
    for one in series:
        faint = " faint" if one.kind == "faint" else ""
        parts.append(f'<line class="curve s{one.colour}{faint}" x1="{at:g}" x2="{at + 22:g}" y1="16" y2="16"/>')
        if one.kind == "dots":
            parts.append(f'<circle class="dot f{one.colour}" cx="{at + 11:g}" cy="16" r="4"/>')
        parts.append(f'<text x="{at + 29:g}" y="16" dy=".35em">{escape(one.name)}</text>')
        at += 29 + 6.6 * len(one.name) + 22
    return Markup("\n".join(parts))


def _curve(one: Series, x: Axis, y: Axis) -> Markup:
    if not one.points:
        return Markup("")
    path = "M" + "L".join(f"{x(a):.1f},{y(b):.1f}" for a, b in one.points)
    faint = " faint" if one.kind == "faint" else ""
    parts = [f'<path class="curve s{one.colour}{faint}" d="{path}"/>']
    if one.kind == "dots":
        parts += [
            f'<circle class="dot f{one.colour}" cx="{x(a):.1f}" cy="{y(b):.1f}" r="4">'
            f"<title>{escape(one.name)}: {b:.4g} at {a:g}</title></circle>"
            for a, b in one.points
        ]
    return Markup("\n".join(parts))


def page(title: str, *parts: Markup) -> str:
    """The whole document."""
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8"/>\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1"/>\n'
        f"<title>{escape(title)}</title>\n<style>{STYLE}\n</style>\n</head>\n<body>\n<main>\n"
        f"<h1>{escape(title)}</h1>\n{join(*parts)}\n</main>\n</body>\n</html>\n"
    )

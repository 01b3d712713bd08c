"""Reports: one self-contained HTML file with tables and charts, no scripts and nothing loaded from anywhere.

Every text argument is plain text and is escaped here; only what these functions and `charts` return is `Markup`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from html import escape
from typing import Literal, NewType

Markup = NewType("Markup", str)

LIGHT = ("#3567b0", "#c9541a", "#2c8a5b", "#8a4fb0", "#0b7f8c", "#c03a78", "#86681a", "#5c6575")
DARK = ("#7fabeb", "#f39a62", "#6cc79a", "#c79be6", "#5cc8d6", "#f28bb9", "#d3b45c", "#a7b0be")
SERIES_COLOURS = len(LIGHT)
PREFIXES = {-9: "n", -6: "µ", -3: "m", 0: "", 3: "k", 6: "M", 9: "G", 12: "T", 15: "P"}


def _variables(colours: Sequence[str]) -> str:
    return " ".join(f"--series{i}: {colour};" for i, colour in enumerate(colours))


COLOURS = f"""
:root {{ color-scheme: light dark; --ink: #1d2330; --soft: #5c6575; --line: #d9dde5; --page: #fbfbfc; --card: #ffffff;
  --mark: #ffe2a8; {_variables(LIGHT)} }}
@media (prefers-color-scheme: dark) {{ :root {{ --ink: #e6e9ef; --soft: #9aa4b5; --line: #333b49; --page: #14171d;
  --card: #1b2028; --mark: #7a5410; {_variables(DARK)} }} }}
"""
FONTS = 'font-family: system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", sans-serif;'
STYLE = (
    COLOURS
    + f"""
* {{ box-sizing: border-box; }}
body {{ margin: 0; background: var(--page); color: var(--ink); line-height: 1.5; {FONTS} }}
"""
    + """
main { max-width: 68rem; margin: 0 auto; padding: 2.5rem 1.25rem 4rem; }
h1 { font-size: 1.7rem; line-height: 1.2; margin: 0 0 .4rem; }
h2 { font-size: 1.15rem; margin: 2.4rem 0 .7rem; }
h3 { font-size: 1rem; margin: 0 0 .5rem; }
p { margin: .5rem 0; max-width: 58rem; } .lead, .note { color: var(--soft); } .note { font-size: .88rem; }
.warning { border-left: 4px solid var(--series1); padding: .3rem .8rem; background: var(--card); }
.card { background: var(--card); border: 1px solid var(--line); border-radius: .6rem; padding: 1rem 1.1rem;
  margin: .8rem 0; overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; font-size: .88rem; }
th { color: var(--soft); font-weight: 600; font-size: .82rem; vertical-align: bottom; }
th, td { padding: .45rem .6rem; text-align: right; border-bottom: 1px solid var(--line); }
.name { text-align: left; } th:first-child, td:first-child { padding-left: 0; } tr:last-child td { border-bottom: 0; }
td { white-space: nowrap; } td.name { white-space: normal; min-width: 9.5rem; }
th[colspan] { padding-top: 1rem; color: var(--ink); }
summary { cursor: pointer; color: var(--soft); }
dl { display: grid; grid-template-columns: max-content 1fr; gap: .25rem 1.2rem; margin: 0; font-size: .93rem; }
dt { color: var(--soft); } dd { margin: 0; }
pre { margin: .35rem 0; font: .85rem/1.5 ui-monospace, SFMono-Regular, Menlo, Consolas, monospace;
  white-space: pre-wrap; overflow-wrap: anywhere; }
mark { background: var(--mark); color: inherit; border-radius: .2rem; padding: .05rem .1rem; font-weight: 700; }
.weight { color: var(--soft); margin-right: .8rem; }
.chart { display: block; width: 100%; height: auto; } .chart * { stroke-linejoin: round; }
"""
)


def quantity(value: float, unit: str) -> str:
    """A value to three digits with an SI prefix: 1.05 ms, 83.9 MB, 0 FLOP."""
    exponent = 3 * math.floor(math.log10(abs(float(f"{value:.3g}"))) / 3) if value else 0
    exponent = min(max(exponent, min(PREFIXES)), max(PREFIXES))
    scaled = value / 10.0**exponent
    digits = f"{scaled:,.0f}" if abs(scaled) >= 999.5 else f"{scaled:.3g}"
    return f"{digits} {PREFIXES[exponent]}{unit}".rstrip()


def interval(low: float, high: float, unit: str) -> str:
    """Two values with their unit, which is said once where both have the same: 0.98–1.20 ms."""
    first, last = quantity(low, unit), quantity(high, unit)
    number, _, prefixed = first.partition(" ")
    return f"{number}–{last}" if last.endswith(f" {prefixed}") else f"{first} – {last}"


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


def folded(summary: str, *parts: Markup) -> Markup:
    """Parts that are hidden until their summary is clicked."""
    return Markup(f"<details><summary>{escape(summary)}</summary>{join(*parts)}</details>")


def section(title: str, *parts: Markup) -> Markup:
    """A titled part of the page."""
    return Markup(f"<section><h2>{escape(title)}</h2>\n{join(*parts)}</section>")


def table(headers: Sequence[str], rows: Sequence[Sequence[str]], names: int = 1) -> Markup:
    """A table: `names` columns of names, then numbers. A row of one cell is a heading of those below it."""

    def row(cells: Sequence[str], tag: str) -> str:
        if len(cells) == 1 < len(headers):
            return f'<tr><th class="name" colspan="{len(headers)}">{escape(cells[0])}</th></tr>'
        kinds = [' class="name"' if place < names else "" for place in range(len(cells))]
        return "<tr>" + "".join(f"<{tag}{k}>{escape(cell)}</{tag}>" for k, cell in zip(kinds, cells)) + "</tr>"

    head, body = row(headers, "th"), "\n".join(row(cells, "td") for cells in rows)
    return Markup(f"<table><thead>{head}</thead>\n<tbody>{body}</tbody></table>")


def definitions(pairs: Sequence[tuple[str, str]]) -> Markup:
    """A list of names with what they are."""
    items = "\n".join(f"<dt>{escape(name)}</dt><dd>{escape(value)}</dd>" for name, value in pairs)
    return Markup(f"<dl>{items}</dl>")


def marked_text(weight: str, before: str, marked: str, after: str) -> Markup:
    """A line of text with one part of it marked, and a number in front."""
    line = f'<span class="weight">{escape(weight)}</span>{escape(before)}<mark>{escape(marked)}</mark>{escape(after)}'
    return Markup(f"<pre>{line}</pre>")


def page(title: str, *parts: Markup) -> str:
    """The whole document."""
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8"/>\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1"/>\n'
        f"<title>{escape(title)}</title>\n<style>{STYLE}\n</style>\n</head>\n<body>\n<main>\n"
        f"<h1>{escape(title)}</h1>\n{join(*parts)}\n</main>\n</body>\n</html>\n"
    )

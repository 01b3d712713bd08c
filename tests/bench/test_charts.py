"""Charts are drawn at their values, in the page's colours, with every text inside the drawing."""

import re
from xml.etree import ElementTree

import pytest

from mumoe_fast.bench import charts
from mumoe_fast.bench.charts import Axis, Plot, Series, chart, standalone
from mumoe_fast.bench.report import SERIES_COLOURS, STYLE, page
from tests.bench.test_report import Page, assert_self_contained

NUMBER = r"-?\d+(?:\.\d+)?"


def draw(*series: Series, x: Axis | None = None, y: Axis | None = None) -> ElementTree.Element:
    drawn = chart(Plot(series, x or Axis("step"), y or Axis("loss")), title="a chart")
    assert_self_contained(page("A page", drawn))
    return ElementTree.fromstring(drawn)


def curve(drawn: ElementTree.Element, colour: int = 0) -> list[tuple[float, float]]:
    """The corners of the path in a colour that has most of them, in the SVG's units; y grows downwards."""
    paths = [p.get("d", "") for p in drawn.iter("path") if f"stroke: var(--series{colour})" in p.get("style", "")]
    found = [[(float(x), float(y)) for x, y in re.findall(rf"({NUMBER}) ({NUMBER})", path)] for path in paths]
    return max(found, key=len)


def texts(drawn: ElementTree.Element) -> list[str]:
    return [text.text or "" for text in drawn.iter("text")]


def test_curves_are_drawn_at_their_values() -> None:
    (x0, y0), (x1, y1), (x2, y2) = curve(draw(Series("falls", [(0, 4.0), (5, 3.0), (10, 2.0)], 1)), 1)
    assert x0 < x1 < x2
    assert y0 < y1 < y2, "smaller values are lower on the page, at larger coordinates"
    assert (x1 - x0, y1 - y0) == (pytest.approx(x2 - x1, abs=0.03), pytest.approx(y2 - y1, abs=0.03))


def test_equal_factors_are_equal_steps_on_log_axes() -> None:
    series = Series("grows", [(1, 1e-5), (64, 1e-3), (4096, 1e-1)], 0)
    drawn = draw(series, x=Axis("tokens", scale="log2"), y=Axis("latency", "s", "log"))
    (x0, y0), (x1, y1), (x2, y2) = curve(drawn)
    assert (x1 - x0, y1 - y0) == (pytest.approx(x2 - x1, abs=0.03), pytest.approx(y2 - y1, abs=0.03))
    assert {"1", "64", "4,096", "10 µs", "1 ms", "100 ms", "tokens", "latency"} <= set(texts(drawn))


@pytest.mark.parametrize("high", [1.0, 1.3, 4.0, 90.0, 1e5])
def test_log_axes_of_any_range_have_ticks_to_read_them_by(high: float) -> None:
    drawn = draw(Series("a", [(1, 7e-4), (2, 7e-4 * high)], 0), y=Axis("latency", "s", "log"))
    assert 2 <= sum(bool(re.fullmatch(r"[\d.]+ [mµ]?s", text)) for text in texts(drawn)) <= 10


def test_every_mark_tells_its_values() -> None:
    drawn = draw(Series("one", [(0, 3.5), (10, 1.25)], 0, marker=0), Series("two", [(2048, 0.5)], 1, "none", 1))
    told = [title.text for title in drawn.iter("title")]
    assert told == ["two: 0.5 at 2,048", "one: 3.5 at 0", "one: 1.25 at 10"], "what is named first is drawn on top"


def test_categories_are_read_from_the_top() -> None:
    rows = ["GPT-2 block", "a layer"]
    series = Series("linear", [(2e-3, 0), (1e-3, 1)], 0, "none", 0, [(1.5e-3, 4e-3), (9e-4, 1.1e-3)])
    drawn = draw(series, x=Axis("latency", "s", "log"), y=Axis("", categories=rows))
    first, second = (mark for mark in drawn.iter("use") if mark.find("title") is not None)
    assert float(first.attrib["y"]) < float(second.attrib["y"])
    assert float(first.attrib["x"]) > float(second.attrib["x"])
    assert first.findtext("title") == "linear: GPT-2 block at 2 ms"
    assert set(rows) <= set(texts(drawn))
    (x0, y0), (x1, y1) = curve(drawn)
    assert y0 == y1 == pytest.approx(float(first.attrib["y"]), abs=0.02)
    assert x0 < float(first.attrib["x"]) < x1, "the spread lies around the point"


def test_colours_are_the_pages() -> None:
    """Nothing that matplotlib was given, and nothing of its own, is left: the page has a light and a dark set."""
    drawn = ElementTree.tostring(
        draw(*(Series(f"s{i}", [(0, i), (1, i + 1)], i, marker=i) for i in range(SERIES_COLOURS + 1))),
        encoding="unicode",
    )
    assert not re.search(r"#[0-9a-f]{6}\b", drawn)
    assert not re.search(r"font-family|\bblack\b|\bwhite\b", drawn)
    used = set(re.findall(r"var\((--\w+)\)", drawn))
    assert {f"--series{i}" for i in range(SERIES_COLOURS)} < used
    for variable in used:
        assert STYLE.count(f"{variable}:") == 2, f"{variable} has one value for light pages and one for dark ones"


@pytest.mark.parametrize("points", [[], [(1.0, 2.0)], [(1.0, 2.0), (2.0, 2.0)]], ids=["none", "one", "flat"])
@pytest.mark.parametrize("scale", ["linear", "log"])
def test_charts_of_little_data_are_still_drawn(points: list[tuple[float, float]], scale: str) -> None:
    drawn = chart(Plot([Series("short", points, 0, marker=0)], Axis("x"), Axis("y", "s", scale)), title="")  # type: ignore[arg-type]
    Page(drawn)
    assert drawn.count("<title>") == len(points)
    assert ("Nothing was recorded" in drawn) == (not points)
    assert "nan" not in drawn


def test_two_charts_of_one_page_share_no_id() -> None:
    series = [Series("a", [(0, 1), (1, 2)], 0, marker=0)]
    drawn = [chart(Plot(series, Axis("x"), Axis("y")), title=title) for title in ("one", "two")]
    assert_self_contained(page("A page", *drawn))


def test_drawing_twice_gives_the_same_text() -> None:
    series = [Series("a", [(0, 1), (1, 2)], 0, "solid", 0, [(0.5, 1.5), (1, 3)])]
    first, second = (chart(Plot(series, Axis("x"), Axis("y")), title="a") for _ in range(2))
    assert first == second


def test_without_matplotlib_the_page_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(charts, "find_spec", lambda name: None)
    drawn = chart(Plot([Series("a", [(0, 1)], 0)], Axis("x"), Axis("y")), title="a")
    assert "pip install matplotlib" in drawn


def test_a_file_of_its_own_has_the_pages_colours() -> None:
    drawn = chart(Plot([Series("a", [(1.0, 2.0), (2.0, 3.0)], 0)], Axis("x"), Axis("y")), title="one")
    alone = standalone(drawn)
    assert alone is not None
    root = ElementTree.fromstring(alone)
    assert root.tag == "{http://www.w3.org/2000/svg}svg"
    used = set(re.findall(r"var\((--\w+)\)", alone))
    assert {"--line", "--series0"} <= used
    assert all(f"{name}: #" in alone for name in used)
    assert standalone(chart(title="nothing")) is None

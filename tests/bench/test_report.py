"""Reports are well-formed, load nothing from anywhere, and show the numbers that they were given."""

import re
from html.parser import HTMLParser

import pytest

from mumoe_fast.bench import report
from mumoe_fast.bench.report import Axis, Series

VOID = {"meta", "br", "hr", "img", "input", "link"}


class Page(HTMLParser):
    """Parses strictly: every tag closed in order. Keeps the text and the attributes."""

    def __init__(self, source: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(source)
        self.close()
        assert not self.open, f"never closed: {self.open}"

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attributes)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attributes)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


def assert_self_contained(source: str) -> Page:
    """Well-formed, without scripts, and without a reference to anything outside the file."""
    page = Page(source)
    assert not {"script", "link", "iframe", "img", "object"} & {tag for tag, _ in page.tags}
    assert not [attributes for _, attributes in page.tags if {"src", "href", "xlink:href"} & attributes.keys()]
    assert not re.search(r"https?://|url\(|@import", source)
    return page


def chart(*series: Series) -> str:
    return report.line_chart(series, title="a chart", x_label="step", y_label="loss")


def test_a_page_is_self_contained_and_shows_what_it_was_given() -> None:
    source = report.page(
        "A title",
        report.paragraph("What this is.", "lead"),
        report.section("Numbers", report.card(report.table(["name", "value"], [["a", "1.25"], ["b", "17"]]))),
        report.section("Curves", chart(Series("one", [(0, 3.5), (10, 1.0)], 0, "dots"))),
        report.card(report.heading("Text"), report.marked_text("0.93", "before ", "this", " after")),
        report.definitions([("machine", "a small one")]),
    )
    page = assert_self_contained(source)
    for shown in ("A title", "What this is.", "1.25", "17", "one: 1 at 10", "before this after", "a small one"):
        assert shown in page.text
    assert ("mark", {}) in page.tags


def test_text_is_escaped_everywhere() -> None:
    evil = "<script>\"&'</script>"
    parts = [
        report.paragraph(evil),
        report.heading(evil),
        report.table([evil], [[evil]]),
        report.definitions([(evil, evil)]),
        report.marked_text(evil, evil, evil, evil),
        report.line_chart([Series(evil, [(0, 1)], 0, "dots")], title=evil, x_label=evil, y_label=evil),
    ]
    page = assert_self_contained(report.page(evil, report.section(evil, *parts)))
    # the title twice, the section's, and what the parts show; a chart shows its name in the legend and on its dot
    assert page.text.count(evil) == 2 + 1 + 1 + 1 + 2 + 2 + 4 + 4


def test_curves_are_drawn_at_their_values() -> None:
    drawn = chart(Series("falls", [(0, 4.0), (5, 3.0), (10, 2.0)], 1))
    (path,) = re.findall(r'<path class="curve s1" d="M([^"]+)"', drawn)
    points = [tuple(map(float, point.split(","))) for point in path.split("L")]
    (x0, y0), (x1, y1), (x2, y2) = points
    assert x0 < x1 < x2
    assert y0 < y1 < y2, "smaller values are lower on the page, at larger coordinates"
    assert (x1 - x0, y1 - y0) == (pytest.approx(x2 - x1, abs=0.2), pytest.approx(y2 - y1, abs=0.2))


@pytest.mark.parametrize("points", [[], [(1.0, 2.0)], [(1.0, 2.0), (2.0, 2.0)]], ids=["none", "one", "flat"])
def test_charts_of_little_data_are_still_drawn(points: list[tuple[float, float]]) -> None:
    drawn = chart(Series("short", points, 0, "dots"))
    Page(drawn)
    assert drawn.count("<circle") == (len(points) + 1 if points else 0)  # one is in the legend
    assert "nan" not in drawn


@pytest.mark.parametrize(
    ("low", "high", "ticks"),
    [(0, 10, [0, 2, 4, 6, 8, 10]), (2.31, 5.6, [2.5, 3, 3.5, 4, 4.5, 5, 5.5]), (0, 270, [0, 50, 100, 150, 200, 250])],
)
def test_ticks_are_round_numbers_inside_the_axis(low: float, high: float, ticks: list[float]) -> None:
    assert Axis(low, high, 0, 100).ticks() == ticks

"""Reports are well-formed, load nothing from anywhere, and show the numbers that they were given."""

import re
from html.parser import HTMLParser

import pytest

from mumoe_fast.bench import report
from mumoe_fast.bench.charts import Axis, Plot, Series, chart

REFERENCES = {"src", "href", "xlink:href"}
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
    references = [value for _, attributes in page.tags for name, value in attributes.items() if name in REFERENCES]
    ids = [attributes["id"] for _, attributes in page.tags if "id" in attributes]
    assert {str(reference)[1:] for reference in references} <= set(ids)
    assert len(ids) == len(set(ids))
    assert not re.search(r"https?://|url\([^#]|@import", source)
    return page


def test_a_page_is_self_contained_and_shows_what_it_was_given() -> None:
    source = report.page(
        "A title",
        report.paragraph("What this is.", "lead"),
        report.section("Numbers", report.card(report.table(["name", "value"], [["a", "1.25"], ["b", "17"]]))),
        report.card(report.heading("Text"), report.marked_text("0.93", "before ", "this", " after")),
        report.definitions([("machine", "a small one")]),
    )
    page = assert_self_contained(source)
    for shown in ("A title", "What this is.", "1.25", "17", "before this after", "a small one"):
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
        chart(Plot([Series(evil, [(0, 1)], 0, marker=0)], Axis(evil), Axis(evil)), title=evil),
    ]
    page = assert_self_contained(report.page(evil, report.section(evil, *parts)))
    # the title twice, the section's, and what the parts show; a chart shows its name in the legend and on its dot
    assert page.text.count(evil) == 2 + 1 + 1 + 1 + 2 + 2 + 4 + 4


@pytest.mark.parametrize(
    ("value", "unit", "shown"),
    [
        (1.05e-3, "s", "1.05 ms"),
        (0.99999, "s", "1 s"),
        (999.6, "s", "1 ks"),
        (83_886_080, "B", "83.9 MB"),
        (155.1e9, "FLOP", "155 GFLOP"),
        (0, "B", "0 B"),
        (4e-13, "s", "0.0004 ns"),
        (123_456e15, "FLOP", "123,456 PFLOP"),
        (-2e-6, "s", "-2 µs"),
    ],
)
def test_quantities_have_three_digits_and_a_prefix(value: float, unit: str, shown: str) -> None:
    assert report.quantity(value, unit) == shown


def test_intervals_say_their_unit_once() -> None:
    assert report.interval(9.8e-4, 9.9e-4, "s") == "980–990 µs"
    assert report.interval(9.8e-4, 1.2e-3, "s") == "980 µs – 1.2 ms"
    assert report.interval(1.0, 2.0, "s") == "1–2 s"

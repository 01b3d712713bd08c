"""Reports in a real browser, light and dark: no error, and no text that is cut off, covered or hard to read."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from dataclasses import replace
from html import unescape
from pathlib import Path

import pytest

from mumoe_fast.bench import paper
from mumoe_fast.bench.demo_result import Demo, Row
from mumoe_fast.bench.demo_result import page as demo_page
from mumoe_fast.bench.experts import ExpertText, Snippet
from mumoe_fast.bench.paper_tables import tables
from mumoe_fast.bench.report import card, page, paragraph, table
from mumoe_fast.bench.suite.html import page as suite_page
from mumoe_fast.examples._training import Record, TrainConfig
from mumoe_fast.examples.train_gpt import ModelConfig
from tests.bench.suite.sample import sample_records

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
pytestmark = pytest.mark.skipif(BROWSER is None, reason="needs chromium, chromium-browser or google-chrome")

PROBE = """
<script>
const problems = [];
addEventListener("error", event => problems.push(`error: ${event.message}`));
addEventListener("load", () => {
  document.querySelectorAll("details").forEach(one => { one.open = true; });
  const inside = (inner, outer) => inner.left >= outer.left - 1 && inner.right <= outer.right + 1 &&
    inner.top >= outer.top - 1 && inner.bottom <= outer.bottom + 1;
  const meet = (a, b) => a.left < b.right - 1 && b.left < a.right - 1 && a.top < b.bottom - 2 && b.top < a.bottom - 2;
  const light = colour => {
    const parts = colour.match(/[\\d.]+/g).slice(0, 3).map(part => part / 255)
      .map(part => part <= 0.04045 ? part / 12.92 : ((part + 0.055) / 1.055) ** 2.4);
    return 0.2126 * parts[0] + 0.7152 * parts[1] + 0.0722 * parts[2];
  };
  const ground = element => {
    for (; element; element = element.parentElement) {
      const colour = getComputedStyle(element).backgroundColor;
      if (colour !== "rgba(0, 0, 0, 0)") return colour;
    }
    return "rgb(255, 255, 255)";
  };
  const contrast = (a, b) => (Math.max(light(a), light(b)) + 0.05) / (Math.min(light(a), light(b)) + 0.05);
  let texts = 0;
  for (const chart of document.querySelectorAll("svg.chart")) {
    const box = chart.getBoundingClientRect(), labels = [...chart.querySelectorAll("text")];
    const boxes = labels.map(label => label.getBoundingClientRect());
    labels.forEach((label, i) => {
      texts += 1;
      if (!inside(boxes[i], box)) problems.push(`outside its chart: ${label.textContent}`);
      if (contrast(getComputedStyle(label).fill, ground(chart)) < 4.5) problems.push(`faint: ${label.textContent}`);
      for (let j = 0; j < i; j++)
        if (meet(boxes[i], boxes[j])) problems.push(`covers ${labels[j].textContent}: ${label.textContent}`);
    });
    for (const mark of chart.querySelectorAll("use"))
      if (!inside(mark.getBoundingClientRect(), box)) problems.push(`a mark outside its chart: ${mark.textContent}`);
  }
  for (const element of document.querySelectorAll("h1, h2, h3, p, td, th, dt, dd, summary, .card")) {
    texts += 1;
    if (element.scrollWidth > element.clientWidth + 1 && element.clientWidth)
      problems.push(`wider than its box: ${element.textContent.slice(0, 60)}`);
    if (contrast(getComputedStyle(element).color, ground(element)) < 4.5)
      problems.push(`faint: ${element.textContent.slice(0, 60)}`);
  }
  const dark = matchMedia("(prefers-color-scheme: dark)").matches;
  const found = document.createElement("output");
  found.textContent = JSON.stringify({ problems, texts, dark, ground: light(ground(document.body)) });
  document.body.append(found);
});
</script>
"""


def look_at(source: str, folder: Path, *, dark: bool = False, width: int = 1100) -> dict[str, object]:
    """What the probe finds in a page: problems, how many texts there are, and whether the scheme is dark."""
    file = folder / "page.html"
    file.write_text(source.replace("</head>", f"{PROBE}</head>"), encoding="utf-8")
    assert BROWSER is not None
    finished = subprocess.run(
        [
            BROWSER,
            "--headless",
            "--no-sandbox",
            "--disable-gpu",
            "--hide-scrollbars",
            "--enable-logging=stderr",
            f"--user-data-dir={folder / 'profile'}",
            f"--blink-settings=preferredColorScheme={0 if dark else 1}",
            f"--window-size={width},900",
            "--dump-dom",
            file.as_uri(),
        ],
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    assert not re.findall(r":CONSOLE.*", finished.stderr)
    (found,) = re.findall(r"<output>(.*)</output>", finished.stdout)
    seen: dict[str, object] = json.loads(unescape(found))
    return seen


@pytest.fixture(scope="module")
def reports() -> dict[str, str]:
    some = [
        replace(record, graph_latency=record.latency)
        for record in sample_records()
        if record.dtype == "bfloat16" and record.direction == "forward+backward"
    ]
    return {"suite": suite_page(some), "paper": paper.page(tables()), "demo": demo_page(demo())}


def demo() -> Demo:
    """What a run of the demo finds out, made up."""
    held_out = {n: {} if n % 40 else {"held_out": 5.4 - 0.01 * n} for n in range(1, 301)}
    records = {
        name: [Record(n, 5.5 - 0.01 * n, 1e-3, 0.1 * n, 512 * n, 10**9, figures) for n, figures in held_out.items()]
        for name in ("dense", "μMoE")
    }
    snippet = Snippet(0.93, "the text in front of a character, ", "x", " and what follows it")
    return Demo(
        model=ModelConfig(),
        training=TrainConfig(steps=300),
        text_bytes=(450_000, 16_000),
        done=300,
        records=records,
        rows=[Row(name, 3_200_000, 6.4e6, (21_000.0, 22_000.0, 23_000.0), 123_000_000, 2.5) for name in records],
        remarks=["Held-out loss at equal steps: μMoE +0.1% against dense."],
        layer=2,
        experts=[ExpertText(7, 0.02, 0.13, [snippet] * 5)],
        machine=[("CPU", "a made-up CPU, 2 threads used")],
    )


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
@pytest.mark.parametrize("name", ["suite", "paper", "demo"])
def test_every_text_can_be_read(reports: dict[str, str], name: str, dark: bool, tmp_path: Path) -> None:
    seen = look_at(reports[name], tmp_path, dark=dark)
    assert seen["problems"] == []
    assert seen["dark"] is dark
    assert (float(str(seen["ground"])) < 0.2) is dark
    assert int(str(seen["texts"])) > 50


def test_the_probe_sees_what_is_wrong(tmp_path: Path) -> None:
    """Each kind of problem, made on purpose."""
    label = '<text x="{x}" y="{y}" style="fill: {fill}">{name}</text>'
    labels = [
        label.format(x=95, y=50, fill="var(--soft)", name="runs out on the right"),
        label.format(x=10, y=20, fill="var(--soft)", name="first of two"),
        label.format(x=14, y=20, fill="var(--soft)", name="second of two"),
        label.format(x=10, y=80, fill="var(--card)", name="unseen"),
    ]
    chart = f'<svg class="chart" viewBox="0 0 200 100">{"".join(labels)}</svg>'
    wide = table(["name", "value"], [["a", "a cell that does not break " * 12]])
    seen = look_at(page("A page", card(chart), card(wide), paragraph("text")), tmp_path)  # type: ignore[arg-type]
    problems = "\n".join(map(str, seen["problems"]))  # type: ignore[call-overload]
    for found in ("outside its chart: runs out on the right", "covers first of two: second of two", "faint: unseen"):
        assert found in problems
    assert "wider than its box: namevalue" in problems

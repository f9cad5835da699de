"""The page of a run: its structure, what it escapes, its size, and how a real browser shows it."""

from __future__ import annotations

import shutil
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest

from fedsp_mpi.cli import main
from fedsp_mpi.record import Run
from fedsp_mpi.report import html
from fedsp_mpi.report.chart import Line, chart, ticks
from helpers.big_run import NUM_CLIENTS, NUM_ROUNDS, SCRIPT, big_run
from helpers.record_samples import make

CHROMIUM = shutil.which("chromium")
VOID = {"meta", "link", "path", "rect", "circle", "polygon"}


class Outline(HTMLParser):
    """What a page consists of; `open` is empty at the end of a well-formed one."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.headings: list[int] = []
        self.ids: list[str] = []
        self.links: list[str] = []
        self.tags: dict[str, list[dict[str, str | None]]] = {}
        self.feed(text)

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        values = dict(attributes)
        self.tags.setdefault(tag, []).append(values)
        self.ids += [str(values["id"])] if "id" in values else []
        self.links += [str(values[key]) for key in ("href", "src") if key in values]
        if tag[0] == "h" and tag[1:].isdigit():
            self.headings.append(int(tag[1]))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.setdefault(tag, []).append(dict(attributes))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def test_a_large_run_is_a_small_page_of_tables_and_pictures() -> None:
    text = html.page(big_run(silo=SCRIPT))
    outline = Outline(text)
    assert len(text.encode()) < 200_000
    assert outline.open == [], "every element is closed"
    assert outline.headings[0] == 1 and outline.headings.count(1) == 1
    assert all(b - a <= 1 for a, b in zip(outline.headings, outline.headings[1:]))
    assert len(outline.ids) == len(set(outline.ids))
    assert len(outline.tags["table"]) == len(outline.tags["caption"]) == 7
    assert {cell["scope"] for cell in outline.tags["th"]} == {"row", "col"}
    rows = NUM_ROUNDS + 2 * NUM_CLIENTS  # rounds, clients, silos
    assert len(outline.tags["tr"]) > rows
    for svg in outline.tags["svg"]:
        assert svg["role"] == "img" and (svg.get("aria-label") or svg.get("aria-labelledby"))
    regions = [tag for tag in outline.tags["div"] if tag.get("role") == "region"]
    labels = [tag["aria-label"] for tag in regions]
    assert len(set(labels)) == len(regions) == 8 and all(tag["tabindex"] == "0" for tag in regions)
    assert all(link.startswith("#") or link == "data:," for link in outline.links)


def test_names_from_outside_are_escaped() -> None:
    """In the label, a silo's name, a method, a reason, a note and the configuration."""
    text = html.page(big_run(name="run" + SCRIPT.replace("/", "|") + "\x1b[2J", silo=SCRIPT))
    assert "script" not in Outline(text).tags and "<script" not in text
    assert text.count("&lt;script&gt;") > 100
    assert "\x1b" not in text and "\\x1b[2J" in text


def test_runs_without_rounds_clients_or_scores_have_a_page(tmp_path: Path) -> None:
    begun = make(tmp_path / "begun", rounds=0).run
    fewer = replace(big_run(), silos=big_run().silos[:0], clients=big_run().clients[:0])
    for run in (begun, fewer, make(tmp_path / "run", rounds=1).run):
        outline = Outline(html.page(run))
        assert outline.open == [] and "silos" not in outline.ids
    assert "No round was committed." in html.page(begun)
    assert "No results yet." in html.page(begun)


def test_a_run_that_was_stopped_says_why_and_how_it_goes_on(tmp_path: Path) -> None:
    record = make(tmp_path / "run", rounds=2)
    record.finish("stopped", "told to stop after round 2")
    text = html.page(record.run)
    assert "stopped, 2 rounds" in text and "told to stop after round 2" in text
    command = text.partition("<dt>go on</dt><dd>")[2].partition("</dd>")[0]
    assert "fedsp_mpi run" in command and "resume" in command.lower()


def test_losses_that_are_not_finite_break_the_line() -> None:
    values = np.array([1.0, np.nan, 2.0, np.inf, 3.0, 3.5])
    drawn = chart("losses", [Line("a", np.arange(1, 7), values)], unit="nats")
    assert drawn is not None
    assert drawn.lines[0].path.count("M") == 3 and "nan" not in drawn.lines[0].path
    assert chart("losses", [Line("a", np.arange(2), values[1:2].repeat(2))], unit="nats") is None
    assert ticks(0.63, 2.8) == [0.5, 1.0, 1.5, 2.0, 2.5, 3.0]
    assert len(ticks(2.0, 2.0)) >= 2


def test_it_is_written_whole_and_over_nothing_of_somebody_else(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make(tmp_path / "run").finish()
    path = tmp_path / "page.html"
    arguments = ["report", str(tmp_path / "run"), "--html", str(path)]
    assert main(arguments) == main(arguments) == 0
    assert path.read_text().endswith("</html>\n") and list(tmp_path.glob(".page*")) == []
    path.write_text("<p>my notes on fedsp_mpi</p>")
    assert main(arguments) == 2
    assert "found a file that no report wrote" in capsys.readouterr().err
    assert path.read_text() == "<p>my notes on fedsp_mpi</p>"
    assert main([*arguments[:-1], str(tmp_path / "page.txt")]) == 2
    assert "found the ending '.txt', expected .html" in capsys.readouterr().err
    assert main([*arguments[:-1], str(tmp_path / "none" / "page.html")]) == 2
    assert "found no place to write to" in capsys.readouterr().err
    make(tmp_path / "other").finish()
    assert main(["report", *map(str, [tmp_path / "run", tmp_path / "other"]), *arguments[2:]]) == 2
    assert "--html: found 2 runs, expected one" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="no chromium: apt-get install chromium")
@pytest.mark.parametrize("width", [1280, 400])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_a_real_browser_shows_it(tmp_path: Path, width: int, scheme: str) -> None:
    """Without network; the body does not scroll sideways, and axe-core finds nothing serious.

    The screenshot stays in pytest's folder, for people.
    """
    playwright = pytest.importorskip("playwright.sync_api", reason="no axe-playwright-python")
    axe = pytest.importorskip("axe_playwright_python.sync_playwright")
    run: Run = big_run(name="big" + SCRIPT.replace("/", "|"), silo=SCRIPT)
    path = tmp_path / "page.html"
    html.write_page(run, path)
    requested: list[str] = []
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        # The checker is a script, which the page's own policy forbids.
        context = browser.new_context(
            viewport={"width": width, "height": 900},
            color_scheme=scheme,
            offline=True,
            bypass_csp=True,
        )
        window = context.new_page()
        messages: list[str] = []
        window.on("request", lambda request: requested.append(request.url))
        window.on("console", lambda message: messages.append(message.text))
        window.goto(path.as_uri())
        title = window.title()
        widths = window.evaluate("[document.documentElement.scrollWidth, innerWidth]")
        shot = tmp_path / f"page-{width}-{scheme}.png"
        window.screenshot(path=shot, full_page=True)
        small_text = window.evaluate(
            "[...document.querySelectorAll('.chart text')].map(text =>"
            " text.getBoundingClientRect().height).filter(height => height < 11).length"
        )
        violations = axe.Axe().run(window).response["violations"]
        browser.close()
    assert requested == [path.as_uri()] and messages == []
    assert title == f"{run.name}: run of fedsp_mpi"
    assert widths == [width, width], "the body scrolls sideways"
    assert small_text == 0 and shot.stat().st_size > 50_000
    serious = [rule for rule in violations if rule["impact"] in ("serious", "critical")]
    assert serious == [], [rule["id"] for rule in serious]

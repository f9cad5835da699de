"""What clients bring: methods against the server-only control, and the part of the way to
centralised tuning.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterator

from fedsp_mpi.files.untrusted import printable
from fedsp_mpi.record.hdf5 import Run
from fedsp_mpi.report.comparison import Comparison, Method
from fedsp_mpi.report.formatting import deviation, markdown_row
from fedsp_mpi.report.summary import main_measure


def gain_table(found: Comparison) -> str | None:
    """A Markdown table of what methods gain on their control; None where no method has one.

    A gain is the difference of the main measure in points, seed by seed, with the standard error of
    its mean over seeds. Where one method tuned prompts on all data in one place, with all of these
    seeds, the part of the gap between the control and that is given, of the means.
    """
    tops = [row for row in found.methods if _is_centralised(row)]
    top = tops[0] if len(tops) == 1 else None
    rows = [
        [method.label, *_cells(found, control, method, top)] for control, method in _pairs(found)
    ]
    if not rows:
        return None
    lines = [["gain", *found.tasks], ["---", *["---:"] * len(found.tasks)], *rows]
    way = (
        f"; in brackets, the part of the gap between it and {printable(top.label)} that this closes"
        if top
        else ""
    )
    legend = f"Points above server-only, mean ± standard error over seeds{way}."
    if any("±" in cell for row in rows for cell in row[1:]):
        legend += (
            " A gain of less than two standard errors is no difference that these seeds can show."
        )
    return "\n".join([*map(markdown_row, lines), "", legend])


def _pairs(found: Comparison) -> Iterator[tuple[Method, Method]]:
    """Each control with each of the methods that it belongs to."""
    by_label = {row.label: row for row in found.methods}
    for control in found.methods:
        yield from ((control, by_label[label]) for label in control.of)


def _is_centralised(row: Method) -> bool:
    """Whether its runs tuned prompts without clients, on all data."""

    def is_one(run: Run) -> bool:
        alone = (
            run.config.get("federation", {}).get("clients") == 0
            and run.config.get("method") == "fedsp"
        )
        return alone and run.config.get("data", {}).get("server_share") is None

    return bool(row.runs) and all(map(is_one, row.runs))


def _cells(found: Comparison, control: Method, method: Method, top: Method | None) -> list[str]:
    return [
        _cell(_points(control, task), _points(method, task), _points(top, task))
        for task in found.tasks
    ]


def _points(row: Method | None, task: str) -> dict[int, float]:
    """The main measure by seed, in percent."""
    results = row.results.get(task, {}) if row else {}
    return {seed: 100 * main_measure(result)[1] for seed, result in results.items()}


def _cell(control: dict[int, float], method: dict[int, float], top: dict[int, float]) -> str:
    seeds = sorted(control.keys() & method.keys())
    if not seeds:
        return "-"
    gains = [method[seed] - control[seed] for seed in seeds]
    gain = statistics.fmean(gains)
    error = f" ± {deviation(gains) / math.sqrt(len(gains)):.2f}" if len(gains) > 1 else ""
    gap = (
        statistics.fmean([top[seed] - control[seed] for seed in seeds])
        if top.keys() >= set(seeds)
        else 0.0
    )
    return f"{gain:+.2f}{error}" + (f" ({gain / gap:.0%})" if gap > 0 else "")

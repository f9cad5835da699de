"""What clients bring: methods against the server-only control, and how much of the gap to tuning on
all data in one place they close.
"""

from __future__ import annotations

import math
import statistics

from fedsp_mpi.files.untrusted import printable
from fedsp_mpi.record.hdf5 import Run
from fedsp_mpi.report.comparison import Comparison, MethodResults, measure_on
from fedsp_mpi.report.facts import PERPLEXITY, main_measure, shown_measure
from fedsp_mpi.report.formatting import NOT_SHOWN, NOT_SHOWN_LEGEND, deviation, markdown_table
from fedsp_mpi.report.significance import includes_zero


def gain_table(comparison: Comparison) -> str | None:
    """Write what methods gain over their control as a Markdown table; None if none has a control.

    A gain is the difference of the main measure in points, seed by seed, with the standard error of
    its mean over seeds. Where one method tuned prompts on all data in one place, with all of these
    seeds, the part of the gap between the control and that method is given, of the means.
    """
    centralised = [row for row in comparison.methods if _is_centralised(row)]
    top = centralised[0] if len(centralised) == 1 else None
    by_label = {row.label: row for row in comparison.methods}
    body = []
    for control in comparison.methods:
        for label in control.control_of:
            method = by_label[label]
            cells = [
                _cell(comparison, control, method, top=top, task=task) for task in comparison.tasks
            ]
            body.append([label, *cells])
    if not body:
        return None
    legend = "Points above server-only, mean ± standard error over seeds"
    if any("[" in cell for row in body for cell in row[1:]):
        legend += " ([a, b], of a single seed: 95 % interval by the number of its questions)"
    if top is not None:
        legend += (
            "; in brackets, the part of the gap between it and "
            f"{printable(top.label)} that this closes"
        )
    if any(measure_on(comparison, task) == PERPLEXITY for task in comparison.tasks):
        legend += "; of perplexity, by how much it is lower"
    legend += "."
    if any(cell.endswith(NOT_SHOWN) for row in body for cell in row[1:]):
        legend += f" {NOT_SHOWN_LEGEND}"
    return f"{markdown_table(['gain', *comparison.tasks], body)}\n\n{legend}"


def _is_centralised(row: MethodResults) -> bool:
    """Return whether a method's runs tuned prompts without clients, on all data."""
    return bool(row.runs) and all(_tunes_on_all_data(run) for run in row.runs)


def _tunes_on_all_data(run: Run) -> bool:
    return (
        run.config.get("method") == "fedsp"
        and run.config.get("federation", {}).get("clients") == 0
        and run.config.get("data", {}).get("server_share") is None
    )


def _points(row: MethodResults | None, task: str) -> dict[int, float]:
    """Return the main measure by seed, in percent; a perplexity with a minus. Empty without a row.

    So a difference is a gain where it is positive, whatever the measure.
    """
    results = row.results.get(task, {}) if row else {}
    points = {}
    for seed, result in results.items():
        sign = -1 if main_measure(result)[0] == PERPLEXITY else 1
        points[seed] = sign * shown_measure(result)
    return points


def _cell(
    comparison: Comparison,
    control: MethodResults,
    method: MethodResults,
    *,
    top: MethodResults | None,
    task: str,
) -> str:
    """Write a gain with its error, in brackets the part of the gap that it closes, and a mark.

    Args:
        comparison: of all rows.
        control: of the method.
        method: whose gain it is.
        top: the centralised method; None if there is none.
        task: of the column.
    """
    of_control = _points(control, task)
    of_method = _points(method, task)
    of_top = _points(top, task)
    seeds = sorted(of_control.keys() & of_method.keys())
    if not seeds:
        return "-"
    gains = [of_method[seed] - of_control[seed] for seed in seeds]
    gain = statistics.fmean(gains)
    interval = comparison.gain_interval(method, task)
    text = f"{gain:+.2f}"
    if len(gains) > 1:
        text += f" ± {deviation(gains) / math.sqrt(len(gains)):.2f}"
    elif not math.isnan(interval[0]):
        text += f" [{100 * interval[0]:+.1f}, {100 * interval[1]:+.1f}]"
    if all(seed in of_top for seed in seeds):
        gap = statistics.fmean([of_top[seed] - of_control[seed] for seed in seeds])
        if gap > 0:
            text += f" ({gain / gap:.0%})"
    return text + NOT_SHOWN if includes_zero(interval) else text

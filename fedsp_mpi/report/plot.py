"""Draws scores and shards as bars, losses as curves; the only importer of matplotlib, an extra."""

from __future__ import annotations

import importlib.util
import io
import math
import statistics
import textwrap
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np

from fedsp_mpi.files import ownership
from fedsp_mpi.files.untrusted import JsonObject, printable
from fedsp_mpi.record.hdf5 import Run
from fedsp_mpi.record.tables import mean_silo_loss
from fedsp_mpi.report import pseudo_labels, silos
from fedsp_mpi.report.comparison import Comparison, measure_on
from fedsp_mpi.report.costs import training_seconds
from fedsp_mpi.report.facts import PERPLEXITY, label_of, reads_plain_text, seed_of, shown_measure
from fedsp_mpi.report.formatting import as_bytes, deviation, shortened
from fedsp_mpi.report.grouping import control_groups, require_distinct, task_names
from fedsp_mpi.report.phases import Phase, phases
from fedsp_mpi.report.pseudo_labels import LabelStudy

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

ENDINGS = (".png", ".svg")
# Okabe and Ito's colours, which colour-blind people can tell apart; black is left to text.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#8C6D1F")
DASHES = ("-", "-.", (0, (1, 1)), (0, (7, 1, 1, 1, 1, 1)))
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
GREYS = ("#BBBBBB", "#777777", "#999999", "#555555")  # of controls
HATCHES = ("", "///", "...")
_CONTROL_COLOUR = "#9A9A9A"  # of bars
_MAX_LABELS = 12  # of shards, that have a colour of their own
_MAX_SEPARATE_BARS = 200  # of shards; more are drawn without gaps
_MAX_SHARD_NAMES = 120  # beside their bars
_MAX_INCHES = 20  # height of a picture of shards
_DPI = 150
_STYLE = {
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "axes.grid": True,
    "grid.color": "#E6E6E6",
    "legend.frameon": False,
    "text.parse_math": False,  # a name with $ is no formula
    "svg.fonttype": "none",  # text stays text
    "svg.hashsalt": "fedsp_mpi",  # equal pictures are equal files
}
# Keyword arguments of matplotlib: colour, line style and the like.
Look = JsonObject
_SILO_LOOK: Look = {"color": GREYS[0], "linewidth": 0.7, "markersize": 3}
_WORST_LOOK: Look = {"color": COLOURS[1], "linewidth": 1.2, "markersize": 4}
_MEAN_LOOK: Look = {"color": COLOURS[0], "linewidth": 2.5, "markersize": 5}


def draw_bars(comparison: Comparison, path: str | Path) -> None:
    """Draw the scores of a comparison: a panel for each task, a horizontal bar for each method.

    The best bar of a panel is at the top; each has its name beside it and its score behind it.
    Methods are blue, controls grey. A thin line is the standard deviation over seeds or, where
    there is one seed, the standard error of the score. Of perplexities the lowest is the best.

    Raises:
        ValueError: matplotlib is missing, or the file cannot be written.
    """
    tasks = comparison.tasks
    bars_of = [_bars(comparison, task) for task in tasks]
    num_columns = min(2, len(tasks))
    num_rows = -(-len(tasks) // num_columns)
    most_bars = max(map(len, bars_of))
    with _picture(path) as figure:
        figure.set_size_inches(7 * num_columns, 0.5 + num_rows * (0.9 + 0.3 * max(3, most_bars)))
        grid = figure.subplots(num_rows, num_columns, squeeze=False).flat
        for axes, task, bars in zip(grid, tasks, bars_of):
            _draw_bars(axes, bars, height=most_bars)
            axes.set_title(
                _panel_title(task, measure_on(comparison, task)), loc="left", fontweight="bold"
            )
        for axes in list(grid)[len(tasks) :]:
            axes.set_axis_off()
        figure.supxlabel(f"score in percent; {_errors_legend(bars_of)}", fontsize=9)


def draw_phases(comparison: Comparison, path: str | Path) -> None:
    """Draw what each phase has brought: a panel for each, from left to right.

    A line of each method goes from its score at the start, a hollow dot, to that at the end. A thin
    vertical line is the standard deviation over seeds or, where there is one seed, the standard
    error of the score. Perplexities are on a logarithmic scale.

    Raises:
        ValueError: matplotlib is missing, or the file cannot be written.
    """
    by_name: dict[str, list[Phase]] = {}
    for phase in phases(comparison):
        by_name.setdefault(phase.name, []).append(phase)
    methods = list(dict.fromkeys(row.method for rows in by_name.values() for row in rows))
    with _picture(path) as figure:
        figure.set_size_inches(1 + 2.8 * len(by_name), 3.6)
        grid = figure.subplots(1, len(by_name), squeeze=False)[0]
        for axes, (name, rows) in zip(grid, by_name.items()):
            # The higher of two scores has its numbers above its dots, so that none are covered.
            by_score = sorted(rows, key=lambda row: -_mean(row.after))
            for place, row in enumerate(by_score):
                height = -6 if place else 6
                _draw_phase(axes, row, methods.index(row.method), height=height)
            axes.set_xticks([0, 1], ["before", "after"])
            axes.set_xlim(-0.3, 1.3)
            axes.set_title(printable(name), loc="left", fontweight="bold")
            _set_measure(axes, rows[0].measure)
        _add_legend(figure, grid, location="outside lower center", max_columns=4)


def draw_curves(runs: Sequence[Run], path: str | Path) -> None:
    """Draw validation losses, of plain text perplexities, against rounds, bytes, client seconds.

    A line for each method, a row for each task. A task has a row for each `data.loss_over` among
    its runs, whose losses have different scales. A line is the mean over seeds, its band the
    standard deviation. What sends no bytes or takes no seconds is drawn across, at its lowest loss.
    Only complete runs are drawn, if there are any.

    Raises:
        ValueError: no run has a round, two have the same task, method and seed, matplotlib is
            missing, or the file cannot be written.
    """
    started = [run for run in runs if run.committed_rounds]
    if not started:
        raise ValueError(
            f"found {len(runs)} runs without a round, expected at least one with a round to draw"
        )
    drawn = [run for run in started if run.status == "complete"] or started
    require_distinct(drawn)
    looks = _line_looks(drawn)
    lines_of = {title: _lines(row_runs, looks) for title, row_runs in _rows(drawn).items()}
    with _picture(path) as figure:
        figure.set_size_inches(12, 0.7 + 3.2 * len(lines_of))
        grid = figure.subplots(len(lines_of), len(_PANELS), squeeze=False, sharey="row")
        for row, (title, lines) in zip(grid, lines_of.items()):
            for axes, panel in zip(row, _PANELS):
                _draw_panel(axes, panel, lines)
            if all(line.is_perplexity for line in lines):
                _set_log_scale(row[0])
                row[0].set_ylabel("validation perplexity")
            else:
                row[0].set_ylabel("validation loss, nats per token")
            row[0].set_title(printable(title), loc="left", fontweight="bold")
        _add_legend(figure, grid[:, 0], location="outside lower center", max_columns=4)


def can_draw() -> bool:
    """Return whether matplotlib is installed."""
    return importlib.util.find_spec("matplotlib") is not None


def draw_shards(
    names: Sequence[str], counts: Mapping[str, Sequence[int]], path: str | Path
) -> None:
    """Draw the sizes of shards: a horizontal bar for each owner, stacked by label.

    Args:
        names: of the owners, from top to bottom.
        counts: number of examples of each owner by label, [num_owners] each; beyond twelve labels
            the rarest are drawn as one. A single label needs no legend.
        path: of the picture.

    Raises:
        ValueError: matplotlib is missing, or the file cannot be written.
    """
    series = _common_labels(counts)
    inches_per_bar = 0.3 if len(names) <= 20 else 0.16
    every = -(-len(names) // _MAX_SHARD_NAMES)
    shown_names = [shortened(printable(name)) for name in names[::every]]
    looks = _shard_looks(len(series), has_rare=len(counts) > len(series))
    with _picture(path) as figure:
        from matplotlib.ticker import MaxNLocator

        figure.set_size_inches(9, min(_MAX_INCHES, 1.2 + inches_per_bar * max(3, len(names))))
        axes = figure.subplots()
        starts = np.zeros(len(names))
        for (label, sizes), look in zip(series.items(), looks):
            _draw_shard_bars(axes, sizes, starts, label=label, look=look)
            starts = starts + sizes
        axes.set_yticks(range(0, len(names), every), shown_names)
        axes.tick_params(axis="y", length=0, labelsize=9 if len(names) <= 20 else 7)
        axes.set_ylim(len(names) - 0.4, -0.6)  # the first owner at the top
        axes.margins(x=0.02)
        axes.set_xlim(left=0)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.grid(visible=False, axis="y")
        axes.set_xlabel("training examples")
        if len(series) > 1:
            _add_legend(figure, [axes], location="outside right upper", max_columns=1)


def draw_silos(runs: Sequence[Run], path: str | Path) -> None:
    """Draw the losses that silos have scored by round: a panel for each run that has such scores.

    A thin line is one silo, over the rounds in which it scored; the bold one is the mean over silos
    by their examples. The silo with the highest loss in the last round is named.

    Raises:
        ValueError: no run has scores of silos, matplotlib is missing, or the file cannot be
            written.
    """
    scores = [(run, rows) for run in runs if (rows := silos.scored(run))]
    if not scores:
        raise ValueError(
            "found no scores of silos, expected a run with evaluation.at=silos or both"
        )
    with _picture(path) as figure:
        figure.set_size_inches(8, 0.7 + 3.6 * len(scores))
        grid = figure.subplots(len(scores), squeeze=False)[:, 0]
        for axes, (run, rows) in zip(grid, scores):
            _draw_silo_lines(axes, run, rows)
            axes.set_ylabel("held-out loss, nats per token")
            axes.set_title(printable(run.name), loc="left", fontweight="bold")
        _add_legend(figure, grid, location="outside lower center", max_columns=3)


def draw_labels(runs: Sequence[Run], path: str | Path) -> None:
    """Draw scores by the number of labels, and the precision of pseudo-labels by round.

    Two panels for each task. Left: a line for each method and spread of labels, with the standard
    deviation over seeds; what the same methods score with all labels goes across. Right: a line
    for each of them and each number of labels, where clients have made labels.

    Raises:
        ValueError: no run has few labels and a result, matplotlib is missing, or the file cannot
            be written.
    """
    studies = pseudo_labels.studies(runs)
    names = dict.fromkeys(curve.name for study in studies for curve in study.curves)
    looks = {name: _curve_look(index) for index, name in enumerate(names)}
    with _picture(path) as figure:
        figure.set_size_inches(11, 0.9 + 3.6 * len(studies))
        grid = figure.subplots(len(studies), 2, squeeze=False)
        for (scores, precision), study in zip(grid, studies):
            _draw_scores_by_labels(scores, study, looks)
            _draw_precision(precision, study, looks)
            scores.set_title(printable(study.task), loc="left", fontweight="bold")
        _add_legend(figure, grid[:, 0], location="outside lower center", max_columns=3)


# -- few labels ------------------------------------------------------------------------------------


def _curve_look(index: int) -> Look:
    """Return how a method's line looks, in all panels."""
    return {
        "color": COLOURS[index % len(COLOURS)],
        "linestyle": DASHES[index % len(DASHES)],
        "marker": MARKERS[index % len(MARKERS)],
        "markersize": 4,
    }


def _draw_scores_by_labels(axes: Axes, study: LabelStudy, looks: Mapping[str, Look]) -> None:
    """Draw the scores of one task by the number of labels, which is on a logarithmic scale."""
    numbers = sorted({number for curve in study.curves for number in curve.scores})
    for curve in study.curves:
        means = [statistics.fmean(scores) for scores in curve.scores.values()]
        errors = [deviation(scores) if len(scores) > 1 else 0.0 for scores in curve.scores.values()]
        axes.errorbar(
            list(curve.scores), means, errors, label=curve.name, capsize=2, **looks[curve.name]
        )
    for index, (label, scores) in enumerate(study.all_labels.items()):
        look: Look = {"color": GREYS[1 + index % 3], "linestyle": "--", "linewidth": 1.2}
        axes.axhline(statistics.fmean(scores), label=f"{label}, all labels", **look)
    axes.set_xscale("log", base=2)
    axes.set_xticks(numbers, [f"{number:,}" for number in numbers])
    axes.minorticks_off()
    axes.set_xlabel("labels of all clients together")
    axes.set_ylabel("score, percent")


def _draw_precision(axes: Axes, study: LabelStudy, looks: Mapping[str, Look]) -> None:
    """Draw the precision of one task's pseudo-labels by round, fewer labels paler."""
    from matplotlib.ticker import MaxNLocator

    for curve in study.curves:
        look = looks[curve.name]
        judged = {n: values for n, values in curve.precision.items() if np.isfinite(values).any()}
        for place, (number, values) in enumerate(judged.items()):
            shade = 0.35 + 0.65 * (place + 1) / len(judged)
            rounds = np.arange(1, len(values) + 1)
            axes.plot(rounds, 100 * values, alpha=shade, **look)
            axes.annotate(
                f"{number:,}",
                (rounds[-1], 100 * values[-1]),
                (5, 0),
                textcoords="offset points",
                va="center",
                fontsize=7,
                color=look["color"],
            )
    axes.set_visible(axes.has_data())
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    axes.set_xlabel("round")
    axes.set_ylabel("right pseudo-labels, percent")


# -- silos -----------------------------------------------------------------------------------------


def _draw_silo_lines(axes: Axes, run: Run, scores: Mapping[int, np.ndarray]) -> None:
    """Draw the lines of one run.

    Args:
        axes: to draw on.
        run: whose silos they are.
        scores: rows of the table `silos` by round, [rows] each.
    """
    from matplotlib.ticker import MaxNLocator

    rounds = list(scores)
    marker = "o" if len(rounds) == 1 else None  # a line of one point is not seen
    rows = np.concatenate(list(scores.values()))
    for silo in np.unique(rows["silo"]):
        line = rows[rows["silo"] == silo]
        axes.plot(line["round"], line["loss"], label="each silo", marker=marker, **_SILO_LOOK)
    last = silos.worst_of(scores[rounds[-1]])
    worst = rows[rows["silo"] == last["silo"]]
    axes.plot(
        worst["round"],
        worst["loss"],
        label="highest loss in the last round",
        marker=marker,
        **_WORST_LOOK,
    )
    name = silos.client_name(run, int(last["silo"])).removeprefix("silo ")
    axes.annotate(
        shortened(printable(name)),
        (last["round"], last["loss"]),
        (6, 0),
        textcoords="offset points",
        va="center",
        color=_WORST_LOOK["color"],
    )
    means = [mean_silo_loss(rows) for rows in scores.values()]
    axes.plot(rounds, means, label="mean by examples", marker=marker, **_MEAN_LOOK)
    axes.margins(x=0.02)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    axes.set_xlabel("round")


# -- shards ----------------------------------------------------------------------------------------


def _common_labels(counts: Mapping[str, Sequence[int]]) -> dict[str, np.ndarray]:
    """Return the counts, [num_owners] each, with the rarest of many labels added up."""
    series = {label: np.asarray(sizes) for label, sizes in counts.items()}
    if len(series) <= _MAX_LABELS:
        return series
    by_size = sorted(series, key=lambda label: -series[label].sum())
    rare = set(by_size[_MAX_LABELS - 1 :])
    common = {label: sizes for label, sizes in series.items() if label not in rare}
    total: np.ndarray = sum((series[label] for label in rare), np.zeros_like(series[by_size[0]]))
    return common | {f"{len(rare)} other labels": total}


def _shard_looks(num_labels: int, has_rare: bool) -> list[Look]:
    """Return a colour for each label, hatched where colours come again.

    Args:
        num_labels: number of labels.
        has_rare: whether the last one stands for many, and is grey.
    """
    looks: list[Look] = [
        {
            "facecolor": COLOURS[index % len(COLOURS)],
            "hatch": HATCHES[index // len(COLOURS) % len(HATCHES)],
            "edgecolor": "white",
            "linewidth": 0,
        }
        for index in range(num_labels)
    ]
    if has_rare:
        looks[-1] = {"facecolor": GREYS[0]}
    return looks


def _draw_shard_bars(
    axes: Axes, sizes: np.ndarray, left: np.ndarray, *, label: str, look: Look
) -> None:
    """Draw one label's part of all bars.

    Args:
        axes: to draw on.
        sizes: of the parts, [num_owners].
        left: where they begin, [num_owners].
        label: in the legend.
        look: of the parts.
    """
    num_owners = len(sizes)
    if num_owners <= _MAX_SEPARATE_BARS:
        axes.barh(range(num_owners), sizes, 0.8, left, label=label, **look)
        return
    edges = np.arange(num_owners + 1) - 0.5
    axes.stairs(
        left + sizes,
        edges,
        baseline=left,
        orientation="horizontal",
        fill=True,
        label=label,
        **look,
    )


# -- phases ----------------------------------------------------------------------------------------


def _panel_title(task: str, measure: str) -> str:
    """Return a task's name, with its measure where that is no score in percent."""
    note = ", perplexity (lower is better)" * (measure == PERPLEXITY)
    return printable(task) + note


def _set_measure(axes: Axes, measure: str) -> None:
    """Set the vertical axis for a measure: all of 0 to 100 %, or a logarithmic scale."""
    if measure != PERPLEXITY:
        axes.set_ylabel(f"{measure}, percent")
        axes.set_ylim(0, 100)
        return
    axes.set_ylabel("perplexity (lower is better)")
    _set_log_scale(axes)


def _set_log_scale(axes: Axes) -> None:
    """Put the vertical axis on a logarithmic scale, with numbers that are written out."""
    from matplotlib.ticker import LogLocator

    axes.set_yscale("log")
    low, high = axes.get_ylim()
    axes.yaxis.set_minor_locator(LogLocator(subs=(2, 5) if high < 100 * low else ()))
    axes.yaxis.set_major_formatter("{x:,g}")
    axes.yaxis.set_minor_formatter("{x:,g}")


def _spread(results: Sequence[np.void]) -> float:
    """Return the standard deviation over seeds, or a single one's standard error; 0: unknown."""
    if len(results) > 1:
        return deviation([shown_measure(result) for result in results])
    error = 100 * float(results[0]["stderr"])
    return error if math.isfinite(error) else 0.0


def _mean(results: Sequence[np.void]) -> float:
    """Return the mean of the main measure over seeds, as tables show it."""
    return statistics.fmean(map(shown_measure, results))


def _draw_phase(axes: Axes, phase: Phase, method: int, *, height: int) -> None:
    """Draw one method's line from the start of a phase to its end.

    Args:
        axes: to draw on.
        phase: of one method.
        method: its number, by which lines of several methods can be told apart.
        height: of numbers above their dots, in points.
    """
    colour = COLOURS[method % len(COLOURS)]
    shift = 0.04 * method
    places = ([0.0] if phase.before else []) + [1.0]
    ends = [results for results in (phase.before, phase.after) if results]
    means = [_mean(results) for results in ends]
    errors = [_spread(results) for results in ends]
    line = [place + shift for place in places]
    axes.errorbar(line, means, yerr=errors, color=colour, label=phase.method, capsize=2)
    for place, mean, is_end in zip(line, means, [len(means) == 1, True]):
        axes.plot(place, mean, marker="o", color=colour, markerfacecolor=colour if is_end else "w")
        axes.annotate(
            f"{mean:.1f}",
            (place, mean),
            (6 if is_end else -6, height),
            textcoords="offset points",
            ha="left" if is_end else "right",
            va="center",
            fontsize=8,
            color=colour,
        )


# -- bars ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Bar:
    """A bar of a comparison.

    Attributes:
        label: of the method.
        percent: mean of the main measure over seeds; of a perplexity, itself.
        error: in points; nan where none is known.
        num_seeds: with one, the error is the standard error of its score.
        is_control: whether it is grey.
    """

    label: str
    percent: float
    error: float
    num_seeds: int
    is_control: bool


def _bars(comparison: Comparison, task: str) -> list[_Bar]:
    """Return the bars of a task, the best first; methods without a score are left out."""
    bars = []
    for method in comparison.methods:
        percents = [value for value in method.percents(task) if math.isfinite(value)]
        if not percents:
            continue
        if len(percents) > 1:
            error = deviation(percents)
        else:
            [result] = method.results[task].values()
            error = 100 * float(result["stderr"])
        bars.append(
            _Bar(
                label=method.label,
                percent=statistics.fmean(percents),
                error=error,
                num_seeds=len(percents),
                is_control=not method.runs,
            )
        )
    is_lower_better = measure_on(comparison, task) == PERPLEXITY
    return sorted(bars, key=lambda bar: bar.percent, reverse=not is_lower_better)


def _draw_bars(axes: Axes, bars: Sequence[_Bar], *, height: int) -> None:
    """Draw one task's bars from the top down.

    Args:
        axes: to draw on.
        bars: the best first.
        height: number of bars that the panel has room for, so that all bars are of one width.
    """
    percents = [bar.percent for bar in bars]
    errors = [bar.error if math.isfinite(bar.error) else 0.0 for bar in bars]
    colours = [_CONTROL_COLOUR if bar.is_control else COLOURS[0] for bar in bars]
    axes.barh(range(len(bars)), percents, 0.72, color=colours)
    drawn = [position for position, error in enumerate(errors) if error > 0]
    axes.errorbar(
        [percents[position] for position in drawn],
        drawn,
        xerr=[errors[position] for position in drawn],
        fmt="none",
        ecolor="black",
        elinewidth=1,
        capsize=2,
    )
    for position, (bar, error) in enumerate(zip(bars, errors)):
        text = f"{bar.percent:.1f}" + (f" ± {error:.1f}" if error > 0 else "")
        axes.annotate(
            text,
            (bar.percent + error, position),
            (4, 0),
            textcoords="offset points",
            va="center",
            fontsize=8,
        )
    axes.set_yticks(range(len(bars)), [_bar_label(bar.label) for bar in bars], fontsize=8)
    axes.tick_params(axis="y", length=0)
    axes.set_ylim(height - 0.4, -0.6)
    ends = [percent + error for percent, error in zip(percents, errors)]
    axes.set_xlim(0, 1.18 * max(ends, default=0.0) or 1.0)  # room for the scores
    axes.grid(visible=False, axis="y")
    axes.spines["left"].set_visible(False)


def _bar_label(label: str) -> str:
    """Return a method's name on at most two lines."""
    lines = textwrap.wrap(
        printable(label), 36, break_on_hyphens=False, max_lines=2, placeholder=" ..."
    )
    return "\n".join(lines)


def _errors_legend(bars_of: Iterable[Sequence[_Bar]]) -> str:
    """Say what the thin lines are, and which bars are grey."""
    bars = [bar for bars in bars_of for bar in bars]
    with_error = [bar for bar in bars if bar.error > 0]
    kinds = []
    if any(bar.num_seeds > 1 for bar in with_error):
        kinds.append("standard deviation over seeds")
    if any(bar.num_seeds == 1 for bar in with_error):
        kinds.append("standard error over questions (one seed)")
    facts = [f"± {' or '.join(kinds)}"] if kinds else []
    if any(bar.is_control for bar in bars):
        facts.append("grey: controls")
    return "; ".join(facts) or "one seed"


# -- curves ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Panel:
    """What losses are drawn against.

    Attributes:
        title: of the axis.
        progress: returns how far a run is after each of its rounds, [rounds].
        show: writes a value of the axis; None for whole rounds.
    """

    title: str
    progress: Callable[[Run], np.ndarray]
    show: Callable[[float], str] | None = None


@dataclass(frozen=True)
class _Line:
    """A line of a panel.

    Attributes:
        label: in the legend.
        runs: one for each seed.
        column: of the table of rounds, with the losses.
        look: of the line.
    """

    label: str
    runs: Sequence[Run]
    column: str
    look: Look

    @property
    def is_perplexity(self) -> bool:
        """Whether perplexities are drawn: of plain text, every token of which is predicted."""
        return all(reads_plain_text(run) for run in self.runs)

    def heights(self) -> np.ndarray:
        """Return losses or perplexities of the rounds that all runs have, [seeds, rounds]."""
        losses = _stacked([run.rounds[self.column] for run in self.runs])
        return np.exp(losses) if self.is_perplexity else losses

    def progress(self, panel: _Panel) -> np.ndarray | None:
        """Return how far the runs are after each round on average, [rounds].

        None for what makes no progress in this measure.
        """
        if panel.show is not None and self.column != "validation_loss":
            return None  # a control has no clients
        progress = _stacked([panel.progress(run) for run in self.runs]).mean(0)
        return progress if progress[-1] > 0 else None


def _stacked(series: Sequence[np.ndarray]) -> np.ndarray:
    """Stack series [rounds] of different lengths, cut to the shortest: [seeds, rounds]."""
    shortest = min(map(len, series))
    return np.stack([values[:shortest] for values in series])


def _bytes_so_far(run: Run) -> np.ndarray:
    """Return the bytes sent after each round, [rounds]."""
    return np.cumsum(run.rounds["bytes_down"] + run.rounds["bytes_up"]).astype(float)


def _client_seconds_so_far(run: Run) -> np.ndarray:
    """Return the seconds that all clients have trained after each round, [rounds]."""
    seconds = training_seconds(run.clients)
    per_round = [seconds[run.clients["round"] == round].sum() for round in run.rounds["round"]]
    return np.cumsum(np.array(per_round))


_PANELS = (
    _Panel("round", lambda run: run.rounds["round"].astype(float)),
    _Panel("bytes sent so far, without the hand-out", _bytes_so_far, as_bytes),
    _Panel(
        "seconds of all clients so far", _client_seconds_so_far, lambda seconds: f"{seconds:g} s"
    ),
)


def _rows(runs: Sequence[Run]) -> dict[str, list[Run]]:
    """Return the runs of each row by its title: tasks in the order of runs, split by loss kind."""
    names = task_names(runs)
    by_task: dict[str, dict[str, list[Run]]] = {}
    for run in runs:
        loss_kind = run.config.get("data", {}).get("loss_over", "vocabulary")
        by_task.setdefault(names[run.file], {}).setdefault(loss_kind, []).append(run)
    rows = {}
    for task, by_kind in by_task.items():
        for loss_kind, row_runs in by_kind.items():
            title = task if len(by_kind) == 1 else f"{task}, data.loss_over: {loss_kind}"
            rows[title] = row_runs
    return rows


def _line_looks(runs: Sequence[Run]) -> dict[str, Look]:
    """Return how the line of each method looks, the same in all rows."""
    looks = {}
    for i, label in enumerate(dict.fromkeys(label_of(run) for run in runs)):
        # There are as many colours as markers: shifted by one whenever the colours begin again.
        marker = (i + i // len(MARKERS)) % len(MARKERS)
        looks[label] = {
            "color": COLOURS[i % len(COLOURS)],
            "linestyle": DASHES[i % len(DASHES)],
            "marker": MARKERS[marker],
        }
    return looks


def _lines(runs: Sequence[Run], looks: dict[str, Look]) -> list[_Line]:
    """Return the lines of one row: methods in the order of runs, then their controls."""
    by_label: dict[str, list[Run]] = {}
    for run in runs:
        by_label.setdefault(label_of(run), []).append(run)
    lines = [
        _Line(label, method_runs, "validation_loss", looks[label])
        for label, method_runs in by_label.items()
    ]
    controls = control_groups(runs, _control_losses, _same_losses)
    for control in controls:
        colour = "#444444" if len(controls) == 1 else looks[control.methods[0]]["color"]
        look = {"color": colour, "linestyle": "--", "linewidth": 1.2}
        one_per_seed = {seed_of(run): run for run in reversed(control.runs)}
        column = "control_validation_loss"
        lines.append(_Line(control.label, list(one_per_seed.values()), column, look))
    return lines


def _control_losses(run: Run) -> np.ndarray | None:
    """Return the losses of the server-only control, [rounds]; None if the run has none."""
    losses = run.rounds["control_validation_loss"]
    return None if np.isnan(losses).all() else losses


def _same_losses(a: np.ndarray, b: np.ndarray) -> bool:
    return a.shape == b.shape and np.allclose(a, b, rtol=1e-3, equal_nan=True)


def _draw_panel(axes: Axes, panel: _Panel, lines: Sequence[_Line]) -> None:
    """Draw all lines of one task against one measure."""
    ends = []
    for line in lines:
        progress = line.progress(panel)
        _draw_line(axes, line, progress)
        if progress is not None:
            ends.append(progress[-1])
    axes.set_xlabel(panel.title)
    _set_scale(axes, panel, ends)


def _draw_line(axes: Axes, line: _Line, progress: np.ndarray | None) -> None:
    """Draw a line over its progress, [rounds]; without any, across the panel."""
    heights = line.heights()
    mean = heights.mean(0)
    if progress is None:
        look = {key: value for key, value in line.look.items() if key != "marker"}
        axes.axhline(float(np.nanmin(mean)), label=line.label, **look)
        return
    every = max(1, len(progress) // 10)
    axes.plot(progress, mean, label=line.label, markersize=3.5, markevery=every, **line.look)
    if len(heights) > 1:
        band = heights.std(0, ddof=1)
        colour = line.look["color"]
        axes.fill_between(progress, mean - band, mean + band, color=colour, alpha=0.15, linewidth=0)


def _set_scale(axes: Axes, panel: _Panel, ends: Sequence[float]) -> None:
    """Show whole rounds; other measures with their unit, logarithmic if lines end far apart.

    Args:
        axes: of the panel.
        panel: says what is shown.
        ends: where the lines end.
    """
    from matplotlib.ticker import FuncFormatter, MaxNLocator, NullFormatter

    if panel.show is None:
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        return
    show = panel.show
    if ends and max(ends) > 20 * min(ends):
        axes.set_xscale("log")
        axes.xaxis.set_minor_formatter(NullFormatter())
    elif ends:
        axes.set_xlim(left=0)
        axes.xaxis.set_major_locator(MaxNLocator(5))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: show(value)))


# -- files -----------------------------------------------------------------------------------------


@contextmanager
def _picture(path: str | Path) -> Iterator[Figure]:
    """Yield an empty figure, and write it to a file at the end.

    Raises ValueError if matplotlib is missing, or the file cannot be written.
    """
    path = Path(path)
    ending = path.suffix.lower()
    if ending not in ENDINGS:
        raise ValueError(
            f"{path}: found the ending {path.suffix!r}, expected {' or '.join(ENDINGS)}"
        )
    ownership.require_picture(path)
    try:
        import matplotlib
        from matplotlib.figure import Figure
    except ImportError:
        raise ValueError(
            "found no matplotlib, expected it for pictures; install it: pip install -c "
            "constraints.txt -e '.[plot]'"
        ) from None
    with matplotlib.rc_context(_STYLE):
        figure = Figure(layout="constrained")
        yield figure
        image = io.BytesIO()
        try:
            metadata = ownership.picture_mark(ending)
            figure.savefig(image, format=ending[1:], dpi=_DPI, metadata=metadata)
            ownership.replace_picture(path, image.getvalue())
        except OSError as error:
            raise ValueError(
                f"{path}: found no place to write to ({error.strerror}), expected a file"
            ) from None


def _add_legend(
    figure: Figure,
    grid: Iterable[Axes],
    *,
    location: Literal["outside right upper", "outside lower center"],
    max_columns: int,
) -> None:
    """Add one legend for all axes, with each label once.

    Args:
        figure: to draw on.
        grid: the axes.
        location: in matplotlib's words.
        max_columns: of the legend.
    """
    handles: JsonObject = {}
    for axes in grid:
        for handle, label in zip(*axes.get_legend_handles_labels()):
            handles.setdefault(label, handle)
    texts = [textwrap.fill(printable(label), 40, break_on_hyphens=False) for label in handles]
    figure.legend(
        list(handles.values()),
        texts,
        loc=location,
        ncols=min(max_columns, len(texts)),
        handlelength=3,
    )

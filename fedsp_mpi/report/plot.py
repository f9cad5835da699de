"""Pictures of runs: scores as bars, losses as curves. The only importer of matplotlib, which is an
extra.
"""

from __future__ import annotations

import io
import statistics
import textwrap
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from fedsp_mpi.files import ownership
from fedsp_mpi.files.untrusted import printable
from fedsp_mpi.record.hdf5 import Run
from fedsp_mpi.report import comparison, costs, formatting, summary
from fedsp_mpi.report.comparison import Comparison, Method

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

ENDINGS = (".png", ".svg")
# Okabe and Ito's colours, which the colour-blind tell apart; black is left to what is said in
# words.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#8C6D1F")
DASHES: tuple[Any, ...] = ("-", "-.", (0, (1, 1)), (0, (7, 1, 1, 1, 1, 1)))
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
GREYS = ("#BBBBBB", "#777777", "#999999", "#555555")  # of controls
_BARS = 36  # in a row
_STYLE: Any = {
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


def draw_bars(found: Comparison, path: str | Path) -> None:
    """Draw the scores of a comparison: a group of bars for each task, a bar for each method; in
    rows if they are many.

    Raises ValueError if matplotlib is not there, or the file cannot be written.
    """
    num = len(found.methods) + 1
    wide = max(1, _BARS // num)
    parts = [found.tasks[at : at + wide] for at in range(0, len(found.tasks), wide)]
    with _picture(path) as figure:
        figure.set_size_inches(
            4 + 0.4 * max(4, num * min(wide, len(found.tasks))), 0.8 + 3.2 * len(parts)
        )
        every = figure.subplots(len(parts), squeeze=False, sharey=True)[:, 0]
        for axes, tasks in zip(every, parts):
            for place, (method, look) in enumerate(zip(found.methods, _bar_looks(found.methods))):
                _draw_bars(axes, tasks, method, (place + 1) / num - 0.5, 1 / num, look)
            axes.set_xticks(range(len(tasks)), list(map(printable, tasks)))
            axes.set_xlim(-0.5, min(wide, len(found.tasks)) - 0.5)
            axes.tick_params(axis="x", length=0)
            axes.grid(visible=False, axis="x")
            axes.set_ylabel("score in percent")
        _legend(figure, every, "outside right upper", 1)


def draw_curves(runs: Sequence[Run], path: str | Path) -> None:
    """Draw validation losses against rounds, bytes and client seconds: a line for each method, a
    row for each task.

    A task has a row for each `data.loss_over` among its runs, whose losses have different scales. A
    line is the mean over seeds, its band the standard deviation. What has no bytes or seconds is
    drawn across, at its lowest loss. Only complete runs are drawn, if there are some.

    Raises ValueError if no run has a round, two are the same task, method and seed, matplotlib is
    not there, or the file cannot be written.
    """
    begun = [run for run in runs if run.committed_rounds]
    if not begun:
        raise ValueError(
            f"found {len(runs)} runs without a round, expected at least one with a round to draw"
        )
    shown = [run for run in begun if run.status == "complete"] or begun
    comparison.require_once(shown)
    looks = _line_looks(shown)
    lines = {row: _lines(some, looks) for row, some in _rows(shown).items()}
    with _picture(path) as figure:
        figure.set_size_inches(12, 0.7 + 3.2 * len(lines))
        grid = figure.subplots(len(lines), len(_PANELS), squeeze=False, sharey="row")
        for row, (title, drawn) in zip(grid, lines.items()):
            for axes, panel in zip(row, _PANELS):
                _draw_panel(axes, panel, drawn)
            row[0].set_ylabel("validation loss, nats a token")
            row[0].set_title(printable(title), loc="left", fontweight="bold")
        _legend(figure, grid[:, 0], "outside lower center", 4)


# -- bars ------------------------------------------------------------------------------------------


def _bar_looks(methods: Sequence[Method]) -> Iterator[dict[str, Any]]:
    """Greys for the controls, colours for the others; hatched where colours come again."""
    greys = coloured = 0
    for method in methods:
        if not method.runs:
            yield {"color": GREYS[greys % len(GREYS)]}
            greys += 1
        else:
            again = coloured // len(COLOURS)
            yield {
                "color": COLOURS[coloured % len(COLOURS)],
                "hatch": ("", "///", "...")[again % 3],
                "edgecolor": "white",
            }
            coloured += 1


def _draw_bars(
    axes: Axes,
    tasks: Sequence[str],
    method: Method,
    offset: float,
    width: float,
    look: dict[str, Any],
) -> None:
    """The bars of one method, one in each task's group; with the mean above, and the deviation over
    seeds.
    """
    places = [place for place, task in enumerate(tasks) if method.percents(task)]
    values = [method.percents(tasks[place]) for place in places]
    means = [statistics.fmean(some) for some in values]
    errors = [formatting.deviation(some) if len(some) > 1 else 0.0 for some in values]
    at = [place + offset for place in places]
    axes.bar(at, means, 0.92 * width, label=method.label, **look)
    several = [i for i, error in enumerate(errors) if error]
    x, y, spread = ([each[i] for i in several] for each in (at, means, errors))
    axes.errorbar(x, y, spread, fmt="none", ecolor="black", elinewidth=1, capsize=2)
    for where, mean, error in zip(at, means, errors):
        axes.annotate(
            f"{mean:.1f}",
            (where, mean + error),
            (0, 2),
            textcoords="offset points",
            ha="center",
            fontsize=7,
        )


# -- curves ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Panel:
    """What the losses are drawn against: `reached` gives it by round, [rounds], of one run."""

    title: str
    reached: Callable[[Run], np.ndarray]
    show: Callable[[float], str] | None = None


@dataclass(frozen=True)
class _Line:
    """One line: its runs, one for each seed, the column of their losses, and how it looks."""

    label: str
    runs: Sequence[Run]
    column: str
    look: dict[str, Any]

    def losses(self) -> np.ndarray:
        """[seeds, rounds], of the rounds that all of them have."""
        return _stacked([run.rounds[self.column] for run in self.runs])

    def reached(self, panel: _Panel) -> np.ndarray | None:
        """How far each round came, [rounds]; None for what does not get on in this measure."""
        if panel.show is not None and self.column != "validation_loss":
            return None  # a control has no clients
        found = _stacked([panel.reached(run) for run in self.runs]).mean(0)
        return found if found[-1] > 0 else None


def _stacked(each: Sequence[np.ndarray]) -> np.ndarray:
    return np.stack([values[: min(map(len, each))] for values in each])


def _seconds(run: Run) -> np.ndarray:
    spent = costs.training_seconds(run.clients)
    return np.array([spent[run.clients["round"] == round].sum() for round in run.rounds["round"]])


_PANELS = (
    _Panel("round", lambda run: run.rounds["round"].astype(float)),
    _Panel(
        "bytes sent so far, without the hand-out",
        lambda run: np.cumsum(run.rounds["bytes_down"] + run.rounds["bytes_up"]).astype(float),
        lambda value: summary.as_bytes(value).replace(".0 ", " "),
    ),
    _Panel(
        "seconds of all clients so far",
        lambda run: np.cumsum(_seconds(run)),
        lambda value: f"{value:g} s",
    ),
)


def _rows(runs: Sequence[Run]) -> dict[str, list[Run]]:
    """The runs of each row, by its title: tasks as they came, and in each its kinds of losses."""
    names = comparison.task_names(runs)
    kinds: dict[str, dict[str, list[Run]]] = {}
    for run in runs:
        kind = run.config.get("data", {}).get("loss_over", "vocabulary")
        kinds.setdefault(names[run.file], {}).setdefault(kind, []).append(run)
    return {
        task if len(by_kind) == 1 else f"{task}, data.loss_over: {kind}": some
        for task, by_kind in kinds.items()
        for kind, some in by_kind.items()
    }


def _line_looks(runs: Sequence[Run]) -> dict[str, dict[str, Any]]:
    """How the line of each method looks, the same in all rows."""
    labels = dict.fromkeys(comparison.label_of(run) for run in runs)
    return {
        label: {
            "color": COLOURS[i % len(COLOURS)],
            "linestyle": DASHES[i % len(DASHES)],
            "marker": MARKERS[
                (i + i // len(MARKERS)) % len(MARKERS)
            ],  # another one where a colour comes again
        }
        for i, label in enumerate(labels)
    }


def _lines(runs: Sequence[Run], looks: dict[str, dict[str, Any]]) -> list[_Line]:
    """The methods of one row as they came, then their controls."""
    by_label: dict[str, list[Run]] = {}
    for run in runs:
        by_label.setdefault(comparison.label_of(run), []).append(run)
    lines = [
        _Line(label, some, "validation_loss", looks[label]) for label, some in by_label.items()
    ]
    controls = comparison.control_groups(runs, _control, _same_losses)
    for control in controls:
        colour = "#444444" if len(controls) == 1 else looks[control.of[0]]["color"]
        one_each = {comparison.seed_of(run): run for run in reversed(control.runs)}
        look = {"color": colour, "linestyle": "--", "linewidth": 1.2}
        lines.append(_Line(control.label, list(one_each.values()), "control_validation_loss", look))
    return lines


def _control(run: Run) -> np.ndarray | None:
    losses = run.rounds["control_validation_loss"]
    return None if np.isnan(losses).all() else losses


def _same_losses(one: np.ndarray, other: np.ndarray) -> bool:
    return one.shape == other.shape and np.allclose(one, other, rtol=1e-3, equal_nan=True)


def _draw_panel(axes: Axes, panel: _Panel, lines: Sequence[_Line]) -> None:
    """All lines of one task against one measure."""
    reached = [line.reached(panel) for line in lines]
    for line, x in zip(lines, reached):
        _draw_line(axes, line, x)
    axes.set_xlabel(panel.title)
    _scale(axes, panel, [x[-1] for x in reached if x is not None])


def _draw_line(axes: Axes, line: _Line, x: np.ndarray | None) -> None:
    losses = line.losses()
    mean = losses.mean(0)
    if x is None:
        look = {key: value for key, value in line.look.items() if key != "marker"}
        axes.axhline(float(np.nanmin(mean)), label=line.label, **look)
        return
    axes.plot(
        x, mean, label=line.label, markersize=3.5, markevery=max(1, len(x) // 10), **line.look
    )
    if len(losses) > 1:
        spread = losses.std(0, ddof=1)
        axes.fill_between(
            x, mean - spread, mean + spread, color=line.look["color"], alpha=0.15, linewidth=0
        )


def _scale(axes: Axes, panel: _Panel, ends: Sequence[float]) -> None:
    """Whole rounds; other measures with their unit, on a logarithmic axis where lines end far from
    each other.
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
    """An empty figure, written to `path` at the end; what is wrong with either as ValueError."""
    path = Path(path)
    if path.suffix.lower() not in ENDINGS:
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
        try:
            ending, image = path.suffix.lower(), io.BytesIO()
            figure.savefig(
                image, format=ending[1:], dpi=150, metadata=ownership.picture_mark(ending)
            )
            ownership.replace_picture(path, image.getvalue())
        except OSError as error:
            raise ValueError(
                f"{path}: found no place to write to ({error.strerror}), expected a file"
            ) from None


def _legend(figure: Figure, every: Iterable[Axes], place: Any, most: int) -> None:
    """One legend beside all, each label once, in `most` columns at most."""
    found: dict[str, Any] = {}
    for axes in every:
        for handle, label in zip(*axes.get_legend_handles_labels()):
            found.setdefault(label, handle)
    texts = [textwrap.fill(printable(label), 40, break_on_hyphens=False) for label in found]
    figure.legend(
        list(found.values()), texts, loc=place, ncols=min(most, len(texts)), handlelength=3
    )

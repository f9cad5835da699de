"""Lays out curves for the page of a run: coordinates and ticks, which its template draws as SVG.

Plain numbers and texts: no library is needed, and the template escapes all that is a name.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

WIDTH = 480  # of a chart, in units of its view box
HEIGHT = 264
_LEFT = 48  # room for the numbers of the vertical axis
_RIGHT = 128  # room for the names of the lines
_TOP = 12
_BOTTOM = 40
_LINE_GAP = 17  # between names at the lines' ends
_MAX_MARKED = 12  # points of a line that are marked by dots
SPARK_WIDTH = 120
SPARK_HEIGHT = 28
_SPARK_MARGIN = 3
_MAX_SPARK_POINTS = 60
_STEPS = (1, 2, 5, 10)  # of ticks, times a power of ten


@dataclass(frozen=True)
class Line:
    """What a line shows, over rounds.

    Attributes:
        label: at its end.
        rounds: [points].
        values: [points]; the line is broken where one is not finite.
        band: the least and the greatest value around it, [points] each.
    """

    label: str
    rounds: np.ndarray
    values: np.ndarray
    band: tuple[np.ndarray, np.ndarray] | None = None


@dataclass(frozen=True)
class Tick:
    """A number on an axis; `position` in units of the view box."""

    position: float
    text: str


@dataclass(frozen=True)
class DrawnLine:
    """A line in units of the view box.

    Attributes:
        label: at its end.
        path: of the line, in SVG's words.
        band: points of the polygon around it; empty without one.
        dots: x and y of marked points.
        label_y: of its name.
    """

    label: str
    path: str
    band: str
    dots: Sequence[tuple[float, float]]
    label_y: float


@dataclass(frozen=True)
class Chart:
    """A laid-out picture.

    Attributes:
        title: above it.
        description: what it shows, in words.
        unit: of the vertical axis.
        lines: at most four have a colour of their own.
    """

    title: str
    description: str
    unit: str
    x_ticks: Sequence[Tick]
    y_ticks: Sequence[Tick]
    lines: Sequence[DrawnLine]
    width: int = WIDTH
    height: int = HEIGHT
    plot_left: int = _LEFT
    plot_right: int = WIDTH - _RIGHT
    plot_bottom: int = HEIGHT - _BOTTOM


@dataclass(frozen=True)
class Spark:
    """A small curve in a cell of a table; `path` in SVG's words, `description` says its ends."""

    path: str
    description: str
    width: int = SPARK_WIDTH
    height: int = SPARK_HEIGHT


@dataclass(frozen=True)
class Bar:
    """A score in a cell of a table, in percent of the cell: its end, and the ends of its error."""

    value: float
    low: float
    high: float
    description: str


@dataclass(frozen=True)
class _Scale:
    """Maps values from `start` to `end` onto `first` to `last`."""

    start: float
    end: float
    first: float
    last: float

    def __call__(self, value: float) -> float:
        part = (value - self.start) / (self.end - self.start)
        return round(self.first + part * (self.last - self.first), 1)


def chart(title: str, lines: Sequence[Line], *, unit: str) -> Chart | None:
    """Lay out lines over rounds; those without a finite value are left out.

    Args:
        title: of the chart.
        lines: with the same unit.
        unit: of the vertical axis.

    Returns:
        The chart; None where there is nothing to draw.
    """
    drawn = [line for line in lines if np.isfinite(line.values).any()]
    if not drawn:
        return None
    values = np.concatenate([part for line in drawn for part in (line.values, *(line.band or ()))])
    finite = values[np.isfinite(values)]
    rounds = np.concatenate([line.rounds for line in drawn])
    y_numbers = ticks(float(finite.min()), float(finite.max()))
    x_numbers = _round_ticks(int(rounds.min()), int(rounds.max()))
    across = _Scale(*_apart(rounds.min(), rounds.max()), first=_LEFT + 8, last=WIDTH - _RIGHT)
    low, high = _apart(min(finite.min(), y_numbers[0]), max(finite.max(), y_numbers[-1]))
    up = _Scale(low, high, first=HEIGHT - _BOTTOM, last=_TOP)
    ends = [up(float(line.values[np.isfinite(line.values)][-1])) for line in drawn]
    places = _spread(ends)
    return Chart(
        title=title,
        description=" ".join(_in_words(line) for line in drawn),
        unit=unit,
        x_ticks=[Tick(across(number), str(number)) for number in x_numbers],
        y_ticks=[Tick(up(number), f"{number:g}") for number in y_numbers],
        lines=[_draw(line, across, up, label_y=place) for line, place in zip(drawn, places)],
    )


def spark(values: np.ndarray, low: float, high: float) -> Spark | None:
    """Lay out a small curve; None without a finite value.

    Args:
        values: [points], of which at most 60 are drawn.
        low: the least value of all curves of the table.
        high: the greatest one.
    """
    finite = values[np.isfinite(values)]
    if not len(finite):
        return None
    every = -(-len(values) // _MAX_SPARK_POINTS)
    shown = np.append(values[:-1:every], values[-1])
    margin = _SPARK_MARGIN
    across = _Scale(*_apart(0, len(shown) - 1), first=margin, last=SPARK_WIDTH - margin)
    up = _Scale(*_apart(low, high), first=SPARK_HEIGHT - margin, last=margin)
    path = _path(np.arange(len(shown)), shown, across=across, up=up)
    return Spark(path, f"from {finite[0]:.4f} to {finite[-1]:.4f}")


def bar(fraction: float, error: float) -> Bar | None:
    """Lay out a score with two standard errors to each side; None where it is not known.

    Args:
        fraction: from 0 to 1.
        error: its standard error, a fraction; nan: none.
    """
    if not math.isfinite(fraction):
        return None
    percent = min(100.0, max(0.0, 100 * fraction))
    reach = 200 * error if math.isfinite(error) else 0.0
    text = f"{percent:.2f} %"
    if reach:
        text += f", plus or minus two standard errors: {reach:.2f}"
    low = max(0.0, percent - reach)
    high = min(100.0, percent + reach)
    return Bar(round(percent, 1), round(low, 1), round(high, 1), text)


def ticks(low: float, high: float, at_most: int = 6) -> list[float]:
    """Return round numbers that span a range, at least two.

    Args:
        low: the range's lower end; the first number is not above it.
        high: its upper end; the last number is not below it.
        at_most: numbers, or one more where an end lies between two of them.
    """
    low, high = _apart(low, high)
    step = _step((high - low) / (at_most - 1))
    first = math.floor(low / step)
    last = math.ceil(high / step)
    return [float(f"{number * step:.10g}") for number in range(first, last + 1)]


def _round_ticks(first: int, last: int) -> list[int]:
    """Return round numbers of rounds, at most eight, the first and the last among them."""
    if first == last:
        return [first]
    step = max(1, round(_step((last - first) / 5)))
    multiples = range(step * (first // step + 1), last, step)
    between = [number for number in multiples if min(number - first, last - number) >= step / 2]
    return [first, *between, last]


def _step(rough: float) -> float:
    """Return the next round number that is not below `rough`."""
    power = 10.0 ** math.floor(math.log10(rough))
    return next(factor * power for factor in _STEPS if factor * power >= rough * (1 - 1e-9))


def _apart(low: float, high: float) -> tuple[float, float]:
    """Return two ends that are apart, so that a scale between them exists."""
    if high > low:
        return float(low), float(high)
    margin = abs(low) * 0.05 or 0.5
    return float(low) - margin, float(low) + margin


def _draw(line: Line, across: _Scale, up: _Scale, *, label_y: float) -> DrawnLine:
    finite = np.isfinite(line.values)
    dots = []
    if finite.sum() <= _MAX_MARKED:
        dots = [(across(x), up(y)) for x, y in zip(line.rounds[finite], line.values[finite])]
    band = ""
    if line.band is not None:
        low, high = line.band
        shown = np.isfinite(low) & np.isfinite(high)
        edge = [f"{across(x)},{up(y)}" for x, y in zip(line.rounds[shown], high[shown])]
        back = [f"{across(x)},{up(y)}" for x, y in zip(line.rounds[shown], low[shown])]
        band = " ".join(edge + back[::-1])
    path = _path(line.rounds, line.values, across=across, up=up)
    return DrawnLine(line.label, path, band, dots, label_y)


def _path(rounds: np.ndarray, values: np.ndarray, *, across: _Scale, up: _Scale) -> str:
    """Write a line that is broken where a value is not finite."""
    steps = []
    command = "M"
    for x, y in zip(rounds, values):
        if math.isfinite(y):
            steps.append(f"{command}{across(float(x))} {up(float(y))}")
            command = "L"
        else:
            command = "M"
    return "".join(steps)


def _spread(positions: Sequence[float]) -> list[float]:
    """Move positions apart, so that names beside them do not overlap; their order stays."""
    order = sorted(range(len(positions)), key=lambda index: positions[index])
    places = [positions[index] for index in order]
    for before, after in itertools.pairwise(range(len(places))):
        places[after] = max(places[after], places[before] + _LINE_GAP)
    overflow = max(0.0, places[-1] - (HEIGHT - _BOTTOM))
    places[-1] -= overflow
    for after in range(len(places) - 1, 0, -1):
        places[after - 1] = min(places[after - 1], places[after] - _LINE_GAP)
    by_index = dict(zip(order, places))
    return [round(by_index[index], 1) for index in range(len(positions))]


def _in_words(line: Line) -> str:
    finite = np.isfinite(line.values)
    values = line.values[finite]
    rounds = line.rounds[finite]
    lowest = int(np.argmin(values))
    return (
        f"{line.label}: {values[0]:.4f} in round {rounds[0]}, {values[-1]:.4f} in round "
        f"{rounds[-1]}, lowest {values[lowest]:.4f} in round {rounds[lowest]}."
    )

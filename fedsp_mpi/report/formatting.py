"""Formats numbers, lists and tables as text: the only place that does, for all commands.

Empty text stands for a number that is not known (nan).
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence

from fedsp_mpi.files.untrusted import printable

WIDTH = 100  # columns of a terminal
_MAX_NAME_LENGTH = 30  # characters
# After what is no difference that the questions, or the seeds, can show.
NOT_SHOWN = " ~"
NOT_SHOWN_LEGEND = (
    "~ = no difference to its control that these questions (one seed: Newcombe, unpaired) or seeds "
    "(more: t distribution) can show at 95 %."
)
# Labels whose lines are not shortened: paths and commands, which are to be copied.
_UNCLIPPED = ("folder ", "go on ")

# -- numbers ---------------------------------------------------------------------------------------


def as_decimal(value: float, digits: int = 4) -> str:
    """Write a number with a fixed number of digits after the point."""
    return "" if math.isnan(value) else f"{value:.{digits}f}"


def as_percent(fraction: float) -> str:
    """Write a fraction as percent, two digits after the point, without the sign: 62.50."""
    return as_decimal(100 * float(fraction), 2)


def as_seconds(seconds: float) -> str:
    """Write seconds without the unit, in whole seconds from 100 on: 1.25, 346."""
    return as_decimal(seconds, 2 if seconds < 99.995 else 0)


def scaled(number: float, unit: str = "") -> str:
    """Write a number with three significant digits and a decimal prefix: 24.6 MB, 6.14 M."""
    for prefix in ("", "k", "M", "G", "T", "P", "E"):
        if number < 999.5:
            return f"{number:.3g} {prefix}{unit}".rstrip()
        number /= 1000
    return f"{number:,.0f} Z{unit}"


def as_bytes(num_bytes: float) -> str:
    """Write a number of bytes in decimal units, as networks count: 24.6 MB."""
    return scaled(num_bytes, "B")


def as_gib(num_bytes: float) -> str:
    """Write a number of bytes in binary units, as memory is sold: 1.50 GiB."""
    return f"{num_bytes / 2**30:.2f} GiB"


def as_count(number: float) -> str:
    """Write a number of parameters, with B for billions: 1.56 B, 6.14 M."""
    return scaled(number).replace("G", "B")


def as_date(iso_time: str) -> str:
    """Write an ISO 8601 time as date and time to the minute."""
    return iso_time[:16].replace("T", " ")


def deviation(values: Sequence[float]) -> float:
    """Return the sample standard deviation of two or more values; nan if one is not finite."""
    return statistics.stdev(values) if all(map(math.isfinite, values)) else math.nan


def mean_and_deviation(values: Sequence[float], *, digits: int = 2, sign: bool = False) -> str:
    """Write the mean ± sample standard deviation of the values that are not nan: 61.50 ± 0.71.

    Args:
        values: a single one has no deviation; "-" stands for none.
        digits: after the point.
        sign: write a + before a positive mean.
    """
    numbers = [value for value in values if not math.isnan(value)]
    if not numbers:
        return "-"
    mean = f"{statistics.fmean(numbers):{'+' if sign else ''}.{digits}f}"
    if len(numbers) == 1:
        return mean
    return f"{mean} ± {deviation(numbers):.{digits}f}"


def score_cell(percents: Sequence[float], interval: tuple[float, float]) -> str:
    """Write scores: mean ± deviation over seeds or, of a single seed, its interval.

    Args:
        percents: the scores by seed.
        interval: of a single one, fractions; nan if there is none: 70.00 [65.3, 74.3].
    """
    low, high = interval
    text = mean_and_deviation(percents)
    if len(percents) != 1 or math.isnan(percents[0]) or math.isnan(low):
        return text
    return f"{text} [{100 * low:.1f}, {100 * high:.1f}]"


# -- lines and tables ------------------------------------------------------------------------------


def table(head: Sequence[str], body: Sequence[Sequence[str]], *, num_left: int = 1) -> list[str]:
    """Lay out a table for a terminal, a rule below its head; columns without an entry are left out.

    Args:
        head: titles of the columns.
        body: a text for each column, row by row.
        num_left: number of columns that are aligned to the left, from the first on.

    Returns:
        The lines.
    """
    shown = [column for column in range(len(head)) if any(row[column] for row in body)]
    widths = {column: max(len(row[column]) for row in (head, *body)) for column in shown}

    def line(cells: Sequence[str]) -> str:
        padded = []
        for column in shown:
            pad = str.ljust if column < num_left else str.rjust
            padded.append(pad(cells[column], widths[column]))
        return "  ".join(padded).rstrip()

    rule = "  ".join("-" * widths[column] for column in shown)
    return [line(head), rule, *(line(row) for row in body)]


def markdown_table(head: Sequence[str], body: Sequence[Sequence[str]], *, num_left: int = 1) -> str:
    """Write a Markdown table, in which no cell can end its cell or its line.

    Args:
        head: titles of the columns.
        body: a text for each column, row by row.
        num_left: number of columns that are aligned to the left, from the first on.
    """
    rule = ["---"] * num_left + ["---:"] * (len(head) - num_left)
    return "\n".join(_markdown_row(row) for row in (head, rule, *body))


def _markdown_row(cells: Sequence[str]) -> str:
    return "| " + " | ".join(printable(cell).replace("|", "\\|") for cell in cells) + " |"


def wrapped(label: str, items: Sequence[str]) -> list[str]:
    """Lay out items after a label, separated by commas, on as many lines as they need.

    Returns:
        The lines; none without items.
    """
    if not items:
        return []
    indent = " " * len(label)
    lines = [label]
    for i, item in enumerate(items):
        text = item if i == len(items) - 1 else f"{item},"
        is_first = len(lines[-1]) == len(label)
        if not is_first and len(lines[-1]) + len(text) + 1 > WIDTH:
            lines.append(indent)
            is_first = True
        lines[-1] += text if is_first else f" {text}"
    return lines


def shortened(name: str) -> str:
    """Shorten a name that is one of many, beside a bar or in a table."""
    if len(name) <= _MAX_NAME_LENGTH:
        return name
    return f"{name[: _MAX_NAME_LENGTH - 3]}..."


def clip(line: str) -> str:
    """Shorten a line to 100 printable ASCII characters, unless it is a path or a command."""
    if line.startswith(_UNCLIPPED):
        return line
    line = line.encode("ascii", "replace").decode()
    return line if len(line) <= WIDTH else line[: WIDTH - 3] + "..."

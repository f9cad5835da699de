"""Numbers, lists and tables as text of at most 100 columns."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence

from fedsp_mpi.files.untrusted import printable

WIDTH = 100


def deviation(values: Sequence[float]) -> float:
    """Sample standard deviation of at least two values; nan if one of them is not finite."""
    return statistics.stdev(values) if all(map(math.isfinite, values)) else math.nan


def spread(values: Sequence[float], digits: int = 2, sign: bool = False) -> str:
    """Mean ± sample standard deviation of the values that are known; without ± for a single one."""
    known = [value for value in values if not math.isnan(value)]
    if not known:
        return "-"
    mean = f"{statistics.fmean(known):{'+' if sign else ''}.{digits}f}"
    return f"{mean} ± {deviation(known):.{digits}f}" if len(known) > 1 else mean


def table(head: Sequence[str], body: Sequence[Sequence[str]], num_left: int) -> list[str]:
    """Aligned columns, the first `num_left` to the left; a column without a single entry is left
    out.
    """
    shown = [i for i in range(len(head)) if any(line[i] for line in body)]
    lines = [[line[i] for i in shown] for line in (head, *body)]
    widths = [max(len(line[i]) for line in lines) for i in range(len(shown))]
    aligned = [
        "  ".join(
            cell.ljust(w) if i < num_left else cell.rjust(w)
            for i, (cell, w) in enumerate(zip(line, widths))
        )
        for line in lines
    ]
    rule = "  ".join("-" * w for w in widths)
    return [line.rstrip() for line in (aligned[0], rule, *aligned[1:])]


def markdown_row(cells: Sequence[str]) -> str:
    """One line of a Markdown table, in which no cell can end its cell, its line, or speak to the
    terminal.
    """
    return "| " + " | ".join(printable(cell).replace("|", "\\|") for cell in cells) + " |"


def wrapped(label: str, items: Sequence[str]) -> list[str]:
    """Items after a label, separated by commas, on as many lines as they need; none without items."""
    if not items:
        return []
    lines = [label]
    for i, item in enumerate(items):
        text = item + ("," if i + 1 < len(items) else "")
        if len(lines[-1]) + len(text) + 1 > WIDTH and lines[-1].strip() != label.strip():
            lines.append(" " * len(label))
        lines[-1] += text if len(lines[-1]) == len(label) else f" {text}"
    return lines


def clip(line: str) -> str:
    """At most 100 printable ASCII characters; all of a path and of a command, which are to be
    typed.
    """
    if line.startswith(("folder ", "go on ")):
        return line
    line = line.encode("ascii", "replace").decode()
    return line if len(line) <= WIDTH else line[: WIDTH - 3] + "..."


def loss(value: float) -> str:
    """Four digits; empty for what is not known."""
    return "" if math.isnan(value) else f"{value:.4f}"


def as_seconds(value: float) -> str:
    """Without the unit; empty for what is not known."""
    return "" if math.isnan(value) else f"{value:.2f}" if value < 99.995 else f"{value:.0f}"


def percent(value: float) -> str:
    """A fraction as percent, without the sign; empty for what is not known."""
    return "" if math.isnan(value) else f"{100 * float(value):.2f}"


def as_bytes(num: float) -> str:
    """Decimal units, as networks count: 24.6 MB."""
    for unit in ("B", "kB", "MB", "GB"):
        if num < 999.95 or unit == "GB":
            return f"{num:.0f} B" if unit == "B" else f"{num:.1f} {unit}"
        num /= 1000
    raise AssertionError("unreachable")


def as_count(num: float) -> str:
    """1557611200 as 1.56 B, 6144000 as 6.14 M."""
    for limit, unit in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if num >= limit:
            return f"{num / limit:.2f} {unit}"
    return f"{num:.0f}"


def date(text: str) -> str:
    """Date and time to the minute, of an ISO time."""
    return text[:16].replace("T", " ")

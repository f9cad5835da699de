"""Tables of runs with tiers: personal, expert and general prompts on three kinds of text."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sequence

import numpy as np

from fedsp_mpi.files.untrusted import printable
from fedsp_mpi.record.hdf5 import Run
from fedsp_mpi.report.facts import label_of
from fedsp_mpi.report.formatting import deviation, markdown_table, mean_and_deviation
from fedsp_mpi.report.grouping import require_distinct

MODELS = ("personal", "expert", "general")
TEXTS = ("own", "domain", "other")
_MEASURES = [f"{text}: {unit}" for text in TEXTS for unit in ("loss", "acc %")]
_HEAD = ("method", "scored", "model", *_MEASURES)
_LEGEND = (
    "Loss in nats per token, and accuracy; mean over users and domains, ± standard deviation over "
    "runs. own = what users hold back, domain = the test split of their domain, other = that of "
    "the other domains. Personal prompts, and all prompts on own text, are scored on the users' "
    "model, because the text stays there; experts and general model on domains, on the global "
    "model."
)
_NO_PUBLIC_TEXT = (
    "Personal prompts are not scored on text of domains where users have silos and experts name no "
    "public text (tiers.experts[].public_test): no user's rank may open an expert's."
)


def tiers_table(runs: Sequence[Run]) -> str:
    """Write what all tiers score before the first round and after the last, as Markdown tables.

    The second one has differences of losses, paired by user or domain and run, with standard
    errors: of the personal to the expert's and the general prompt on own text, and of the experts
    to the general model on their domain. Runs that are not complete do not count, and are named.

    Args:
        runs: of one or several methods, some seeds each.

    Raises:
        ValueError: none has scored its tiers and is complete, or two have the same task, label and
            seed.
    """
    scored = [run for run in runs if len(run.tiers)]
    unfinished = [f"{run.name} ({run.status})" for run in scored if run.status != "complete"]
    by_label: dict[str, list[Run]] = {}
    for run in scored:
        if run.status == "complete":
            by_label.setdefault(label_of(run), []).append(run)
    if unfinished and not by_label:
        raise ValueError(
            f"--table tiers: found no complete run among {', '.join(map(printable, unfinished))}, "
            "expected at least one; wait for them, or let them go on with --resume"
        )
    if not by_label:
        raise ValueError(
            "--table tiers: found no scores of tiers, expected a run with method=plmm and "
            "tiers.judge=ends or rounds"
        )
    require_distinct([run for of_label in by_label.values() for run in of_label])
    body: list[list[str]] = []
    gains: list[list[str]] = []
    for label, of_label in by_label.items():
        for when, pick in (("before", min), ("after", max)):
            body += [
                [printable(label), when, model, *_row(of_label, model, pick)] for model in MODELS
            ]
        gains.append([printable(label), *_gains(of_label)])
    tables = [markdown_table(_HEAD, body, num_left=3), _LEGEND]
    if any(_lacks_public_text(run) for runs in by_label.values() for run in runs):
        tables.append(_NO_PUBLIC_TEXT)
    head = ("loss is lower by", *(f"{a} < {b}, {text}" for a, b, text in _PAIRS))
    tables += [
        markdown_table(head, gains),
        "After the last round; mean ± standard error, paired by user (own) or domain, and by run.",
    ]
    if unfinished:
        tables.append(f"Not complete: {', '.join(map(printable, unfinished))}.")
    return "\n\n".join(tables)


_PAIRS = (
    ("personal", "expert", "own"),
    ("personal", "general", "own"),
    ("expert", "general", "domain"),
)


def _rows(run: Run, model: str, text: str, *, pick: Callable[[Sequence[int]], int]) -> np.ndarray:
    """Return the rows of a run's first or last scores of a model on a text, [rows]."""
    round = pick(run.tiers["round"].tolist())
    tiers = run.tiers[run.tiers["round"] == round]
    is_shown = [_text(row["model"]) == model and _text(row["text"]) == text for row in tiers]
    return tiers[np.array(is_shown, dtype=bool)]


def _lacks_public_text(run: Run) -> bool:
    """Return whether users, who have silos, scored their prompts on no text but their own."""
    texts = (text for text in TEXTS if text != "own")
    is_scored = any(len(_rows(run, "personal", text, pick=max)) for text in texts)
    return "silos" in run.sections and not is_scored


def _row(runs: Sequence[Run], model: str, pick: Callable[[Sequence[int]], int]) -> list[str]:
    """Return a model's losses and accuracies on each text, by runs."""
    cells = []
    for text in TEXTS:
        rows = [_rows(run, model, text, pick=pick) for run in runs]
        rows = [table for table in rows if len(table)]
        losses = [float(table["loss"].mean()) for table in rows]
        accuracies = [100 * float(table["acc"].mean()) for table in rows]
        cells += [mean_and_deviation(losses, digits=3), mean_and_deviation(accuracies)]
    return cells


def _gains(runs: Sequence[Run]) -> list[str]:
    """Return by how much one model's loss is below another one's, for each pair."""
    cells = []
    for model, other, text in _PAIRS:
        gaps: list[float] = []
        for run in runs:
            theirs = {
                _text(row["name"]): float(row["loss"]) for row in _rows(run, other, text, pick=max)
            }
            gaps += [
                theirs[_text(row["name"])] - float(row["loss"])
                for row in _rows(run, model, text, pick=max)
                if _text(row["name"]) in theirs
            ]
        cells.append(_mean_and_error(gaps))
    return cells


def _mean_and_error(values: Sequence[float]) -> str:
    """Write a mean with its sign ± its standard error, and the number of pairs."""
    if not values:
        return "-"
    mean = f"{statistics.fmean(values):+.3f}"
    if len(values) == 1:
        return mean
    error = deviation(values) / math.sqrt(len(values))
    return f"{mean} ± {error:.3f} (n = {len(values)})"


def _text(value: object) -> str:
    return value.decode() if isinstance(value, bytes) else str(value)

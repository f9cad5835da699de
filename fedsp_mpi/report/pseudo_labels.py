"""What clients with few labels have made of them: pseudo-labels by round, and scores by labels."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from fedsp_mpi.record.hdf5 import Run
from fedsp_mpi.report.facts import label_of, own_result, seed_of, shown_measure
from fedsp_mpi.report.formatting import as_percent, as_seconds, table

_HEAD = ("round", "labelled", "texts", "labels s", "trained on", "pseudo", "precision %")
_LEGEND = (
    "all clients of a round: labelled = who labelled text, texts = what the model read for it,",
    "labels s = seconds of it; trained on = examples, pseudo = pseudo-labels among them,",
    "precision = the share of these that is right",
)


@dataclass(frozen=True)
class LabelledRound:
    """What all clients of one round have labelled, and trained on.

    Attributes:
        round: from 1.
        num_labelling: clients that labelled text.
        texts: that went through the model to be labelled.
        seconds: of labelling, of all clients.
        examples: that clients trained on.
        pseudo: pseudo-labels among them.
        precision: fraction of these that are right; nan where nobody knows, or there are none.
    """

    round: int
    num_labelling: int
    texts: int
    seconds: float
    examples: int
    pseudo: int
    precision: float


def by_round(run: Run) -> list[LabelledRound]:
    """Return a run's rounds; none where clients have made no labels of their own."""
    clients = run.clients
    if "pseudo_labels" not in (clients.dtype.names or ()):
        return []
    rounds = []
    for round in np.unique(clients["round"]):
        rows = clients[(clients["round"] == round) & (clients["status"] == "ok")]
        pseudo = np.nan_to_num(rows["pseudo_labels"])
        precision = _column(rows, "pseudo_precision")
        is_judged = np.isfinite(precision) & (pseudo > 0)
        rounds.append(
            LabelledRound(
                round=int(round),
                num_labelling=int((rows["texts_scored"] > 0).sum()),
                texts=int(np.nansum(rows["texts_scored"])),
                seconds=float(np.nansum(rows["seconds_labels"])),
                examples=int(rows["samples"].sum()),
                pseudo=int(pseudo.sum()),
                precision=(
                    float(np.average(precision[is_judged], weights=pseudo[is_judged]))
                    if is_judged.any()
                    else math.nan
                ),
            )
        )
    return rounds


def _column(rows: np.ndarray, name: str) -> np.ndarray:
    """Return a column of rows [rows]; nan where the table lacks it."""
    if name in (rows.dtype.names or ()):
        column: np.ndarray = rows[name]
        return column
    return np.full(len(rows), np.nan)


def lines(run: Run) -> list[str]:
    """Return the table of a run's pseudo-labels by round; nothing where there are none."""
    rounds = by_round(run)
    if not any(row.texts for row in rounds):
        return []
    body = [
        [
            str(row.round),
            str(row.num_labelling),
            str(row.texts),
            as_seconds(row.seconds),
            str(row.examples),
            str(row.pseudo),
            as_percent(row.precision),
        ]
        for row in rounds
    ]
    return [*table(_HEAD, body, num_left=0), *_LEGEND]


@dataclass(frozen=True)
class LabelCurve:
    """Scores of one method by the number of labels, over seeds.

    Attributes:
        name: of the method, and of how its labels are spread.
        scores: in percent, of each seed, by number of labels.
        precision: mean fraction of right pseudo-labels over seeds by round, of the fewest labels
            first: by number of labels, [rounds] each; nan where nobody knows.
    """

    name: str
    scores: dict[int, list[float]]
    precision: dict[int, np.ndarray]


@dataclass(frozen=True)
class LabelStudy:
    """Runs on one task with different numbers of labels.

    Attributes:
        task: of the data.
        curves: a line for each method and spread.
        all_labels: scores in percent of each seed with all labels, by method.
    """

    task: str
    curves: list[LabelCurve]
    all_labels: dict[str, list[float]]


def studies(runs: Sequence[Run]) -> list[LabelStudy]:
    """Return what runs with few labels have scored, task by task.

    Raises:
        ValueError: no run has few labels and a result, or two of the same task, label, spread and
            number of labels have the same seed.
    """
    by_task: dict[str, list[Run]] = {}
    for run in runs:
        if own_result(run) is not None:
            by_task.setdefault(str(run.config.get("data", {}).get("task")), []).append(run)
    all_studies = [_study(task, task_runs) for task, task_runs in by_task.items()]
    with_curves = [study for study in all_studies if study.curves]
    if not with_curves:
        raise ValueError(
            f"found {len(runs)} runs, none of them with few labels and a result, expected a run "
            "with data.labels"
        )
    return with_curves


def _study(task: str, runs: Sequence[Run]) -> LabelStudy:
    grouped: dict[tuple[str, float], dict[int, list[Run]]] = {}
    all_labels: dict[str, list[float]] = {}
    seen: dict[tuple[object, ...], Run] = {}
    for run in runs:
        data = run.config.get("data", {})
        num_labels = data.get("labels")
        result = own_result(run)
        assert result is not None
        spread = None if num_labels is None else float(data.get("label_spread", 1.0))
        first = seen.setdefault((label_of(run), num_labels, spread, seed_of(run)), run)
        if first is not run:
            raise ValueError(
                f"found two runs of {label_of(run)} on {task} with {num_labels or 'all'} labels "
                f"and seed {seed_of(run)} ({first.file.parent} and {run.file.parent}), expected "
                "one; leave one out, or give them different labels (run.label)"
            )
        if num_labels is None:
            all_labels.setdefault(label_of(run), []).append(shown_measure(result))
            continue
        key = (label_of(run), float(data.get("label_spread", 1.0)))
        grouped.setdefault(key, {}).setdefault(int(num_labels), []).append(run)
    curves = []
    for (label, gamma), by_number in grouped.items():
        numbers = sorted(by_number)
        curves.append(
            LabelCurve(
                f"{label}, gamma {gamma:g}",
                {number: _scores(by_number[number]) for number in numbers},
                {number: _precision(by_number[number]) for number in numbers},
            )
        )
    return LabelStudy(task, curves, all_labels)


def _scores(runs: Sequence[Run]) -> list[float]:
    results = [own_result(run) for run in runs]
    return [shown_measure(result) for result in results if result is not None]


def _precision(runs: Sequence[Run]) -> np.ndarray:
    """Return the mean precision over runs by round, [rounds]; nan where none knows it."""
    series = [[row.precision for row in by_round(run)] for run in runs]
    length = min(map(len, series), default=0)
    stacked = np.array([values[:length] for values in series])
    counts = np.isfinite(stacked).sum(axis=0)
    totals = np.nansum(stacked, axis=0)
    return np.where(counts > 0, totals / np.maximum(counts, 1), np.nan)

"""Compare the results of lm-eval with a run's record, and write them as a table and as JSON."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from fedsp_mpi.files import ownership
from fedsp_mpi.files.untrusted import JsonObject
from fedsp_mpi.record import RecordError, atomic
from fedsp_mpi.report import formatting

if TYPE_CHECKING:
    from fedsp_mpi.evaluation.harness import Result

FILE = ownership.EVALUATION
MEASURES = ("acc", "acc_norm", "exact_match")


@dataclass(frozen=True)
class EvalRow:
    """The result of one task with one model.

    Attributes:
        task: by lm-eval's name.
        filter: which of the task's ways to read an answer; "none" is the usual one.
        method: "zero-shot", or what the run's tables call its method.
        n: questions.
        measures: by lm-eval's names.
        errors: standard errors of the measures that have one.
        recorded: what the run's own scorer found for this method on the run's own task: n, and
            those of `MEASURES` that it has; None if the run has no such result.
        equal: whether all measures that both have are equal; None where the two did not answer the
            same questions.
    """

    task: str
    filter: str
    method: str
    n: int
    measures: dict[str, float]
    errors: dict[str, float]
    recorded: dict[str, float] | None = None
    equal: bool | None = None


@dataclass(frozen=True)
class Evaluation:
    """The results of an evaluation.

    Attributes:
        folder: of the run.
        provenance: model, versions and settings that made the results, as they are written.
        rows: in lm-eval's order of tasks.
    """

    folder: Path
    provenance: JsonObject
    rows: tuple[EvalRow, ...]


def compare(result: Result, method: str, recorded: dict[str, float] | None) -> EvalRow:
    """Compare a result with the run's record, if the questions are the same.

    Args:
        result: of lm-eval.
        method: that answered.
        recorded: what the run's own scorer found, None if it is another task's.
    """
    equal = None
    if recorded and recorded["n"] == result.n and result.filter == "none":
        common = [name for name in MEASURES if name in recorded and name in result.measures]
        if common:
            equal = all(recorded[name] == result.measures[name] for name in common)
    return EvalRow(
        task=result.task,
        filter=result.filter,
        method=method,
        n=result.n,
        measures=result.measures,
        errors=result.errors,
        recorded=recorded,
        equal=equal,
    )


def table(evaluation: Evaluation) -> str:
    """Write each task with each model, beside what the run's own scorer found."""
    rows = evaluation.rows
    provenance = evaluation.provenance
    all_measures = dict.fromkeys(name for row in rows for name in row.measures)
    measures = [name for name in MEASURES if name in all_measures]
    measures += [name for name in all_measures if name not in MEASURES]
    recorded = [name for name in MEASURES if any(name in (row.recorded or {}) for row in rows)]
    head = [
        "task",
        "model",
        "n",
        *(_label(name) for name in measures),
        "std. error",
        *(f"run's {_label(name)}" for name in recorded),
        "equal",
    ]
    cells = [_cells(row, measures, recorded) for row in rows]
    lines = [
        f"run       {provenance['run']}: {provenance['model']}",
        f"made with lm-eval {provenance['versions']['lm_eval']}, {provenance['dtype']} on "
        f"{provenance['device']}",
        "",
        *formatting.table(head, cells, num_left=2),
        *_remarks(rows),
    ]
    return "\n".join(lines)


def write(evaluation: Evaluation) -> Path:
    """Write evaluation.json into the run's folder, whole or not at all; an earlier one is replaced.

    Returns:
        The file's path.

    Raises:
        ValueError: it cannot be written.
    """
    path = evaluation.folder / FILE
    ownership.require_evaluation(path)
    results = [asdict(row) for row in evaluation.rows]
    content = {**evaluation.provenance, "results": _without_nan(results)}
    text = json.dumps(content, indent=2, ensure_ascii=False) + "\n"
    try:
        atomic.write(path, [text.encode()], "the run is as it was")
    except RecordError as error:
        raise ValueError(str(error)) from None
    return path


def _label(measure: str) -> str:
    """Return the head of a measure's column."""
    return f"{measure.replace('_match', '')} %" if measure in MEASURES else measure


def _cells(row: EvalRow, measures: Sequence[str], recorded: Sequence[str]) -> list[str]:
    """Return a row's cells.

    Args:
        row: of the table.
        measures: columns of lm-eval's measures.
        recorded: columns of the run's own.
    """
    main = ""
    for name in ("exact_match", "acc", *measures):
        if name in row.measures:
            main = name
            break
    recorded_measures = row.recorded or {}
    equal = {True: "yes", False: "no", None: ""}
    return [
        row.task if row.filter == "none" else f"{row.task} ({row.filter})",
        row.method,
        str(row.n or ""),
        *(_value(name, row.measures.get(name)) for name in measures),
        _value(main, row.errors.get(main)),
        *(_value(name, recorded_measures.get(name)) for name in recorded),
        equal[row.equal],
    ]


def _value(measure: str, value: float | None) -> str:
    """Write a measure: the package's own in percent, others as lm-eval has them."""
    if value is None:
        return ""
    return formatting.as_percent(value) if measure in MEASURES else formatting.as_decimal(value)


def _remarks(rows: Sequence[EvalRow]) -> list[str]:
    """Return the lines below the table: why results differ, or are not compared."""
    if any(row.equal is False for row in rows):
        return [
            "not equal: look for another device, number of threads or version in the run's record"
        ]
    for row in rows:
        if row.recorded and row.recorded["n"] != row.n:
            return [
                f"the run scored {row.recorded['n']} questions of {row.task}, not {row.n}: "
                "nothing is compared"
            ]
    return []


def _without_nan(value: object) -> object:
    """Replace nan and infinity by None: JSON has neither."""
    if isinstance(value, Mapping):
        return {key: _without_nan(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_without_nan(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value

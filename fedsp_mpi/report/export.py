"""Exports records for other programs: tables as CSV files, whole records as JSON.

Names of files, columns and keys are those of the record, which `record/RECORD.md` explains. A value
that is not known (nan) is an empty cell in CSV and null in JSON.
"""

from __future__ import annotations

import csv
import io
import json
import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from fedsp_mpi.files import ownership
from fedsp_mpi.files.untrusted import JsonObject
from fedsp_mpi.record.hdf5 import Run
from fedsp_mpi.record.tables import TABLES

FORMAT = "fedsp_mpi report"
VERSION = 1
_JSON_MARK = f'"format": "{FORMAT}"'
_OPTIONAL_TABLES = ("silos", "tiers")  # whose file is left out where the table has no rows
# What a spreadsheet takes for the beginning of a formula.
_FORMULA = ("=", "+", "-", "@", "\t", "\r")


def write_csv(run: Run, folder: str | Path) -> list[Path]:
    """Write each table of a run as NAME.csv; return the files.

    A text that a spreadsheet would take for a formula gets a ' in front.

    Args:
        run: the record.
        folder: is made if it is missing; other files in it stay.

    Raises:
        ValueError: a file of that name is somebody else's, or cannot be written.
    """
    folder = Path(folder)
    tables: dict[str, np.ndarray] = {}
    for name in TABLES:
        table = getattr(run, name)
        path = folder / f"{name}.csv"
        # A file of an earlier export is written even without rows: it would look like this run's.
        if len(table) or name not in _OPTIONAL_TABLES or path.exists():
            tables[name] = table
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name, table in tables.items():
            ownership.require_picture(folder / f"{name}.csv", _csv_mark(table))
        for name, table in tables.items():
            content = _csv(table).encode("utf-8", "backslashreplace")
            ownership.replace_picture(folder / f"{name}.csv", content, _csv_mark(table))
    except OSError as error:
        raise ValueError(
            f"{folder}: found no place to write to ({error.strerror}), expected a folder"
        ) from None
    return [folder / f"{name}.csv" for name in tables]


def _csv_mark(table: np.ndarray) -> bytes:
    """Return what a CSV file of this table begins with in every version: three columns' names."""
    return ",".join((table.dtype.names or ())[:3]).encode()


def _csv(table: np.ndarray) -> str:
    """Write a table [rows] as comma-separated values with a head."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(table.dtype.names or ())
    for row in table:
        writer.writerow([_csv_cell(value) for value in row.tolist()])
    return text.getvalue()


def _csv_cell(value: object) -> object:
    """Return a cell's text; numbers are written so that they come back exactly."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, float):
        return "" if math.isnan(value) else repr(value)
    if isinstance(value, int):
        return value
    text = _text(value)
    return f"'{text}" if text.startswith(_FORMULA) else text


def write_json(runs: Sequence[Run], path: str | Path) -> None:
    """Write what the records say to a file, whole or not at all.

    Raises:
        ValueError: the file is somebody else's, or cannot be written.
    """
    path = Path(path)
    content = f"{as_json(runs)}\n".encode()
    try:
        ownership.replace_picture(path, content, _JSON_MARK.encode())
    except OSError as error:
        raise ValueError(
            f"{path}: found no place to write to ({error.strerror}), expected a file"
        ) from None


def as_json(runs: Sequence[Run]) -> str:
    """Return what the records say, but for their prompts, as one JSON document.

    Numbers that are not finite are null: JSON has none.
    """
    document = {"format": FORMAT, "version": VERSION, "runs": [_run(run) for run in runs]}
    return json.dumps(document, indent=1, allow_nan=False)


def _run(run: Run) -> JsonObject:
    tables = {name: _rows(getattr(run, name)) for name in TABLES}
    return {
        "name": run.name,
        "folder": str(run.file.parent),
        "status": run.status,
        "reason": run.reason,
        "created": run.created,
        "updated": run.updated,
        "committed_rounds": run.committed_rounds,
        "prompt_rounds": list(run.prompt_rounds),
        "config": _finite(run.config),
        "environment": _finite(run.environment),
        # Without the question of the test split: an export is for others, too.
        "sections": _finite(
            {name: value for name, value in run.sections.items() if name != "plain_use"}
        ),
        **tables,
    }


def _rows(table: np.ndarray) -> list[JsonObject]:
    """Return the rows of a table [rows], a mapping each."""
    names = table.dtype.names or ()
    return [{name: _finite(value) for name, value in zip(names, row.tolist())} for row in table]


def _finite(value: object) -> object:
    """Return a value as JSON can hold it."""
    if isinstance(value, dict):
        return {str(key): _finite(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_finite(item) for item in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if value is None or isinstance(value, (bool, int)):
        return value
    return _text(value)


def _text(value: object) -> str:
    return value.decode() if isinstance(value, bytes) else str(value)

"""Find the classes of a table whose user names none: those of its schema, else its labels."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import datasets

from fedsp_mpi.data import labels
from fedsp_mpi.data.classification import is_number, plain_name

MAX_CLASSES = 100  # more are hardly the labels of a classification
_MAX_SHOWN = 20  # classes that a note lists
_MAX_NAME_LENGTH = 30  # characters of one of them


def find(
    task: str, tables: Mapping[str, datasets.Dataset], column: str
) -> tuple[tuple[str, ...], list[str]]:
    """Return the names of the classes in order, and a note that says them.

    Numbers are sorted as numbers, other labels as texts. Labels that differ only by case and outer
    blanks are one class. A null, a blank and -1 are no labels.

    Args:
        task: its name, for messages.
        tables: the splits of the source; a split may lack the column.
        column: of the labels.

    Raises:
        ValueError: there are no labels, one, or more than `MAX_CLASSES`, or they are neither texts
            nor numbers.
    """
    features = [table.features[column] for table in tables.values() if column in table.features]
    schema = next((kind for kind in features if isinstance(kind, datasets.ClassLabel)), None)
    if schema is not None:
        classes = tuple(schema.names)
        origin = "its schema"
        has_minus_one = False
    else:
        for kind in features:
            _require_plain(task, column, kind)
        labelled = [table for table in tables.values() if column in table.features]
        spellings = _distinct(labelled, column)
        has_minus_one = "-1" in spellings
        classes = _sorted(spellings)
        origin = "the rows"
    if not 2 <= len(classes) <= MAX_CLASSES:
        raise ValueError(
            f"{task}: found {len(classes)} different labels in the column {column!r}, expected 2 "
            f"to {MAX_CLASSES}; name the right column in data.columns.label, or all classes in "
            "data.classes"
        )
    note = (
        f"{len(classes)} classes, found in {origin}: {_listed(classes)} (data.classes names them)"
    )
    if has_minus_one:
        note += "; -1 was taken for no label"
    return classes, [note]


def _require_plain(task: str, column: str, kind: object) -> None:
    """Raise ValueError if a column's cells are neither texts nor numbers."""
    dtype = kind.dtype if isinstance(kind, datasets.Value) else type(kind).__name__.lower()
    if not dtype.startswith(("string", "large_string", "int", "uint", "float", "bool", "null")):
        raise ValueError(
            f"{task}: found {dtype} in the column {column!r}, expected one label a row, a text or "
            "a number; name the right column in data.columns.label"
        )


def _distinct(tables: Iterable[datasets.Dataset], column: str) -> dict[str, str]:
    """Return labels as they are written, by how names are compared.

    Of several spellings the last one in order, which has the fewest capitals, counts.
    """
    spellings: dict[str, str] = {}
    for table in tables:
        for label in table.unique(column):
            if labels.is_missing(label):
                continue
            name = plain_name(label)
            spelling = label.strip() if isinstance(label, str) else name
            spellings[name] = max(spelling, spellings.get(name, spelling))
    return spellings


def _sorted(spellings: Mapping[str, str]) -> tuple[str, ...]:
    """Return the labels but -1, numbers in their order and then other texts in theirs."""

    def order(name: str) -> tuple[bool, float, str]:
        if is_number(name):
            return False, float(name), name
        return True, 0.0, name

    return tuple(spellings[name] for name in sorted(spellings, key=order) if name != "-1")


def _listed(classes: Sequence[str]) -> str:
    """List the first classes by their names; a long name, which may be a text, by its length."""
    names = [
        name if len(name) <= _MAX_NAME_LENGTH else f"({len(name)} characters)"
        for name in classes[:_MAX_SHOWN]
    ]
    ellipsis = ["..."] if len(classes) > _MAX_SHOWN else []
    return ", ".join([*names, *ellipsis])

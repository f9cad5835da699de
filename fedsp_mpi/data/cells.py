"""Read the cells of a row, in any form that a file format gives to texts, lists and mappings.

A message describes a cell by its type and size and never quotes it, because it is a client's text.
"""

from __future__ import annotations

import ast
import json
from collections.abc import Mapping, Sequence
from contextlib import suppress

from fedsp_mpi.files.untrusted import JsonMapping

Row = JsonMapping
_NUM_CHOICES_SHOWN = 10
# Characters up to which a label is quoted: it is the name of a class, not a client's text.
MAX_LABEL_LENGTH = 10
# Characters up to which the name of a column is quoted: without a header it is a client's text.
_MAX_COLUMN_LENGTH = 30


class NoTextError(ValueError):
    """Raised where a row has no text at all; such a row is left out."""


def text(row: Row, name: str) -> str:
    """Return the text of a column; raise ValueError if the cell holds something else."""
    value = row.get(name)
    if not isinstance(value, str):
        raise ValueError(
            f"column {name!r}: found {describe_cell(value)}, expected text; correct the row"
        )
    return value


def texts(row: Row, name: str) -> tuple[str, ...]:
    """Return the list of texts of a column; CSV, which has no lists, holds it written as text.

    Raises:
        ValueError: the cell holds something else.
    """
    value = _parsed(row.get(name))
    if isinstance(value, list) and all(isinstance(option, str) for option in value):
        return tuple(value)
    advice = "correct the row"
    if isinstance(value, str):
        advice = (
            'a CSV cell cannot hold a list: write it as a JSON list, ["a", "b"], or use JSON lines '
            "or Parquet"
        )
    raise ValueError(
        f"column {name!r}: found {describe_cell(value)}, expected a list of texts; {advice}"
    )


def mapping(row: Row, name: str) -> Row:
    """Return the lists `text` and `label` of a column of options.

    Raises:
        ValueError: the cell is no mapping.
    """
    value = _parsed(row.get(name))
    if not isinstance(value, Mapping):
        raise ValueError(
            f"column {name!r}: found {describe_cell(value)}, expected the lists 'text' and 'label'"
        )
    return value


def is_mapping(row: Row, name: str) -> bool:
    """Return whether a column of options holds the lists `text` and `label`."""
    return isinstance(_parsed(row.get(name)), Mapping)


def as_text(row: Row, name: str) -> str:
    """Return the text of a column of the user's own, where a number is a text and null is none.

    Raises:
        ValueError: the cell holds something else.
    """
    value = row.get(name)
    if value is None:
        return ""
    if isinstance(value, (int, float)):
        return str(value)
    if not isinstance(value, str):
        raise ValueError(
            f"column {name!r}: found {type(value).__name__}, expected text, as data.template has it"
        )
    return value


def describe_cell(value: object) -> str:
    """Describe a cell for a message: numbers and booleans as they are, others by type and size."""
    kind = type(value).__name__
    if value is None or isinstance(value, bool):
        return f"{kind} {value}"
    if isinstance(value, (int, float)):
        digits = repr(value)
        if len(digits) <= MAX_LABEL_LENGTH:
            return f"{kind} {digits}"
        return f"{kind} of {len(digits)} characters"
    if isinstance(value, str):
        return f"{kind} of {len(value)} characters"
    if isinstance(value, (list, tuple, Mapping)):
        return f"{kind} of length {len(value)}"
    return kind


def describe_label(value: object) -> str:
    """Describe a label: quote a short word, which names a class; others as in `describe_cell`."""
    if isinstance(value, str) and len(value) <= MAX_LABEL_LENGTH:
        return repr(value)
    return describe_cell(value)


def describe_choices(choices: Sequence[str]) -> str:
    """Describe choices: list short words, which name classes; else count them."""
    first_choices = choices[:_NUM_CHOICES_SHOWN]
    if any(len(choice) > MAX_LABEL_LENGTH for choice in first_choices):
        return f"{len(choices)} texts"
    ellipsis = ", ..." if len(choices) > _NUM_CHOICES_SHOWN else ""
    return ", ".join(first_choices) + ellipsis


def describe_columns(names: Sequence[str]) -> str:
    """List the names of columns; a long one, which may be a row's text, is not shown."""
    shown = [
        name if len(name) <= _MAX_COLUMN_LENGTH else f"(a name of {len(name)} characters)"
        for name in names[:_NUM_CHOICES_SHOWN]
    ]
    ellipsis = ["..."] if len(names) > _NUM_CHOICES_SHOWN else []
    return ", ".join([*shown, *ellipsis])


def _parsed(value: object) -> object:
    """Return the list or mapping that a text writes in JSON or Python; other values as they are."""
    if not isinstance(value, str) or value.lstrip()[:1] not in ("[", "{"):
        return value
    for read in (json.loads, ast.literal_eval):
        with suppress(ValueError, SyntaxError, RecursionError, MemoryError):
            parsed: object = read(value.strip())
            return parsed
    return value

"""The cells of a row: texts, lists and mappings, whatever the file format could hold of them.

A message describes a cell by its type and size and never quotes it: what it holds is a client's
text.
"""

from __future__ import annotations

import ast
import json
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Any

Row = Mapping[str, Any]
_MOST_SHOWN = 10  # choices
SHORTEST_TEXT = (
    10  # characters up to which a label is quoted: it is the name of a class, not a client's text
)


def text(row: Row, name: str) -> str:
    """Return the text of a column. Raises ValueError if the cell holds something else."""
    value = row.get(name)
    if not isinstance(value, str):
        raise ValueError(f"column {name!r}: found {shown(value)}, expected text; correct the row")
    return value


def texts(row: Row, name: str) -> tuple[str, ...]:
    """Return the list of texts of a column; in CSV, which has no lists, the cell is one written
    out.

    Raises ValueError if the cell holds something else.
    """
    value = _parsed(row.get(name))
    if isinstance(value, list) and all(isinstance(option, str) for option in value):
        return tuple(value)
    advice = "correct the row"
    if isinstance(value, str):
        advice = (
            'a CSV cell cannot hold a list: write it as a JSON list, ["a", "b"], or use '
            "JSON lines or Parquet"
        )
    raise ValueError(f"column {name!r}: found {shown(value)}, expected a list of texts; {advice}")


def mapping(row: Row, name: str) -> Row:
    """Return the lists `text` and `label` of a column of options.

    Raises ValueError if the cell is no mapping.
    """
    value = _parsed(row.get(name))
    if not isinstance(value, Mapping):
        raise ValueError(
            f"column {name!r}: found {shown(value)}, expected the lists 'text' and 'label'"
        )
    return value


def shown(value: object) -> str:
    """Describe a cell for a message: numbers and truth values as they are, the rest by type and
    size.
    """
    kind = type(value).__name__
    if value is None or isinstance(value, bool):
        return f"{kind} {value}"
    if isinstance(value, (int, float)):
        digits = repr(value)
        return (
            f"{kind} {digits}"
            if len(digits) <= SHORTEST_TEXT
            else f"{kind} of {len(digits)} characters"
        )
    if isinstance(value, str):
        return f"{kind} of {len(value)} characters"
    if isinstance(value, (list, tuple, Mapping)):
        return f"{kind} of length {len(value)}"
    return kind


def shown_label(value: object) -> str:
    """Describe a label: as `shown`, but a short word is quoted, because it is the name of a class."""
    if isinstance(value, str) and len(value) <= SHORTEST_TEXT:
        return repr(value)
    return shown(value)


def shown_choices(choices: Sequence[str]) -> str:
    """Describe choices: in words where they are short, which is how classes are named; else by
    their number.
    """
    if all(len(choice) <= SHORTEST_TEXT for choice in choices[:_MOST_SHOWN]):
        return ", ".join(choices[:_MOST_SHOWN]) + (", ..." if len(choices) > _MOST_SHOWN else "")
    return f"{len(choices)} texts"


def _parsed(value: object) -> object:
    """Return the list or mapping that a text writes out, as JSON or as Python does; any other value
    as it is.
    """
    if not isinstance(value, str) or value.lstrip()[:1] not in ("[", "{"):
        return value
    for read in (json.loads, ast.literal_eval):
        with suppress(ValueError, SyntaxError, RecursionError, MemoryError):
            parsed: object = read(value.strip())
            return parsed
    return value

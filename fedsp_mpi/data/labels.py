"""Find the number of the choice that a label means.

Public data sets write the right answer in many ways: a class number whose names stand in the file's
schema, and in any order; "0" or 1.0 where a blank cell made texts or floats of a column; the words
of the choices; letters A to D.
"""

from __future__ import annotations

import math
import re
import string
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import lru_cache

from fedsp_mpi.data.cells import describe_choices, describe_label

Synonyms = tuple[tuple[str, ...], ...]  # for each choice, further names of its class, in lower case

_NUMBER = re.compile(r"\d+(\.0*)?", re.ASCII)
# Class names that are positions or letters, not words.
_GENERIC = re.compile(r"\d+|[A-Za-z]", re.ASCII)


class NoLabelError(ValueError):
    """Raised where a row has no label at all; such a row is left out."""


@dataclass
class ClassNames:
    """The names of the classes of a column, by number.

    Attributes:
        texts: name by class number.
        are_unknown: whether labels were taken by number because no name is one of the choices; set
            by `position`.
    """

    texts: tuple[str, ...]
    are_unknown: bool = field(default=False, compare=False)


@dataclass(frozen=True)
class ClassId:
    """A class number of a column whose classes have names."""

    number: int
    names: ClassNames

    @property
    def name(self) -> str:
        """The name of the class; raises ValueError if the number has none."""
        if not 0 <= self.number < len(self.names.texts):
            raise ValueError(
                f"found class {self.number}, expected one below {len(self.names.texts)}; "
                "correct the row"
            )
        return self.names.texts[self.number]


def is_missing(label: object) -> bool:
    """Return whether a cell holds no label: null, a blank text, or not a number."""
    if isinstance(label, str):
        return not label.strip()
    return label is None or (isinstance(label, float) and math.isnan(label))


def is_unlabelled(label: object) -> bool:
    """Return whether a cell says that its row has no label: by -1, or as in `is_missing`."""
    if isinstance(label, ClassId):
        return label.number == -1
    if isinstance(label, str) and label.strip() == "-1":
        return True
    return is_missing(label) or label == -1


def position(
    label: object, choices: Sequence[str], synonyms: Synonyms = (), *, first: int = 0
) -> int:
    """Return the number of the choice that a label means.

    Booleans are refused: as a number, True would mean the second of ("True", "False").

    Args:
        label: a number, a `ClassId`, or a text: a number, a choice's words, or its letter.
        choices: of the row.
        synonyms: of choices that are the same in every row, which are the task's classes.
        first: number of the first choice.

    Raises:
        NoLabelError: the cell is empty.
        ValueError: the label means no choice, or different ones; or the names of the classes are
            not the choices'.
    """
    if isinstance(label, ClassId):
        return _position_of_class(label, tuple(choices), synonyms)
    if is_missing(label):
        raise NoLabelError(_refusal(label, choices, first))
    if isinstance(label, float) and label.is_integer():
        label = int(label)
    if isinstance(label, int) and not isinstance(label, bool):
        place = label - first
        if 0 <= place < len(choices):
            return place
    if not isinstance(label, str):
        raise ValueError(_refusal(label, choices, first))
    meanings = _meanings(label.strip(), choices, synonyms, first=first)
    if len(set(meanings.values())) > 1:
        means = ", ".join(f"choice {number} by its {kind}" for kind, number in meanings.items())
        raise ValueError(
            f"column 'label': found {describe_label(label)}, which means {means} (from 0), "
            "expected one meaning; give the position as a number, not as a text (in CSV its letter)"
        )
    if not meanings:
        raise ValueError(_refusal(label, choices, first))
    return next(iter(meanings.values()))


def key(label: object) -> str:
    """Return an answer key, such as "A" or "2", as text.

    Raises:
        NoLabelError: the cell is empty.
        ValueError: the cell holds neither a text nor a whole number.
    """
    if is_missing(label):
        raise NoLabelError(
            "found no answer key, expected the label of the right option; correct the row"
        )
    if isinstance(label, ClassId):
        return label.name
    if isinstance(label, int) and not isinstance(label, bool):
        return str(label)
    if not isinstance(label, str):
        raise ValueError(
            f"found the answer key {describe_label(label)}, expected text; correct the row"
        )
    return label.strip()


def number_in_cell(cell: object) -> object:
    """Return the whole number that a text writes, as cells of CSV do; other cells as they are."""
    if isinstance(cell, str) and _NUMBER.fullmatch(cell.strip()):
        return int(float(cell))
    return cell


def _refusal(label: object, choices: Sequence[str], first: int) -> str:
    last = len(choices) - 1 + first
    advice = "correct the row"
    if label in (last + 1, str(last + 1)) and first == 0:
        advice = "correct the row, or set data.first_label=1 if rows count from 1"
    return (
        f"column 'label': found {describe_label(label)}, expected a whole number from {first} to "
        f"{last}, the position of the right choice (or the choice itself, or its letter); {advice}"
    )


def _meanings(
    text: str, choices: Sequence[str], synonyms: Synonyms, *, first: int
) -> dict[str, int]:
    """Return the choice that a text means, by each way of reading it that gives one."""
    meanings = {}
    by_word = _position_by_word(text, choices, synonyms)
    if by_word is not None:
        meanings["words"] = by_word
    if _NUMBER.fullmatch(text) and 0 <= float(text) - first < len(choices):
        meanings["number"] = int(float(text)) - first
    letter = string.ascii_uppercase.find(text.upper()) if len(text) == 1 else -1
    if 0 <= letter < len(choices):
        meanings["letter"] = letter
    return meanings


def _position_by_word(text: str, choices: Sequence[str], synonyms: Synonyms) -> int | None:
    """Return the position of the only choice that a text equals; None if there is no such choice.

    Exact equality comes first, then equality without case and outer blanks, then synonyms.
    """
    plain = text.strip().casefold()
    exact = [number for number, choice in enumerate(choices) if choice == text]
    folded = [number for number, choice in enumerate(choices) if choice.strip().casefold() == plain]
    synonymous = [number for number, names in enumerate(synonyms) if plain in names]
    for matches in (exact, folded, synonymous):
        if len(matches) == 1:
            return matches[0]
    return None


def position_by_class_name(label: ClassId, choices: tuple[str, ...]) -> int:
    """Return the number of the choice that is called like a class.

    Where no class is, labels are taken by number, which `ClassNames.are_unknown` says.

    Raises:
        NoLabelError: the number is -1, by which data sets say that they do not know the class.
        ValueError: there is no such class; or the names of the classes are not the choices'.
    """
    if label.number == -1:
        raise NoLabelError("found class -1")
    order = _order(label.names.texts, choices, ())
    _ = label.name  # raises if there is no such class
    if order is None:
        label.names.are_unknown = True
        return label.number
    return order[label.number]


def _position_of_class(label: ClassId, choices: tuple[str, ...], synonyms: Synonyms) -> int:
    """Return the number of the choice that a class with a name means."""
    names = label.names.texts
    if all(_GENERIC.fullmatch(name) for name in names):
        if synonyms and len(names) != len(choices):
            raise ValueError(_mismatch(names, choices))
        return position(label.name, choices, synonyms)
    order = _order(names, choices, synonyms)
    if order is None:
        label.names.are_unknown = True
        return position(label.number, choices)
    _ = label.name  # raises if there is no such class
    return order[label.number]


@lru_cache(maxsize=1024)
def _order(
    names: tuple[str, ...], choices: tuple[str, ...], synonyms: Synonyms
) -> tuple[int, ...] | None:
    """Return the choice of each class; None where the names do not tell it.

    Raises:
        ValueError: there are more or fewer classes than choices, or only some names are choices'
            and their order is another one.
    """
    if len(names) != len(choices):
        raise ValueError(_mismatch(names, choices))
    order = [_position_by_word(name, choices, synonyms) for name in names]
    matched = [number for number in order if number is not None]
    if len(set(matched)) == len(names):
        return tuple(matched)
    if all(number is None or number == index for index, number in enumerate(order)):
        return None
    raise ValueError(_mismatch(names, choices))


def _mismatch(names: Sequence[str], choices: Sequence[str]) -> str:
    """Word the message on classes that are not the choices, with both orders."""
    return (
        f"column 'label': found {len(names)} classes in the order {describe_choices(names)}, "
        f"expected the {len(choices)} choices {describe_choices(choices)}; name the classes after "
        "the choices, or choose another task"
    )

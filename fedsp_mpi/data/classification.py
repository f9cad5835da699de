"""Classification of the user's own text: rows of any table, whose labels are names or numbers.

With `data.classes` the classes are known without a row, so that parties who see none of each
other's text agree on them. Without it they are those of the rows: data/found_classes.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Protocol

from fedsp_mpi.config.parsing import ConfigError
from fedsp_mpi.data import labels
from fedsp_mpi.data.cells import (
    NoTextError,
    Row,
    as_text,
    describe_choices,
    describe_label,
)
from fedsp_mpi.data.examples import Example

TEXT = "text"  # the column of the text, where no template names others
_MAX_LISTED = 10  # classes up to which the question names them
_TRUTH = ("false", "true")


class TextTemplate(Protocol):
    """What the text is made of, in the user's own words."""

    @property
    def columns(self) -> tuple[str, ...]:
        """The columns that it names."""

    def fill(self, row: Row) -> tuple[str, str]:
        """Return the texts before the answer and behind it."""


@dataclass(frozen=True)
class DefaultTemplate:
    """The words around a text where the user gives none.

    Attributes:
        words: of the classes.
    """

    words: tuple[str, ...]

    @property
    def columns(self) -> tuple[str, ...]:
        """The column of the text."""
        return (TEXT,)

    def fill(self, row: Row) -> tuple[str, str]:
        """Return the text with a question about its class, and nothing behind the answer.

        The question names the classes, if they are few, as those of the public tasks do.
        """
        text = as_text(row, TEXT)
        if len(self.words) > _MAX_LISTED:
            return f"{text}\nQuestion: What is this about?\nAnswer:", ""
        listed = " or ".join(filter(None, [", ".join(self.words[:-1]), self.words[-1]]))
        return f"{text}\nQuestion: Is this {listed}?\nAnswer:", ""


@dataclass(frozen=True)
class Reader:
    """Turn the rows of a table into examples of classes.

    Attributes:
        classes: names, in order.
        words: an answer for each class; empty: its name.
        template: the words around a text; None: a question that names the classes.
        first: the number of the first class in labels that are numbers.
    """

    classes: tuple[str, ...]
    words: tuple[str, ...] = ()
    template: TextTemplate | None = None
    first: int = 0

    @cached_property
    def _answers(self) -> tuple[str, ...]:
        return self.words or self.classes

    @cached_property
    def _template(self) -> TextTemplate:
        return self.template or DefaultTemplate(self._answers)

    @cached_property
    def _by_name(self) -> dict[str, int]:
        return {plain_name(name): number for number, name in enumerate(self.classes)}

    def __call__(self, row: Row) -> Example:
        """Return the example of a row.

        Raises:
            NoLabelError: the row has no label, or -1 where that is no class.
            NoTextError: all columns of its text are blank.
            ValueError: the label means no class, or the text is none.
        """
        gold = self.position(row.get("label"))
        columns = self._template.columns
        if not any(as_text(row, name).strip() for name in columns):
            raise NoTextError(f"found nothing in {', '.join(columns)}")
        context, suffix = self._template.fill(row)
        return Example(context, f" {self._answers[gold]}", self._answers, (gold,), suffix)

    def position(self, label: object) -> int:
        """Return the number of the class that a label means.

        A class's name counts first. A number that is no name is a position, unless some classes
        are called by numbers.

        Raises:
            NoLabelError: there is no label.
            ValueError: the label means no class.
        """
        if isinstance(label, labels.ClassId):
            return labels.position_by_class_name(label, self.classes)
        name = plain_name(label) if isinstance(label, (str, int, float)) else None
        if name in self._by_name:
            return self._by_name[name]
        if labels.is_unlabelled(label):
            raise labels.NoLabelError("found no label")
        if name in _TRUTH and len(self.classes) == len(_TRUTH):
            return _TRUTH.index(name)
        positions = ""
        if not any(map(is_number, self._by_name)):
            number = labels.number_in_cell(name)
            place = number - self.first if isinstance(number, int) else -1
            if 0 <= place < len(self.classes):
                return place
            positions = f", or a number from {self.first} to {len(self.classes) - 1 + self.first}"
        raise ValueError(
            f"column 'label': found {describe_label(label)}, expected one of "
            f"{describe_choices(self.classes)}{positions}; correct the row, or name all labels in "
            "data.classes"
        )


def needs_classes(row: Row) -> Example:
    """Stand for the reader of rows whose classes have not been found yet.

    Raises:
        ValueError: always.
    """
    raise ValueError("found no classes, expected data.classes, or rows to find them in")


def plain_name(label: str | float) -> str:
    """Return a label as names are compared: without case, outer blanks, or a number's ".0"."""
    if isinstance(label, float) and label.is_integer():
        label = int(label)
    number = labels.number_in_cell(str(label))
    return str(number).strip().casefold()


def is_number(name: str) -> bool:
    """Return whether a class is called by a number."""
    return name.removeprefix("-").replace(".", "", 1).isdecimal()


def require_classes(classes: Sequence[str]) -> None:
    """Raise ConfigError if the configuration's classes are not two or more different names."""
    names = {plain_name(name) for name in classes}
    if len(classes) == 1 or len(names) < len(classes) or "" in names:
        raise ConfigError(
            f"data.classes: found {describe_choices(classes)}, expected two or more names that "
            "differ by more than case and blanks"
        )

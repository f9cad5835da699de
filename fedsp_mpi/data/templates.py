"""The user's own words around a task's text, and for its classes: a template and a verbaliser.

As in FedPrompt (arXiv 2208.12268), whose template is "[text] is [MASK]" and whose verbalisers have
one word a class.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from string import Formatter

from fedsp_mpi.config.parsing import ConfigError
from fedsp_mpi.data.cells import shown_choices
from fedsp_mpi.data.tasks import Example, Row, Task

MASK = "mask"


@dataclass(frozen=True)
class Template:
    """A template, taken apart.

    Attributes:
        before, after: what stands in front of the answer and behind it, as pairs of text and the
            column that follows it (None: none).
    """

    before: tuple[tuple[str, str | None], ...]
    after: tuple[tuple[str, str | None], ...]

    @classmethod
    def of(cls, text: str, columns: Sequence[str]) -> Template:
        """Read "{column} some words {mask}.".

        Raises ConfigError if it is not well formed, names a column that is not one of `columns`, or
        does not name the mask once.
        """
        pieces = [(literal, name) for literal, name, *_ in _parsed(text)]
        for _, name in pieces:
            if name is not None and name not in (*columns, MASK):
                raise ConfigError(
                    f"data.template: found {{{name}}}, expected one of "
                    f"{', '.join(f'{{{known}}}' for known in (*columns, MASK))}"
                )
        at = [place for place, (_, name) in enumerate(pieces) if name == MASK]
        if len(at) != 1:
            raise ConfigError(
                f"data.template: found {{mask}} {len(at)} times in {text!r}, expected it once, "
                "where the answer belongs"
            )
        [place] = at
        return cls((*pieces[:place], (pieces[place][0], None)), tuple(pieces[place + 1 :]))

    def fill(self, row: Row) -> tuple[str, str]:
        """What stands before the answer, without blanks at its end, and what stands behind it."""
        before, after = (
            "".join(_piece(row, *pair) for pair in part) for part in (self.before, self.after)
        )
        return before.rstrip(), after


class Wording:
    """Turns rows of a task into examples in the user's words.

    Args:
        task: in its own words.
        template: None leaves the task's own context.
        verbaliser: a word a class, in the order of the classes; empty leaves the task's own.

    Raises ConfigError on a template or a verbaliser that cannot be.
    """

    def __init__(self, task: Task, template: str | None, verbaliser: Sequence[str]) -> None:
        if task.metric != "multiple_choice":
            raise ConfigError(
                f"data.template, data.verbaliser: found with the task {task.name}, which has no "
                "classes, expected a "
                "task of multiple choice; take them away"
            )
        texts = dict.fromkeys((*task.columns[:-1], *task.other_columns[:-1]))
        self._template = None if template is None else Template.of(template, tuple(texts))
        self._own, self._words = task.example, tuple(verbaliser)
        self._choices: tuple[str, ...] | None = None
        if len(set(self._words)) < len(self._words) or not all(
            word.strip() == word != "" for word in self._words
        ):
            raise ConfigError(
                f"data.verbaliser: found {list(verbaliser)}, expected different words without "
                "blanks around them"
            )

    def __call__(self, row: Row) -> Example:
        """The example of a row.

        Raises ValueError if the row does not read, or its choices have no words.
        """
        example = self._own(row)
        if self._template is not None:
            context, after = self._template.fill(row)
            example = replace(example, context=context, after=after)
        if not self._words:
            return example
        self._choices = self._choices or example.choices
        if len(example.choices) != len(self._words):
            raise ValueError(
                f"data.verbaliser: found {len(self._words)} words for "
                f"{len(example.choices)} classes "
                f"({shown_choices(example.choices)}), expected one for each"
            )
        if example.choices != self._choices:
            raise ValueError(
                "data.verbaliser: found rows with different choices, expected a task whose "
                "choices are classes"
            )
        return replace(example, choices=self._words, target=f" {self._words[example.gold[0]]}")


def reworded(task: Task, template: str | None, verbaliser: Sequence[str]) -> Task:
    """The same task in other words; itself where none are given. Raises ConfigError as `Wording`
    does.
    """
    if template is None and not verbaliser:
        return task
    return replace(task, example=Wording(task, template, verbaliser))


def require_answer_last(examples: Sequence[Example], family: str) -> None:
    """Raise ConfigError if words follow the answer, which a model that reads from left to right
    does not see.
    """
    if after := next((example.after for example in examples if example.after.strip()), None):
        raise ConfigError(
            f"data.template: found {after!r} behind {{mask}} with a {family}, which reads "
            "from left to right, "
            "expected {mask} at the end"
        )


def _parsed(text: str) -> list[tuple[str, str | None]]:
    try:
        found = list(Formatter().parse(text))
    except ValueError as error:
        raise ConfigError(
            f"data.template: found {text!r} ({error}), expected columns in braces, and {{mask}}"
        ) from None
    if any(form or conversion for _, _, form, conversion in found):
        raise ConfigError(
            f"data.template: found {text!r}, expected plain names in braces, without ':' or '!'"
        )
    return [(literal, name) for literal, name, _, _ in found]


def _piece(row: Row, literal: str, name: str | None) -> str:
    if name is None:
        return literal
    value = row.get(name)
    if not isinstance(value, str):
        raise ValueError(
            f"column {name!r}: found {type(value).__name__}, expected text, as data.template has it"
        )
    return literal + value

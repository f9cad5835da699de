"""A template and a verbaliser: the user's own words around a task's text, and for its classes.

As in FedPrompt (arXiv 2208.12268), whose template is "[text] is [MASK]" and whose verbalisers have
one word a class.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from string import Formatter

from fedsp_mpi.config.parsing import ConfigError
from fedsp_mpi.data.cells import Row, as_text, describe_choices
from fedsp_mpi.data.examples import Example
from fedsp_mpi.data.tasks import Task

MASK = "mask"


_Piece = tuple[str, str | None]  # a text, and the column that follows it, if any


def _task_cell(row: Row, name: str) -> str:
    value = row.get(name)
    if not isinstance(value, str):
        raise ValueError(
            f"column {name!r}: found {type(value).__name__}, expected text, as data.template has it"
        )
    return value


@dataclass(frozen=True)
class Template:
    """A template, taken apart at its mask.

    Attributes:
        before: the pieces in front of the answer.
        after: the pieces behind it.
        cell: reads a column of a row.
    """

    before: tuple[_Piece, ...]
    after: tuple[_Piece, ...]
    cell: Callable[[Row, str], str] = _task_cell

    @classmethod
    def of(cls, text: str, columns: Sequence[str]) -> Template:
        """Read a template such as "{column} some words {mask}.".

        Raises:
            ConfigError: it is not well formed, names a column that is not one of `columns`, or does
                not name the mask exactly once.
        """
        pieces = _parsed(text)
        names = (*columns, MASK)
        for _, name in pieces:
            if name is not None and name not in names:
                raise ConfigError(
                    f"data.template: found {{{name}}}, expected one of "
                    f"{', '.join(f'{{{expected}}}' for expected in names)}"
                )
        masks = [index for index, (_, name) in enumerate(pieces) if name == MASK]
        if len(masks) != 1:
            raise ConfigError(
                f"data.template: found {{mask}} {len(masks)} times in {text!r}, expected it once, "
                "where the answer belongs"
            )
        [mask] = masks
        text_before_mask = (pieces[mask][0], None)
        return cls((*pieces[:mask], text_before_mask), tuple(pieces[mask + 1 :]))

    @classmethod
    def of_own(cls, text: str, answer_columns: Sequence[str], names: Mapping[str, str]) -> Template:
        """Read a template over the columns of the user's own rows, whatever they are called.

        Without a mask the answer follows at the end. Numbers are texts, and null is none.

        Args:
            text: the template.
            answer_columns: that it must not name.
            names: the task's names of columns by the source's, which it may have, too.

        Raises:
            ConfigError: it is not well formed, names a column of `answer_columns` or none, or names
                the mask twice.
        """
        fields = [name for _, name in _parsed(text) if name is not None]
        if MASK not in fields:
            text = f"{text}{{{MASK}}}"
        columns = [name for name in dict.fromkeys(fields) if name and name != MASK]
        for name in columns:
            if names.get(name, name) in answer_columns:
                raise ConfigError(
                    f"data.template: found {{{name}}}, which holds the answer, expected columns of "
                    "the text; take it away"
                )
        if not columns:
            raise ConfigError(
                f"data.template: found {text!r} without a column, expected one of the text, such "
                "as {text}"
            )
        template = cls.of(text, columns)
        before, after = (
            tuple((words, name and names.get(name, name)) for words, name in pieces)
            for pieces in (template.before, template.after)
        )
        return cls(before, after, as_text)

    @property
    def columns(self) -> tuple[str, ...]:
        """The columns that it names."""
        pieces = (*self.before, *self.after)
        return tuple(dict.fromkeys(name for _, name in pieces if name is not None))

    def fill(self, row: Row) -> tuple[str, str]:
        """Return the texts before the answer, without blanks at its end, and behind it.

        Raises:
            ValueError: a column of the row is not text.
        """
        before = "".join(self._filled(piece, row) for piece in self.before)
        after = "".join(self._filled(piece, row) for piece in self.after)
        return before.rstrip(), after

    def _filled(self, piece: _Piece, row: Row) -> str:
        literal, name = piece
        return literal if name is None else literal + self.cell(row, name)


class _Rewording:
    """Turn rows of a task into examples in the user's words.

    Args:
        task: in its own words.
        template: None leaves the task's own context.
        verbaliser: a word for each class, in the order of the classes; empty leaves the task's own.

    Raises:
        ConfigError: the task has no classes, or the verbaliser is not well formed.
    """

    def __init__(self, task: Task, template: Template | None, verbaliser: Sequence[str]) -> None:
        if task.metric != "multiple_choice":
            raise ConfigError(
                f"data.template, data.verbaliser: found with the task {task.name}, which has no "
                "classes, expected a task of multiple choice; take them away"
            )
        self._task_example = task.example
        self._template = template
        self._words = tuple(verbaliser)
        self._choices: tuple[str, ...] | None = None  # of the first row
        require_words(verbaliser)

    def __call__(self, row: Row) -> Example:
        """Return the example of a row.

        Raises:
            ValueError: the row does not read, or its choices have no words.
        """
        example = self._task_example(row)
        if self._template is not None:
            context, suffix = self._template.fill(row)
            example = replace(example, context=context, suffix=suffix)
        if not self._words:
            return example
        self._choices = self._choices or example.choices
        if len(example.choices) != len(self._words):
            raise ValueError(
                f"data.verbaliser: found {len(self._words)} words for {len(example.choices)} "
                f"classes ({describe_choices(example.choices)}), expected one for each"
            )
        if example.choices != self._choices:
            raise ValueError(
                "data.verbaliser: found rows with different choices, expected a task whose choices "
                "are classes"
            )
        return replace(example, choices=self._words, target=f" {self._words[example.gold[0]]}")


def with_wording(
    task: Task,
    template: str | None,
    verbaliser: Sequence[str],
    *,
    names: Mapping[str, str] | None = None,
) -> Task:
    """Return the task in the user's words; the task itself if there are none.

    Args:
        task: in its own words.
        template: "{column} some words {mask}."; None leaves the task's own context.
        verbaliser: a word for each class, in the order of the classes; empty leaves the task's own.
        names: the task's names of columns by those of the user's own rows.

    Raises:
        ConfigError: the task has no classes, or template or verbaliser are not well formed.
    """
    if template is None and not verbaliser:
        return task
    own_template = None if template is None else template_of(task, template, names or {})
    reworded = replace(task, example=_Rewording(task, own_template, verbaliser))
    if own_template is None or task.hub is not None:
        return reworded
    return with_columns(reworded, own_template.columns)


def template_of(task: Task, template: str, names: Mapping[str, str]) -> Template:
    """Read a template over the columns of a task, or of the user's own rows.

    Args:
        task: in its own words.
        template: of the user.
        names: the task's names of columns by those of the user's own rows.

    Raises:
        ConfigError: it is not well formed, or names a column that it must not.
    """
    if task.hub is None:
        answer_columns = [columns[-1] for columns in task.column_sets]
        return Template.of_own(template, answer_columns, names)
    # All columns but the last of each set, which holds the answer.
    columns = dict.fromkeys(name for names in task.column_sets for name in names[:-1])
    return Template.of(template, tuple(columns))


def with_columns(task: Task, names: Sequence[str]) -> Task:
    """Return a task whose rows need further columns, too."""
    column_sets = tuple(
        tuple(dict.fromkeys((*names, *columns[:-1]))) + columns[-1:] for columns in task.column_sets
    )
    return replace(task, column_sets=column_sets)


def require_words(verbaliser: Sequence[str]) -> None:
    """Raise ConfigError if the words of the classes are not different ones."""
    are_different = len(set(verbaliser)) == len(verbaliser)
    are_words = all(word and word == word.strip() for word in verbaliser)
    if not are_different or not are_words:
        raise ConfigError(
            f"data.verbaliser: found {list(verbaliser)}, expected different words without "
            "blanks around them"
        )


def require_answer_last(examples: Sequence[Example], family: str) -> None:
    """Raise ConfigError if text follows the answer.

    A model that reads from left to right, whose `family` the message names, does not see it.
    """
    suffixes = [example.suffix for example in examples if example.suffix.strip()]
    if suffixes:
        raise ConfigError(
            f"data.template: found {suffixes[0]!r} behind {{mask}} with a {family}, which reads "
            "from left to right, expected {mask} at the end"
        )


def _parsed(text: str) -> list[_Piece]:
    """Take a template apart at its braces.

    Raises:
        ConfigError: it is not well formed.
    """
    try:
        fields = list(Formatter().parse(text))
    except ValueError as error:
        raise ConfigError(
            f"data.template: found {text!r} ({error}), expected columns in braces, and {{mask}}"
        ) from None
    if any(form or conversion for _, _, form, conversion in fields):
        raise ConfigError(
            f"data.template: found {text!r}, expected plain names in braces, without ':' or '!'"
        )
    return [(literal, name) for literal, name, _, _ in fields]

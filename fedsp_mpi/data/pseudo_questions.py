"""Questions about plain text in the form of a task.

For a server that knows a task's form but has hardly any of its text.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from itertools import cycle, takewhile

from fedsp_mpi.data.examples import Example

_MIN_WORDS = 5  # shorter lines are headings


def common_affixes(contexts: Sequence[str]) -> tuple[str, str]:
    """Return the text that all contexts begin with, and the text that all end with.

    These are the words of the task around the text that it is about.

    Raises:
        ValueError: there are no two different contexts, so that the two cannot be told apart.
    """
    num_different = len(set(contexts))
    if num_different < 2:
        raise ValueError(
            f"distillation.text: found {num_different} different texts of the server (its shard "
            "and the validation split), expected two at least, to tell the words of the task from "
            "its text"
        )
    prefix = _common_prefix(contexts)
    reversed_rests = [context[len(prefix) :][::-1] for context in contexts]
    return prefix, _common_prefix(reversed_rests)[::-1]


def _common_prefix(texts: Sequence[str]) -> str:
    """Return the characters that all texts begin with."""
    columns = takewhile(lambda column: len(set(column)) == 1, zip(*texts))
    return "".join(column[0] for column in columns)


def paragraphs(lines: Iterable[str]) -> list[str]:
    """Return the lines of plain text that are not headings, stripped of blanks."""
    return [line.strip() for line in lines if len(line.split()) >= _MIN_WORDS]


def questions(texts: Iterable[str], examples: Sequence[Example]) -> Iterator[tuple[str, str]]:
    """Yield a pair of context and target for each text, in the form of the examples.

    A context is the beginning of the text, as many words as an example's own text has, between the
    words of the task. The targets only say where an answer is due and how long it is; they do not
    answer these questions.

    Raises:
        ValueError: as `common_affixes` does.
    """
    prefix, suffix = common_affixes([example.context for example in examples])
    for text, example in zip(texts, cycle(examples)):
        example_text = example.context[len(prefix) : len(example.context) - len(suffix)]
        num_words = max(len(example_text.split()), 1)
        yield prefix + " ".join(text.split()[:num_words]) + suffix, example.target

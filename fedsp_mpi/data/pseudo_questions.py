"""Questions about plain text in the form of a task, for a server that has a task's form and hardly
any of its text.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from itertools import cycle, takewhile

from fedsp_mpi.data.tasks import Example

_FEWEST_WORDS = 5  # fewer make a heading


def frame(contexts: Sequence[str]) -> tuple[str, str]:
    """What all contexts begin with and what all end with: the words of the task around the text
    that it is about.

    Raises ValueError if there are not two different ones, because then it cannot be told.
    """
    if len(set(contexts)) < 2:
        raise ValueError(
            f"distillation.text: found {len(set(contexts))} different texts of the server "
            "(its shard and the "
            "validation split), expected two at least, to tell the words of the task from its text"
        )
    begin = _shared(contexts)
    return begin, _shared([context[len(begin) :][::-1] for context in contexts])[::-1]


def _shared(texts: Sequence[str]) -> str:
    """The characters that all texts begin with."""
    columns = takewhile(lambda column: len(set(column)) == 1, zip(*texts))
    return "".join(column[0] for column in columns)


def paragraphs(lines: Iterable[str]) -> list[str]:
    """The lines of plain text that are no headings, without blanks around them."""
    return [line.strip() for line in lines if len(line.split()) >= _FEWEST_WORDS]


def questions(texts: Iterable[str], examples: Sequence[Example]) -> Iterator[tuple[str, str]]:
    """Pairs of context and target: what each text begins with, as long as an example's own, in the
    examples' frame.

    The targets only say where an answer is due and how long it is; they are nobody's answers to
    these questions.
    """
    begin, end = frame([example.context for example in examples])
    for text, example in zip(texts, cycle(examples)):
        own = example.context[len(begin) : len(example.context) - len(end)]
        num_words = max(len(own.split()), 1)
        yield begin + " ".join(text.split()[:num_words]) + end, example.target

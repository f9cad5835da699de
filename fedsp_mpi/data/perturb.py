"""Copies of texts with random words in them: what an objective compares a text with that must not
be ignored.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import takewhile

import numpy as np

from fedsp_mpi.data.tokens import Text


def perturbed(
    texts: Sequence[Text], share: float, words: np.ndarray, random: np.random.Generator
) -> list[Text]:
    """The texts with about a share of their own tokens replaced, each independently of the others.

    The answers stay, and so does what all contexts begin and end with, the words of the task (of
    one text alone they cannot be told); and tokens that are not words. Source: FedBPT, whose
    reference replaces the words of the task too.

    Args:
        texts: of one owner.
        share: chance of a token to be replaced, r_p.
        words: sorted ids of the tokens that are words; replacements are drawn from them, each as
            likely as any other.
        random: draws which, and by what.
    """
    contexts = [_without_answer(text) for text in texts]
    begin, end = _common(contexts)
    copies = [
        _replaced(text.ids, begin, len(c) - end, share, words, random)
        for text, c in zip(texts, contexts)
    ]
    for text, copy in zip(texts, copies):
        copy[text.answer :][: text.num_answers] = text.ids[text.answer :][: text.num_answers]
    return [Text(copy, text.answer, text.gap) for text, copy in zip(texts, copies)]


def _without_answer(text: Text) -> np.ndarray:
    """What the model is asked with: all before the answer, or with a gap in its place all of the
    text.
    """
    if text.gap is None:
        return text.ids[: text.answer]
    ids = text.ids.copy()
    ids[text.answer] = text.gap
    return ids


def _replaced(
    ids: np.ndarray,
    begin: int,
    end: int,
    share: float,
    words: np.ndarray,
    random: np.random.Generator,
) -> np.ndarray:
    drawn, others = random.random(len(ids)) < share, random.choice(words, len(ids))
    places = np.arange(len(ids))
    own = (places >= begin) & (places < end) & np.isin(ids, words)
    return np.where(drawn & own, others, ids).astype(ids.dtype)


def _common(contexts: Sequence[np.ndarray]) -> tuple[int, int]:
    """How many tokens all contexts begin with, and how many of the others they all end with."""
    if len({context.tobytes() for context in contexts}) < 2:
        return 0, 0
    begin = _shared(contexts)
    return begin, _shared([context[begin:][::-1] for context in contexts])


def _shared(rows: Sequence[np.ndarray]) -> int:
    return sum(
        1
        for _ in takewhile(
            lambda column: len(set(column)) == 1, zip(*(row.tolist() for row in rows))
        )
    )

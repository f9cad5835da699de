"""Copies of texts with random words in them.

An objective compares a text with its copy, so that a prompt does not learn to ignore the text.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import takewhile

import numpy as np

from fedsp_mpi.data.tokens import Text


def perturbed(
    texts: Sequence[Text], share: float, words: np.ndarray, *, random: np.random.Generator
) -> list[Text]:
    """Return copies of texts, in which each token of a text's own is replaced with chance `share`.

    Answers stay, and so do the tokens that all contexts begin or end with, which are the words of
    the task (of one text alone they cannot be told), and tokens that are not words. Source: FedBPT,
    whose reference replaces the words of the task too.

    Args:
        texts: of one owner.
        share: chance of a token to be replaced, r_p.
        words: int64 [num_words], sorted ids of the tokens that are words; replacements are drawn
            from them uniformly.
        random: draws which tokens are replaced, and by what.
    """
    contexts = [_without_answer(text) for text in texts]
    prefix_length, suffix_length = _common_lengths(contexts)
    copies = []
    for text, context in zip(texts, contexts):
        # Both are drawn for all tokens, so that the draws do not depend on what may be replaced.
        is_drawn = random.random(len(text.ids)) < share
        replacements = random.choice(words, len(text.ids))
        indices = np.arange(len(text.ids))
        is_own = (indices >= prefix_length) & (indices < len(context) - suffix_length)
        is_replaced = is_drawn & is_own & np.isin(text.ids, words)
        ids = np.where(is_replaced, replacements, text.ids).astype(text.ids.dtype)
        answer = slice(text.answer, text.answer + text.num_answers)
        ids[answer] = text.ids[answer]
        copies.append(Text(ids, text.answer, text.gap))
    return copies


def _without_answer(text: Text) -> np.ndarray:
    """Return the ids [length] that the model is asked with.

    All before the answer; or the whole text, with the gap in the place of the answer.
    """
    if text.gap is None:
        return text.ids[: text.answer]
    ids = text.ids.copy()
    ids[text.answer] = text.gap
    return ids


def _common_lengths(contexts: Sequence[np.ndarray]) -> tuple[int, int]:
    """Return how many tokens all contexts begin with, and how many of the others all end with."""
    if len({context.tobytes() for context in contexts}) < 2:
        return 0, 0
    prefix_length = _common_prefix_length(contexts)
    reversed_rests = [context[prefix_length:][::-1] for context in contexts]
    return prefix_length, _common_prefix_length(reversed_rests)


def _common_prefix_length(rows: Sequence[np.ndarray]) -> int:
    columns = zip(*(row.tolist() for row in rows))
    return sum(1 for _ in takewhile(lambda column: len(set(column)) == 1, columns))

"""Scores of answers that need no model: a guess, and always the most frequent answer.

A method that is no better than these has learnt nothing of the text, whatever it gained over its
controls.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence

import numpy as np

from fedsp_mpi.data.tasks import Example
from fedsp_mpi.record.tables import CHANCE, LABELS, MAJORITY, MAJORITY_OF_TEST, ResultRow


def baseline_rows(test: Sequence[Example], own: Sequence[Example], metric: str) -> list[ResultRow]:
    """Score answers without a model on the test split.

    `chance` is what a guess among a question's choices has on average: the mean over questions of
    the share of its choices that are right. `majority` always gives the most frequent answer of
    what the server owns beside the test, so that the scored answers have no part in the choice; the
    first of several that are equally frequent. Where it owns nothing else, the answer is chosen by
    the test itself, in hindsight, and the row says so.

    Args:
        test: examples that are scored.
        own: the server's other examples: its shard and its validation split.
        metric: of the task, "multiple_choice" or "exact_match".

    Returns:
        No row without choices; `chance` alone where questions have different choices.
    """
    if not test or metric != "multiple_choice":
        return []
    shares = [len(set(example.gold)) / len(example.choices) for example in test]
    chance = ResultRow(method=CHANCE, split=LABELS, n=len(test), acc=float(np.mean(shares)))
    choices = {example.choices for example in (*test, *own)}
    if len(choices) > 1:
        return [chance]
    counts = Counter(index for example in (own or test) for index in example.gold)
    answer = max(range(len(test[0].choices)), key=lambda index: counts[index])
    correct = np.array([answer in example.gold for example in test], dtype=float)
    stderr = float(correct.std(ddof=1) / math.sqrt(len(test))) if len(test) > 1 else math.nan
    majority = ResultRow(
        method=MAJORITY if own else MAJORITY_OF_TEST,
        split=LABELS,
        n=len(test),
        acc=float(correct.mean()),
        stderr=stderr,
    )
    return [chance, majority]

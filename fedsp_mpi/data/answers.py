"""What a task's answers are to a tokenizer: tokens that differ, and are the candidates that losses
choose among.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import cycle
from typing import Any

import numpy as np

from fedsp_mpi.config.parsing import ConfigError
from fedsp_mpi.data import cloze
from fedsp_mpi.data.tasks import Example, Splits
from fedsp_mpi.data.tokens import Text, encode_pairs, first_token

_SHOWN = 5  # rows that a note names


def joins(contexts: Iterable[str]) -> list[str]:
    """Return one context for each way in which contexts end: the last word and the blanks behind
    it.

    An answer's tokens depend on nothing else of its context: blanks go over to the answer, and a
    tokenizer may join the last word with what follows.
    """
    by_ending: dict[tuple[str, str], str] = {}
    for context in contexts:
        kept = context.rstrip()
        word = kept.rsplit(None, 1)[-1] if kept else ""
        by_ending.setdefault((word, context[len(kept) :]), context)
    return list(by_ending.values())


def tokens(
    tokenizer: Any, contexts: Sequence[str], answers: Sequence[str]
) -> list[list[tuple[int, ...]]]:
    """Return the ids of every answer's tokens behind every context, [contexts][answers][tokens].

    Args:
        contexts: one for each ending, from `joins`; none for a model that fills in a gap, where
            answers are one token.
        answers: without the leading blank.

    Raises ConfigError if an answer has no token, or in a gap more than one.
    """
    if not contexts:
        return [[(cloze.answer_token(tokenizer, answer.strip()),) for answer in answers]]
    texts = encode_pairs(
        tokenizer, [(context, f" {answer}") for context in contexts for answer in answers]
    )
    for answer, text in zip(cycle(answers), texts):
        if text.num_answers < 1:
            raise ConfigError(
                f"data.verbaliser: found the choice {answer!r}, which has no token to this "
                "tokenizer, expected one at "
                "least; give each class a word that it knows"
            )
    ids = [tuple(map(int, text.ids[text.answer :])) for text in texts]
    return [ids[start : start + len(answers)] for start in range(0, len(ids), len(answers))]


def require_different(
    tokenizer: Any, choices: Sequence[str], rows: Iterable[Sequence[tuple[int, ...]]]
) -> None:
    """Raise ConfigError if two choices of a task are the same tokens behind a context: no model can
    tell them apart.

    Args:
        choices: the task's.
        rows: their `tokens`.
    """
    for row in rows:
        for place, ids in enumerate(row):
            if (first := row.index(ids)) != place:
                names = " ".join(map(str, tokenizer.convert_ids_to_tokens(list(ids))))
                raise ConfigError(
                    f"data.verbaliser: found the choices {choices[first]!r} and "
                    f"{choices[place]!r}, "
                    "which are the same "
                    f"to this tokenizer ({names}), expected choices that it tells apart; give each "
                    "class another word, "
                    "or take the tokenizer that belongs to the model"
                )


def equal_options(
    examples: Sequence[Example], options: Sequence[Sequence[Text]]
) -> tuple[str, ...]:
    """Return a note on test questions, each with choices of its own, of which two are the same
    tokens.
    """
    rows = [example.row for example, texts in zip(examples, options) if _has_equal(texts)]
    if not rows:
        return ()
    number = "1 question" if len(rows) == 1 else f"{len(rows)} questions"
    shown = ", ".join(rows[:_SHOWN]) + (
        f" and {len(rows) - _SHOWN} more" if len(rows) > _SHOWN else ""
    )
    return (
        (
            f"test: {number} with options that are the same tokens to this tokenizer, of "
            f"which the first counts: {shown}"
        ),
    )


def require_beginning(tokenizer: Any, splits: Splits) -> None:
    """Raise ConfigError, which names the row, if a context is empty and the tokenizer has no token
    in its place.
    """
    examples = (*splits.train, *splits.validation, *splits.test)
    empty = next((example for example in examples if not example.context.strip()), None)
    if empty is None:
        return
    try:
        first_token(tokenizer)
    except ConfigError as error:
        raise ConfigError(f"{error} ({empty.row})") from None


def require_candidates(
    texts: Sequence[Text], examples: Sequence[Example], candidates: np.ndarray
) -> None:
    """Raise ConfigError, which names the row, if a token that is taught is not one of the
    candidates' ids [number].

    Among the candidates it would stand for another token.
    """
    for text, example in zip(texts, examples):
        if not np.isin(text.ids[text.answer :][: text.num_answers], candidates).all():
            raise ConfigError(
                f"{example.row or 'data'}: found an answer with a token that no choice has "
                "behind other contexts, "
                "expected the choices' own tokens; set data.loss_over=vocabulary"
            )


def _has_equal(texts: Sequence[Text]) -> bool:
    return len({text.ids.tobytes() for text in texts}) < len(texts)

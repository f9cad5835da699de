"""The tokens of a task's answers, which must differ, and are the candidates of some losses."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import cycle

import numpy as np

from fedsp_mpi.config.parsing import ConfigError
from fedsp_mpi.data import cloze
from fedsp_mpi.data.examples import Example
from fedsp_mpi.data.tasks import Splits
from fedsp_mpi.data.tokenizer import Tokenizer
from fedsp_mpi.data.tokens import Text, encode_pairs, start_token

_NUM_ROWS_SHOWN = 5  # rows that a note names


def distinct_endings(contexts: Iterable[str]) -> list[str]:
    """Return one context for each way in which contexts end: the last word, and blanks behind it.

    An answer's tokens depend on nothing else of its context: blanks at its end go over to the
    answer, and a tokenizer may join the last word with the text that follows.
    """
    by_ending: dict[tuple[str, str], str] = {}
    for context in contexts:
        stripped = context.rstrip()
        last_word = stripped.rsplit(None, 1)[-1] if stripped else ""
        blanks = context[len(stripped) :]
        by_ending.setdefault((last_word, blanks), context)
    return list(by_ending.values())


def tokens(
    tokenizer: Tokenizer, contexts: Sequence[str], answers: Sequence[str]
) -> list[list[tuple[int, ...]]]:
    """Return the ids of every answer's tokens behind every context, [contexts][answers][tokens].

    Args:
        tokenizer: of the model.
        contexts: one for each ending, from `distinct_endings`; none for a model that fills in a
            gap, where answers are one token.
        answers: without the leading blank.

    Raises:
        ConfigError: an answer has no token, or in a gap more than one.
    """
    if not contexts:
        return [[(cloze.answer_token(tokenizer, answer.strip()),) for answer in answers]]
    pairs = [(context, f" {answer}") for context in contexts for answer in answers]
    texts = encode_pairs(tokenizer, pairs)
    for answer, text in zip(cycle(answers), texts):
        if text.num_answers < 1:
            raise ConfigError(
                f"data.verbaliser: found the choice {answer!r}, which has no token in this "
                "tokenizer, expected at least one; give each class a word that it knows"
            )
    ids = [tuple(map(int, text.ids[text.answer :])) for text in texts]
    return [ids[start : start + len(answers)] for start in range(0, len(ids), len(answers))]


def require_distinct_choices(
    tokenizer: Tokenizer, choices: Sequence[str], rows: Iterable[Sequence[tuple[int, ...]]]
) -> None:
    """Raise ConfigError if two choices have the same tokens: no model can tell them apart.

    Args:
        tokenizer: of the model.
        choices: of the task.
        rows: the `tokens` of the choices, behind every context.
    """
    for row in rows:
        for index, ids in enumerate(row):
            first = row.index(ids)
            if first == index:
                continue
            names = " ".join(map(str, tokenizer.convert_ids_to_tokens(list(ids))))
            raise ConfigError(
                f"data.verbaliser: found the choices {choices[first]!r} and {choices[index]!r}, "
                f"which are the same to this tokenizer ({names}), expected choices that it tells "
                "apart; give each class another word, or take the tokenizer that belongs to the "
                "model"
            )


def equal_options_note(
    examples: Sequence[Example], options: Sequence[Sequence[Text]]
) -> tuple[str, ...]:
    """Return a note on test questions with choices of their own, two of which have the same tokens.

    Args:
        examples: the questions.
        options: of each question, the text of every choice.

    Returns:
        One note, or none.
    """
    rows = [example.row for example, texts in zip(examples, options) if _has_equal(texts)]
    if not rows:
        return ()
    number = "1 question" if len(rows) == 1 else f"{len(rows)} questions"
    shown = ", ".join(rows[:_NUM_ROWS_SHOWN])
    if len(rows) > _NUM_ROWS_SHOWN:
        shown += f" and {len(rows) - _NUM_ROWS_SHOWN} more"
    note = (
        f"test: {number} with options that are the same tokens to this tokenizer, of which the "
        f"first counts: {shown}"
    )
    return (note,)


def require_start_token(tokenizer: Tokenizer, splits: Splits) -> None:
    """Raise ConfigError if a context is empty and no token can stand in its place.

    That is so where the tokenizer has neither a beginning-of-text nor an end-of-text token. The
    message names the row.
    """
    examples = (*splits.train, *splits.validation, *splits.test)
    empty = next((example for example in examples if not example.context.strip()), None)
    if empty is None:
        return
    try:
        start_token(tokenizer)
    except ConfigError as error:
        raise ConfigError(f"{error} ({empty.row})") from None


def require_candidates(
    texts: Sequence[Text], examples: Sequence[Example], candidates: np.ndarray
) -> None:
    """Raise ConfigError, which names the row, if a token of an answer is not among the candidates.

    A loss over the candidates would take another token for it.

    Args:
        texts: the tokenised examples.
        examples: of the texts.
        candidates: int64 [num_candidates], ids of the tokens that a loss chooses among.
    """
    for text, example in zip(texts, examples):
        answer_ids = text.ids[text.answer :][: text.num_answers]
        if not np.isin(answer_ids, candidates).all():
            raise ConfigError(
                f"{example.row or 'data'}: found an answer with a token that no choice has behind "
                "other contexts, expected the choices' own tokens; set data.loss_over=vocabulary"
            )


def _has_equal(texts: Sequence[Text]) -> bool:
    return len({text.ids.tobytes() for text in texts}) < len(texts)

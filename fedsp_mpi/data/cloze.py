"""Texts with a gap, for models that fill it in: masked ones at a mask token, T5 at its first
sentinel.

A text is the task's words before the answer, the gap, and those behind it. The answer is one token,
as FedPrompt's one-to-one verbalisers have it (arXiv 2208.12268).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from fedsp_mpi.config.parsing import ConfigError
from fedsp_mpi.data.tasks import Example
from fedsp_mpi.data.tokens import Text

_SENTINEL = "<extra_id_0>"


def gap(tokenizer: Any) -> tuple[str, int]:
    """The token that marks a gap, and its id. Raises ConfigError if the tokenizer has none."""
    name = tokenizer.mask_token or _SENTINEL
    found = tokenizer.convert_tokens_to_ids(name)
    if found is None or found == tokenizer.unk_token_id:
        raise ConfigError(
            f"model.tokenizer: found one without a mask token and without {_SENTINEL}, "
            "expected the one that belongs "
            "to the model"
        )
    return name, int(found)


def answer_token(tokenizer: Any, word: str) -> int:
    """The one token that a word is, with a blank before it.

    Raises ConfigError if it is several, or unknown.
    """
    ids = tokenizer(f" {word}", add_special_tokens=False)["input_ids"]
    if len(ids) != 1 or ids[0] == tokenizer.unk_token_id:
        pieces = ", ".join(map(repr, tokenizer.convert_ids_to_tokens(ids)))
        raise ConfigError(
            f"data.verbaliser: found {word!r}, which is {pieces or 'nothing'} to this "
            "tokenizer, expected words that "
            "are one token each; choose others"
        )
    return int(ids[0])


def encode(tokenizer: Any, examples: Sequence[Example], max_length: int) -> list[Text]:
    """Each example as one text with its right answer in the gap, at most `max_length` tokens.

    A long text loses its beginning, but for the token that every text begins with.

    Raises ConfigError if an answer is not one token, or if the words from the gap on do not fit;
    the latter names the row.
    """
    texts = _with_gaps(tokenizer, examples, max_length)
    answers = _answers(tokenizer, (example.target.strip() for example in examples))
    return [
        _filled(text, answers[example.target.strip()]) for text, example in zip(texts, examples)
    ]


def encode_options(
    tokenizer: Any, examples: Sequence[Example], max_length: int
) -> list[tuple[Text, ...]]:
    """Each example as a text for every choice; the same errors as `encode`."""
    texts = _with_gaps(tokenizer, examples, max_length)
    answers = _answers(tokenizer, (choice for example in examples for choice in example.choices))
    for choices in dict.fromkeys(example.choices for example in examples):
        _require_different(choices, [answers[choice] for choice in choices])
    return [
        tuple(_filled(t, answers[choice]) for choice in e.choices) for t, e in zip(texts, examples)
    ]


def lengths_from_the_gap(tokenizer: Any, examples: Sequence[Example]) -> list[int]:
    """Return the number of tokens of each example that must fit: from the gap on, and what every
    text begins with.
    """
    return [len(ids) - at + kept for ids, at, kept in _located(tokenizer, examples)]


def _require_different(choices: Sequence[str], ids: Sequence[int]) -> None:
    for choice, id in zip(choices, ids):
        if (other := choices[ids.index(id)]) != choice:
            raise ConfigError(
                f"data.verbaliser: found {other!r} and {choice!r}, which are one token to this "
                "tokenizer, expected "
                "words that it tells apart; choose others"
            )


def _located(tokenizer: Any, examples: Sequence[Example]) -> list[tuple[list[int], int, int]]:
    """Of each example its tokens, the gap's place among them, and how many tokens every text begins
    with.
    """
    name, id = gap(tokenizer)
    pairs = [(example.context, example.after) for example in examples]
    whole = [f"{before.rstrip()} {name}{after}".lstrip() for before, after in pairs]
    rows = (
        tokenizer(whole, return_attention_mask=False, verbose=False)["input_ids"] if whole else []
    )
    located = []
    for ids, (before, _) in zip(rows, pairs):
        # The task's own text may hold the mark of a gap, too.
        at = [place for place, token in enumerate(ids) if token == id][before.count(name)]
        located.append((ids, at, int(ids[0] == tokenizer.cls_token_id)))
    return located


def _with_gaps(tokenizer: Any, examples: Sequence[Example], max_length: int) -> list[Text]:
    """Each example as a text with an empty gap, without what is too much of its beginning."""
    _, id = gap(tokenizer)
    texts = []
    for example, (ids, at, kept) in zip(examples, _located(tokenizer, examples)):
        excess = max(0, len(ids) - max_length)
        if at - kept < excess:
            raise ConfigError(
                f"{example.row or 'data'}: found {len(ids) - at + kept} tokens from the answer "
                "on, expected at most "
                f"{max_length}, which fit; shorten the row, the template or the prompt"
            )
        left = [*ids[:kept], *ids[kept + excess :]]
        texts.append(Text(np.asarray(left, dtype=np.int32), at - excess, id))
    return texts


def _answers(tokenizer: Any, words: Iterable[str]) -> dict[str, int]:
    return {word: answer_token(tokenizer, word) for word in dict.fromkeys(words)}


def _filled(text: Text, answer: int) -> Text:
    ids = text.ids.copy()
    ids[text.answer] = answer
    return Text(ids, text.answer, text.gap)

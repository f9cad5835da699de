"""Texts with a gap, for models that fill it in: at a mask token, or T5 at its first sentinel.

A text is the task's words before the answer, the gap, and the words behind it. The answer is one
token, as with FedPrompt's one-to-one verbalisers (arXiv 2208.12268).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from fedsp_mpi.config.parsing import ConfigError
from fedsp_mpi.data.examples import Example
from fedsp_mpi.data.tokenizer import Tokenizer
from fedsp_mpi.data.tokens import Text

_SENTINEL = "<extra_id_0>"


def gap(tokenizer: Tokenizer) -> tuple[str, int]:
    """Return the token that marks a gap, and its id.

    Raises:
        ConfigError: the tokenizer has none.
    """
    token = tokenizer.mask_token or _SENTINEL
    token_id = tokenizer.convert_tokens_to_ids(token)
    if token_id is None or token_id == tokenizer.unk_token_id:
        raise ConfigError(
            f"model.tokenizer: found one without a mask token and without {_SENTINEL}, expected "
            "the one that belongs to the model"
        )
    return token, int(token_id)


def answer_token(tokenizer: Tokenizer, word: str) -> int:
    """Return the id of the one token that a word is, with a blank before it.

    Raises:
        ConfigError: the word is several tokens, or unknown.
    """
    ids = tokenizer(f" {word}", add_special_tokens=False)["input_ids"]
    if len(ids) != 1 or ids[0] == tokenizer.unk_token_id:
        pieces = ", ".join(map(repr, tokenizer.convert_ids_to_tokens(ids)))
        raise ConfigError(
            f"data.verbaliser: found {word!r}, which is {pieces or 'nothing'} to this tokenizer, "
            "expected words that are one token each; choose others"
        )
    return int(ids[0])


def encode(tokenizer: Tokenizer, examples: Sequence[Example], max_length: int) -> list[Text]:
    """Tokenise each example as one text with its right answer in the gap.

    A long text loses its beginning, but for the token that every text begins with.

    Args:
        tokenizer: of the model.
        examples: of the task.
        max_length: maximum number of tokens of a text.

    Raises:
        ConfigError: an answer is not one token; or the words from the gap on do not fit, in which
            case the message names the row.
    """
    texts = with_gaps(tokenizer, examples, max_length)
    answers = _answers(tokenizer, (example.target.strip() for example in examples))
    return [
        _filled(text, answers[example.target.strip()]) for text, example in zip(texts, examples)
    ]


def encode_options(
    tokenizer: Tokenizer, examples: Sequence[Example], max_length: int
) -> list[tuple[Text, ...]]:
    """Tokenise each example as a text for every choice.

    Args:
        tokenizer: of the model.
        examples: of the task.
        max_length: maximum number of tokens of a text.

    Raises:
        ConfigError: as in `encode`, or two choices are the same token.
    """
    texts = with_gaps(tokenizer, examples, max_length)
    answers = _answers(tokenizer, (choice for example in examples for choice in example.choices))
    for choices in dict.fromkeys(example.choices for example in examples):
        _require_different(choices, [answers[choice] for choice in choices])
    return [
        tuple(_filled(text, answers[choice]) for choice in example.choices)
        for text, example in zip(texts, examples)
    ]


def lengths(tokenizer: Tokenizer, examples: Sequence[Example]) -> list[int]:
    """Return the number of tokens of each example."""
    return [len(located.ids) for located in _locate_gaps(tokenizer, examples)]


def lengths_from_gap(tokenizer: Tokenizer, examples: Sequence[Example]) -> list[int]:
    """Return the number of tokens of each example that must fit.

    These are the tokens from the gap on, and the token that every text begins with.
    """
    return [located.num_required for located in _locate_gaps(tokenizer, examples)]


def _require_different(choices: Sequence[str], ids: Sequence[int]) -> None:
    for choice, token_id in zip(choices, ids):
        first = choices[ids.index(token_id)]
        if first != choice:
            raise ConfigError(
                f"data.verbaliser: found {first!r} and {choice!r}, which are one token to this "
                "tokenizer, expected words that it tells apart; choose others"
            )


@dataclass(frozen=True)
class _LocatedGap:
    """A tokenised text and its gap.

    Attributes:
        ids: of all tokens.
        gap: index of the gap's token.
        num_leading: number of special tokens that the text begins with, 0 or 1.
    """

    ids: list[int]
    gap: int
    num_leading: int

    @property
    def num_required(self) -> int:
        """Number of tokens that must fit."""
        return len(self.ids) - self.gap + self.num_leading


def _locate_gaps(tokenizer: Tokenizer, examples: Sequence[Example]) -> list[_LocatedGap]:
    """Tokenise each example with an empty gap."""
    token, token_id = gap(tokenizer)
    if not examples:
        return []
    texts = [f"{example.context.rstrip()} {token}{example.suffix}".lstrip() for example in examples]
    rows = tokenizer(texts, return_attention_mask=False, verbose=False)["input_ids"]
    located = []
    for ids, example in zip(rows, examples):
        gaps = [index for index, id in enumerate(ids) if id == token_id]
        # The task's own text may hold the mark of a gap, too.
        index = gaps[example.context.count(token)]
        located.append(_LocatedGap(ids, index, int(ids[0] == tokenizer.cls_token_id)))
    return located


def with_gaps(tokenizer: Tokenizer, examples: Sequence[Example], max_length: int) -> list[Text]:
    """Tokenise each example with an empty gap; a long text loses the beginning of its words.

    Args:
        tokenizer: of the model.
        examples: of the task.
        max_length: maximum number of tokens of a text.

    Raises:
        ConfigError: the words from the gap on do not fit; the message names the row.
    """
    _, gap_id = gap(tokenizer)
    texts = []
    for example, located in zip(examples, _locate_gaps(tokenizer, examples)):
        ids = located.ids
        num_leading = located.num_leading
        excess = max(0, len(ids) - max_length)
        if located.gap - num_leading < excess:
            raise ConfigError(
                f"{example.row or 'data'}: found {located.num_required} tokens from the answer on, "
                f"expected at most {max_length}, which fit; shorten the row, the template or the "
                "prompt"
            )
        remaining = [*ids[:num_leading], *ids[num_leading + excess :]]
        texts.append(Text(np.asarray(remaining, dtype=np.int32), located.gap - excess, gap_id))
    return texts


def _answers(tokenizer: Tokenizer, words: Iterable[str]) -> dict[str, int]:
    """Return the token of each different word."""
    return {word: answer_token(tokenizer, word) for word in dict.fromkeys(words)}


def _filled(text: Text, answer: int) -> Text:
    ids = text.ids.copy()
    ids[text.answer] = answer
    return Text(ids, text.answer, text.gap)

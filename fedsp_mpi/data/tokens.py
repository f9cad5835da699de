"""Texts as token ids: the pair encoding that lm-eval scores, batches padded to their longest, and
their order.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

import numpy as np
import torch

from fedsp_mpi import rng
from fedsp_mpi.config.parsing import ConfigError
from fedsp_mpi.data.tasks import Example
from fedsp_mpi.tensors import Batch

_LINES = 1000  # of plain text that are tokenised at once
_SHORT = "a b"  # a text that every tokenizer makes tokens of: read_tokenizer asks for it


@dataclass(frozen=True)
class Text:
    """One tokenised text.

    Attributes:
        ids: int32 [length], context and answer.
        answer: index of the answer's first token.
        gap: id of the token that stands in the place of the answer, which is one token, where the
            model reads; None: the text is read from left to right, and the answer is the rest of
            it.
    """

    ids: np.ndarray
    answer: int
    gap: int | None = None

    @property
    def num_answers(self) -> int:
        """Tokens that the model is asked for."""
        return len(self.ids) - self.answer if self.gap is None else 1


def encode_pairs(tokenizer: Any, pairs: Sequence[tuple[str, str]]) -> list[Text]:
    """Tokenise (context, continuation) pairs as lm-eval does for causal models.

    Blanks at the context's end move to the continuation; the whole is tokenised at once and cut
    where the context alone would end; an empty context becomes the beginning-of-text (or
    end-of-text) token. Two things differ from lm-eval, which would score nothing, or what the
    tokenizer adds: a continuation that lies in the context's last token is tokenised by itself, and
    an end-of-text token that the tokenizer appends is dropped.

    Raises ConfigError if a context is empty and the tokenizer has no token for it.
    """
    moved = [_move_blanks(context, continuation) for context, continuation in pairs]
    wholes = token_ids(tokenizer, [context + continuation for context, continuation in moved])
    contexts = token_ids(tokenizer, [context or " " for context, _ in moved])
    texts = []
    for (context, continuation), whole, before in zip(moved, wholes, contexts):
        if not context or not before:
            start = first_token(tokenizer)
            alone = _without_marks(tokenizer, continuation)
            whole, before = [start, *(alone[1:] if alone[:1] == [start] else alone)], [start]
        elif len(whole) <= len(before):
            whole = [*before, *_without_marks(tokenizer, continuation)]
        texts.append(Text(np.asarray(whole, dtype=np.int32), min(len(before), len(whole))))
    return texts


def token_ids(tokenizer: Any, texts: Sequence[str]) -> list[list[int]]:
    """Tokenise texts with the tokens that the tokenizer puts before a text, and without those that
    it appends.

    An end-of-text token (`add_eos_token`) would otherwise be taught and scored in the place of the
    answer, and stand between a text and what is generated behind it.
    """
    if not texts:
        return []
    rows: list[list[int]] = tokenizer(list(texts), return_attention_mask=False, verbose=False)[
        "input_ids"
    ]
    appended = _num_appended(tokenizer)
    return [row[: len(row) - appended] for row in rows] if appended else rows


def first_token(tokenizer: Any) -> int:
    """Return the token that stands before a text without a context: that of a text's beginning,
    else of its end.

    Raises ConfigError if the tokenizer has neither.
    """
    for token in (tokenizer.bos_token_id, tokenizer.eos_token_id):
        if token is not None:
            return int(token)
    raise ConfigError(
        "model.tokenizer: found one with neither a beginning-of-text nor an "
        "end-of-text token, and a text without a "
        "context, expected one of them to stand before it; set bos_token in "
        "tokenizer_config.json, or fill the context"
    )


def encode(tokenizer: Any, examples: Sequence[Example], max_length: int) -> list[Text]:
    """Tokenise context and target for training, at most `max_length` tokens; a long context loses
    its beginning.

    Raises ConfigError, which names the row, if an answer has no token, or does not fit behind one
    of its context.
    """
    texts = encode_pairs(tokenizer, [(example.context, example.target) for example in examples])
    for text, example in zip(texts, examples):
        require_answer(text, example)
        if text.num_answers >= max_length:
            raise ConfigError(
                f"{example.row or 'data'}: found an answer of {text.num_answers} tokens, "
                "expected at most "
                f"{max_length - 1}, which fit behind a token of the context; shorten the answer"
            )
    return [truncate(text, max_length) for text in texts]


def require_answer(text: Text, example: Example) -> None:
    """Raise ConfigError, which names the row, if an answer, or an option, has no token."""
    if text.num_answers < 1:
        raise ConfigError(
            f"{example.row or 'data'}: found an answer without a token, expected at least "
            "one; correct the row, or "
            "name the tokenizer that belongs to the model in model.tokenizer"
        )


def pieces(tokenizer: Any, lines: Iterable[str], length: int) -> list[Text]:
    """Plain text, tokenised and cut into pieces of `length` tokens; what is left at the end is
    dropped.

    Raises ValueError if there is not enough for one piece.
    """
    found, rest = [], np.empty(0, dtype=np.int32)
    for some in _batched(lines, _LINES):
        rest = np.concatenate(
            [
                rest,
                np.concatenate(
                    [np.array(ids, dtype=np.int32) for ids in token_ids(tokenizer, some)]
                ),
            ]
        )
        whole = len(rest) // length * length
        found += [Text(ids, 1) for ids in rest[:whole].reshape(-1, length)]
        rest = rest[whole:]
    if not found:
        raise ValueError(
            f"distillation.text: found {len(rest)} tokens, expected at least "
            f"distillation.text_length={length}"
        )
    return found


def _batched(lines: Iterable[str], size: int) -> Iterator[list[str]]:
    """Lists of `size` lines; the last may be shorter."""
    source = iter(lines)
    while some := list(islice(source, size)):
        yield some


def truncate(text: Text, max_length: int) -> Text:
    """Keep the last `max_length` tokens, so that an answer is never lost to a long context."""
    cut = max(0, len(text.ids) - max_length)
    return Text(text.ids[cut:], max(1, text.answer - cut)) if cut else text


def collate(texts: Sequence[Text]) -> Batch:
    """Right-padded inputs (all tokens but the last) and targets (the answers' tokens, one position
    earlier).

    Of texts with a gap: all tokens, the gap's for the answer, and the answer's as the target of its
    own position.
    """
    return _Table(texts).batch(np.arange(len(texts)))


class _Table:
    """Texts as one padded array, of which a batch is a few rows: cutting one costs no loop over its
    texts.
    """

    def __init__(self, texts: Sequence[Text]) -> None:
        self._gap = texts[0].gap
        self._ends = np.array([len(text.ids) for text in texts]) - (self._gap is None)
        self._answers = np.array([text.answer for text in texts]) - (self._gap is None)
        self._ids = np.zeros((len(texts), self._ends.max() + (self._gap is None)), dtype=np.int64)
        for row, text in enumerate(texts):
            self._ids[row, : len(text.ids)] = text.ids
        self._places = np.arange(self._ids.shape[1])

    def longest_first(self, rows: np.ndarray) -> np.ndarray:
        """The same rows, sorted; cut into micro-batches, texts of one length come together and need
        less padding.
        """
        return rows[np.argsort(-self._ends[rows], kind="stable")]

    def batch(self, rows: np.ndarray) -> Batch:
        """The texts of some rows, padded to the longest of them."""
        ends = self._ends[rows, None]
        length = int(ends.max())
        if self._gap is not None:
            return self._with_gaps(rows, length, ends, self._gap)
        places, ids = self._places[:length], self._ids[rows, : length + 1]
        read = places < ends
        asked = read & (places >= self._answers[rows, None])
        targets = np.where(asked, ids[:, 1:], -100)
        return Batch(*map(torch.from_numpy, (ids[:, :-1] * read, read.astype(np.int64), targets)))

    def _with_gaps(self, rows: np.ndarray, length: int, ends: np.ndarray, gap: int) -> Batch:
        places, ids = self._places[:length], self._ids[rows, :length]
        asked, read = places == self._answers[rows, None], places < ends
        parts = (np.where(asked, gap, ids), read.astype(np.int64), np.where(asked, ids, -100))
        return Batch(*map(torch.from_numpy, parts))


def by_length(
    texts: Sequence[Text], batch_tokens: int, prompt_tokens: int = 0
) -> Iterator[list[int]]:
    """Indices of all texts in groups of similar length, longest first, at most `batch_tokens`
    padded tokens each.

    Soft tokens are counted for each text if they are given.
    """
    order = sorted(range(len(texts)), key=lambda i: (-len(texts[i].ids), i))
    start = 0
    while start < len(order):
        size = max(1, batch_tokens // (len(texts[order[start]].ids) + prompt_tokens))
        yield order[start : start + size]
        start += size


class Batches:
    """Training batches over one shard, addressed by step: the same step gives the same batch to
    whoever asks.

    The shard is gone through in a new random order each epoch; a batch that reaches the end of one
    goes on in the next.

    Args:
        texts: the shard; not empty.
        batch_size: examples of one optimizer step.
        micro_batch: examples of one forward pass, of similar length; None takes the whole batch.
        seed, owner: what the order depends on: the run's seed, and whose stage it is, such as
            ("client prompt", 3).
        part: (index, number of parts): the part of every batch that is given, where several ranks
            share the work.
    """

    def __init__(
        self,
        texts: Sequence[Text],
        batch_size: int,
        micro_batch: int | None,
        seed: int,
        *owner: str | int,
        part: tuple[int, int] = (0, 1),
    ) -> None:
        assert len(texts) > 0
        self._table, self._num_texts = _Table(texts), len(texts)
        self._size, self._micro = batch_size, micro_batch or batch_size
        self._seed, self._purpose, self._owner = (
            seed,
            f"order {owner[0]}",
            tuple(int(number) for number in owner[1:]),
        )
        self._part = part
        self._epoch, self._order = -1, np.empty(0, dtype=np.int64)

    @property
    def batch_size(self) -> int:
        """Examples of one optimizer step, of all parts together."""
        return self._size

    def step(self, index: int) -> list[Batch]:
        """The micro-batches of optimizer step `index`, counted from 0."""
        start, end = index * self._size, (index + 1) * self._size
        epochs = range(start // self._num_texts, (end - 1) // self._num_texts + 1)
        index, num_parts = self._part
        rows = np.concatenate([self._rows(epoch, start, end) for epoch in epochs])
        if self._micro * num_parts < len(rows):
            rows = self._table.longest_first(rows)
        rows = rows[index::num_parts]
        return [
            self._table.batch(rows[at : at + self._micro])
            for at in range(0, len(rows), self._micro)
        ]

    def _rows(self, epoch: int, start: int, end: int) -> np.ndarray:
        """The part of an epoch's order that lies between two positions of the stream."""
        if epoch != self._epoch:
            random = rng.generator(self._seed, self._purpose, *self._owner, epoch)
            self._epoch, self._order = epoch, random.permutation(self._num_texts)
        before = epoch * self._num_texts
        return self._order[max(0, start - before) : end - before]


def _move_blanks(context: str, continuation: str) -> tuple[str, str]:
    kept = context.rstrip()
    return kept, context[len(kept) :] + continuation


def _without_marks(tokenizer: Any, text: str) -> list[int]:
    """The tokens of a text alone, without those that the tokenizer puts around one."""
    return tokenizer.encode(text, add_special_tokens=False)


def _num_appended(tokenizer: Any) -> int:
    """How many tokens the tokenizer appends to every text, found out on a short one."""
    plain, marked = _without_marks(tokenizer, _SHORT), tokenizer.encode(_SHORT)
    starts = range(len(marked) - len(plain) + 1)
    return next(
        (len(marked) - len(plain) - at for at in starts if marked[at : at + len(plain)] == plain), 0
    )

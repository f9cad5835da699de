"""Texts as token ids: encoded as lm-eval does, and batched in a random order.

A batch is padded on the right to its longest text.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import chain, islice

import numpy as np
import torch

from fedsp_mpi import rng
from fedsp_mpi.config.parsing import ConfigError
from fedsp_mpi.data.examples import Example
from fedsp_mpi.data.tokenizer import Tokenizer
from fedsp_mpi.tensors import AnswerPlaces, Batch

_LINES_AT_ONCE = 1000  # lines of plain text that are tokenised in one call
_IGNORED = -100  # target of positions that are not asked for
# Every tokenizer makes tokens of this text: read_tokenizer sees to it.
_SAMPLE = "a b"


@dataclass(frozen=True)
class Text:
    """One tokenised text.

    Attributes:
        ids: int32 [length], context and answer.
        answer: index of the answer's first token.
        gap: id of the token that the model reads in the place of the answer, which is one token;
            None where the text is read from left to right, and the answer is its end.
        weight: how much its answer counts in a training loss, from 0 to 1.
    """

    ids: np.ndarray
    answer: int
    gap: int | None = None
    weight: float = 1.0

    @property
    def num_answers(self) -> int:
        """Number of tokens that the model is asked for."""
        return len(self.ids) - self.answer if self.gap is None else 1


@dataclass(frozen=True)
class Question:
    """A tokenised example; it does not depend on the prompt, and is reused by every test.

    Attributes:
        options: context and option, of each option.
        lengths: characters of each option.
        gold: indices of the right options.
    """

    options: tuple[Text, ...]
    lengths: tuple[int, ...]
    gold: tuple[int, ...]

    def shortened(self, max_length: int) -> Question:
        """Return the question in at most `max_length` tokens, without its context's beginning.

        Its options go on from the same context; there is no gap.
        """
        excess = max(len(text.ids) for text in self.options) - max_length
        if excess <= 0:
            return self
        options = tuple(truncate(text, len(text.ids) - excess) for text in self.options)
        return replace(self, options=options)


def encode_pairs(tokenizer: Tokenizer, pairs: Sequence[tuple[str, str]]) -> list[Text]:
    """Tokenise (context, continuation) pairs as lm-eval does for causal models.

    Blanks at the context's end move to the continuation; both are tokenised together and cut where
    the context alone would end; an empty context becomes the beginning-of-text (or end-of-text)
    token. Two things differ from lm-eval. A continuation that lies in the context's last token is
    tokenised by itself, where lm-eval would score nothing. An end-of-text token that the tokenizer
    appends is dropped, which lm-eval would score.

    Raises:
        ConfigError: a context is empty and the tokenizer has no token for it.
    """
    moved = [_move_blanks(context, continuation) for context, continuation in pairs]
    joint_rows = token_ids(tokenizer, [context + continuation for context, continuation in moved])
    context_rows = token_ids(tokenizer, [context or " " for context, _ in moved])
    texts = []
    for (context, continuation), ids, context_ids in zip(moved, joint_rows, context_rows):
        if not context or not context_ids:
            start = start_token(tokenizer)
            continuation_ids = _without_special_tokens(tokenizer, continuation)
            if continuation_ids[:1] == [start]:
                continuation_ids = continuation_ids[1:]
            context_ids = [start]
            ids = [start, *continuation_ids]
        elif len(ids) <= len(context_ids):
            ids = [*context_ids, *_without_special_tokens(tokenizer, continuation)]
        texts.append(Text(np.asarray(ids, dtype=np.int32), min(len(context_ids), len(ids))))
    return texts


def token_ids(tokenizer: Tokenizer, texts: Sequence[str]) -> list[list[int]]:
    """Tokenise texts with the tokens that the tokenizer puts before a text, and without those that
    it appends.

    An end-of-text token (`add_eos_token`) would otherwise be taught and scored as if it belonged to
    the answer, and stand between a text and what is generated behind it.
    """
    if not texts:
        return []
    encoding = tokenizer(list(texts), return_attention_mask=False, verbose=False)
    rows: list[list[int]] = encoding["input_ids"]
    num_appended = _num_appended(tokenizer)
    if num_appended == 0:
        return rows
    return [row[: len(row) - num_appended] for row in rows]


def start_token(tokenizer: Tokenizer) -> int:
    """Return the id of the token that stands in the place of an empty context.

    It is the beginning-of-text token, else the end-of-text token.

    Raises:
        ConfigError: the tokenizer has neither.
    """
    for token in (tokenizer.bos_token_id, tokenizer.eos_token_id):
        if token is not None:
            return int(token)
    raise ConfigError(
        "model.tokenizer: found one with neither a beginning-of-text nor an end-of-text token, and "
        "a text without a context, expected one of them to stand before it; set bos_token in "
        "tokenizer_config.json, or fill the context"
    )


def encode(tokenizer: Tokenizer, examples: Sequence[Example], max_length: int) -> list[Text]:
    """Tokenise context and target for training; a long context loses its beginning.

    Args:
        tokenizer: of the model.
        examples: of the task.
        max_length: maximum number of tokens of a text.

    Raises:
        ConfigError: an answer has no token, or does not fit behind one token of its context; the
            message names the row.
    """
    texts = encode_pairs(tokenizer, [(example.context, example.target) for example in examples])
    for text, example in zip(texts, examples):
        require_answer(text, example)
        if text.num_answers >= max_length:
            raise ConfigError(
                f"{example.row or 'data'}: found an answer of {text.num_answers} tokens, expected "
                f"at most {max_length - 1}, which fit behind a token of the context; shorten the "
                "answer"
            )
    return [truncate(text, max_length) for text in texts]


def require_answer(text: Text, example: Example) -> None:
    """Raise ConfigError, which names the row, if an answer, or an option, has no token."""
    if text.num_answers < 1:
        raise ConfigError(
            f"{example.row or 'data'}: found an answer without a token, expected at least one; "
            "correct the row, or name the tokenizer that belongs to the model in model.tokenizer"
        )


def pieces(tokenizer: Tokenizer, lines: Iterable[str], length: int) -> list[Text]:
    """Tokenise plain text and cut it into pieces; an incomplete piece at the end is dropped.

    Args:
        tokenizer: of the model.
        lines: the text.
        length: number of tokens of a piece.

    Raises:
        ValueError: there is not enough text for one piece.
    """
    texts: list[Text] = []
    pending = np.empty(0, dtype=np.int32)  # tokens that make no piece yet
    for batch in _batched(lines, _LINES_AT_ONCE):
        rows = [np.array(ids, dtype=np.int32) for ids in token_ids(tokenizer, batch)]
        pending = np.concatenate([pending, *rows])
        end = len(pending) // length * length
        texts += [Text(ids, 1) for ids in pending[:end].reshape(-1, length)]
        pending = pending[end:]
    if not texts:
        raise ValueError(
            f"distillation.text: found {len(pending)} tokens, expected at least "
            f"distillation.text_length={length}"
        )
    return texts


def blocks(
    tokenizer: Tokenizer, documents: Sequence[str], length: int, *, whole: bool
) -> list[Text]:
    """Tokenise documents, put them one after the other, and cut them into blocks without padding.

    The end-of-text token stands between two documents, if the tokenizer has one. A block begins
    with the last token of the one before, so that every token but the first is predicted once.

    Args:
        tokenizer: of the model.
        documents: the text.
        length: most tokens of a block, the first of which is not predicted; at least 2.
        whole: whether an incomplete block at the end is dropped; else it is a shorter one.

    Returns:
        The blocks; none where there is too little text.
    """
    end = tokenizer.eos_token_id
    pieces: list[list[int]] = []
    for batch in _batched(documents, _LINES_AT_ONCE):
        for ids in token_ids(tokenizer, batch):
            pieces.append(ids)
            if end is not None:
                pieces.append([end])
    stream = np.fromiter(chain.from_iterable(pieces), dtype=np.int32)
    step = length - 1
    num_predicted = len(stream) - 1
    last = num_predicted // step * step if whole else num_predicted
    return [Text(stream[begin : begin + length], 1) for begin in range(0, last, step)]


def _batched(lines: Iterable[str], size: int) -> Iterator[list[str]]:
    """Yield lists of `size` lines; the last may be shorter."""
    source = iter(lines)
    batch = list(islice(source, size))
    while batch:
        yield batch
        batch = list(islice(source, size))


def truncate(text: Text, max_length: int) -> Text:
    """Keep the last `max_length` tokens, so that an answer is never lost to a long context."""
    excess = len(text.ids) - max_length
    if excess <= 0:
        return text
    return Text(text.ids[excess:], max(1, text.answer - excess))


def collate(texts: Sequence[Text]) -> Batch:
    """Pad texts on the right and stack them: int64 [batch, length] inputs, mask and targets.

    Inputs are all tokens but the last; the target of a position is the next token if it belongs to
    the answer, else -100. Of texts with a gap, inputs are all tokens, with the gap in the place of
    the answer, and the target of that position is the answer.
    """
    return _Table(texts).batch(np.arange(len(texts)))


class _Table:
    """Texts as one padded array, of which a batch is a few rows.

    So no loop over its texts runs when a batch is cut.

    Args:
        texts: not empty; all with a gap or all without.
    """

    def __init__(self, texts: Sequence[Text]) -> None:
        self._gap = texts[0].gap
        # Without a gap, the last token is only a target, and answers are asked one position early.
        shift = 1 if self._gap is None else 0
        self._ends = np.array([len(text.ids) for text in texts]) - shift
        self._answers = np.array([text.answer for text in texts]) - shift
        self._ids = np.zeros((len(texts), self._ends.max() + shift), dtype=np.int64)
        for row, text in enumerate(texts):
            self._ids[row, : len(text.ids)] = text.ids
        self._positions = np.arange(self._ids.shape[1])
        # None: all count alike, as in most tables.
        weights = np.array([text.weight for text in texts], dtype=np.float32)
        self._weights = None if (weights == 1).all() else weights

    def longest_first(self, rows: np.ndarray) -> np.ndarray:
        """Sort rows [batch] by length, longest first.

        Cut into micro-batches, texts of one length come together and need less padding.
        """
        return rows[np.argsort(-self._ends[rows], kind="stable")]

    def lengths(self, rows: np.ndarray) -> np.ndarray:
        """Return how many positions rows [batch] take, int64 [batch]."""
        return self._ends[rows]

    def batch(self, rows: np.ndarray) -> Batch:
        """Return the texts of rows [batch], padded to the longest of them."""
        ends = self._ends[rows, None]
        answers = self._answers[rows, None]
        length = int(ends.max())
        positions = self._positions[:length]
        is_text = positions < ends
        if self._gap is None:
            ids = self._ids[rows, : length + 1]
            inputs = ids[:, :-1] * is_text
            is_answer = is_text & (positions >= answers)
            targets = np.where(is_answer, ids[:, 1:], _IGNORED)
        else:
            ids = self._ids[rows, :length]
            is_answer = positions == answers
            inputs = np.where(is_answer, self._gap, ids)
            targets = np.where(is_answer, ids, _IGNORED)
        return Batch(
            torch.from_numpy(inputs),
            torch.from_numpy(is_text.astype(np.int64)),
            torch.from_numpy(targets),
            None if self._weights is None else torch.from_numpy(self._weights[rows]),
            AnswerPlaces.of(is_answer),
        )


def by_length(
    texts: Sequence[Text], batch_tokens: int, prompt_tokens: int = 0
) -> Iterator[list[int]]:
    """Yield the indices of texts in groups of similar length, longest first.

    Args:
        texts: of any length; one that is longer than `batch_tokens` is a group of its own.
        batch_tokens: maximum number of tokens of a group, padding included.
        prompt_tokens: soft tokens that are counted for each text.
    """
    order = sorted(range(len(texts)), key=lambda index: (-len(texts[index].ids), index))
    start = 0
    while start < len(order):
        size = max(1, batch_tokens // (len(texts[order[start]].ids) + prompt_tokens))
        yield order[start : start + size]
        start += size


def sizes_by_length(lengths: np.ndarray, max_size: int, max_padding: float) -> list[int]:
    """Cut a batch that is sorted by length into as few groups as a limit of padding takes.

    Of all ways to cut it into that many, the one with the least padding.

    Args:
        lengths: of the texts, int64 [batch], longest first.
        max_size: most texts of a group.
        max_padding: largest fraction of all groups' tokens that may be padding, below 1.

    Returns:
        The sizes of the groups, in order.
    """
    num_texts = len(lengths)
    most = lengths.sum() / (1 - max_padding)
    ends = np.arange(num_texts + 1)
    sizes = ends[None, :] - ends[:, None]  # of a group from the row's text to before the column's
    cost_of_group = np.where(
        (sizes > 0) & (sizes <= max_size), np.append(lengths, 0)[:, None] * sizes, np.inf
    )
    costs = np.where(ends == 0, 0.0, np.inf)  # tokens of the best groups up to each text
    begins: list[np.ndarray] = []  # of the last of them
    while costs[-1] > most * (1 + 1e-9):
        totals = costs[:, None] + cost_of_group
        begins.append(totals.argmin(axis=0))
        costs = totals.min(axis=0)
        if len(begins) == num_texts:  # each text by itself
            break
    cut: list[int] = []
    end = num_texts
    for begin in reversed(begins):
        cut.append(end - int(begin[end]))
        end -= cut[-1]
    return cut[::-1]


class Batches:
    """Training batches over one shard, addressed by step: a step always gives the same batch.

    Each epoch goes through the shard in a new random order; a batch that reaches the end of an
    epoch continues in the next one.

    Args:
        texts: the shard; not empty.
        batch_size: examples of one optimizer step.
        micro_batch: examples of one forward pass, of similar length; None takes the whole batch.
        seed: of the run; the order depends on it, on `purpose` and on `numbers`.
        purpose: the stage whose order it is, such as "client prompt".
        numbers: of whose order it is, such as the client's.
        part: (index, number of parts): the part of every batch that is returned, where several
            ranks share the work.
        max_padding: largest fraction of a step's tokens that are padding; a batch is cut into as
            few micro-batches as that takes, of at most `micro_batch` examples. None: no limit.
    """

    def __init__(
        self,
        texts: Sequence[Text],
        batch_size: int,
        micro_batch: int | None,
        *,
        seed: int,
        purpose: str,
        numbers: tuple[int, ...] = (),
        part: tuple[int, int] = (0, 1),
        max_padding: float | None = None,
    ) -> None:
        assert len(texts) > 0
        self._table = _Table(texts)
        self._num_texts = len(texts)
        self._batch_size = batch_size
        self._micro_batch = micro_batch or batch_size
        self._seed = seed
        self._purpose = f"order {purpose}"
        self._numbers = numbers
        self._part = part
        self._max_padding = max_padding
        # The order of one epoch is kept: steps mostly come one after the other.
        self._epoch = -1
        self._order = np.empty(0, dtype=np.int64)

    @property
    def batch_size(self) -> int:
        """Examples of one optimizer step, of all parts together."""
        return self._batch_size

    def step(self, index: int) -> list[Batch]:
        """Return the micro-batches of optimizer step `index`, counted from 0."""
        start = index * self._batch_size
        end = start + self._batch_size
        epochs = range(start // self._num_texts, (end - 1) // self._num_texts + 1)
        rows = np.concatenate([self._rows(epoch, start, end) for epoch in epochs])
        part_index, num_parts = self._part
        if self._micro_batch * num_parts < len(rows) or self._max_padding is not None:
            rows = self._table.longest_first(rows)
        rows = rows[part_index::num_parts]
        if self._max_padding is None:
            sizes = [self._micro_batch] * -(-len(rows) // self._micro_batch)
        else:
            lengths = self._table.lengths(rows)
            sizes = sizes_by_length(lengths, self._micro_batch, self._max_padding)
        ends = np.cumsum(sizes)
        return [self._table.batch(rows[end - size : end]) for size, end in zip(sizes, ends)]

    def _rows(self, epoch: int, start: int, end: int) -> np.ndarray:
        """Return the rows of an epoch's order between two positions of the stream of all epochs."""
        if epoch != self._epoch:
            random = rng.generator(self._seed, self._purpose, *self._numbers, epoch)
            self._epoch = epoch
            self._order = random.permutation(self._num_texts)
        first = epoch * self._num_texts
        return self._order[max(0, start - first) : end - first]


def _move_blanks(context: str, continuation: str) -> tuple[str, str]:
    """Move the blanks at the end of a context to the beginning of its continuation."""
    stripped = context.rstrip()
    return stripped, context[len(stripped) :] + continuation


def _without_special_tokens(tokenizer: Tokenizer, text: str) -> list[int]:
    """Return the tokens of a text alone, without those that the tokenizer puts around it."""
    return tokenizer.encode(text, add_special_tokens=False)


def _num_appended(tokenizer: Tokenizer) -> int:
    """Return how many tokens the tokenizer appends to a text, as it does to a short one."""
    plain = _without_special_tokens(tokenizer, _SAMPLE)
    framed = tokenizer.encode(_SAMPLE)
    num_special = len(framed) - len(plain)
    for num_prepended in range(num_special + 1):
        if framed[num_prepended : num_prepended + len(plain)] == plain:
            return num_special - num_prepended
    return 0

"""Scores of a language model with or without a prompt: `acc`, `acc_norm` and `exact_match` as
lm-eval defines them.
"""

from __future__ import annotations

import math
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from fedsp_mpi.data import cloze
from fedsp_mpi.data.tasks import Example
from fedsp_mpi.data.tokens import Text, by_length, collate, encode_pairs, require_answer, truncate
from fedsp_mpi.models.language_model import LanguageModel
from fedsp_mpi.models.losses import answer_loss
from fedsp_mpi.models.prompts import Prompt
from fedsp_mpi.tensors import Batch
from fedsp_mpi.training.process_group import SINGLE_RANK, ServerGroup


@dataclass(frozen=True)
class Score:
    """What a test split says of a model.

    Attributes:
        n: questions.
        acc: share whose option of highest summed log-likelihood is right; nan where the task has no
            options.
        acc_norm: the same with the log-likelihood divided by the option's length in characters.
        exact_match: share whose right answer is what greedy decoding would give.
        stderr: standard error of the task's main number (sample standard deviation over the root of
            n, as lm-eval).
        seconds: wall time.
    """

    n: int
    acc: float
    acc_norm: float
    exact_match: float
    stderr: float
    seconds: float


@dataclass(frozen=True)
class Question:
    """An example whose options are tokenised: what is independent of the model's prompt is done
    once.
    """

    options: tuple[Text, ...]
    lengths: tuple[int, ...]
    gold: tuple[int, ...]


def questions(tokenizer: Any, examples: Sequence[Example]) -> list[Question]:
    """Tokenise every option of every example as lm-eval does: context, then " " + option.

    Raises ConfigError, which names the row, if an option has no token.
    """
    pairs = [(example.context, " " + choice) for example in examples for choice in example.choices]
    tokenised = encode_pairs(tokenizer, pairs)
    for text, owner in zip(tokenised, (example for example in examples for _ in example.choices)):
        require_answer(text, owner)
    texts = iter(tokenised)
    return [
        Question(tuple(next(texts) for _ in e.choices), tuple(map(len, e.choices)), e.gold)
        for e in examples
    ]


def gap_questions(tokenizer: Any, examples: Sequence[Example], max_length: int) -> list[Question]:
    """The same for models that fill in a gap; at most `max_length` tokens, the prompt's not among
    them.
    """
    options = cloze.encode_options(tokenizer, examples, max_length)
    return [
        Question(some, tuple(map(len, e.choices)), e.gold) for some, e in zip(options, examples)
    ]


@torch.no_grad()
def score(
    model: LanguageModel,
    prompt: Prompt | None,
    asked: Sequence[Question],
    metric: str,
    batch_tokens: int,
    on_done: Callable[[int], None] = lambda count: None,
    stop: Callable[[], bool] = lambda: False,
    team: ServerGroup = SINGLE_RANK,
) -> Score | None:
    """Score all questions; None if `stop` said so, asked between two batches.

    A context is run once for all its options; contexts of one length share a batch, so nothing is
    padded before an option, and little behind it, because options of similar length come together.
    Texts longer than the model's positions (less the prompt's) lose their beginning, as in lm-eval.

    Args:
        model: on its device, frozen.
        prompt: at the model's depth, or None for zero-shot.
        asked: tokenised questions.
        metric: "multiple_choice" or "exact_match", which decides whose standard error is given.
        batch_tokens: positions that a batch runs at most, padding and an input prompt among them;
            more only where one context and its options are longer.
        on_done: told how many options were finished by this rank.
        team: the ranks that share the batches; all of them call this, and get the same.
    """
    start = time.perf_counter()
    found = loglikelihoods(model, prompt, asked, batch_tokens, on_done, stop, team)
    if found is None:
        return None
    right = np.array([_judge(question, f) for question, f in zip(asked, found)], dtype=float)
    acc, norm, exact = right.mean(axis=0)
    main = right[:, 2 if metric == "exact_match" else 0]
    stderr = float(main.std(ddof=1) / math.sqrt(len(main))) if len(main) > 1 else math.nan
    if metric == "exact_match":
        acc = norm = math.nan
    else:
        exact = math.nan
    return Score(
        len(asked), float(acc), float(norm), float(exact), stderr, time.perf_counter() - start
    )


@torch.no_grad()
def loglikelihoods(
    model: LanguageModel,
    prompt: Prompt | None,
    asked: Sequence[Question],
    batch_tokens: int,
    on_done: Callable[[int], None] = lambda count: None,
    stop: Callable[[], bool] = lambda: False,
    team: ServerGroup = SINGLE_RANK,
) -> list[OptionScores] | None:
    """What `score` judges by, question by question; arguments and None as there."""
    if model.kind != "causal":
        return _gap_loglikelihoods(model, prompt, asked, batch_tokens, on_done, stop, team)
    room = positions_for_text(model, prompt)
    before = prompt.spec.num_tokens if prompt and prompt.spec.kind == "input" else 0
    found = [OptionScores(len(question.options)) for question in asked]
    mine = [
        g
        for index, g in enumerate(_groups(asked, room, before, batch_tokens))
        if team.is_mine(index)
    ]
    stopped = stop()
    with model.evaluating():
        for group in mine:
            if stopped := stopped or stop():
                break
            _score_group(model, prompt, group, found)
            on_done(sum(len(stem.options) for stem in group))
    if team.any(stopped):
        return None
    _share(found, team)
    return found


def _gap_loglikelihoods(
    model: LanguageModel,
    prompt: Prompt | None,
    asked: Sequence[Question],
    batch_tokens: int,
    on_done: Callable[[int], None],
    stop: Callable[[], bool],
    team: ServerGroup,
) -> list[OptionScores] | None:
    """Of questions with a gap, whose options are what one position may say: each is run once."""
    found = [OptionScores(len(question.options)) for question in asked]
    before = prompt.spec.num_tokens if prompt else 0
    groups = enumerate(by_length([question.options[0] for question in asked], batch_tokens, before))
    stopped = stop()
    with model.evaluating():
        for group in (group for index, group in groups if team.is_mine(index)):
            if stopped := stopped or stop():
                break
            batch = collate([asked[place].options[0] for place in group]).to(model.device)
            each = F.log_softmax(model.head(model.answer_states(batch, prompt)).double(), dim=-1)
            best = each.argmax(-1).tolist()
            for row, place in enumerate(group):
                tokens = [int(text.ids[text.answer]) for text in asked[place].options]
                found[place].loglikelihood[:] = each[row, tokens].tolist()
                found[place].greedy[:] = [token == best[row] for token in tokens]
            on_done(sum(len(asked[place].options) for place in group))
    if team.any(stopped):
        return None
    _share(found, team)
    return found


def positions_for_text(model: LanguageModel, prompt: Prompt | None) -> int:
    """The model's positions less the prompt's."""
    return model.shape.num_positions - (prompt.spec.num_tokens if prompt else 0)


@torch.no_grad()
def answer_loss_mean(
    model: LanguageModel,
    prompt: Prompt | None,
    texts: Sequence[Text],
    batch_tokens: int,
    team: ServerGroup = SINGLE_RANK,
) -> float:
    """Mean cross entropy over all answer tokens of the texts: the validation loss. A team's ranks
    share the batches.
    """
    groups = list(by_length(texts, batch_tokens))
    sums = torch.zeros(len(groups), dtype=torch.float64, device=model.device)
    with model.evaluating():
        for index, rows in enumerate(groups):
            if team.is_mine(index):
                batch = collate([texts[i] for i in rows]).to(model.device)
                sums[index] = answer_loss(*model.answer_logits(batch, prompt))
    team.sum([sums])  # of zeros, but for one rank's number: no sum depends on who shared
    return sum(sums.tolist()) / max(sum(text.num_answers for text in texts), 1)


class OptionScores:
    """Log-likelihood of each option of a question, and whether greedy decoding gives it."""

    def __init__(self, num_options: int) -> None:
        self.loglikelihood = np.zeros(num_options)
        self.greedy = np.zeros(num_options, dtype=bool)


def _share(found: list[OptionScores], team: ServerGroup) -> None:
    """Let every rank know what each found out."""
    if team.size == 1:
        return
    numbers = iter(
        team.totals([number for each in found for number in (*each.loglikelihood, *each.greedy)])
    )
    for each in found:
        for row in (each.loglikelihood, each.greedy):
            row[:] = [next(numbers) for _ in row]


@dataclass(frozen=True)
class _SharedContext:
    """Token ids that some options of a question share as their context."""

    question: int
    ids: tuple[int, ...]
    options: tuple[int, ...]
    endings: tuple[np.ndarray, ...]

    @property
    def longest(self) -> int:
        return max(len(ending) for ending in self.endings)


def _groups(
    asked: Sequence[Question], room: int, before: int, batch_tokens: int
) -> list[list[_SharedContext]]:
    """Stems of equal length side by side, those with long options first, at most `batch_tokens`
    positions together.
    """
    by_size: dict[int, list[_SharedContext]] = defaultdict(list)
    for index, question in enumerate(asked):
        for stem in _stems(index, question, room):
            by_size[len(stem.ids)].append(stem)
    return [
        group
        for size in sorted(by_size, reverse=True)
        for group in _cut(
            sorted(by_size[size], key=lambda stem: -stem.longest), before + size, batch_tokens
        )
    ]


def _cut(
    stems: list[_SharedContext], size: int, batch_tokens: int
) -> Iterator[list[_SharedContext]]:
    """Groups of at most `batch_tokens` positions: `size` for a stem, for an option the longest's,
    sorted first.
    """
    group: list[_SharedContext] = []
    num_options = 0
    for stem in stems:
        longest = (group or [stem])[0].longest
        positions = (len(group) + 1) * size + (num_options + len(stem.options)) * longest
        if group and positions > batch_tokens:
            yield group
            group, num_options = [], 0
        group.append(stem)
        num_options += len(stem.options)
    yield group


def _stems(index: int, question: Question, room: int) -> list[_SharedContext]:
    shared: dict[tuple[int, ...], list[tuple[int, np.ndarray]]] = defaultdict(list)
    for option, text in enumerate(question.options):
        kept = truncate(text, room + 1)  # the last token is predicted, not read
        shared[tuple(kept.ids[: kept.answer].tolist())].append((option, kept.ids[kept.answer :]))
    return [
        _SharedContext(index, ids, *(tuple(part) for part in zip(*some)))
        for ids, some in shared.items()
    ]


def _score_group(
    model: LanguageModel,
    prompt: Prompt | None,
    group: list[_SharedContext],
    found: list[OptionScores],
) -> None:
    ids = torch.tensor([stem.ids for stem in group], device=model.device)
    stem_of = [row for row, stem in enumerate(group) for _ in stem.options]
    endings = [ending for stem in group for ending in stem.endings]
    first, rest = model.continue_from(
        ids, prompt, torch.tensor(stem_of, device=model.device), _pad(endings, model)
    )
    targets = torch.full((len(endings), max(map(len, endings))), -100)
    for row, ending in enumerate(endings):
        targets[row, : len(ending)] = torch.from_numpy(ending.astype(np.int64))
    targets = targets.to(model.device)
    parts = [_compared(first[:, None], targets[:, :1])]
    if rest is not None:
        parts.append(_compared(rest, targets[:, 1:]))
    sums = torch.cat([each for each, _ in parts], dim=1).double().sum(dim=1).tolist()
    greedy = torch.cat([is_best for _, is_best in parts], dim=1).all(dim=1).tolist()
    places = [(stem.question, option) for stem in group for option in stem.options]
    for (question, option), value, is_greedy in zip(places, sums, greedy):
        found[question].loglikelihood[option], found[question].greedy[option] = value, is_greedy


def _compared(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Log-likelihood of every target, and whether it is the likeliest token; 0 and true where there
    is none.
    """
    # Flat, because the kernel for [batch, vocabulary, length] is off by up to 1e-3 a text on a CPU.
    each = -F.cross_entropy(logits.float().flatten(0, 1), targets.flatten(), reduction="none").view(
        targets.shape
    )
    return each, (logits.argmax(-1) == targets) | (targets == -100)


def _pad(endings: list[np.ndarray], model: LanguageModel) -> Batch | None:
    """The endings without their last token, right-padded; None where no option is longer than a
    token.
    """
    length = max(len(ending) for ending in endings) - 1
    if length == 0:
        return None
    ids, mask = np.zeros((2, len(endings), length), dtype=np.int64)
    for row, ending in enumerate(endings):
        ids[row, : len(ending) - 1] = ending[:-1]
        mask[row, : len(ending) - 1] = 1
    both: tuple[Tensor, Tensor] = (
        torch.from_numpy(ids).to(model.device),
        torch.from_numpy(mask).to(model.device),
    )
    return Batch(*both, both[0])


def _judge(question: Question, found: OptionScores) -> tuple[bool, bool, bool]:
    best = int(np.argmax(found.loglikelihood))
    best_norm = int(np.argmax(found.loglikelihood / np.array(question.lengths, dtype=float)))
    return (
        best in question.gold,
        best_norm in question.gold,
        bool(found.greedy[list(question.gold)].any()),
    )

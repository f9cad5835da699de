"""Score a language model with or without a prompt: `acc`, `acc_norm` and `exact_match`.

The measures are those that lm-eval defines.
"""

from __future__ import annotations

import math
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from fedsp_mpi.data import cloze
from fedsp_mpi.data.tasks import Example
from fedsp_mpi.data.tokenizer import Tokenizer
from fedsp_mpi.data.tokens import (
    Question,
    Text,
    by_length,
    collate,
    encode_pairs,
    require_answer,
    truncate,
)
from fedsp_mpi.models.language_model import LanguageModel
from fedsp_mpi.models.losses import answer_loss
from fedsp_mpi.models.prompts import Prompt, PromptBatch
from fedsp_mpi.tensors import Batch
from fedsp_mpi.training.process_group import SINGLE_RANK, ServerGroup

_NO_TARGET = -100  # torch's index of positions that a loss ignores


@dataclass(frozen=True)
class Score:
    """What a test split says of a model.

    Attributes:
        n: questions.
        acc: share whose option of highest summed log-likelihood is right; nan where the task has no
            options.
        acc_norm: the same with the log-likelihood divided by the option's length in characters.
        exact_match: share whose right answer is what greedy decoding would give; nan where the task
            has options.
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


def pooled(scores: Sequence[Score]) -> Score:
    """Return one score of several splits that were each scored under a prompt of its own.

    Means are weighted by questions; the standard error is that of a stratified mean.
    """
    if len(scores) == 1:
        return scores[0]
    total = sum(score.n for score in scores)
    shares = [score.n / total for score in scores]

    def mean(values: Iterable[float]) -> float:
        return float(sum(share * value for share, value in zip(shares, values)))

    variance = sum((share * score.stderr) ** 2 for share, score in zip(shares, scores))
    return Score(
        n=total,
        acc=mean(score.acc for score in scores),
        acc_norm=mean(score.acc_norm for score in scores),
        exact_match=mean(score.exact_match for score in scores),
        stderr=math.sqrt(variance),
        seconds=sum(score.seconds for score in scores),
    )


class OptionScores:
    """What a model says of the options of a question.

    Attributes:
        loglikelihood: float64 [options], natural logarithm, summed over the option's tokens.
        greedy: bool [options], whether greedy decoding would give the option.
    """

    def __init__(self, num_options: int) -> None:
        self.loglikelihood = np.zeros(num_options)
        self.greedy = np.zeros(num_options, dtype=bool)


def questions(tokenizer: Tokenizer, examples: Sequence[Example]) -> list[Question]:
    """Tokenise every option of every example as lm-eval does: context, then " " + option.

    Raises:
        ConfigError: an option has no token; the message names the row.
    """
    examples_of_options = [example for example in examples for _ in example.choices]
    pairs = [(example.context, " " + choice) for example in examples for choice in example.choices]
    texts = encode_pairs(tokenizer, pairs)
    for text, example in zip(texts, examples_of_options, strict=True):
        require_answer(text, example)
    tokenised = []
    start = 0
    for example in examples:
        end = start + len(example.choices)
        tokenised.append(_question(example, tuple(texts[start:end])))
        start = end
    return tokenised


def gap_questions(
    tokenizer: Tokenizer, examples: Sequence[Example], max_length: int
) -> list[Question]:
    """Tokenise every option of every example for models that fill in a gap.

    Args:
        tokenizer: of the model.
        examples: whose options are one token each.
        max_length: tokens of a text, without the prompt's.
    """
    options_by_example = cloze.encode_options(tokenizer, examples, max_length)
    return [
        _question(example, options)
        for example, options in zip(examples, options_by_example, strict=True)
    ]


def _question(example: Example, options: tuple[Text, ...]) -> Question:
    lengths = tuple(len(choice) for choice in example.choices)
    return Question(options, lengths, example.gold)


@torch.no_grad()
def score(
    model: LanguageModel,
    prompt: Prompt | None,
    questions: Sequence[Question],
    *,
    metric: str,
    batch_tokens: int,
    on_done: Callable[[int], None] = lambda count: None,
    stop: Callable[[], bool] = lambda: False,
    group: ServerGroup = SINGLE_RANK,
) -> Score | None:
    """Score all questions.

    A context is run once for all its options; contexts of one length share a batch, so nothing is
    padded before an option, and little after it, because options of similar length come together.
    Texts longer than the model's positions (less the prompt's) lose their beginning, as in lm-eval.

    Args:
        model: on its device, frozen.
        prompt: at the model's depth, or None for zero-shot.
        questions: tokenised.
        metric: "multiple_choice" or "exact_match", which decides whose standard error is returned.
        batch_tokens: largest number of positions in a batch, padding and an input prompt included;
            more only where one context and its options are longer.
        on_done: called after each batch with the number of options that this rank has finished.
        stop: called between two batches; whether to give up.
        group: ranks that share the batches; all of them call this, and get the same score.

    Returns:
        The score; None if a rank was told to stop.
    """
    start = time.perf_counter()
    scores = loglikelihoods(
        model, prompt, questions, batch_tokens=batch_tokens, on_done=on_done, stop=stop, group=group
    )
    if scores is None:
        return None
    correct = np.array(
        [
            _is_correct(question, option_scores)
            for question, option_scores in zip(questions, scores, strict=True)
        ],
        dtype=float,
    )
    acc, acc_norm, exact_match = (float(mean) for mean in correct.mean(axis=0))
    if metric == "exact_match":
        main = correct[:, 2]
        acc = math.nan
        acc_norm = math.nan
    else:
        main = correct[:, 0]
        exact_match = math.nan
    stderr = float(main.std(ddof=1) / math.sqrt(len(main))) if len(main) > 1 else math.nan
    return Score(
        n=len(questions),
        acc=acc,
        acc_norm=acc_norm,
        exact_match=exact_match,
        stderr=stderr,
        seconds=time.perf_counter() - start,
    )


def _is_correct(question: Question, scores: OptionScores) -> tuple[bool, bool, bool]:
    """Return whether a question is answered correctly by acc, acc_norm and exact_match."""
    best = int(np.argmax(scores.loglikelihood))
    per_character = scores.loglikelihood / np.array(question.lengths, dtype=float)
    best_norm = int(np.argmax(per_character))
    return (
        best in question.gold,
        best_norm in question.gold,
        bool(scores.greedy[list(question.gold)].any()),
    )


@dataclass(frozen=True)
class _Work:
    """A batch that one rank runs: `run` fills in the scores of `num_options` options."""

    run: Callable[[], None]
    num_options: int


@torch.no_grad()
def loglikelihoods(
    model: LanguageModel,
    prompt: Prompt | PromptBatch | None,
    questions: Sequence[Question],
    *,
    batch_tokens: int,
    on_done: Callable[[int], None] = lambda count: None,
    stop: Callable[[], bool] = lambda: False,
    group: ServerGroup = SINGLE_RANK,
) -> list[OptionScores] | None:
    """Compute the log-likelihood of every option.

    Args:
        model: on its device, frozen.
        prompt: at the model's depth, or None; of several, `prompt_index` is by question.
        questions: tokenised.
        batch_tokens: as in `score`.
        on_done: as in `score`.
        stop: as in `score`.
        group: as in `score`.

    Returns:
        The scores of each question's options; None if a rank was told to stop.
    """
    scores = [OptionScores(len(question.options)) for question in questions]
    if model.kind == "causal":
        batches = _causal_batches(
            model, prompt, questions, scores=scores, batch_tokens=batch_tokens
        )
    else:
        batches = _gap_batches(model, prompt, questions, scores=scores, batch_tokens=batch_tokens)
    own_batches = [batch for index, batch in enumerate(batches) if group.is_mine(index)]
    stopped = stop()
    with model.evaluating():
        for batch in own_batches:
            stopped = stopped or stop()
            if stopped:
                break
            batch.run()
            on_done(batch.num_options)
    if group.any(stopped):
        return None
    _share(scores, group)
    return scores


def choice_losses(
    model: LanguageModel,
    prompts: PromptBatch,
    questions: Sequence[Question],
    *,
    batch_tokens: int,
) -> np.ndarray:
    """Return the cross entropy of the right choice among a question's choices, in nats.

    A choice's probability is the softmax of the log-likelihoods that `acc` compares, summed over
    each choice's tokens; of several right choices the probabilities are added.

    Args:
        model: on its device, frozen.
        prompts: at the model's depth; each is tried with every question.
        questions: tokenised.
        batch_tokens: as in `score`.

    Returns:
        fp64 [prompts, questions].
    """
    index = torch.arange(prompts.num, device=model.device).repeat_interleave(len(questions))
    pairs = [question for _ in range(prompts.num) for question in questions]  # prompt by prompt
    scores = loglikelihoods(
        model, replace(prompts, prompt_index=index), pairs, batch_tokens=batch_tokens
    )
    assert scores is not None, "nothing tells it to stop"
    losses = np.empty(len(pairs))
    for place, (question, option_scores) in enumerate(zip(pairs, scores, strict=True)):
        all_choices = option_scores.loglikelihood
        right_choices = all_choices[list(question.gold)]
        losses[place] = np.logaddexp.reduce(all_choices) - np.logaddexp.reduce(right_choices)
    return losses.reshape(prompts.num, len(questions))


def choice_scores(
    model: LanguageModel,
    prompt: Prompt | None,
    questions: Sequence[Question],
    *,
    batch_tokens: int,
) -> np.ndarray:
    """Return the log-likelihoods of all choices of questions that have the same ones, in nats.

    Args:
        model: on its device, frozen.
        prompt: at the model's depth, or None.
        questions: tokenised, at least one.
        batch_tokens: as in `score`.

    Returns:
        fp64 [questions, choices], summed over each choice's tokens.
    """
    scores = loglikelihoods(model, prompt, questions, batch_tokens=batch_tokens)
    assert scores is not None, "nothing tells it to stop"
    return np.stack([option_scores.loglikelihood for option_scores in scores])


def _prompts_of(
    prompt: Prompt | PromptBatch | None, indices: Sequence[int]
) -> Prompt | PromptBatch | None:
    """Return what goes in front of some of the questions, which are given by their indices."""
    if not isinstance(prompt, PromptBatch):
        return prompt
    return replace(prompt, prompt_index=prompt.prompt_index[list(indices)])


def _share(scores: Sequence[OptionScores], group: ServerGroup) -> None:
    """Sum the scores over all ranks, of which one has computed each; the others have zeros."""
    if group.size == 1:
        return
    numbers: list[float] = []
    for option_scores in scores:
        numbers += [*option_scores.loglikelihood, *option_scores.greedy]
    totals = iter(group.totals(numbers))
    for option_scores in scores:
        for row in (option_scores.loglikelihood, option_scores.greedy):
            row[:] = [next(totals) for _ in row]


def positions_for_text(model: LanguageModel, prompt: Prompt | PromptBatch | None) -> int:
    """Return the model's positions less the prompt's."""
    return model.shape.num_positions - (prompt.spec.num_tokens if prompt else 0)


@torch.no_grad()
def answer_loss_mean(
    model: LanguageModel,
    prompt: Prompt | None,
    texts: Sequence[Text],
    *,
    batch_tokens: int,
    group: ServerGroup = SINGLE_RANK,
) -> float:
    """Compute the validation loss: the mean cross entropy over all answer tokens, in nats.

    Args:
        model: on its device.
        prompt: at the model's depth, or None.
        texts: with their answers.
        batch_tokens: largest number of padded tokens in a batch.
        group: ranks that share the batches; all of them call this, and get the same loss.
    """
    batches = list(by_length(texts, batch_tokens))
    sums = torch.zeros(len(batches), dtype=torch.float64, device=model.device)
    with model.evaluating():
        for index, rows in enumerate(batches):
            if group.is_mine(index):
                batch = collate([texts[row] for row in rows]).to(model.device)
                sums[index] = answer_loss(*model.answer_logits(batch, prompt))
    # All ranks but one add zeros, so the sum does not depend on how the batches are shared.
    group.sum([sums])
    return sum(sums.tolist()) / max(sum(text.num_answers for text in texts), 1)


def perplexity(loss: float) -> float:
    """Return exp of a mean loss in nats a token; infinite where that is no finite number."""
    try:
        return math.exp(loss)
    except OverflowError:
        return math.inf


# -- models that fill in a gap ---------------------------------------------------------------------


def _gap_batches(
    model: LanguageModel,
    prompt: Prompt | PromptBatch | None,
    questions: Sequence[Question],
    *,
    scores: list[OptionScores],
    batch_tokens: int,
) -> Iterator[_Work]:
    """Yield the batches of questions with a gap, each of which is run once for all its options."""
    prompt_tokens = prompt.spec.num_tokens if prompt else 0
    texts = [question.options[0] for question in questions]
    for indices in by_length(texts, batch_tokens, prompt_tokens):
        batch_questions = [questions[index] for index in indices]
        batch_scores = [scores[index] for index in indices]
        yield _Work(
            partial(
                _score_gaps,
                model,
                _prompts_of(prompt, indices),
                batch_questions,
                scores=batch_scores,
            ),
            sum(len(question.options) for question in batch_questions),
        )


def _score_gaps(
    model: LanguageModel,
    prompt: Prompt | PromptBatch | None,
    questions: Sequence[Question],
    *,
    scores: Sequence[OptionScores],
) -> None:
    """Fill in the scores of one batch: an option is a token that may stand in the gap.

    Args:
        model: that fills in gaps.
        prompt: at the model's depth, or None.
        questions: of the batch.
        scores: of the same questions.
    """
    batch = collate([question.options[0] for question in questions]).to(model.device)
    logits = model.head(model.answer_states(batch, prompt))  # [questions, vocabulary]
    log_probabilities = F.log_softmax(logits.double(), dim=-1)
    best_tokens = log_probabilities.argmax(-1).tolist()
    for row, (question, option_scores) in enumerate(zip(questions, scores, strict=True)):
        tokens = [int(text.ids[text.answer]) for text in question.options]
        option_scores.loglikelihood[:] = log_probabilities[row, tokens].tolist()
        option_scores.greedy[:] = [token == best_tokens[row] for token in tokens]


# -- causal models ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class _SharedContext:
    """A context that some options of a question share.

    Attributes:
        question: index of the question.
        ids: tokens of the context.
        options: indices of the options.
        endings: int32 [tokens] of each of these options.
    """

    question: int
    ids: tuple[int, ...]
    options: tuple[int, ...]
    endings: tuple[np.ndarray, ...]

    @property
    def longest(self) -> int:
        """Tokens of the longest option."""
        return max(len(ending) for ending in self.endings)


def _causal_batches(
    model: LanguageModel,
    prompt: Prompt | PromptBatch | None,
    questions: Sequence[Question],
    *,
    scores: list[OptionScores],
    batch_tokens: int,
) -> Iterator[_Work]:
    """Yield the batches of contexts with their options."""
    # A prefix lies in the cache, and takes no positions of the forward pass.
    is_input = prompt is not None and prompt.spec.kind == "input"
    contexts_by_length: dict[int, list[_SharedContext]] = defaultdict(list)
    for index, question in enumerate(questions):
        for context in _shared_contexts(index, question, positions_for_text(model, prompt)):
            contexts_by_length[len(context.ids)].append(context)
    for length in sorted(contexts_by_length, reverse=True):
        contexts = sorted(contexts_by_length[length], key=lambda context: -context.longest)
        context_tokens = length + (prompt.spec.num_tokens if prompt and is_input else 0)
        for batch in _split_contexts(contexts, context_tokens, batch_tokens):
            yield _Work(
                partial(_score_group, model, prompt, batch, scores=scores),
                sum(len(context.options) for context in batch),
            )


def _shared_contexts(index: int, question: Question, max_positions: int) -> list[_SharedContext]:
    """Group the options of a question by their context.

    Args:
        index: of the question.
        question: whose options may have contexts of their own, where tokens merge at the border.
        max_positions: for context and option.
    """
    options_by_context: dict[tuple[int, ...], list[int]] = defaultdict(list)
    endings_by_context: dict[tuple[int, ...], list[np.ndarray]] = defaultdict(list)
    for option, text in enumerate(question.options):
        text = truncate(text, max_positions + 1)  # the last token is predicted, not read
        context = tuple(text.ids[: text.answer].tolist())
        options_by_context[context].append(option)
        endings_by_context[context].append(text.ids[text.answer :])
    return [
        _SharedContext(index, context, tuple(options), tuple(endings_by_context[context]))
        for context, options in options_by_context.items()
    ]


def _split_contexts(
    contexts: Sequence[_SharedContext], context_tokens: int, batch_tokens: int
) -> Iterator[list[_SharedContext]]:
    """Yield the contexts in batches of at most `batch_tokens` positions.

    Args:
        contexts: of one length, those with the longest options first.
        context_tokens: positions of a context, with an input prompt.
        batch_tokens: positions of a batch; every option takes as many as the batch's longest.
    """
    batch: list[_SharedContext] = []
    num_options = 0
    for context in contexts:
        longest = batch[0].longest if batch else context.longest
        positions = (len(batch) + 1) * context_tokens
        positions += (num_options + len(context.options)) * longest
        if batch and positions > batch_tokens:
            yield batch
            batch = []
            num_options = 0
        batch.append(context)
        num_options += len(context.options)
    yield batch


def _score_group(
    model: LanguageModel,
    prompt: Prompt | PromptBatch | None,
    contexts: list[_SharedContext],
    *,
    scores: list[OptionScores],
) -> None:
    """Fill in the scores of the options of one batch.

    Args:
        model: causal.
        prompt: at the model's depth, or None.
        contexts: of one length.
        scores: of all questions.
    """
    context_ids = torch.tensor([context.ids for context in contexts], device=model.device)
    prompt = _prompts_of(prompt, [context.question for context in contexts])
    endings = [ending for context in contexts for ending in context.endings]
    rows = [row for row, context in enumerate(contexts) for _ in context.options]
    # Logits of the options' first token [options, vocabulary], and of the further ones.
    first, further = model.continue_from(
        context_ids, prompt, torch.tensor(rows, device=model.device), endings=_pad(endings, model)
    )
    longest = max(len(ending) for ending in endings)
    targets = torch.full((len(endings), longest), _NO_TARGET)
    for row, ending in enumerate(endings):
        targets[row, : len(ending)] = torch.from_numpy(ending.astype(np.int64))
    targets = targets.to(model.device)
    values, is_best = _compare(first[:, None], targets[:, :1])
    if further is not None:
        further_values, further_is_best = _compare(further, targets[:, 1:])
        values = torch.cat([values, further_values], dim=1)
        is_best = torch.cat([is_best, further_is_best], dim=1)
    sums = iter(values.double().sum(dim=1).tolist())
    greedy = iter(is_best.all(dim=1).tolist())
    for context in contexts:
        option_scores = scores[context.question]
        for option in context.options:
            option_scores.loglikelihood[option] = next(sums)
            option_scores.greedy[option] = next(greedy)


def _compare(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Compare predictions with targets.

    Args:
        logits: [batch, length, vocabulary].
        targets: int64 [batch, length], -100 where there is none.

    Returns:
        Log-likelihood of every target, float32 [batch, length], 0 where there is none; and whether
        it is the likeliest token, bool [batch, length], true where there is none.
    """
    # Flat, because the kernel for [batch, vocabulary, length] is off by up to 1e-3 a text on a CPU.
    losses = F.cross_entropy(logits.float().flatten(0, 1), targets.flatten(), reduction="none")
    is_best = (logits.argmax(-1) == targets) | (targets == _NO_TARGET)
    return -losses.view(targets.shape), is_best


def _pad(endings: Sequence[np.ndarray], model: LanguageModel) -> Batch | None:
    """Pad options without their last token, which is predicted and not read, on the right.

    Args:
        endings: int [tokens] of each option.
        model: on its device.

    Returns:
        A batch [options, longest - 1]; None where no option is longer than a token.
    """
    length = max(len(ending) for ending in endings) - 1
    if length == 0:
        return None
    input_ids = np.zeros((len(endings), length), dtype=np.int64)
    attention_mask = np.zeros((len(endings), length), dtype=np.int64)
    for row, ending in enumerate(endings):
        input_ids[row, : len(ending) - 1] = ending[:-1]
        attention_mask[row, : len(ending) - 1] = 1
    ids = torch.from_numpy(input_ids).to(model.device)
    mask = torch.from_numpy(attention_mask).to(model.device)
    return Batch(ids, mask, targets=ids)

"""Leave out rows whose answer does not fit into the model, with a note, before training begins."""

from __future__ import annotations

import unicodedata
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from fedsp_mpi.config.parsing import ConfigError
from fedsp_mpi.data import cloze
from fedsp_mpi.data.examples import Example
from fedsp_mpi.data.tasks import Splits
from fedsp_mpi.data.tokenizer import Tokenizer
from fedsp_mpi.data.tokens import Text, encode_pairs

_NUM_ROWS_SHOWN = 5  # rows that a note names


@dataclass(frozen=True)
class AnswerLimit:
    """The maximum length of an answer, or of a text from its gap on.

    Attributes:
        tokens: maximum number of tokens of an answer; of models that fill in a gap, of the text
            from the gap on.
        reason: where that number comes from.
        advice: how to raise it.
        fills_gaps: whether the model fills in a gap.
    """

    tokens: int
    reason: str
    advice: str
    fills_gaps: bool = False

    @classmethod
    def of(cls, num_positions: int, num_prompt_tokens: int, fills_gaps: bool) -> AnswerLimit:
        """Return the positions of a model, less those of the prompt.

        Args:
            num_positions: of the model.
            num_prompt_tokens: positions that the prompt takes.
            fills_gaps: whether the model fills in a gap.
        """
        reason = f"the model has {num_positions} positions, the prompt takes {num_prompt_tokens}"
        advice = (
            "shorten them, or take a shorter prompt or a model with more positions, to keep them"
        )
        return cls(num_positions - num_prompt_tokens, reason, advice, fills_gaps)

    def at_most(self, max_length: int) -> AnswerLimit:
        """Tighten the limit for texts of at most `max_length` tokens.

        One of them stands before an answer, if the model does not fill in a gap.
        """
        tokens = max_length if self.fills_gaps else max_length - 1
        if tokens >= self.tokens:
            return self
        return replace(
            self,
            tokens=tokens,
            reason=f"data.max_length={max_length}",
            advice="raise it to keep them",
        )

    @property
    def part(self) -> str:
        """The part of a text that must fit, in words."""
        return "text from the answer on" if self.fills_gaps else "answer"


def drop_too_long(
    splits: Splits,
    limit: AnswerLimit,
    tokenizer: Callable[[], Tokenizer],
    *,
    attack_target: int | None = None,
) -> tuple[Splits, tuple[str, ...]]:
    """Leave out rows of train and validation whose answer does not fit, whatever it is of a row
    without a label.

    Only rows that are long enough to be doubtful are tokenised: no token is shorter than a byte.

    Args:
        splits: of a task.
        limit: maximum length of what must fit.
        tokenizer: loads the tokenizer; called only if there is a doubtful row.
        attack_target: position of the choice that an attacker may teach in the place of a training
            row's answer; None if there is no attack.

    Returns:
        The splits without these rows, and a note for each split that lost some.

    Raises:
        ConfigError: no row of a split is left.
    """
    train, train_notes = _fitting(
        "train", splits.train, limit, tokenizer=tokenizer, attack_target=attack_target
    )
    validation, validation_notes = _fitting(
        "validation", splits.validation, limit, tokenizer=tokenizer, attack_target=None
    )
    unlabelled, unlabelled_notes = _fitting_unlabelled(splits.unlabelled, limit, tokenizer)
    splits = replace(splits, train=train, validation=validation, unlabelled=unlabelled)
    return splits, train_notes + validation_notes + unlabelled_notes


def truncated_options_note(
    examples: Sequence[Example], options: Sequence[Sequence[Text]], limit: AnswerLimit
) -> tuple[str, ...]:
    """Return a note on test questions with an option that is too long and loses its beginning.

    lm-eval scores such an option by its last tokens, too; to leave the question out would make
    another test.

    Args:
        examples: the questions.
        options: of each question, the text of every choice.
        limit: maximum length of what must fit.

    Returns:
        One note, or none.
    """
    longest = [max((text.num_answers for text in texts), default=0) for texts in options]
    rows = [
        f"{example.row} ({length} tokens)"
        for example, length in zip(examples, longest)
        if length > limit.tokens
    ]
    if not rows:
        return ()
    number = "1 question" if len(rows) == 1 else f"{len(rows)} questions"
    note = (
        f"test: {number} with an option that is longer than the {limit.tokens} tokens that fit "
        f"({limit.reason}), scored by its last tokens as in lm-eval: {_listed(rows)}"
    )
    return (note,)


def shortened_note(
    split: str,
    examples: Sequence[Example],
    max_length: int,
    *,
    tokenizer: Callable[[], Tokenizer],
    fills_gaps: bool,
) -> tuple[str, ...]:
    """Return a note on the texts of a split that are too long and lose their beginning, or none.

    Only rows that are long enough to be doubtful are tokenised.

    Args:
        split: its name.
        examples: of the split.
        max_length: maximum number of tokens of a text, answer included.
        tokenizer: loads the tokenizer; called only if there is a doubtful row.
        fills_gaps: whether the model fills in a gap.
    """
    doubtful = [
        example
        for example in examples
        if _max_bytes(example.context) + _max_bytes(example.target + example.suffix) + 3
        > max_length
    ]
    if not doubtful:
        return ()
    if fills_gaps:
        lengths = cloze.lengths(tokenizer(), doubtful)
    else:
        pairs = [(example.context, example.target) for example in doubtful]
        lengths = [len(text.ids) for text in encode_pairs(tokenizer(), pairs)]
    too_long = [length for length in lengths if length > max_length]
    if not too_long:
        return ()
    verb = "is" if len(too_long) == 1 else "are"
    note = (
        f"{split}: {len(too_long)} of {len(examples)} texts {verb} longer than the {max_length} "
        f"tokens that fit (up to {max(too_long)}), and only the end is read"
    )
    return (note,)


def _fitting(
    split: str,
    examples: Sequence[Example],
    limit: AnswerLimit,
    *,
    tokenizer: Callable[[], Tokenizer],
    attack_target: int | None,
) -> tuple[tuple[Example, ...], tuple[str, ...]]:
    """Return the examples of a split that fit, and a note on those that do not."""
    doubtful = [
        index
        for index, example in enumerate(examples)
        if _max_tokens(example, limit, attack_target) > limit.tokens
    ]
    if not doubtful:
        return tuple(examples), ()
    lengths = _num_tokens(
        tokenizer(), [examples[index] for index in doubtful], limit, attack_target=attack_target
    )
    too_long = {index: length for index, length in zip(doubtful, lengths) if length > limit.tokens}
    if not too_long:
        return tuple(examples), ()
    rows = _listed(
        [f"{examples[index].row} ({length} tokens)" for index, length in too_long.items()]
    )
    fitting = tuple(example for index, example in enumerate(examples) if index not in too_long)
    if not fitting:
        raise ConfigError(
            f"data.max_length, prompt.num_tokens: found no row of {split} whose {limit.part} fits, "
            f"expected at most {limit.tokens} tokens ({limit.reason}): {rows}; {limit.advice}"
        )
    number = "1 row" if len(too_long) == 1 else f"{len(too_long)} rows"
    note = (
        f"{split}: {number} left out of {len(examples)}, whose {limit.part} is longer than the "
        f"{limit.tokens} tokens that fit ({limit.reason}): {rows}; {limit.advice}"
    )
    return fitting, (note,)


def _fitting_unlabelled(
    examples: Sequence[Example], limit: AnswerLimit, tokenizer: Callable[[], Tokenizer]
) -> tuple[tuple[Example, ...], tuple[str, ...]]:
    """Return the examples without a label of which every choice fits, and a note on others."""
    with_longest = [
        replace(example, target=f" {max(example.choices, key=len)}") for example in examples
    ]
    fitting, notes = _fitting(
        "unlabelled rows", with_longest, limit, tokenizer=tokenizer, attack_target=None
    )
    return tuple(replace(example, target="") for example in fitting), notes


def _taught_answers(example: Example, attack_target: int | None) -> list[str]:
    """Return the answers that may be taught behind an example's context."""
    if attack_target is None or attack_target >= len(example.choices):
        return [example.target]
    return [example.target, f" {example.choices[attack_target]}"]


def _max_tokens(example: Example, limit: AnswerLimit, attack_target: int | None) -> int:
    """Return an upper limit of the number of tokens that must fit."""
    if limit.fills_gaps:
        # Three more: the gap's token, and one that the tokenizer puts at either end.
        return _max_bytes(example.suffix) + 3
    # Blanks at the context's end move to the answer.
    blanks = len(example.context) - len(example.context.rstrip())
    answers = _taught_answers(example, attack_target)
    return blanks + 1 + max(_max_bytes(answer) for answer in answers)


def _max_bytes(text: str) -> int:
    """Return an upper limit of the bytes of a text that a tokenizer has normalised.

    Normalisation may make longer texts of letters that are not ASCII's.
    """
    if text.isascii():
        return len(text)
    return 2 * len(unicodedata.normalize("NFKC", text).encode("utf-8", "replace"))


def _num_tokens(
    tokenizer: Tokenizer,
    examples: Sequence[Example],
    limit: AnswerLimit,
    *,
    attack_target: int | None,
) -> list[int]:
    """Return the number of tokens of each example that must fit."""
    if limit.fills_gaps:
        return cloze.lengths_from_gap(tokenizer, examples)
    answers = [_taught_answers(example, attack_target) for example in examples]
    pairs = [
        (example.context, answer)
        for example, example_answers in zip(examples, answers)
        for answer in example_answers
    ]
    texts = iter(encode_pairs(tokenizer, pairs))
    return [max(next(texts).num_answers for _ in example_answers) for example_answers in answers]


def _listed(rows: Sequence[str]) -> str:
    shown = ", ".join(rows[:_NUM_ROWS_SHOWN])
    if len(rows) > _NUM_ROWS_SHOWN:
        shown += f" and {len(rows) - _NUM_ROWS_SHOWN} more"
    return shown

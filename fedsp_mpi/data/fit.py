"""Rows that leave no room for their answer: they are left out, with a note, before anybody trains
on them.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from fedsp_mpi.config.parsing import ConfigError
from fedsp_mpi.data import cloze
from fedsp_mpi.data.tasks import Example, Splits
from fedsp_mpi.data.tokens import Text, encode_pairs

_SHOWN = 5  # rows that a note names


@dataclass(frozen=True)
class Room:
    """How much of a text must fit, and into what.

    Attributes:
        tokens: most that an answer may have; of models that fill in a gap, most from the gap on.
        reason: where that number comes from.
        advice: what makes it larger.
        fills_gaps: whether the model fills in a gap.
    """

    tokens: int
    reason: str
    advice: str
    fills_gaps: bool = False

    @classmethod
    def of(cls, num_positions: int, num_prompt_tokens: int, fills_gaps: bool) -> Room:
        """Return the room that a model's positions leave, less the prompt's."""
        reason = f"the model has {num_positions} positions, the prompt takes {num_prompt_tokens}"
        advice = (
            "shorten them, or take a shorter prompt or a model with more positions, to keep them"
        )
        return cls(num_positions - num_prompt_tokens, reason, advice, fills_gaps)

    def at_most(self, max_length: int) -> Room:
        """Return the room in a text of at most `max_length` tokens, of which one stands before an
        answer.
        """
        tokens = max_length - (0 if self.fills_gaps else 1)
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
        """What of a text must fit."""
        return "text from the answer on" if self.fills_gaps else "answer"


def leave_out(
    splits: Splits, room: Room, tokenizer: Callable[[], Any], attacked: int | None = None
) -> tuple[Splits, tuple[str, ...]]:
    """Leave rows of train and validation out whose answer does not fit; return the others, and a
    note a split.

    Only rows that are long enough to be doubtful are tokenised: no token is shorter than a byte.

    Args:
        splits: of a task.
        room: what must fit into what.
        tokenizer: gives the tokenizer, if there is a doubtful row.
        attacked: position of the choice that an attacker may put in the place of a training row's
            answer, or None.

    Raises ConfigError if no row of a split is left.
    """
    train, about_train = _fitting("train", splits.train, room, tokenizer, attacked)
    validation, about_validation = _fitting("validation", splits.validation, room, tokenizer, None)
    return replace(splits, train=train, validation=validation), about_train + about_validation


def cut_options(
    examples: Sequence[Example], options: Sequence[Sequence[Text]], room: Room
) -> tuple[str, ...]:
    """Return a note on test questions with an option that is longer than the room: its beginning is
    not scored.

    lm-eval scores such an option by its last tokens, too; to leave the question out would make
    another test.
    """
    longest = [max((text.num_answers for text in texts), default=0) for texts in options]
    rows = [
        f"{example.row} ({length} tokens)"
        for example, length in zip(examples, longest)
        if length > room.tokens
    ]
    if not rows:
        return ()
    number = "1 question" if len(rows) == 1 else f"{len(rows)} questions"
    return (
        f"test: {number} with an option that is longer than the {room.tokens} tokens "
        f"that fit ({room.reason}), scored "
        f"by its last tokens as in lm-eval: {_listed(rows)}",
    )


def _fitting(
    split: str,
    examples: Sequence[Example],
    room: Room,
    tokenizer: Callable[[], Any],
    attacked: int | None,
) -> tuple[tuple[Example, ...], tuple[str, ...]]:
    doubtful = [
        place
        for place, example in enumerate(examples)
        if _most(example, room, attacked) > room.tokens
    ]
    if not doubtful:
        return tuple(examples), ()
    lengths = _lengths(tokenizer(), [examples[place] for place in doubtful], room, attacked)
    out = {place: length for place, length in zip(doubtful, lengths) if length > room.tokens}
    if not out:
        return tuple(examples), ()
    rows = _listed([f"{examples[place].row} ({length} tokens)" for place, length in out.items()])
    kept = tuple(example for place, example in enumerate(examples) if place not in out)
    if not kept:
        raise ConfigError(
            f"data.max_length, prompt.num_tokens: found no row of {split} whose {room.part} "
            "fits, expected at most "
            f"{room.tokens} tokens ({room.reason}): {rows}; {room.advice}"
        )
    number = "1 row" if len(out) == 1 else f"{len(out)} rows"
    return kept, (
        f"{split}: {number} left out of {len(examples)}, whose {room.part} is longer "
        f"than the {room.tokens} tokens "
        f"that fit ({room.reason}): {rows}; {room.advice}",
    )


def _answers(example: Example, attacked: int | None) -> list[str]:
    """What may be taught behind an example's context."""
    if attacked is None or attacked >= len(example.choices):
        return [example.target]
    return [example.target, f" {example.choices[attacked]}"]


def _most(example: Example, room: Room, attacked: int | None) -> int:
    """At most so many tokens need room."""
    if room.fills_gaps:
        return _bytes(example.after) + 3  # the gap's, and one that the tokenizer puts at either end
    blanks = len(example.context) - len(example.context.rstrip())
    return blanks + 1 + max(_bytes(answer) for answer in _answers(example, attacked))


def _bytes(text: str) -> int:
    """Bytes of a text, and room for what a tokenizer's normalisation makes of other letters than
    ASCII's.
    """
    return (
        len(text)
        if text.isascii()
        else 2 * len(unicodedata.normalize("NFKC", text).encode("utf-8", "replace"))
    )


def _lengths(
    tokenizer: Any, examples: Sequence[Example], room: Room, attacked: int | None
) -> list[int]:
    """Tokens of each example that need room."""
    if room.fills_gaps:
        return cloze.lengths_from_the_gap(tokenizer, examples)
    answers = [_answers(example, attacked) for example in examples]
    pairs = [
        (example.context, answer) for example, some in zip(examples, answers) for answer in some
    ]
    texts = iter(encode_pairs(tokenizer, pairs))
    return [max(next(texts).num_answers for _ in some) for some in answers]


def _listed(rows: Sequence[str]) -> str:
    return ", ".join(rows[:_SHOWN]) + (
        f" and {len(rows) - _SHOWN} more" if len(rows) > _SHOWN else ""
    )

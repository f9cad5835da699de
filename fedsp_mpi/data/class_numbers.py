"""Texts whose answer is the number of a class, for models with a classification head.

The number stands where the answer's token would, which no model reads: of a text that is continued
the last token is predicted only, and in a gap the model reads the gap's own token.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from fedsp_mpi.data import cloze
from fedsp_mpi.data.examples import Example
from fedsp_mpi.data.tokenizer import Tokenizer
from fedsp_mpi.data.tokens import Question, Text, encode_pairs, truncate


def continued_questions(
    tokenizer: Tokenizer, examples: Sequence[Example], max_length: int
) -> list[Question]:
    """Tokenise examples for causal models: the context, and behind it each class's number.

    A context is tokenised before one and the same word, whatever the right answer is: at its end
    tokens can merge with what follows. A long context loses its beginning.

    Args:
        tokenizer: of the model.
        examples: which all have the same choices.
        max_length: maximum number of tokens of a text, the number's place among them.
    """
    pairs = [(example.context, " " + example.choices[0]) for example in examples]
    texts = encode_pairs(tokenizer, pairs)
    contexts = [Text(text.ids[: text.answer + 1], text.answer) for text in texts]
    return [
        _question(truncate(context, max_length), example)
        for context, example in zip(contexts, examples, strict=True)
    ]


def gap_questions(
    tokenizer: Tokenizer, examples: Sequence[Example], max_length: int
) -> list[Question]:
    """Tokenise examples for models that fill in a gap, where each class's number stands.

    Args:
        tokenizer: of the model.
        examples: which all have the same choices, of any number of tokens.
        max_length: maximum number of tokens of a text.

    Raises:
        ConfigError: the words from the gap on do not fit; the message names the row.
    """
    texts = cloze.with_gaps(tokenizer, examples, max_length)
    return [_question(text, example) for text, example in zip(texts, examples, strict=True)]


def right_texts(questions: Sequence[Question]) -> list[Text]:
    """Return of each question the text with its right answer; of several the first."""
    return [question.options[question.gold[0]] for question in questions]


def _question(text: Text, example: Example) -> Question:
    """Return a text as a question: its options differ in the number at `text.answer` alone.

    A number counts as one character, so `acc_norm` is `acc`.
    """
    options: list[Text] = []
    for number in range(len(example.choices)):
        ids = text.ids.copy()
        ids[text.answer] = np.int32(number)
        options.append(Text(ids, text.answer, text.gap))
    return Question(tuple(options), (1,) * len(options), example.gold)

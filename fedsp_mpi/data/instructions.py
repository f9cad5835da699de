"""Instructions in words as token ids: what stands in front of a text."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from fedsp_mpi.config.parsing import ConfigError
from fedsp_mpi.data.tokenizer import Tokenizer
from fedsp_mpi.data.tokens import token_ids

_SEPARATOR = " "  # between two phrases
_END = "\n"  # of an instruction: the text begins in a line of its own
_NO_TOKEN = -1  # behind the tokens of an instruction that is shorter than its row


def tokens_of(row: np.ndarray) -> np.ndarray:
    """Return the token ids of a row of `InstructionTokens`, int64 [tokens of the instruction]."""
    return row[row != _NO_TOKEN].astype(np.int64)


class InstructionTokens:
    """Turns phrases into a row of token ids.

    All rows are of one length. Behind a shorter instruction the rest of its row is no token, and
    does not enter a model; without a phrase nothing does: the task's own words stand alone.

    Args:
        tokenizer: of the model.
        num_tokens: of a row.
    """

    def __init__(self, tokenizer: Tokenizer, num_tokens: int) -> None:
        self._tokenizer = tokenizer
        self._num_tokens = num_tokens

    @property
    def num_tokens(self) -> int:
        """Tokens of the longest instruction."""
        return self._num_tokens

    def text(self, phrases: Sequence[str]) -> str:
        """Return the words of an instruction and the end of its line; nothing without a phrase."""
        return _SEPARATOR.join(phrases) + _END if phrases else ""

    def ids(self, phrases: Sequence[str]) -> list[int]:
        """Return the tokens of an instruction, however many they are."""
        return self._tokenizer.encode(self.text(phrases), add_special_tokens=False)

    def fits(self, phrases: Sequence[str]) -> bool:
        """Return whether an instruction fits into a row."""
        return len(self.ids(phrases)) <= self._num_tokens

    def row(self, phrases: Sequence[str]) -> np.ndarray:
        """Return an instruction that fits, int64 [num_tokens]; `tokens_of` has it back."""
        row = np.full(self._num_tokens, _NO_TOKEN, dtype=np.int64)
        ids = self.ids(phrases)
        row[: len(ids)] = ids
        return row

    def words(self, row: np.ndarray) -> str:
        """Return the words of a row [num_tokens], without the end of the line."""
        return self._tokenizer.decode(tokens_of(row).tolist()).removesuffix(_END)

    def context(self, text: str) -> list[int]:
        """Return the tokens of a text that a model is to continue."""
        [ids] = token_ids(self._tokenizer, [text])
        return ids

    def first_line(self, ids: Sequence[int]) -> str:
        """Return the first line with words of what a model has written; nothing without any."""
        lines = self._tokenizer.decode(ids, skip_special_tokens=True).strip().splitlines()
        return lines[0].strip() if lines else ""

    def require_pool(self, pool: Sequence[str]) -> None:
        """Raise ConfigError unless each phrase of a pool is an instruction that fits."""
        for position, phrase in enumerate(pool):
            if not self._tokenizer.encode(phrase, add_special_tokens=False):
                raise ConfigError(
                    f"instructions.pool: found phrase {position + 1} without a token to this "
                    "tokenizer, expected at least one; write another"
                )
            num_tokens = len(self.ids([phrase]))
            if num_tokens > self._num_tokens:
                raise ConfigError(
                    f"instructions.pool: found phrase {position + 1} of {num_tokens} tokens, "
                    f"expected at most prompt.num_tokens={self._num_tokens}; set that higher, or "
                    "write it shorter"
                )

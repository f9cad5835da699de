"""Instructions in words as token ids: what stands in front of a text, at one length for all."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from fedsp_mpi.config.parsing import ConfigError
from fedsp_mpi.data.tokenizer import Tokenizer
from fedsp_mpi.data.tokens import token_ids

_SEPARATOR = " "  # between two phrases
_END = "\n"  # of an instruction: the text begins in a line of its own


class InstructionTokens:
    """Turns phrases into a row of token ids.

    Shorter instructions are padded in front with the token that separates documents, behind which a
    text begins anew. Without a phrase there is nothing else: the task's own words stand alone.

    Args:
        tokenizer: of the model.
        num_tokens: of a row.

    Raises:
        ConfigError: the tokenizer has no token that separates documents.
    """

    def __init__(self, tokenizer: Tokenizer, num_tokens: int) -> None:
        self._tokenizer = tokenizer
        self._num_tokens = num_tokens
        ends = (tokenizer.eos_token_id, tokenizer.bos_token_id)
        separators = [token for token in ends if token is not None]
        if not separators:
            raise ConfigError(
                "model.tokenizer: found one with neither an end-of-text nor a beginning-of-text "
                "token, expected one of them, with which short instructions are padded; set "
                "eos_token in tokenizer_config.json"
            )
        self._padding = int(separators[0])

    @property
    def num_tokens(self) -> int:
        """Tokens of a row, padding included."""
        return self._num_tokens

    def text(self, phrases: Sequence[str]) -> str:
        """Return the words of an instruction and the end of its line; nothing without a phrase."""
        return _SEPARATOR.join(phrases) + _END if phrases else ""

    def ids(self, phrases: Sequence[str]) -> list[int]:
        """Return the tokens of an instruction without padding, however many they are."""
        return self._tokenizer.encode(self.text(phrases), add_special_tokens=False)

    def fits(self, phrases: Sequence[str]) -> bool:
        """Return whether an instruction fits into a row."""
        return len(self.ids(phrases)) <= self._num_tokens

    def row(self, phrases: Sequence[str]) -> np.ndarray:
        """Return an instruction that fits, padded in front: int64 [num_tokens]."""
        ids = self.ids(phrases)
        padding = [self._padding] * (self._num_tokens - len(ids))
        return np.array(padding + ids, dtype=np.int64)

    def words(self, row: np.ndarray) -> str:
        """Return the words of a row [num_tokens] of token ids, without padding and line end."""
        ids = [int(token) for token in row]
        num_padding = 0
        while num_padding < len(ids) and ids[num_padding] == self._padding:
            num_padding += 1
        return self._tokenizer.decode(ids[num_padding:]).removesuffix(_END)

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

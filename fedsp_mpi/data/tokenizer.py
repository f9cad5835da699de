"""The part of a transformers tokenizer that this package uses."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from fedsp_mpi.files.untrusted import JsonMapping


class Tokenizer(Protocol):
    """A tokenizer of transformers; tests take simpler ones.

    Attributes:
        bos_token_id: id of the beginning-of-text token; None if there is none.
        eos_token_id: id of the end-of-text token; None if there is none.
        cls_token_id: id of the token that masked models begin a text with; None if there is none.
        unk_token_id: id that stands for unknown words; None if there is none.
        eos_token: the end-of-text token; None if there is none.
        mask_token: the token that masked models fill in; None if there is none.
    """

    bos_token_id: int | None
    eos_token_id: int | None
    cls_token_id: int | None
    unk_token_id: int | None
    eos_token: str | None
    mask_token: str | None

    def __call__(self, text: str | list[str], **settings: bool) -> JsonMapping:
        """Tokenise one text or several; "input_ids" holds the ids of each."""
        ...

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """Return the ids of a text."""
        ...

    def convert_tokens_to_ids(self, tokens: str) -> int | None:
        """Return the id of a token."""
        ...

    def convert_ids_to_tokens(self, ids: Sequence[int]) -> list[str]:
        """Return the tokens of ids."""
        ...

    def decode(self, ids: Sequence[int], *, skip_special_tokens: bool = False) -> str:
        """Return the text of ids."""
        ...

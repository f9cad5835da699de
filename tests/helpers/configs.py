"""Configurations from files, and what a refused one has to say."""

from __future__ import annotations

import dataclasses
import re
import typing
from pathlib import Path

import pytest
import yaml

from fedsp_mpi import config
from fedsp_mpi.config import Config, ConfigError
from fedsp_mpi.config.parsing import merge

MODEL = {"recipe": "paper", "model": {"name": "some/model"}}  # the recipe that changes no default


def write(folder: Path, content: object, name: str = "c.yaml") -> Path:
    path = folder / name
    path.write_text(content if isinstance(content, str) else yaml.safe_dump(content))
    return path


def load(folder: Path, content: object, *overrides: str) -> Config:
    """Load a file with this content; a mapping gets a model's name if it has none."""
    whole = merge(MODEL, content) if isinstance(content, dict) else content
    return config.load(write(folder, whole), list(overrides))


def leaves(kind: type, where: str = "") -> list[tuple[str, object]]:
    """Dotted key and type of every value of a configuration."""
    hints = typing.get_type_hints(kind)
    each = [(f"{where}{field.name}", hints[field.name]) for field in dataclasses.fields(kind)]
    below = [
        leaves(hint, f"{key}.") if dataclasses.is_dataclass(hint) else [(key, hint)]
        for key, hint in each
    ]
    return [leaf for some in below for leaf in some]


def refused(call, *words: str) -> str:
    """The one-line message of a ConfigError that says what was found, what was expected, and
    `words`.
    """
    with pytest.raises(ConfigError) as told:
        call()
    message = str(told.value)
    assert "\n" not in message and "found" in message, message
    assert re.search("expected|did you mean|known keys", message) or "set it to" in message, message
    assert all(word in message for word in words), message
    return message

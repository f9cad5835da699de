"""Reading what others may have written or damaged: bounded files, plain JSON, printable text."""

from __future__ import annotations

import json
import os
import stat
import unicodedata
from collections.abc import Mapping
from io import BufferedReader
from pathlib import Path
from typing import Any

# An object of JSON, or of YAML: the values are whatever JSON has.
JsonObject = dict[str, Any]
JsonMapping = Mapping[str, Any]  # one that is only read

_MAX_DEPTH = 50  # levels of JSON; what the package writes has fewer than 10
_MAX_INTEGER = 1 << 70  # in JSON
# Unicode categories: control and format characters, lone surrogates, line separators.
_UNSAFE = ("Cc", "Cf", "Cs", "Zl", "Zp")


def open_regular_file(path: Path) -> BufferedReader:
    """Open a regular file for reading; refuse a FIFO or a device, which could hang or never end.

    Raises:
        OSError: it cannot be opened.
        ValueError: it is not a regular file.
    """
    handle = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    if not stat.S_ISREG(os.fstat(handle).st_mode):
        os.close(handle)
        raise ValueError("no regular file")
    return os.fdopen(handle, "rb")


def read_bytes(path: Path, max_bytes: int) -> bytes:
    """Return a file's bytes.

    Raises:
        OSError: it cannot be read.
        ValueError: it is not a regular file, or has more than `max_bytes` bytes.
    """
    with open_regular_file(path) as file:
        content = file.read(max_bytes + 1)
    if len(content) > max_bytes:
        raise ValueError(f"more than {max_bytes} bytes")
    return content


def parse_json(text: str | bytes) -> Any:
    """Return the value of a JSON text.

    Raises:
        ValueError: the text is not JSON, is nested too deeply, or has too large an integer.
    """
    try:
        value = json.loads(text)
    except RecursionError:
        raise ValueError("JSON that is nested too deeply") from None
    level = [value]
    depth = 0
    while level:
        if depth >= _MAX_DEPTH:
            raise ValueError(f"JSON of more than {_MAX_DEPTH} levels")
        next_level: list[Any] = []
        for item in level:
            if isinstance(item, int) and abs(item) > _MAX_INTEGER:
                raise ValueError("JSON with a whole number of more than 70 bits")
            if isinstance(item, dict):
                next_level += item.values()
            elif isinstance(item, list):
                next_level += item
        level = next_level
        depth += 1
    return value


def printable(text: str, keep: str = "") -> str:
    r"""Escape what a terminal would obey, such as control and format characters (\x1b).

    Args:
        text: of any origin.
        keep: characters that are not escaped, such as the line end of a text of several lines.
    """
    if text.isprintable():  # most texts
        return text
    characters = []
    for character in text:
        if character not in keep and unicodedata.category(character) in _UNSAFE:
            character = character.encode("unicode_escape").decode()
        characters.append(character)
    return "".join(characters)

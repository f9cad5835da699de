"""What others may have written or damaged: files with a bound, JSON of a plain form, text that is
safe to show.
"""

from __future__ import annotations

import json
import os
import stat
import unicodedata
from pathlib import Path
from typing import Any, BinaryIO

_DEEPEST = 50  # levels of JSON; what the package writes has fewer than 10
_LARGEST = 1 << 70  # of whole numbers in JSON
_UNSAFE = (
    "Cc",
    "Cf",
    "Cs",
    "Zl",
    "Zp",
)  # control and format characters, lone surrogates, line separators


def open_plain(path: Path) -> BinaryIO:
    """Open a regular file to read it; a FIFO or a device, which could hang or never end, is
    refused.

    Raises OSError, ValueError if it is no regular file.
    """
    handle = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    if not stat.S_ISREG(os.fstat(handle).st_mode):
        os.close(handle)
        raise ValueError("no regular file")
    return os.fdopen(handle, "rb")


def read_bytes(path: Path, most: int) -> bytes:
    """A file's bytes.

    Raises OSError, ValueError if it is no regular file or has more than `most` bytes.
    """
    with open_plain(path) as file:
        image = file.read(most + 1)
    if len(image) > most:
        raise ValueError(f"more than {most} bytes")
    return image


def parse_json(text: str | bytes) -> Any:
    """A value from JSON.

    Raises ValueError if the text is not JSON, is nested too deeply, or has a number too large.
    """
    try:
        value = json.loads(text)
    except RecursionError:
        raise ValueError("JSON that is nested too deeply") from None
    level, depth = [value], 0
    while level:
        if depth >= _DEEPEST:
            raise ValueError(f"JSON of more than {_DEEPEST} levels")
        if any(isinstance(item, int) and abs(item) > _LARGEST for item in level):
            raise ValueError("JSON with a whole number of more than 70 bits")
        below = [
            item.values() if isinstance(item, dict) else item
            for item in level
            if isinstance(item, (dict, list))
        ]
        level = [item for items in below for item in items]
        depth += 1
    return value


def printable(text: str, keep: str = "") -> str:
    r"""Text without what a terminal obeys: control and format characters are written out, such as
    \x1b.

    Args:
        text: of any origin.
        keep: characters that stay, such as the line end of a text of several lines.
    """
    if text.isprintable():  # most texts
        return text
    return "".join(_written_out(sign) if sign not in keep else sign for sign in text)


def _written_out(sign: str) -> str:
    return sign.encode("unicode_escape").decode() if unicodedata.category(sign) in _UNSAFE else sign

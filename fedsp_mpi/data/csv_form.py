"""Recognise the form of a table that is text, as spreadsheets write it: separator and encoding.

Commas, semicolons (where the comma is the decimal point), tabs or bars; UTF-8 with or without a
byte order mark, or UTF-16; Excel's line "sep=;".
"""

from __future__ import annotations

import bz2
import gzip
import lzma
import re
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import BinaryIO, cast

import pyarrow as pa

_OPEN: dict[str, Callable[[Path], object]] = {
    ".gz": gzip.open,
    ".bz2": bz2.open,
    ".xz": lzma.open,
    ".zst": partial(pa.input_stream, compression="zstd"),
}
_MARKS = {b"\xef\xbb\xbf": "utf-8-sig", b"\xff\xfe": "utf-16", b"\xfe\xff": "utf-16"}
_MAX_HEADER = 1 << 16  # bytes that are looked at
_QUOTED = re.compile(r'"[^"]*"?')
_DECLARED = re.compile(r"sep=(.)\s*")


def recognise(path: Path, *, is_tsv: bool) -> dict[str, object]:
    """Return the options of `pandas.read_csv` that a file needs, from its first line.

    A comma in the header makes it a table with commas; without one, the most frequent of the other
    separators counts.

    Args:
        path: of a table; .gz, .bz2 and .xz are opened.
        is_tsv: whether its name says that the separator is a tab.

    Raises:
        OSError: it cannot be read.
    """
    with opened(path) as file:
        start = file.read(_MAX_HEADER)
    encoding = next((name for mark, name in _MARKS.items() if start.startswith(mark)), None)
    lines = start.decode(encoding or "utf-8", "replace").splitlines()
    header = lines[0] if lines else ""
    declared = _DECLARED.fullmatch(header)
    options: dict[str, object] = {"sep": _separator(header, is_tsv=is_tsv)}
    if declared:
        options = {"sep": declared.group(1), "skiprows": 1}
    if encoding:
        options["encoding"] = encoding
    return options


def opened(path: Path) -> BinaryIO:
    """Open a file for reading bytes; .gz, .bz2, .xz and .zst are unpacked.

    Raises:
        OSError: it cannot be read.
    """
    open_file = _OPEN.get(path.suffix.lower())
    return cast(BinaryIO, open_file(path)) if open_file else path.open("rb")


def _separator(header: str, *, is_tsv: bool) -> str:
    """Return the character between the columns of a header."""
    if is_tsv:
        return "\t"
    plain = _QUOTED.sub("", header)
    separator = max(";\t|", key=plain.count)
    return "," if "," in plain or separator not in plain else separator

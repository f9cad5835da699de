"""What has been added to a large run.h5 since it was written: so no commit writes the tables again.

Two files beside run.h5, while a run goes on:

    run.additions       frames, one behind the other; bytes that are there are never changed
    run.additions.mark  how many bytes of them count, their digest, and that of the run.h5 that they
                        belong to; replaced as a whole

A frame is on disk before the mark names it, so a kill leaves the state before or after a commit.
Additions to an earlier run.h5, left by a kill when a new one has just been written, belong to
nothing.

    frame:   length (8 bytes, little-endian), zlib of: length of the JSON (8 bytes), JSON, columns
    JSON:    {"fields": {name: value}, "appended": {table: columns}, "replaced": {table: columns}}
    columns: {"rows": number, "texts": {column: [text]}, "numbers": [[column, type]]}, whose bytes
             follow in this order
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import h5py
import numpy as np
import xxhash

from fedsp_mpi.files import untrusted
from fedsp_mpi.files.untrusted import JsonMapping, JsonObject
from fedsp_mpi.record import atomic

NAME = "run.additions"
MARK = "run.additions.mark"
_MAX_MARK_BYTES = 4096
_MAX_FRAME_BYTES = 1 << 30  # unpacked
_LENGTH = 8  # bytes of a number in front of what it counts
_LEVEL = 1  # of zlib; 1,000 rows of clients take 3 ms


@dataclass(frozen=True)
class Addition:
    """What one commit has changed.

    Attributes:
        fields: new values of what is no table, by name; JSON.
        appended: new rows of tables, structured arrays [rows] by name.
        replaced: tables that have other rows now, likewise.
    """

    fields: JsonMapping = field(default_factory=dict)
    appended: Mapping[str, np.ndarray] = field(default_factory=dict)
    replaced: Mapping[str, np.ndarray] = field(default_factory=dict)


class Additions:
    """Writes what is added to one run.h5.

    Args:
        folder: of the run.
        base: digest of the run.h5.
    """

    def __init__(self, folder: Path, base: str) -> None:
        self._folder = folder
        self._base = base
        self._size = 0
        self._digest = xxhash.xxh3_128()

    def append(self, addition: Addition, intact: str) -> None:
        """Write one addition; on return it is on disk.

        Args:
            addition: to write.
            intact: what is still there if this fails, for the error message.

        Raises:
            RecordError: it cannot be written; the earlier ones stay as they are.
        """
        frame = _frame(addition)
        atomic.append(self._folder / NAME, self._size, frame, intact=intact)
        digest = self._digest.copy()
        digest.update(frame)
        size = self._size + len(frame)
        values = {"base": self._base, "size": size, "digest": digest.hexdigest()}
        mark = json.dumps(values).encode()
        content = mark + f"\n{xxhash.xxh3_64_hexdigest(mark)}\n".encode()
        atomic.write(self._folder / MARK, [content], intact)
        self._size = size
        self._digest = digest


def read(folder: Path, base: str) -> list[Addition]:
    """Return what has been added to a run.h5.

    Args:
        folder: of the run.
        base: digest of the run.h5.

    Raises:
        OSError: a file cannot be read.
        ValueError: a file was damaged, or made by something else.
    """
    mark = _mark(folder)
    if mark is None or mark["base"] != base:
        return []
    size = mark["size"]
    with untrusted.open_regular_file(folder / NAME) as file:
        content = file.read(size)
    if len(content) != size or xxhash.xxh3_128_hexdigest(content) != mark["digest"]:
        raise ValueError(f"{NAME} beside it whose bytes are not what was written")
    additions = []
    start = 0
    while start < size:
        length = _number(content, start)
        start += _LENGTH
        additions.append(_addition(content[start : start + length]))
        start += length
    return additions


def remove(folder: Path) -> None:
    """Remove the additions to an earlier run.h5, in the folder of a run."""
    for name in (MARK, NAME, f"{MARK}.part"):
        (folder / name).unlink(missing_ok=True)


def _mark(folder: Path) -> JsonObject | None:
    """Return the mark; None if there is none. Raises ValueError if it is damaged."""
    try:
        content = untrusted.read_bytes(folder / MARK, _MAX_MARK_BYTES)
    except FileNotFoundError:
        return None
    text, _, digest = content.partition(b"\n")
    if digest != f"{xxhash.xxh3_64_hexdigest(text)}\n".encode():
        raise ValueError(f"{MARK} beside it that is damaged")
    mark = untrusted.parse_json(text)
    kinds = {"base": str, "size": int, "digest": str}
    if not isinstance(mark, dict) or any(
        not isinstance(mark.get(name), kind) for name, kind in kinds.items()
    ):
        raise ValueError(f"{MARK} beside it that no run writes")
    return mark


# -- frames ----------------------------------------------------------------------------------------


def _frame(addition: Addition) -> bytes:
    buffers: list[bytes] = []
    content = {
        "fields": addition.fields,
        "appended": {name: _columns(rows, buffers) for name, rows in addition.appended.items()},
        "replaced": {name: _columns(rows, buffers) for name, rows in addition.replaced.items()},
    }
    text = json.dumps(content).encode()
    unpacked = b"".join([len(text).to_bytes(_LENGTH, "little"), text, *buffers])
    packed = zlib.compress(unpacked, _LEVEL)
    return len(packed).to_bytes(_LENGTH, "little") + packed


def _columns(rows: np.ndarray, buffers: list[bytes]) -> JsonObject:
    """Describe a table [rows], and add the bytes of its numbers to `buffers`."""
    texts = {}
    numbers = []
    for name in rows.dtype.names or ():
        column = rows[name]
        if column.dtype.hasobject:
            texts[name] = column.tolist()
        else:
            numbers.append([name, column.dtype.str])
            buffers.append(column.tobytes())
    return {"rows": len(rows), "texts": texts, "numbers": numbers}


def _addition(packed: bytes) -> Addition:
    """Read one frame; raise ValueError if it is none that a run writes."""
    try:
        unpacked = zlib.decompressobj().decompress(packed, _MAX_FRAME_BYTES)
        length = _number(unpacked, 0)
        start = _LENGTH + length
        content = untrusted.parse_json(unpacked[_LENGTH:start])
        appended, start = _tables(content["appended"], unpacked, start)
        replaced, start = _tables(content["replaced"], unpacked, start)
        return Addition(dict(content["fields"]), appended, replaced)
    except (zlib.error, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{NAME} beside it that no run writes ({error!r})") from None


def _tables(
    described: JsonMapping, unpacked: bytes, start: int
) -> tuple[dict[str, np.ndarray], int]:
    """Return the tables of a frame by name, and where the bytes behind them begin."""
    tables = {}
    for name, columns in described.items():
        num_rows = columns["rows"]
        if not isinstance(num_rows, int) or not 0 <= num_rows <= len(unpacked):
            raise ValueError(f"{num_rows!r} rows in {NAME} beside it")
        values: JsonObject = {}
        types: list[tuple[str, np.dtype]] = []
        for column, texts in columns["texts"].items():
            if len(texts) != num_rows or not all(isinstance(text, str) for text in texts):
                raise ValueError(f"{len(texts)} texts of {num_rows} rows in {NAME} beside it")
            types.append((column, h5py.string_dtype()))
            values[column] = texts
        for column, kind in columns["numbers"]:
            dtype = np.dtype(str(kind))
            if dtype.kind not in "fiub":
                raise ValueError(f"numbers of {dtype} in {NAME} beside it")
            end = start + num_rows * dtype.itemsize
            types.append((column, dtype))
            values[column] = np.frombuffer(unpacked[start:end], dtype)
            start = end
        table = np.empty(num_rows, dtype=types)
        for column, column_values in values.items():
            table[column] = column_values
        tables[name] = table
    return tables, start


def _number(content: bytes, start: int) -> int:
    return int.from_bytes(content[start : start + _LENGTH], "little")

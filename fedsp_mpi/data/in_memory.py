"""Read small files as `datasets` does, but into memory alone: nothing is left on a disk."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path

import datasets
import pandas as pd
import pyarrow as pa
import pyarrow.ipc
import pyarrow.json
import pyarrow.parquet

from fedsp_mpi.data import csv_form
from fedsp_mpi.files.untrusted import JsonMapping


def table(kind: str, paths: Sequence[Path], options: JsonMapping) -> datasets.Dataset:
    """Return the rows of files of one kind, one file after the other.

    Args:
        kind: name of the reader in `datasets`: "json", "csv", "parquet", "arrow" or "text".
        paths: the files.
        options: of that reader; those of "csv" are pandas' own, and `features`; of "text" the only
            one is `sample_by="paragraph"`.

    Raises:
        Exception: whatever the libraries raise on a file that they cannot read.
    """
    read = _READERS[kind]
    return datasets.concatenate_datasets([read(path, options) for path in paths])


def _csv(path: Path, options: JsonMapping) -> datasets.Dataset:
    reader_options = dict(options)
    features = reader_options.pop("features", None)
    frame = pd.read_csv(path, dtype=str, **reader_options)
    return datasets.Dataset.from_pandas(frame, features=features, preserve_index=False)


def _json(path: Path, options: JsonMapping) -> datasets.Dataset:
    with csv_form.opened(path) as file:
        content = file.read()
    if content.lstrip()[:1] == b"[":
        return datasets.Dataset.from_list(json.loads(content))
    # One block: a record must not be cut, and a column's type is found from all rows.
    one_block = pyarrow.json.ReadOptions(block_size=len(content) + 1)
    return datasets.Dataset(
        pyarrow.json.read_json(pa.BufferReader(content), read_options=one_block)
    )


def _parquet(path: Path, options: JsonMapping) -> datasets.Dataset:
    return datasets.Dataset(pyarrow.parquet.ParquetFile(path).read())


def _arrow(path: Path, options: JsonMapping) -> datasets.Dataset:
    content = path.read_bytes()
    try:
        return datasets.Dataset(pyarrow.ipc.open_stream(content).read_all())
    except pa.ArrowInvalid:
        return datasets.Dataset(pyarrow.ipc.open_file(content).read_all())


def _text(path: Path, options: JsonMapping) -> datasets.Dataset:
    with csv_form.opened(path) as file:
        content = file.read().decode("utf-8")
    paragraphs = [paragraph for paragraph in content.split("\n\n") if paragraph]
    return datasets.Dataset.from_dict({"text": paragraphs})


_READERS: dict[str, Callable[[Path, JsonMapping], datasets.Dataset]] = {
    "csv": _csv,
    "json": _json,
    "parquet": _parquet,
    "arrow": _arrow,
    "text": _text,
}

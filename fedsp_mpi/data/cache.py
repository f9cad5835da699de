"""The cache of `datasets` under HF_HOME, and local files by their content: the same path may hold
other rows today.

`datasets` tells files apart by path and time of change, and takes rsync -t, an unpacked archive or
a restored backup for the old file; here the digest of the content counts.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import os
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import datasets
from datasets.data_files import DataFilesList

_SET = "set HF_HOME or HF_DATASETS_CACHE to a folder"


def require() -> None:
    """Raise ValueError if the cache cannot be written, or its file system has no file locks.

    Without locks `datasets` waits for ever at a lock file that an earlier process left behind.
    """
    root = Path(datasets.config.HF_DATASETS_CACHE).expanduser()
    try:
        root.mkdir(parents=True, exist_ok=True)
        file = tempfile.NamedTemporaryFile(dir=root, prefix=".lock-")  # noqa: SIM115
    except OSError as error:
        raise ValueError(
            f"cannot write {root} ({os.strerror(error.errno or errno.EIO)}), where prepared "
            "data go, expected a folder "
            f"for it; {_SET} that can be written"
        ) from None
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise ValueError(
                f"cannot lock {file.name} ({os.strerror(error.errno or errno.EIO)}), expected "
                "file locks where "
                f"prepared data go; {_SET} whose file system has flock, such as one of this node"
            ) from None


def digest(paths: Sequence[str | Path]) -> str:
    """Return the SHA-256 digest of the contents of files, in this order, in hexadecimal.

    Raises OSError.
    """
    whole = hashlib.sha256()
    for path in paths:
        with Path(path).open("rb") as file:
            whole.update(hashlib.file_digest(file, "sha256").digest())
    return whole.hexdigest()


def builder(
    kind: str, split: str, paths: Sequence[Path], options: Mapping[str, Any]
) -> datasets.DatasetBuilder:
    """Return what reads local files of one kind ("json", "csv", ...) into one split; the paths are
    no patterns.
    """
    marks = [(digest([path]),) for path in paths]
    files = DataFilesList([path.as_posix() for path in paths], marks)
    return datasets.load_dataset_builder(kind, data_files={split: files}, **options)


def declared_builder(folder: Path, config: str) -> datasets.DatasetBuilder:
    """Return what reads a folder whose README says which files make up which split, from a cache by
    their content.
    """
    first = datasets.load_dataset_builder(str(folder), config)
    names = [
        name
        for split in sorted(first.config.data_files or {})
        for name in first.config.data_files[split]
    ]
    root = Path(datasets.config.HF_DATASETS_CACHE).expanduser() / "by_content" / digest(names)[:32]
    return datasets.load_dataset_builder(str(folder), config, cache_dir=str(root))

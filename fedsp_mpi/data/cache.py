"""The cache of `datasets` under HF_HOME, with local files told apart by their content.

`datasets` tells files apart by path and time of change. It would take a file that rsync -t, an
unpacked archive or a restored backup put there for the old one; here the digest of the content
counts.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import os
import stat
import tempfile
from collections.abc import Sequence
from pathlib import Path

import datasets
from datasets.data_files import DataFilesList

from fedsp_mpi.files.untrusted import JsonMapping

# `datasets` would tell its makers of every reader of local files that is built: a request that a
# node without a network waits for, once for each table.
datasets.config.HF_UPDATE_DOWNLOAD_COUNTS = False

_ADVICE = "set HF_HOME or HF_DATASETS_CACHE to a folder"


def private_folder(root: str | None, name: str) -> Path:
    """Return the folder where prepared data of one silo go; nothing is made yet.

    Args:
        root: where the folders of all silos lie; None: below TMPDIR, in a folder of the user's.
        name: of the silo.
    """
    if root is None:
        parent = Path(tempfile.gettempdir()) / f"fedsp_mpi-silos-{os.getuid()}"
    else:
        parent = Path(root).expanduser()
    return parent / name


def folder_name(folder: Path | None) -> str | None:
    """Return the `cache_dir` that `datasets` expects; None is its own."""
    return None if folder is None else str(folder)


def require(folder: Path | None = None) -> None:
    """Raise ValueError if the cache cannot be written, or its file system has no file locks.

    Without locks `datasets` waits forever at a lock file that an earlier process left behind.

    Args:
        folder: a private one, which nobody else may read; None: the one that all sources share.
    """
    root = folder or Path(datasets.config.HF_DATASETS_CACHE).expanduser()
    try:
        if folder is not None:
            _make_private(folder)
        root.mkdir(parents=True, exist_ok=True)
        file = tempfile.NamedTemporaryFile(dir=root, prefix=".lock-")  # noqa: SIM115
    except OSError as error:
        raise ValueError(
            f"cannot write {root} ({os.strerror(error.errno or errno.EIO)}), where prepared data "
            f"go, expected a folder for them; {_ADVICE} that can be written"
        ) from None
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise ValueError(
                f"cannot lock {file.name} ({os.strerror(error.errno or errno.EIO)}), expected file "
                f"locks where prepared data go; {_ADVICE} whose file system has flock, such as one "
                "of this node"
            ) from None


def _make_private(folder: Path) -> None:
    """Make a folder, and the one around it, that only this user may read.

    Raises:
        OSError: it cannot be made.
        ValueError: it is another user's, or a link.
    """
    for path in (folder.parent, folder):
        path.mkdir(mode=0o700, parents=True, exist_ok=True)
    status = folder.lstat()
    if status.st_uid != os.getuid() or not stat.S_ISDIR(status.st_mode):
        raise ValueError(
            f"found {folder}, which is a link or another user's, expected a folder of this user's; "
            "set federation.silo_cache to another place"
        )
    folder.chmod(0o700)


def digest(paths: Sequence[str | Path]) -> str:
    """Return the SHA-256 digest of the contents of files, in this order, in hexadecimal.

    Raises:
        OSError: a file cannot be read.
    """
    combined = hashlib.sha256()
    for path in paths:
        with Path(path).open("rb") as file:
            combined.update(hashlib.file_digest(file, "sha256").digest())
    return combined.hexdigest()


def builder(
    kind: str,
    split: str,
    paths: Sequence[Path],
    *,
    options: JsonMapping,
    folder: Path | None = None,
) -> datasets.DatasetBuilder:
    """Build the reader of local files of one kind into one split.

    Args:
        kind: name of the reader in `datasets`: "json", "csv", ...
        split: the split that all files make up.
        paths: the files, not patterns.
        options: of the reader.
        folder: where prepared data go; None: where those of all sources do.
    """
    # In the place of the time of change, by which `datasets` would tell the files apart.
    digests = [(digest([path]),) for path in paths]
    files = DataFilesList([path.as_posix() for path in paths], digests)
    return datasets.load_dataset_builder(
        kind, data_files={split: files}, cache_dir=folder_name(folder), **options
    )


def declared_builder(
    folder: Path, config: str, root: Path | None = None
) -> datasets.DatasetBuilder:
    """Build the reader of a folder whose README says which files make up which split.

    Prepared data go to a part of the cache that belongs to the files' content.

    Args:
        folder: with the README.
        config: name of the configuration in the README.
        root: of the cache; None: that of `datasets`.
    """
    root = root or Path(datasets.config.HF_DATASETS_CACHE).expanduser()
    # Of this first builder only the files are used: its cache would tell them apart by time.
    first = datasets.load_dataset_builder(str(folder), config)
    data_files = first.config.data_files or {}
    names = [name for split in sorted(data_files) for name in data_files[split]]
    by_content = root / "by_content" / digest(names)[:32]
    return datasets.load_dataset_builder(str(folder), config, cache_dir=str(by_content))

"""The forms of a source: what `save_to_disk` wrote, a set with a README as on the hub, a folder of
the user's files.

The splits train, validation and test go by many names (data/splits.py); local files are known by
their content (data/cache.py). Whatever goes wrong inside `datasets` becomes one line, which quotes
no cell.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, TypeAlias, TypeVar

import datasets
import huggingface_hub
import pandas as pd
from huggingface_hub.errors import RepositoryNotFoundError

from fedsp_mpi.data import cache, splits
from fedsp_mpi.data.cells import SHORTEST_TEXT
from fedsp_mpi.data.splits import SPLITS

Table: TypeAlias = datasets.Dataset
T = TypeVar("T")

FETCH = "run `python -m fedsp_mpi fetch CONFIG` on a machine with network first"
_HUB_SECONDS = 5.0  # for one answer of the hub; a cluster's nodes often reach none


@dataclass(frozen=True)
class Location:
    """A folder, or else the data set `name` on the hub.

    `config` is the configuration that was asked for (None: the only one); `usual` is the one that
    the task has on the hub, taken from a folder that has it among several. `columns` says by the
    task's columns how the source calls them.
    """

    folder: Path | None
    name: str
    config: str | None
    usual: str | None = None
    columns: Mapping[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        return str(self.folder) if self.folder else f"{self.name} on the hub"


class Saved:
    """What `save_to_disk` wrote; a lone table is the train split."""

    def __init__(self, task: str, location: Location) -> None:
        stored = _ask(task, location, lambda: datasets.load_from_disk(str(location.folder)))
        whole = dict(stored) if isinstance(stored, datasets.DatasetDict) else {"train": stored}
        self._tables = {
            split: whole[name] for split, name in _renamed(task, location, whole).items()
        }

    def columns(self) -> dict[str, list[str]]:
        """Return split -> column names."""
        return {split: table.column_names for split, table in self._tables.items()}

    def tables(self) -> tuple[dict[str, Table], list[str]]:
        """Return split -> rows, and notes."""
        return self._tables, []


class Declared:
    """A hub set, or a copy of one: its README, or its names of files on the hub, say which files
    are which split.
    """

    def __init__(self, task: str, location: Location, builder: datasets.DatasetBuilder) -> None:
        self._task, self._location, self._builder = task, location, builder
        names = builder.config.data_files or builder.info.splits or {}
        self._names = _renamed(task, location, names)

    def columns(self) -> dict[str, list[str]]:
        """Return split -> column names: as declared, else those of each split's first row."""
        builder = self._builder
        return {
            split: _ask(self._task, self._location, lambda: _first_row_columns(builder, name))  # noqa: B023
            for split, name in self._names.items()
        }

    def tables(self) -> tuple[dict[str, Table], list[str]]:
        """Return split -> rows, and notes."""
        whole = _ask(self._task, self._location, lambda: _prepare(self._builder))
        return {
            split: whole[name]
            for split, name in _renamed(self._task, self._location, whole).items()
        }, []


class Folder:
    """Files of the user's own, whose names say which split they are.

    Each split may have further columns.
    """

    def __init__(self, task: str, location: Location) -> None:
        assert location.folder is not None
        self._task, self._location, self._folder = task, location, location.folder
        self._files = _for_user(task, lambda: splits.assigned(self._folder))

    def columns(self) -> dict[str, list[str]]:
        """Return split -> column names, of each split's first row."""
        columns = {}
        for split, paths in self._files.by_split.items():
            columns[split] = self._asked(paths, partial(self._columns_of, split, paths))
        return columns

    def _columns_of(self, split: str, paths: Sequence[Path]) -> list[str]:
        return _first_row_columns(self._builder(split, paths), split)

    def tables(self) -> tuple[dict[str, Table], list[str]]:
        """Return split -> rows, and notes on splits of several files, and on files that are not
        read.
        """
        tables, notes = {}, []
        for split, paths in self._files.by_split.items():
            several = len(paths) > 1 and not splits.are_shards(paths)
            parts = [
                self._table(split, part)
                for part in ([[path] for path in paths] if several else [paths])
            ]
            tables[split] = self._asked(paths, lambda: datasets.concatenate_datasets(parts))  # noqa: B023
            tables[split].info.builder_name = self._files.kind  # which is lost in between
            if several:
                sizes = [
                    f"{path.relative_to(self._folder)} ({len(part)} rows)"
                    for path, part in zip(paths, parts)
                ]
                notes.append(
                    f"{split} = {len(paths)} files: {_listed(sizes)}; move away what does not "
                    "belong to it"
                )
        if self._files.not_read:
            notes.append(
                f"not read, because their names say no split: {_listed(self._files.not_read)}"
            )
        return tables, notes

    def _table(self, split: str, paths: Sequence[Path]) -> Table:
        return self._asked(paths, lambda: _prepare(self._builder(split, paths))[split])

    def _builder(self, split: str, paths: Sequence[Path]) -> datasets.DatasetBuilder:
        return cache.builder(self._files.kind, split, paths, self._options(paths))

    def _asked(self, paths: Sequence[Path], question: Callable[[], T]) -> T:
        """What `datasets` answers about some of the files."""
        names = _listed([str(path.relative_to(self._folder)) for path in paths])
        wanted = (
            f"{self._files.ending} files in UTF-8 with the same columns in every row; "
            "correct the file"
        )
        return _ask(self._task, self._location, question, f"{names} in {self._folder}", wanted)

    def _options(self, paths: Sequence[Path]) -> dict[str, Any]:
        """How a table of texts is read: every cell is text as it stands, NA and None too."""
        if self._files.kind != "csv":
            return {}
        separator = "\t" if self._files.ending == ".tsv" else ","
        names = pd.read_csv(paths[0], sep=separator, nrows=0).columns
        features = datasets.Features({name: datasets.Value("string") for name in names})
        return {"sep": separator, "features": features, "keep_default_na": False}


Source = Saved | Declared | Folder


def opened(task: str, location: Location) -> Source:
    """Return the form that a source has.

    Raises ValueError if it cannot be reached, or the cache cannot be used.
    """
    folder = location.folder
    if folder and any((folder / mark).exists() for mark in ("dataset_dict.json", "state.json")):
        return Saved(task, location)
    _for_user(task, cache.require)
    if folder is None:
        _require_hub(task, location.name)
        hub = _ask(
            task, location, lambda: datasets.load_dataset_builder(location.name, location.config)
        )
        return Declared(task, location, hub)
    if not _is_declared(task, location):
        return Folder(task, location)
    _for_user(task, lambda: splits.require_files(folder))
    if any(character in str(folder) for character in "*?["):
        raise ValueError(
            f"{task}: found one of * ? [ in the path {folder}, whose README lists its files "
            "by patterns, expected a "
            "path without them; rename the folder"
        )
    config = _pick_config(task, location)
    return Declared(
        task, location, _ask(task, location, lambda: cache.declared_builder(folder, config))
    )


def _is_declared(task: str, location: Location) -> bool:
    """Whether the README of a folder says something of its files, as those of the hub do."""
    assert location.folder is not None
    if any(
        (location.folder / name).is_file() for name in ("dataset_infos.json", ".huggingface.yaml")
    ):
        return True
    readme = location.folder / "README.md"
    if not readme.is_file():
        return False
    card = _ask(
        task,
        location,
        lambda: huggingface_hub.DatasetCard.load(readme, ignore_metadata_errors=True).data,
    )
    return bool(card.get("configs") or card.get("dataset_info"))


def _renamed(task: str, location: Location, names: Iterable[str]) -> dict[str, str]:
    """Train, validation and test by the source's names for them."""
    names = list(map(str, names))
    if (
        location.folder is None
    ):  # nobody can rename what lies on the hub: its plain names come first
        plain = [name for name in names if name in SPLITS]
        others = [
            name for name in names if name not in SPLITS and name.casefold() not in _words_of(plain)
        ]
        names = [*plain, *others]
    try:
        return splits.renamed(names)
    except ValueError as error:
        raise ValueError(f"{task}: in {location}, {error}") from None


def _words_of(plain: Iterable[str]) -> set[str]:
    return {word for split in plain for word in splits.NAMES[split]}


def _prepare(builder: datasets.DatasetBuilder) -> datasets.DatasetDict:
    builder.download_and_prepare()
    return builder.as_dataset()


def _pick_config(task: str, location: Location) -> str:
    """The configuration that was asked for, else the task's usual one, else the only one, else the
    default.
    """
    names: list[str] = _ask(
        task, location, lambda: datasets.get_dataset_config_names(str(location.folder))
    )
    only = names[0] if len(names) == 1 else "default"
    for wanted in (location.config,) if location.config else (location.usual, only):
        if wanted in names:
            return wanted
    raise ValueError(
        f"{task}: found the configurations {', '.join(names)} in {location}, expected "
        f"{location.config or 'only one'}; "
        f"write {location}:{names[0]} to take the first"
    )


def _require_hub(task: str, name: str) -> None:
    """One short question to the hub, because `datasets` goes on asking for half a minute. Not for
    what is cached.

    Where the hub is cut off and the data are cached, HF_HUB_OFFLINE=1 spares that wait.
    """
    if datasets.config.HF_HUB_OFFLINE or _is_cached(name):
        return
    found = f"{task}: found no folder {Path(name).absolute()}"
    advice = f"give a local folder as the source, or {FETCH}"
    try:
        huggingface_hub.HfApi().dataset_info(name, timeout=_HUB_SECONDS)
    except RepositoryNotFoundError as error:
        raise ValueError(
            f"{found} and no data set {name} on the hub, expected one of them; correct the name"
        ) from error
    except Exception as error:
        raise ValueError(
            f"{found}, and this node cannot reach the hub for {name} ({_reason(error)}), "
            f"expected one of them; {advice}"
        ) from error


def _is_cached(name: str) -> bool:
    def plain(text: str) -> str:
        return re.sub(r"[_/]", "", text).lower()

    cache = Path(datasets.config.HF_DATASETS_CACHE)
    return cache.is_dir() and any(plain(path.name) == plain(name) for path in cache.iterdir())


def _first_row_columns(builder: datasets.DatasetBuilder, split: str) -> list[str]:
    """The column names of a split's first row."""
    if builder.info.features is not None:
        return list(builder.info.features)
    return list(next(iter(builder.as_streaming_dataset(split=split)), {}))


def _for_user(task: str, question: Callable[[], T]) -> T:
    """The answer, or the line for the user with the task's name before it."""
    try:
        return question()
    except ValueError as error:
        raise ValueError(f"{task}: {error}") from None


def _listed(names: Sequence[str]) -> str:
    """The first names of a list that may be long."""
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")


def _ask(
    task: str,
    location: Location,
    question: Callable[[], T],
    where: object = None,
    wanted: str | None = None,
) -> T:
    """What `datasets` answers; whatever goes wrong inside it becomes one line for the user."""
    try:
        return question()
    except Exception as error:
        expected = (
            wanted or "files of one format with the same columns in every split; correct the files"
        )
        if not location.folder:
            expected = (
                "the data set; where the hub cannot be reached, give a local folder as the "
                f"source, or {FETCH}"
            )
        reason = (
            _unquoted(_reason(error), str(location.folder)) if location.folder else _reason(error)
        )
        raise ValueError(
            f"{task}: found {reason} while reading {where or location}, expected {expected}"
        ) from error


def _unquoted(reason: str, folder: str) -> str:
    """A library's message without what it quotes of the files; paths in the folder and short names
    stay.
    """

    def plain(match: re.Match[str]) -> str:
        inner = match.group(2)
        return match.group(0) if folder in inner or len(inner) <= SHORTEST_TEXT else "(not shown)"

    return re.sub(r"(?<!\w)(['\"])(.*?)(?:\1(?!\w)|$)", plain, reason)


def _reason(error: BaseException) -> str:
    """The innermost message, in one line of about 200 characters."""
    while error.__cause__ is not None:
        error = error.__cause__
    text = " ".join(str(error).split())
    text = text if len(text) <= 200 else f"{text[:197]}..."
    return f"{type(error).__name__}: {text}" if text else type(error).__name__

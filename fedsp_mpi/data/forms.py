"""The forms of a source: saved by `save_to_disk`, declared as on the hub, or a folder of files.

The splits train, validation and test go by many names (data/splits.py); local files are told apart
by their content (data/cache.py). Whatever goes wrong inside `datasets` becomes a message of one
line, which quotes no cell.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeAlias, TypeVar

import datasets
import huggingface_hub
import pandas as pd
from huggingface_hub.errors import RepositoryNotFoundError

from fedsp_mpi.data import cache, csv_form, in_memory, splits
from fedsp_mpi.data.cells import MAX_LABEL_LENGTH
from fedsp_mpi.data.splits import SPLITS

Table: TypeAlias = datasets.Dataset
T = TypeVar("T")

FETCH = "run `python -m fedsp_mpi fetch CONFIG` on a machine with network first"
_HUB_TIMEOUT = 5.0  # seconds for one answer of the hub; a cluster's nodes often do not reach it
_NUM_NAMES_SHOWN = 5  # files that a message lists
_MAX_BYTES_IN_MEMORY = 64 << 20  # of a split's files, packed as they lie
_MAX_REASON_LENGTH = 200  # characters of a library's message


@dataclass(frozen=True)
class Location:
    """A folder, or else a data set on the hub.

    Attributes:
        folder: the folder; None for a data set on the hub.
        name: the name on the hub, or of the folder.
        config: the configuration that the user chose; None takes the only one.
        usual_config: the configuration that the task has on the hub, preferred in a folder that has
            it among several.
        columns: the source's name of a column by the task's, where they differ.
        cache: the folder where what `datasets` prepares of this source goes; None: where all
            sources go.
        file: the only file of the folder that is read, all of which is train; None: all files.
    """

    folder: Path | None
    name: str
    config: str | None
    usual_config: str | None = None
    columns: Mapping[str, str] = field(default_factory=dict)
    cache: Path | None = None
    file: Path | None = None

    def __str__(self) -> str:
        if self.file:
            return str(self.file)
        return str(self.folder) if self.folder else f"{self.name} on the hub"


class Saved:
    """What `save_to_disk` wrote; a lone table is the train split."""

    def __init__(self, task: str, location: Location) -> None:
        stored = _ask(task, location, lambda: datasets.load_from_disk(str(location.folder)))
        tables = dict(stored) if isinstance(stored, datasets.DatasetDict) else {"train": stored}
        self._tables = {
            split: tables[name] for split, name in _split_names(task, location, tables).items()
        }

    def columns(self) -> dict[str, list[str]]:
        """Return split -> column names."""
        return {split: table.column_names for split, table in self._tables.items()}

    def tables(self) -> tuple[dict[str, Table], list[str]]:
        """Return split -> rows, and notes."""
        return self._tables, []


class Declared:
    """A hub set, or a copy of one, which says itself which files are which split.

    It does so by its README, or by the names of its files on the hub.
    """

    def __init__(self, task: str, location: Location, builder: datasets.DatasetBuilder) -> None:
        self._task = task
        self._location = location
        self._builder = builder
        names = builder.config.data_files or builder.info.splits or {}
        self._names = _split_names(task, location, names)

    def columns(self) -> dict[str, list[str]]:
        """Return split -> column names: as declared, else those of each split's first row."""
        columns = {}
        for split, name in self._names.items():
            columns[split] = self._first_row_columns(name)
        return columns

    def tables(self) -> tuple[dict[str, Table], list[str]]:
        """Return split -> rows, and notes."""
        prepared = _ask(self._task, self._location, lambda: _prepare(self._builder))
        names = _split_names(self._task, self._location, prepared)
        return {split: prepared[name] for split, name in names.items()}, []

    def _first_row_columns(self, name: str) -> list[str]:
        return _ask(self._task, self._location, lambda: _first_row_columns(self._builder, name))


class Folder:
    """Files of the user's own, whose names say which split they are.

    Each split may have further columns.
    """

    def __init__(self, task: str, location: Location) -> None:
        assert location.folder is not None
        self._task = task
        self._location = location
        self._folder = location.folder
        self._in_memory: dict[tuple[Path, ...], Table] = {}
        self._files = _name_task(
            task,
            lambda: (
                splits.only_file(location.file)
                if location.file
                else splits.assign_files(self._folder)
            ),
        )

    def columns(self) -> dict[str, list[str]]:
        """Return split -> column names, of each split's first row."""
        columns = {}
        for split, paths in self._files.by_split.items():
            columns[split] = self._first_row_columns(split, paths)
        return columns

    def tables(self) -> tuple[dict[str, Table], list[str]]:
        """Return split -> rows, and notes on splits of several files and on unread files."""
        tables = {}
        notes = []
        for split, paths in self._files.by_split.items():
            if len(paths) == 1 or splits.are_shards(paths):
                tables[split] = self._concatenated(paths, [self._table(split, paths)])
                continue
            parts = [self._table(split, [path]) for path in paths]
            tables[split] = self._concatenated(paths, parts)
            sizes = [
                f"{path.relative_to(self._folder)} ({len(part)} rows)"
                for path, part in zip(paths, parts)
            ]
            notes.append(
                f"{split} = {len(paths)} files: {_listed(sizes)}; move away what does not belong "
                "to it"
            )
        if self._files.not_read:
            notes.append(
                f"not read, because their names say no split: {_listed(self._files.not_read)}"
            )
        return tables, notes

    def _first_row_columns(self, split: str, paths: Sequence[Path]) -> list[str]:
        if self._is_read_into_memory(paths):
            return self._table(split, paths).column_names
        return self._ask(paths, lambda: _first_row_columns(self._builder(split, paths), split))

    def _is_read_into_memory(self, paths: Sequence[Path]) -> bool:
        size = sum(path.stat().st_size for path in paths)
        return self._location.cache is not None and size <= _MAX_BYTES_IN_MEMORY

    def _table(self, split: str, paths: Sequence[Path]) -> Table:
        if not self._is_read_into_memory(paths):
            return self._ask(paths, lambda: _prepare(self._builder(split, paths))[split])
        key = tuple(paths)
        if key not in self._in_memory:
            options = self._ask(paths, lambda: self._reader_options(paths))
            self._in_memory[key] = self._ask(
                paths, lambda: in_memory.table(self._files.kind, paths, options)
            )
        return self._in_memory[key]

    def _concatenated(self, paths: Sequence[Path], parts: Sequence[Table]) -> Table:
        table = self._ask(paths, lambda: datasets.concatenate_datasets(list(parts)))
        table.info.builder_name = self._files.kind  # which concatenating forgets
        return table

    def _builder(self, split: str, paths: Sequence[Path]) -> datasets.DatasetBuilder:
        if self._location.cache is not None:
            cache.require(self._location.cache)
        return cache.builder(
            self._files.kind,
            split,
            paths,
            options=self._reader_options(paths),
            folder=self._location.cache,
        )

    def _ask(self, paths: Sequence[Path], question: Callable[[], T]) -> T:
        """Ask `datasets` about some of the files."""
        names = _listed([str(path.relative_to(self._folder)) for path in paths])
        expected = (
            f"{self._files.ending} files in UTF-8 with the same columns in every row; correct the "
            "file"
        )
        return _ask(
            self._task,
            self._location,
            question,
            place=f"{names} in {self._folder}",
            expected=expected,
        )

    def _reader_options(self, paths: Sequence[Path]) -> dict[str, object]:
        """Return the options by which every cell of a CSV table is text, NA and None too, and a
        row of plain text is what lies between empty lines.
        """
        if self._files.kind == "text":
            return {"sample_by": "paragraph"}
        if self._files.kind != "csv":
            return {}
        form = csv_form.recognise(paths[0], is_tsv=self._files.ending == ".tsv")
        names = pd.read_csv(paths[0], **form, nrows=0).columns
        features = datasets.Features({name: datasets.Value("string") for name in names})
        return {**form, "features": features, "keep_default_na": False}


Source = Saved | Declared | Folder


def open_source(task: str, location: Location) -> Source:
    """Return a source in its form.

    Raises:
        ValueError: the source cannot be reached, or the cache cannot be used.
    """
    folder = location.folder
    if location.file:
        _name_task(task, lambda: _require_shared_cache(location))
        return Folder(task, location)
    if folder and any((folder / name).exists() for name in ("dataset_dict.json", "state.json")):
        return Saved(task, location)
    if folder is None or _is_declared(task, location, folder):
        _name_task(task, lambda: cache.require(location.cache))
    else:
        _name_task(task, lambda: _require_shared_cache(location))
    if folder is None:
        _require_hub(task, location.name, location.cache)
        hub_builder = _ask(
            task,
            location,
            lambda: datasets.load_dataset_builder(
                location.name, location.config, cache_dir=cache.folder_name(location.cache)
            ),
        )
        return Declared(task, location, hub_builder)
    if not _is_declared(task, location, folder):
        return Folder(task, location)
    _name_task(task, lambda: splits.require_files(folder))
    if any(character in str(folder) for character in "*?["):
        raise ValueError(
            f"{task}: found one of * ? [ in the path {folder}, whose README lists its files by "
            "patterns, expected a path without them; rename the folder"
        )
    config = _pick_config(task, location)
    builder = _ask(task, location, lambda: cache.declared_builder(folder, config, location.cache))
    return Declared(task, location, builder)


def _require_shared_cache(location: Location) -> None:
    """Raise ValueError if files of the user's own would be prepared where that cannot be done.

    A private cache is made when it is needed: small files need none.
    """
    if location.cache is None:
        cache.require()


def _is_declared(task: str, location: Location, folder: Path) -> bool:
    """Return whether the README of a folder describes its files, as those of the hub do."""
    if any((folder / name).is_file() for name in ("dataset_infos.json", ".huggingface.yaml")):
        return True
    readme = folder / "README.md"
    if not readme.is_file():
        return False
    card = _ask(
        task,
        location,
        lambda: huggingface_hub.DatasetCard.load(readme, ignore_metadata_errors=True).data,
    )
    return bool(card.get("configs") or card.get("dataset_info"))


def _split_names(task: str, location: Location, names: Iterable[str]) -> dict[str, str]:
    """Return train, validation and test by the source's names for them."""
    names = [str(name) for name in names]
    if location.folder is None:
        # Nobody can rename the splits of a hub set. If it has "validation" and "dev", the plain
        # name counts.
        plain = [name for name in names if name in SPLITS]
        plain_words = {word for split in plain for word in splits.NAMES[split]}
        synonyms = [
            name for name in names if name not in SPLITS and name.casefold() not in plain_words
        ]
        names = [*plain, *synonyms]
    try:
        return splits.split_names(names)
    except ValueError as error:
        raise ValueError(f"{task}: in {location}, {error}") from None


def _prepare(builder: datasets.DatasetBuilder) -> datasets.DatasetDict:
    builder.download_and_prepare()
    return builder.as_dataset()


def _pick_config(task: str, location: Location) -> str:
    """Return the configuration of a folder that is read.

    The user's choice; else the task's usual one, else the only one, else the default.
    """
    names: list[str] = _ask(
        task, location, lambda: datasets.get_dataset_config_names(str(location.folder))
    )
    fallback = names[0] if len(names) == 1 else "default"
    preferred = [location.config] if location.config else [location.usual_config, fallback]
    for name in preferred:
        if name in names:
            return name
    raise ValueError(
        f"{task}: found the configurations {', '.join(names)} in {location}, expected "
        f"{location.config or 'only one'}; write {location}:{names[0]} to take the first"
    )


def _require_hub(task: str, name: str, folder: Path | None) -> None:
    """Raise ValueError if the hub does not have a data set, or cannot be reached.

    It is asked once, because `datasets` would go on asking for half a minute, and not about data
    that are cached. Where the hub is cut off and the data are cached, HF_HUB_OFFLINE=1 saves the
    half minute.

    Args:
        task: its name, for messages.
        name: of the data set.
        folder: where it may be cached; None: where all sources share.
    """
    if datasets.config.HF_HUB_OFFLINE or _is_cached(name, folder):
        return
    no_folder = f"{task}: found no folder {Path(name).absolute()}"
    try:
        huggingface_hub.HfApi().dataset_info(name, timeout=_HUB_TIMEOUT)
    except RepositoryNotFoundError as error:
        raise ValueError(
            f"{no_folder} and no data set {name} on the hub, expected one of them; correct the name"
        ) from error
    except Exception as error:
        raise ValueError(
            f"{no_folder}, and this node cannot reach the hub for {name} ({_reason(error)}), "
            f"expected one of them; give a local folder as the source, or {FETCH}"
        ) from error


def _is_cached(name: str, folder: Path | None) -> bool:
    def plain(text: str) -> str:
        return re.sub(r"[_/]", "", text).lower()

    root = folder or Path(datasets.config.HF_DATASETS_CACHE)
    return root.is_dir() and any(plain(path.name) == plain(name) for path in root.iterdir())


def _first_row_columns(builder: datasets.DatasetBuilder, split: str) -> list[str]:
    """Return the declared column names, else those of a split's first row."""
    if builder.info.features is not None:
        return list(builder.info.features)
    return list(next(iter(builder.as_streaming_dataset(split=split)), {}))


def _name_task(task: str, question: Callable[[], T]) -> T:
    """Return the answer; put the task's name before the message of a ValueError."""
    try:
        return question()
    except ValueError as error:
        raise ValueError(f"{task}: {error}") from None


def _listed(names: Sequence[str]) -> str:
    """List the first names of a list that may be long."""
    shown = ", ".join(names[:_NUM_NAMES_SHOWN])
    if len(names) > _NUM_NAMES_SHOWN:
        shown += f" and {len(names) - _NUM_NAMES_SHOWN} more"
    return shown


def _ask(
    task: str,
    location: Location,
    question: Callable[[], T],
    *,
    place: str | None = None,
    expected: str = "files of one format with the same columns in every split; correct the files",
) -> T:
    """Return what `datasets` answers; turn any error inside it into one line for the user.

    Args:
        task: the task's name.
        location: of the source.
        question: calls `datasets`.
        place: what is read, for the message; None for the whole source.
        expected: of a folder, for the message.

    Raises:
        ValueError: `datasets` raised an error.
    """
    try:
        return question()
    except Exception as error:
        reason = _reason(error)
        if location.folder:
            reason = _unquoted(reason, str(location.folder))
        else:
            expected = (
                "the data set; where the hub cannot be reached, give a local folder as the "
                f"source, or {FETCH}"
            )
        raise ValueError(
            f"{task}: found {reason} while reading {place or location}, expected {expected}"
        ) from error


def _unquoted(reason: str, folder: str) -> str:
    """Remove from a library's message what it quotes of the files.

    Paths in the folder and short names stay.
    """

    def without_cell(match: re.Match[str]) -> str:
        quoted = match.group(2)
        if folder in quoted or len(quoted) <= MAX_LABEL_LENGTH:
            return match.group(0)
        return "(not shown)"

    return re.sub(r"(?<!\w)(['\"])(.*?)(?:\1(?!\w)|$)", without_cell, reason)


def _reason(error: BaseException) -> str:
    """Return the innermost message in one line of about 200 characters."""
    while error.__cause__ is not None:
        error = error.__cause__
    text = " ".join(str(error).split())
    if "corresponds to no data" in text:
        return "no row"  # which `datasets` says of a table that has only a head
    if len(text) > _MAX_REASON_LENGTH:
        text = f"{text[: _MAX_REASON_LENGTH - 3]}..."
    return f"{type(error).__name__}: {text}" if text else type(error).__name__

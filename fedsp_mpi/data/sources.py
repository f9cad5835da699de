"""Where a task's rows come from: a local folder or the hub, read by `datasets`, and how they make three splits.

Nothing is written into a source folder; what `datasets` prepares lies under HF_HOME, behind its file locks, so that
several processes may ask for the same data at once.
"""

from __future__ import annotations

import gzip
import logging
import re
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import datasets
import huggingface_hub
import numpy as np
from huggingface_hub.errors import RepositoryNotFoundError

from fedsp_mpi.rng import generator

Tables = Mapping[str, datasets.Dataset]
Rows = tuple[str, Sequence[int]]  # a split of the source, and which of its rows
T = TypeVar("T")

SPLITS = ("train", "validation", "test")
_SUFFIXES = (".jsonl", ".json", ".csv", ".parquet", ".gz")
_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*(/[\w.-]+)?")
FETCH = "run `python -m fedsp_mpi fetch CONFIG` on a machine with network first"
_HUB_SECONDS = 5.0  # for one answer of the hub; a cluster's nodes often reach none


@dataclass(frozen=True)
class Location:
    """A folder, or else the data set `name` on the hub.

    `config` is the configuration that was asked for (None: the only one); `usual` is the one that the task has on the
    hub, taken from a folder that has it among several.
    """

    folder: Path | None
    name: str
    config: str | None
    usual: str | None = None

    def __str__(self) -> str:
        return str(self.folder) if self.folder else f"{self.name} on the hub"


def locate(task: str, hub: tuple[str, str | None] | None, source: str | None) -> Location:
    """Decide what `source` means: None the task's own hub set, an existing folder, else a name on the hub.

    Raises:
        ValueError: neither a folder nor a possible name, or a task without a hub set and no source.
    """
    if source is None:
        if hub is None:
            raise ValueError(
                f"{task}: found no source, expected a folder or a hub set; this task has no data of its own"
            )
        return Location(None, *hub)
    head, _, tail = source.rpartition(":")
    for text, config in ((source, None), (head, tail)):
        if text and Path(text).expanduser().is_dir():
            return Location(Path(text).expanduser().resolve(), Path(text).name, config, hub[1] if hub else None)
    name, _, config = source.partition(":")
    if Path(source).expanduser().exists():
        raise ValueError(f"{task}: found the file {source}, expected a folder with train.jsonl, ...; give its folder")
    if not _HUB_NAME.fullmatch(name):
        raise ValueError(
            f"{task}: found no folder {Path(source).expanduser().absolute()}, expected one with train.jsonl, "
            "validation.jsonl, test.jsonl, or a hub name; correct the path"
        )
    return Location(None, name, config or (hub[1] if hub and hub[0] == name else None))


def read(task: str, location: Location, column_sets: Sequence[Sequence[str]]) -> Tables:
    """The splits train, validation and test that the source has, with one of the `column_sets` each.

    Raises:
        ValueError: the source cannot be read or reached, or a column is missing.
    """
    with _quiet():
        if location.folder and (saved := _saved(task, location)) is not None:
            found = saved
        else:
            builder = _builder(task, location)
            _require_columns(task, location, _first_columns(task, location, builder), column_sets)
            found = _ask(task, location, lambda: _prepare(builder))
    found = {split: found[split] for split in SPLITS if split in found}
    _require_columns(task, location, {split: table.column_names for split, table in found.items()}, column_sets)
    return found


def plain_text(source: str) -> Iterator[str]:
    """The lines of a text file (.txt, .txt.gz), or of all that a folder holds, in the order of their names.

    Raises ValueError if there is none, or it is not UTF-8.
    """
    path = Path(source).expanduser()
    files = [path] if path.is_file() else sorted(found for end in ("txt", "txt.gz") for found in path.glob(f"*.{end}"))
    if not files:
        raise ValueError(f"found no text in {source!r}, expected a .txt or .txt.gz file, or a folder of them")
    for file in files:
        try:
            with (gzip.open if file.suffix == ".gz" else open)(file, "rt", encoding="utf-8") as lines:
                yield from lines
        except (OSError, EOFError, ValueError) as error:
            raise ValueError(f"found {file}, which could not be read ({error}), expected UTF-8 text") from None


def check(task: str, location: Location, column_sets: Sequence[Sequence[str]]) -> None:
    """The part of `read` that reads no more than the first row of each split; the same errors."""
    with _quiet():
        if location.folder and (saved := _saved(task, location)) is not None:
            columns = {split: saved[split].column_names for split in SPLITS if split in saved}
        else:
            columns = _first_columns(task, location, _builder(task, location))
    _require_columns(task, location, columns, column_sets)


def split_rows(
    task: str, tables: Tables, column_sets: Sequence[Sequence[str]], seed: int
) -> tuple[dict[str, Rows], list[str]]:
    """Which rows of which of the source's splits make up train, validation and test, and notes on what was decided.

    Test is `test` where its answers (the last column of the set) are public, else `validation`. Validation is
    `validation` unless test took it; then it is a tenth of `train`, drawn with `seed`, in file order like the rest.

    Raises:
        ValueError: one of the three can be had in no way.
    """
    rows: dict[str, Rows] = {
        split: (split, range(len(tables[split]))) for split in ("train", "validation") if split in tables
    }
    notes = []
    hidden = "test" in tables and not _has_answers(tables["test"], column_sets)
    if "test" in tables and not hidden:
        rows["test"] = ("test", range(len(tables["test"])))
    elif "validation" in tables:
        rows["test"] = rows.pop("validation")
        reason = "the answers of the split 'test' are not public" if hidden else "the source has no split 'test'"
        notes.append(f"test = the split 'validation': {reason}")
    if "validation" not in rows and "train" in rows:
        reason = "'validation' is the test" if "validation" in tables else "the source has no split 'validation'"
        rows["train"], rows["validation"] = _cut(task, len(tables["train"]), seed)
        notes.append(f"validation = {len(rows['validation'][1])} rows cut from 'train' with seed {seed}: {reason}")
    for split in SPLITS:
        if split not in rows:
            raise ValueError(
                f"{task}: found the splits {', '.join(tables) or '(none)'}, expected train and test (or validation) "
                f"with answers, for {split}; add a file {split}.jsonl"
            )
    return rows, notes


def _cut(task: str, num_rows: int, seed: int) -> tuple[Rows, Rows]:
    """Nine tenths of train for training and a tenth for validation, both in file order."""
    if num_rows < 2:
        raise ValueError(f"{task}: found {num_rows} rows in train, expected at least 2; add rows, or a validation")
    order = generator(seed, "validation split").permutation(num_rows)
    num_validation = max(1, num_rows // 10)
    validation, train = np.sort(order[:num_validation]).tolist(), np.sort(order[num_validation:]).tolist()
    return ("train", train), ("train", validation)


def _has_answers(table: datasets.Dataset, column_sets: Sequence[Sequence[str]]) -> bool:
    """False where every answer is blank or -1, as in the test splits of GLUE, HellaSwag and PIQA on the hub."""
    answers = next(c[-1] for c in column_sets if set(c) <= set(table.column_names))
    return len(table) == 0 or any(answer not in (None, "", -1, "-1", []) for answer in table[answers])


def _prepare(builder: datasets.DatasetBuilder) -> datasets.DatasetDict:
    builder.download_and_prepare()
    return builder.as_dataset()


def _saved(task: str, location: Location) -> dict[str, datasets.Dataset] | None:
    """What `save_to_disk` wrote, or None where the folder is something else; a lone table is the train split."""
    assert location.folder is not None
    if not any((location.folder / mark).exists() for mark in ("dataset_dict.json", "state.json")):
        return None
    found = _ask(task, location, lambda: datasets.load_from_disk(str(location.folder)))
    return dict(found) if isinstance(found, datasets.DatasetDict) else {"train": found}


def _builder(task: str, location: Location) -> datasets.DatasetBuilder:
    if location.folder:
        _require_files(task, location.folder)
        config = _pick_config(task, location)
        return _ask(task, location, lambda: datasets.load_dataset_builder(str(location.folder), config))
    _require_hub(task, location.name)
    return _ask(task, location, lambda: datasets.load_dataset_builder(location.name, location.config))


def _pick_config(task: str, location: Location) -> str:
    """The configuration that was asked for, else the task's usual one, else the only one, else the default."""
    names: list[str] = _ask(task, location, lambda: datasets.get_dataset_config_names(str(location.folder)))
    only = names[0] if len(names) == 1 else "default"
    for wanted in (location.config,) if location.config else (location.usual, only):
        if wanted in names:
            return wanted
    raise ValueError(
        f"{task}: found the configurations {', '.join(names)} in {location}, expected {location.config or 'only one'}; "
        f"write {location}:{names[0]} to take the first"
    )


def _require_files(task: str, folder: Path) -> None:
    near = (path for pattern in ("*", "*/*") for path in folder.glob(pattern))  # not all below: it may be a home
    files = [path for path in near if path.suffix in _SUFFIXES and path.is_file()]
    if not files:
        raise ValueError(
            f"{task}: found no data file in {folder}, expected train.jsonl, validation.jsonl, test.jsonl "
            "(or .jsonl.gz, .json, .csv, .parquet); put them there"
        )
    for path in files:
        if path.stat().st_size == 0:
            raise ValueError(f"{task}: found the empty file {path}, expected rows; fill it or remove it")


def _require_hub(task: str, name: str) -> None:
    """One short question to the hub, because `datasets` goes on asking for half a minute. Not for what is cached.

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
            f"{found}, and this node cannot reach the hub for {name} ({_reason(error)}), expected one of them; {advice}"
        ) from error


def _is_cached(name: str) -> bool:
    def plain(text: str) -> str:
        return re.sub(r"[_/]", "", text).lower()

    cache = Path(datasets.config.HF_DATASETS_CACHE)
    return cache.is_dir() and any(plain(path.name) == plain(name) for path in cache.iterdir())


def _first_columns(task: str, location: Location, builder: datasets.DatasetBuilder) -> dict[str, list[str]]:
    """Split -> column names: as the README or the hub declares them, else those of each split's first row."""
    splits = [split for split in SPLITS if split in (builder.config.data_files or builder.info.splits or {})]
    if builder.info.features is not None:
        return {split: list(builder.info.features) for split in splits}
    return {
        split: _ask(task, location, lambda: list(next(iter(builder.as_streaming_dataset(split=split)), {})))  # noqa: B023
        for split in splits
    }


def _require_columns(
    task: str, location: Location, found: Mapping[str, Sequence[str]], column_sets: Sequence[Sequence[str]]
) -> None:
    for split, columns in found.items():
        missing = [[name for name in wanted if name not in columns] for wanted in column_sets]
        if all(missing):
            expected = " or ".join(", ".join(wanted) for wanted in column_sets)
            raise ValueError(
                f"{task}: found no column {', '.join(map(repr, missing[0]))} in {split} of {location}, which has "
                f"{', '.join(columns) or 'no columns'}; expected {expected}; rename the columns or choose another task"
            )


def _ask(task: str, location: Location, question: Callable[[], T]) -> T:
    """What `datasets` answers; whatever goes wrong inside it becomes one line for the user."""
    try:
        return question()
    except Exception as error:
        expected = "files of one format with the same columns in every split; correct the files"
        if not location.folder:
            expected = f"the data set; where the hub cannot be reached, give a local folder as the source, or {FETCH}"
        raise ValueError(f"{task}: found {_reason(error)} while reading {location}, expected {expected}") from error


def _reason(error: BaseException) -> str:
    """The innermost message, in one line of about 200 characters."""
    while error.__cause__ is not None:
        error = error.__cause__
    text = " ".join(str(error).split())
    text = text if len(text) <= 200 else f"{text[:197]}..."
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


@contextmanager
def _quiet() -> Iterator[None]:
    """No progress bars, warnings or log lines of the libraries; their settings are as before afterwards."""
    had_bars = not datasets.are_progress_bars_disabled()
    loggers = [logging.getLogger(name) for name in ("datasets", "huggingface_hub")]
    levels = [logger.level for logger in loggers]
    datasets.disable_progress_bars()
    for logger in loggers:
        logger.setLevel(logging.CRITICAL)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels):
            logger.setLevel(level)
        if had_bars:
            datasets.enable_progress_bars()

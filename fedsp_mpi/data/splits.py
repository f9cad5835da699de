"""Find train, validation and test among the files of a folder or the splits of a data set."""

from __future__ import annotations

import os
import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePath

SPLITS = ("train", "validation", "test")
NAMES = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "val", "dev", "development", "eval", "evaluation"),
    "test": ("test", "testing"),
}
KINDS = {
    ".jsonl": "json",
    ".ndjson": "json",
    ".json": "json",
    ".csv": "csv",
    ".tsv": "csv",
    ".parquet": "parquet",
    ".arrow": "arrow",
    ".txt": "text",
}
# Read where a folder has no tables: beside tables, such a file is a note to the reader.
_PLAIN = ".txt"
_WORKBOOKS = (".xlsx", ".xls", ".xlsm", ".ods")
_COMPRESSED = (".gz", ".bz2", ".xz", ".zst")
# Files that describe a data set and hold no rows.
_METADATA = (
    "config.json",
    "dataset_info.json",
    "dataset_infos.json",
    "dataset_dict.json",
    "state.json",
)
_MAX_DEPTH = 3  # nested folders that are searched: the source may be a home directory
_SHARD = re.compile(r"(.*)-(\d{5})-of-(\d{5})")
_WORD_PATTERNS = {
    split: re.compile(rf"(?<![a-z])({'|'.join(names)})(?![a-z])") for split, names in NAMES.items()
}


@dataclass(frozen=True)
class Files:
    """The files of a folder by split.

    Attributes:
        kind: the format of all files, by the name of its reader in `datasets`.
        ending: of their names, such as ".csv".
        by_split: the files of each split, shards in their order.
        not_read: data files, relative to the folder, whose names do not say a split while others'
            do.
    """

    kind: str
    ending: str
    by_split: dict[str, list[Path]]
    not_read: list[str]


def split_names(names: Iterable[str]) -> dict[str, str]:
    """Return train, validation and test by the name that a data set has for it.

    Other splits are left out.

    Raises:
        ValueError: two names mean the same split.
    """
    by_split: dict[str, str] = {}
    for name in names:
        split = next((split for split, words in NAMES.items() if name.casefold() in words), None)
        if split is None:
            continue
        if split in by_split:
            raise ValueError(
                f"found the splits {by_split[split]} and {name}, which both mean {split}, expected "
                "one; rename or remove the other"
            )
        by_split[split] = name
    return by_split


def assign_files(folder: Path) -> Files:
    """Assign the data files of a folder to splits.

    By their names, else by the names of the folders that they are in. Where no name says a split,
    all files are train.

    Raises:
        ValueError: there is no data file, one is empty, a name means two splits, a split has two
            sources or lacks a shard, or formats are mixed.
    """
    paths = require_files(folder)
    words: dict[Path, tuple[str, str]] = {}
    for path in paths:
        split_and_word = _split_and_word(path.relative_to(folder))
        if split_and_word is not None:
            words[path] = split_and_word
    not_read: list[str] = []
    if words:
        not_read = [str(path.relative_to(folder)) for path in paths if path not in words]
    else:
        words = {path: ("train", "") for path in paths}
    words_by_split: dict[str, dict[Path, str]] = defaultdict(dict)
    for path, (split, word) in words.items():
        words_by_split[split][path] = word
    kind, ending = _one_format(
        folder, [path for split_words in words_by_split.values() for path in split_words]
    )
    for split, split_words in words_by_split.items():
        _require_one_source(folder, split, split_words)
    by_split = {split: list(words_by_split[split]) for split in SPLITS if split in words_by_split}
    return Files(kind, ending, by_split, not_read)


def is_table(name: str) -> bool:
    """Return whether a name is that of a file with rows, by its ending."""
    return _ending(name) in KINDS


def only_file(path: Path) -> Files:
    """Take a file by itself, whatever its name says; all of it is train.

    Raises:
        ValueError: it is of another format, or empty.
    """
    ending = _ending(path.name)
    if ending not in KINDS:
        raise ValueError(
            f"found the file {path}, expected a table ({', '.join(KINDS)}), or a folder with some; "
            f"{_conversion(path)}"
        )
    _require_rows(path)
    return Files(KINDS[ending], ending, {"train": [path]}, [])


def require_files(folder: Path) -> list[Path]:
    """Return the data files of a folder, sorted.

    Raises:
        ValueError: there is none, or one is empty.
    """
    paths = sorted(_data_files(folder))
    tables = [path for path in paths if _ending(path.name) != _PLAIN]
    paths = tables or paths
    if not paths:
        workbook = next((path for path in sorted(folder.iterdir()) if _is_workbook(path)), None)
        advice = _conversion(workbook) if workbook else "put them there"
        raise ValueError(
            f"found no data file in {folder}, expected train.jsonl, validation.jsonl, test.jsonl "
            f"(or .jsonl.gz, .json, .csv, .tsv, .parquet, .txt); {advice}"
        )
    for path in paths:
        _require_rows(path)
    return paths


def _require_rows(path: Path) -> None:
    if path.stat().st_size == 0:
        raise ValueError(f"found the empty file {path}, expected rows; fill it or remove it")


def _is_workbook(path: Path) -> bool:
    return path.suffix.lower() in _WORKBOOKS


def _conversion(path: Path) -> str:
    """Say what to do with a file that is no table."""
    if _is_workbook(path):
        return f"save {path.name} as CSV UTF-8 in the spreadsheet"
    return "convert it"


def are_shards(paths: Iterable[Path]) -> bool:
    """Return whether files are the shards of one, by their folder and names (-00000-of-00002)."""
    series = set()
    for path in paths:
        match = _SHARD.match(path.name)
        if match is None:
            return False
        series.add((path.parent, match.group(1), match.group(3)))
    return len(series) == 1


def _data_files(folder: Path) -> Iterator[Path]:
    """Yield the files with rows, whatever their split.

    As in `datasets`, hidden files and folders are left out, and folders that begin with __.
    """
    for root, folders, names in os.walk(folder, followlinks=True):
        depth = len(Path(root).relative_to(folder).parts)
        # os.walk goes on to the folders that are left in this list.
        if depth + 1 < _MAX_DEPTH:
            folders[:] = [name for name in folders if not name.startswith((".", "__"))]
        else:
            folders.clear()
        for name in names:
            is_hidden = name.startswith(".")
            if not is_hidden and name not in _METADATA and _ending(name) in KINDS:
                yield Path(root) / name


def _stem_and_ending(name: str) -> tuple[str, str]:
    """Return a file's name without its endings, and the ending of its format in lower case.

    The ending of a compression is left out.
    """
    path = PurePath(name)
    if path.suffix.lower() in _COMPRESSED:
        path = PurePath(path.stem)
    return path.stem, path.suffix.lower()


def _stem(name: str) -> str:
    return _stem_and_ending(name)[0]


def _ending(name: str) -> str:
    return _stem_and_ending(name)[1]


def _split_and_word(path: PurePath) -> tuple[str, str] | None:
    """Return the split that a path names, and the word that says so; None if it names none.

    The file's name counts first, then its folders from the innermost one.

    Raises:
        ValueError: a name says two splits.
    """
    for part in (_stem(path.name), *reversed(path.parts[:-1])):
        words = {}
        for split, pattern in _WORD_PATTERNS.items():
            match = pattern.search(part.casefold())
            if match:
                words[split] = match.group(1)
        if len(words) > 1:
            raise ValueError(
                f"found {path}, whose name says {' and '.join(words)}, expected one split; rename "
                "it"
            )
        for split, word in words.items():
            return split, word
    return None


def _one_format(folder: Path, paths: list[Path]) -> tuple[str, str]:
    """Return the kind and the ending of all files.

    Tables with commas and with tabs are two formats.

    Raises:
        ValueError: there are several formats.
    """
    endings = [_ending(path.name) for path in paths]
    formats = {(KINDS[ending], ending == ".tsv"): path for ending, path in zip(endings, paths)}
    if len(formats) > 1:
        names = " and ".join(str(path.relative_to(folder)) for path in formats.values())
        raise ValueError(
            f"found {names} in {folder}, expected files of one format; convert them, or move the "
            "others away"
        )
    return KINDS[endings[0]], endings[0]


def _require_one_source(folder: Path, split: str, words: Mapping[Path, str]) -> None:
    """Raise ValueError if the files of a split cannot all belong to it.

    That is so where they go by two words for it, are copies by their names, or lack a shard.

    Args:
        folder: of all files.
        split: the split.
        words: by its files, the word that says so.
    """
    first_by_word: dict[str, Path] = {}
    first_by_stem: dict[str, Path] = {}
    for path, word in words.items():
        first_by_word.setdefault(word, path)
        stem = str(path.relative_to(folder).with_name(_stem(path.name))).casefold()
        first = first_by_stem.setdefault(stem, path)
        if first is not path:
            raise ValueError(
                f"found {first.name} and {path.name} in {path.parent} for {split}, expected one; "
                "remove the other"
            )
    if len(first_by_word) > 1:
        names = " and ".join(str(path.relative_to(folder)) for path in first_by_word.values())
        raise ValueError(
            f"found {names} in {folder}, which both mean {split}, expected one source; rename or "
            "remove the other"
        )
    _require_all_shards(words)


def _require_all_shards(paths: Iterable[Path]) -> None:
    numbers_by_series: dict[tuple[Path, str, int], set[int]] = defaultdict(set)
    for path in paths:
        match = _SHARD.match(_stem(path.name))
        if match:
            series = (path.parent, match.group(1), int(match.group(3)))
            numbers_by_series[series].add(int(match.group(2)))
    for (parent, stem, num_shards), numbers in numbers_by_series.items():
        missing = sorted(set(range(num_shards)) - numbers)
        if missing:
            raise ValueError(
                f"found {len(numbers)} of the {num_shards} shards of {stem} in {parent}, expected "
                f"all; number {missing[0]} is missing: copy it"
            )

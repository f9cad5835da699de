"""Which files of a folder, and which splits of a data set, are train, validation and test."""

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
}
_COMPRESSED = (".gz", ".bz2", ".xz", ".zst")
_ABOUT = (
    "config.json",
    "dataset_info.json",
    "dataset_infos.json",
    "dataset_dict.json",
    "state.json",
)  # no rows
_DEPTH = 3  # folders of a path that are looked into: the source may be a home
_SHARD = re.compile(r"(.*)-(\d{5})-of-(\d{5})")
_WORDS = {
    split: re.compile(rf"(?<![a-z])({'|'.join(names)})(?![a-z])") for split, names in NAMES.items()
}


@dataclass(frozen=True)
class Files:
    """The files of a folder by split.

    Attributes:
        kind: the format of them all, by the name of its reader in `datasets`.
        ending: of their names, such as ".csv".
        by_split: the files of each split, shards in their order.
        not_read: data files, relative to the folder, whose names say no split while others' do.
    """

    kind: str
    ending: str
    by_split: dict[str, list[Path]]
    not_read: list[str]


def renamed(names: Iterable[str]) -> dict[str, str]:
    """Return train, validation and test by the name that a data set has for it; other splits are
    left out.

    Raises ValueError if two names mean the same split.
    """
    by_split: dict[str, str] = {}
    for name in names:
        split = next((split for split, words in NAMES.items() if name.casefold() in words), None)
        if split in by_split:
            raise ValueError(
                f"found the splits {by_split[split]} and {name}, which both mean {split}, "
                "expected one; "
                "rename or remove the other"
            )
        if split:
            by_split[split] = name
    return by_split


def assigned(folder: Path) -> Files:
    """Assign the data files of a folder to splits by their names, else by the names of the folders
    that they are in.

    Where no name says a split, all files are train.

    Raises ValueError if there is no data file, one is empty, a name means two splits, a split has
    two sources or lacks a shard, or formats are mixed.
    """
    paths = require_files(folder)
    words = {path: _word(path.relative_to(folder)) for path in paths}
    named = {path: word for path, word in words.items() if word}
    by_split: dict[str, list[Path]] = defaultdict(list)
    for path in named or paths:
        by_split[named[path][0] if named else "train"].append(path)
    kind, ending = _one_kind(folder, [path for files in by_split.values() for path in files])
    for split, files in by_split.items():
        _require_one_source(
            folder, split, {path: named[path][1] if named else "" for path in files}
        )
    unread = [str(path.relative_to(folder)) for path in paths if named and path not in named]
    return Files(
        kind, ending, {split: by_split[split] for split in SPLITS if split in by_split}, unread
    )


def require_files(folder: Path) -> list[Path]:
    """Return the data files of a folder, sorted.

    Raises ValueError if there is none, or one is empty.
    """
    paths = sorted(_data_files(folder))
    if not paths:
        raise ValueError(
            f"found no data file in {folder}, expected train.jsonl, validation.jsonl, test.jsonl "
            "(or .jsonl.gz, .json, .csv, .tsv, .parquet); put them there"
        )
    for path in paths:
        if path.stat().st_size == 0:
            raise ValueError(f"found the empty file {path}, expected rows; fill it or remove it")
    return paths


def are_shards(paths: Iterable[Path]) -> bool:
    """Return whether several files are the pieces of one, by their folder and names
    (-00000-of-00002).
    """
    series = set()
    for path in paths:
        match = _SHARD.match(path.name)
        series.add((path.parent, match.group(1), match.group(3)) if match else None)
    return len(series) == 1 and None not in series


def _data_files(folder: Path) -> Iterator[Path]:
    """The files with rows, whatever their split; as in `datasets`, hidden ones and folders with __
    are left out.
    """
    for root, folders, names in os.walk(folder, followlinks=True):
        depth = len(Path(root).relative_to(folder).parts)
        folders[:] = (
            [n for n in folders if not n.startswith((".", "__"))] if depth + 1 < _DEPTH else []
        )
        for name in names:
            if not name.startswith(".") and name not in _ABOUT and _ending(name) in KINDS:
                yield Path(root) / name


def _parts(name: str) -> tuple[str, str, str]:
    """A file's name without its ending, the ending in lower case, and that of its compression, if
    any.
    """
    path = PurePath(name)
    packed = path.suffix.lower() if path.suffix.lower() in _COMPRESSED else ""
    path = PurePath(path.stem) if packed else path
    return path.stem, path.suffix.lower(), packed


def _ending(name: str) -> str:
    return _parts(name)[1]


def _word(path: PurePath) -> tuple[str, str] | None:
    """The split that a path names, and the word by which; None if it names none."""
    for part in (_parts(path.name)[0], *reversed(path.parts[:-1])):
        matches = {
            split: match
            for split, word in _WORDS.items()
            if (match := word.search(part.casefold()))
        }
        if len(matches) > 1:
            raise ValueError(
                f"found {path}, whose name says {' and '.join(matches)}, expected one "
                "split; rename it"
            )
        for split, match in matches.items():
            return split, match.group(1)
    return None


def _one_kind(folder: Path, paths: list[Path]) -> tuple[str, str]:
    """The format of all files; tables with commas and with tabs are two."""
    formats = {(KINDS[_ending(path.name)], _ending(path.name) == ".tsv"): path for path in paths}
    if len(formats) > 1:
        names = " and ".join(str(path.relative_to(folder)) for path in formats.values())
        raise ValueError(
            f"found {names} in {folder}, expected files of one format; convert them, or "
            "move the others away"
        )
    return KINDS[_ending(paths[0].name)], _ending(paths[0].name)


def _require_one_source(folder: Path, split: str, words: Mapping[Path, str]) -> None:
    """Raise ValueError if the files of a split go by two words for it, are copies by their names,
    or lack a shard.
    """
    first: dict[str, Path] = {}
    stems: dict[str, Path] = {}
    for path, word in words.items():
        first.setdefault(word, path)
        stem = str(path.relative_to(folder).with_name(_parts(path.name)[0])).casefold()
        other = stems.setdefault(stem, path)
        if other is not path:
            raise ValueError(
                f"found {other.name} and {path.name} in {path.parent} for {split}, expected "
                "one; remove the other"
            )
    if len(first) > 1:
        names = " and ".join(str(path.relative_to(folder)) for path in first.values())
        raise ValueError(
            f"found {names} in {folder}, which both mean {split}, expected one source; "
            "rename or remove the other"
        )
    _require_shards(folder, words)


def _require_shards(folder: Path, paths: Iterable[Path]) -> None:
    present: dict[tuple[Path, str, int], set[int]] = defaultdict(set)
    for path in paths:
        if match := _SHARD.match(_parts(path.name)[0]):
            present[path.parent, match.group(1), int(match.group(3))].add(int(match.group(2)))
    for (parent, stem, num_shards), numbers in present.items():
        if missing := sorted(set(range(num_shards)) - numbers):
            raise ValueError(
                f"found {len(numbers)} of the {num_shards} shards of {stem} in {parent}, "
                "expected all; "
                f"number {missing[0]} is missing: copy it"
            )

"""Where a task's rows come from: a local folder or the hub, read by `datasets`, and how they make
three splits.

Nothing is written into a source folder; what `datasets` prepares lies under HF_HOME, behind its
file locks, so that several processes may ask for the same data at once (data/cache.py).
data/splits.py knows which file is which split.
"""

from __future__ import annotations

import gzip
import logging
import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import datasets
import numpy as np

from fedsp_mpi.data.forms import Location, Table, opened
from fedsp_mpi.data.splits import SPLITS
from fedsp_mpi.rng import generator

Tables = Mapping[str, Table]
Rows = tuple[str, Sequence[int]]  # a split of the source, and which of its rows

_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*(/[\w.-]+)?")


def locate(
    task: str,
    hub: tuple[str, str | None] | None,
    source: str | None,
    columns: Mapping[str, str] | None = None,
) -> Location:
    """Decide what `source` means: None the task's own hub set, an existing folder, else a name on
    the hub.

    `columns` says by the task's columns how the source calls them, where it has other names.

    Raises:
        ValueError: neither a folder nor a possible name, or a task without a hub set and no source.
    """
    renames = columns or {}
    if source is None:
        if hub is None:
            raise ValueError(
                f"{task}: found no source, expected a folder or a hub set; this task has no "
                "data of its own"
            )
        return Location(None, *hub, columns=renames)
    head, _, tail = source.rpartition(":")
    for text, config in ((source, None), (head, tail)):
        if text and Path(text).expanduser().is_dir():
            return Location(
                Path(text).expanduser().resolve(),
                Path(text).name,
                config,
                hub[1] if hub else None,
                renames,
            )
    name, _, config = source.partition(":")
    if Path(source).expanduser().exists():
        raise ValueError(
            f"{task}: found the file {source}, expected a folder with train.jsonl, ...; "
            "give its folder"
        )
    if not _HUB_NAME.fullmatch(name):
        raise ValueError(
            f"{task}: found no folder {Path(source).expanduser().absolute()}, expected one "
            "with train.jsonl, "
            "validation.jsonl, test.jsonl, or a hub name; correct the path"
        )
    return Location(
        None, name, config or (hub[1] if hub and hub[0] == name else None), columns=renames
    )


def read(
    task: str, location: Location, column_sets: Sequence[Sequence[str]]
) -> tuple[dict[str, Table], list[str]]:
    """Return the splits train, validation and test that the source has, and notes on what they were
    made of.

    Each split has one of the `column_sets`; test may lack the last column of it, which holds the
    answers.

    Raises:
        ValueError: the source cannot be read or reached, or a column is missing.
    """
    with _quiet():
        source = opened(task, location)
        _require_columns(
            task, location, _named(task, location, source.columns(), column_sets), column_sets
        )
        tables, notes = source.tables()
        tables = {split: _in_task_words(table, location.columns) for split, table in tables.items()}
    _require_columns(
        task, location, {split: table.column_names for split, table in tables.items()}, column_sets
    )
    return tables, notes


def plain_text(source: str) -> Iterator[str]:
    """The lines of a text file (.txt, .txt.gz), or of all that a folder holds, in the order of
    their names.

    Raises ValueError if there is none, or it is not UTF-8.
    """
    path = Path(source).expanduser()
    files = (
        [path]
        if path.is_file()
        else sorted(found for end in ("txt", "txt.gz") for found in path.glob(f"*.{end}"))
    )
    if not files:
        raise ValueError(
            f"found no text in {source!r}, expected a .txt or .txt.gz file, or a folder of them"
        )
    for file in files:
        try:
            with (gzip.open if file.suffix == ".gz" else open)(
                file, "rt", encoding="utf-8"
            ) as lines:
                yield from lines
        except (OSError, EOFError, ValueError) as error:
            raise ValueError(
                f"found {file}, which could not be read ({error}), expected UTF-8 text"
            ) from None


def check(task: str, location: Location, column_sets: Sequence[Sequence[str]]) -> None:
    """The part of `read` that reads no more than the first row of each split; the same errors."""
    with _quiet():
        columns = _named(task, location, opened(task, location).columns(), column_sets)
        _require_columns(task, location, columns, column_sets)


def split_rows(
    task: str, tables: Tables, column_sets: Sequence[Sequence[str]], seed: int
) -> tuple[dict[str, Rows], list[str]]:
    """Which rows of which of the source's splits make up train, validation and test, and notes on
    what was decided.

    Test is `test` where its answers (the last column of the set) are public, else `validation`.
    Validation is `validation` unless test took it; then it is a tenth of `train`, drawn with
    `seed`, in file order like the rest.

    Raises:
        ValueError: one of the three can be had in no way.
    """
    rows: dict[str, Rows] = {
        split: (split, range(len(tables[split])))
        for split in ("train", "validation")
        if split in tables
    }
    notes = []
    reason = _why_not_scored(tables.get("test"), column_sets)
    if reason is None:
        rows["test"] = ("test", range(len(tables["test"])))
    elif "validation" in tables:
        rows["test"] = rows.pop("validation")
        notes.append(f"test = the split 'validation': {reason}")
    if "validation" not in rows and "train" in rows:
        reason = (
            "'validation' is the test"
            if "validation" in tables
            else "the source has no split 'validation'"
        )
        rows["train"], rows["validation"] = _cut(task, len(tables["train"]), seed)
        notes.append(
            f"validation = {len(rows['validation'][1])} rows cut from 'train' with seed "
            f"{seed}: {reason}"
        )
    for split in SPLITS:
        if split not in rows:
            raise ValueError(
                f"{task}: found the splits {', '.join(tables) or '(none)'}, expected train and "
                "test (or validation) "
                f"with answers, for {split}; add a file {split}.jsonl"
            )
    return rows, notes


def _cut(task: str, num_rows: int, seed: int) -> tuple[Rows, Rows]:
    """Nine tenths of train for training and a tenth for validation, both in file order."""
    if num_rows < 2:
        raise ValueError(
            f"{task}: found {num_rows} rows in train, expected at least 2; add rows, or "
            "a validation"
        )
    order = generator(seed, "validation split").permutation(num_rows)
    num_validation = max(1, num_rows // 10)
    validation, train = (
        np.sort(order[:num_validation]).tolist(),
        np.sort(order[num_validation:]).tolist(),
    )
    return ("train", train), ("train", validation)


def _why_not_scored(test: Table | None, column_sets: Sequence[Sequence[str]]) -> str | None:
    """Why test cannot be scored, or None where it can: some answer is neither blank nor -1, as GLUE
    hides them.
    """
    if test is None:
        return "the source has no split 'test'"
    answers = next((c[-1] for c in column_sets if set(c) <= set(test.column_names)), None)
    if answers is None:
        missing = " or ".join(repr(columns[-1]) for columns in column_sets)
        return f"the split 'test' has no column {missing}"
    if len(test) == 0 or any(answer not in (None, "", -1, "-1", []) for answer in test[answers]):
        return None
    return "the answers of the split 'test' are not public"


def _named(
    task: str,
    location: Location,
    by_split: Mapping[str, Sequence[str]],
    column_sets: Sequence[Sequence[str]],
) -> dict[str, list[str]]:
    """Split -> column names in the task's words.

    Raises ValueError if data.columns names a column that is not there.
    """
    known = list(dict.fromkeys(name for columns in column_sets for name in columns))
    for name, theirs in location.columns.items():
        if name not in known:
            raise ValueError(
                f"data.columns: found {name!r}, expected one of the columns of {task}: "
                f"{', '.join(known)}"
            )
        for split, columns in by_split.items():
            is_answer = any(name == wanted[-1] for wanted in column_sets)
            if theirs not in columns and not (split == "test" and is_answer):
                raise ValueError(
                    f"data.columns.{name}: found {theirs!r}, which {split} of {location} does not "
                    "have, expected one "
                    f"of {', '.join(columns)}"
                )
    return {
        split: list(_new_names(columns, location.columns).values())
        for split, columns in by_split.items()
    }


def _new_names(columns: Sequence[str], theirs: Mapping[str, str]) -> dict[str, str]:
    """The columns that stay, by their old names; one that has the name of a renamed one goes."""
    renamed = {old: new for new, old in theirs.items() if old in columns}
    return {
        name: renamed.get(name, name) for name in columns if name in renamed or name not in theirs
    }


def _in_task_words(table: Table, theirs: Mapping[str, str]) -> Table:
    """The table with the task's names of columns."""
    if not theirs:
        return table
    names = _new_names(table.column_names, theirs)
    return table.select_columns(list(names)).rename_columns(names)


def _require_columns(
    task: str,
    location: Location,
    found: Mapping[str, Sequence[str]],
    column_sets: Sequence[Sequence[str]],
) -> None:
    for split, columns in found.items():
        # A test split without answers is not scored, however the file format says that it has none.
        needed = [wanted[:-1] for wanted in column_sets] if split == "test" else column_sets
        missing = [[name for name in wanted if name not in columns] for wanted in needed]
        if all(missing):
            expected = " or ".join(", ".join(wanted) for wanted in column_sets)
            raise ValueError(
                f"{task}: found no column {', '.join(map(repr, missing[0]))} in {split} of "
                f"{location}, which has "
                f"{', '.join(columns) or 'no columns'}; expected {expected}; rename the columns "
                "or choose another task"
            )


@contextmanager
def _quiet() -> Iterator[None]:
    """No progress bars, warnings or log lines of the libraries; their settings are as before
    afterwards.
    """
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

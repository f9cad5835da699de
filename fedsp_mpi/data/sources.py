"""Read a task's rows from a local folder or the hub, and make three splits of them.

Nothing is written into a source folder; what `datasets` prepares lies under HF_HOME, behind its
file locks, so that several processes may ask for the same data at once (data/cache.py).
data/splits.py knows which file is which split.
"""

from __future__ import annotations

import gzip
import logging
import re
import warnings
from collections.abc import Container, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import datasets
import numpy as np

from fedsp_mpi.data.cells import describe_columns
from fedsp_mpi.data.forms import Location, Table, open_source
from fedsp_mpi.data.splits import SPLITS, is_table
from fedsp_mpi.rng import generator

Tables = Mapping[str, Table]
ColumnSets = Sequence[Sequence[str]]
Rows = tuple[str, Sequence[int]]  # a split of the source, and the numbers of rows in it

_UNANSWERED = ("test",)  # splits that may lack the column of their answers
_TEST_SHARE = 5  # a fifth of train is test, where it has to be cut
_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*(/[\w.-]+)?")


def locate(
    task: str,
    hub: tuple[str, str | None] | None,
    source: str | None,
    *,
    columns: Mapping[str, str] | None = None,
) -> Location:
    """Decide what `source` means.

    Args:
        task: the task's name, for messages.
        hub: path and configuration of the task's own hub set; None if it has none.
        source: None for the task's own hub set; an existing folder, else a name on the hub; either
            may end in ":configuration".
        columns: the source's name of a column by the task's, where they differ.

    Raises:
        ValueError: neither a folder nor a possible name, or a task without a hub set and no source.
    """
    columns = columns or {}
    hub_name, hub_config = hub or (None, None)
    if source is None:
        if hub_name is None:
            raise ValueError(
                f"{task}: found no source, expected a folder or a hub set; this task has no data "
                "of its own"
            )
        return Location(None, hub_name, hub_config, columns=columns)
    # A folder's name may hold a colon: the whole source comes first.
    head, _, tail = source.rpartition(":")
    for text, config in ((source, None), (head, tail)):
        if text and Path(text).expanduser().is_dir():
            folder = Path(text).expanduser().resolve()
            return Location(folder, Path(text).name, config, hub_config, columns)
    path = Path(source).expanduser()
    if path.exists() and hub is None:
        return Location(
            path.resolve().parent, path.name, None, columns=columns, file=path.resolve()
        )
    if path.exists():
        raise ValueError(
            f"{task}: found the file {source}, expected a folder with train.jsonl, ...; give its "
            "folder"
        )
    if is_table(source):
        raise ValueError(
            f"{task}: found no file {path.absolute()}, expected a table, or a folder with some; "
            "correct the path"
        )
    name, _, chosen_config = source.partition(":")
    if not may_be_hub_set(source):
        raise ValueError(
            f"{task}: found no folder {Path(source).expanduser().absolute()}, expected one with "
            "train.jsonl, validation.jsonl, test.jsonl, or a hub name; correct the path"
        )
    if not chosen_config and name == hub_name:
        return Location(None, name, hub_config, columns=columns)
    return Location(None, name, chosen_config or None, columns=columns)


def may_be_hub_set(source: str) -> bool:
    """Return whether a source that is no folder here can be the name of a hub set."""
    name = source.partition(":")[0]
    return not is_table(source) and _HUB_NAME.fullmatch(name) is not None


def read(
    task: str, location: Location, column_sets: ColumnSets, *, may_lack_answers: bool = False
) -> tuple[dict[str, Table], list[str]]:
    """Read the splits train, validation and test that a source has.

    Args:
        task: the task's name, for messages.
        location: of the source.
        column_sets: sets of columns, in the task's names; each split must have one of them. Test
            may lack the last column of the set, which holds the answers.
        may_lack_answers: whether other splits may lack it, too.

    Returns:
        The tables by split, and notes on what they were made of.

    Raises:
        ValueError: the source cannot be read or reached, or a column is missing.
    """
    with _quiet():
        source = open_source(task, location)
        columns = source.columns()
        unanswered = tuple(columns) if may_lack_answers else _UNANSWERED
        names = _task_names(task, location, columns, column_sets=column_sets, unanswered=unanswered)
        _require_columns(task, location, names, column_sets=column_sets, unanswered=unanswered)
        tables, notes = source.tables()
        tables = {
            split: _with_task_names(table, location.columns) for split, table in tables.items()
        }
    names = {split: table.column_names for split, table in tables.items()}
    _require_columns(task, location, names, column_sets=column_sets, unanswered=unanswered)
    return tables, notes


def with_values(table: Table, column: str, values: Sequence[object]) -> Table:
    """Return the table with other values in a column, which is its last one then.

    Args:
        table: of any columns.
        column: one of them.
        values: one per row, of one type.
    """
    with _quiet():
        return table.remove_columns(column).add_column(column, list(values))


def without_values(table: Table, column: str, keeps: Sequence[bool]) -> Table:
    """Return the table with nulls in a column of the same type, which is its last one then.

    Args:
        table: of any columns.
        column: one of them.
        keeps: whether a row keeps its value, one per row.
    """
    kind = table.features[column]
    cells = [cell if is_kept else None for cell, is_kept in zip(table[column], keeps)]
    with _quiet():
        return table.remove_columns(column).add_column(column, cells, feature=kind)


def with_empty_column(table: Table, column: str) -> Table:
    """Return the table with one more column, in which every cell is null."""
    with _quiet():
        return table.add_column(column, [None] * len(table))


def write_parquet(table: Table, path: Path) -> None:
    """Write a table with its features, which `read` finds in the file.

    Raises:
        OSError: the file cannot be written.
    """
    with _quiet():
        table.to_parquet(str(path))


def plain_text(source: str) -> Iterator[str]:
    """Yield the lines of a text file (.txt, .txt.gz), or of all in a folder, sorted by name.

    Raises:
        ValueError: there is none, or it is not UTF-8.
    """
    path = Path(source).expanduser()
    in_folder = sorted([*path.glob("*.txt"), *path.glob("*.txt.gz")])
    files = [path] if path.is_file() else in_folder
    if not files:
        raise ValueError(
            f"found no text in {source!r}, expected a .txt or .txt.gz file, or a folder of them"
        )
    for file in files:
        open_text = gzip.open if file.suffix == ".gz" else open
        try:
            with open_text(file, "rt", encoding="utf-8") as lines:
                yield from lines
        except (OSError, EOFError, ValueError) as error:
            raise ValueError(
                f"found {file}, which could not be read ({error}), expected UTF-8 text"
            ) from None


def check(task: str, location: Location, column_sets: ColumnSets) -> None:
    """Check a source as `read` does, with no more than the first row of each split.

    Args:
        task: as in `read`.
        location: as in `read`.
        column_sets: as in `read`.

    Raises:
        ValueError: as in `read`.
    """
    with _quiet():
        columns = open_source(task, location).columns()
        names = _task_names(task, location, columns, column_sets=column_sets)
        _require_columns(task, location, names, column_sets=column_sets)


def split_rows(
    task: str,
    tables: Tables,
    column_sets: ColumnSets,
    *,
    seed: int,
    cuts_test: bool = False,
) -> tuple[dict[str, Rows], list[str]]:
    """Decide which rows of which of the source's splits make up train, validation and test.

    Test is `test` where its answers (the last column of the set) are public, else `validation`.
    Validation is `validation` unless test took it; then it is a tenth of `train`, drawn with
    `seed`, in file order like all splits. With `cuts_test`, rows without any split are divided in
    the same way: a fifth is test.

    Args:
        task: the task's name, for messages.
        tables: the source's splits.
        column_sets: sets of columns, of which each table has one.
        seed: of the run.
        cuts_test: whether test may be cut from train, where the source has neither test nor
            validation.

    Returns:
        The rows by split, and notes on what was decided.

    Raises:
        ValueError: one of the three can be had in no way.
    """
    rows = _whole(tables, ("train", "validation"))
    notes = []
    reason = _why_not_scored(tables.get("test"), column_sets)
    if reason is None:
        rows["test"] = ("test", range(len(tables["test"])))
    elif "validation" in tables:
        rows["test"] = rows.pop("validation")
        notes.append(f"test = the split 'validation': {reason}")
    if cuts_test and list(tables) == ["train"]:
        rows["train"], rows["test"] = _cut_train(
            task, rows["train"][1], seed, share=_TEST_SHARE, purpose="test split"
        )
        notes.append(
            f"test = {len(rows['test'][1])} rows cut from 'train' with seed {seed}: the source has "
            "no split 'test' and no 'validation'"
        )
    if "validation" not in rows and "train" in rows:
        if "validation" in tables:
            reason = "'validation' is the test"
        else:
            reason = "the source has no split 'validation'"
        rows["train"], rows["validation"] = _cut_train(task, rows["train"][1], seed)
        num_validation = len(rows["validation"][1])
        notes.append(
            f"validation = {num_validation} rows cut from 'train' with seed {seed}: {reason}"
        )
    for split in SPLITS:
        if split not in rows:
            raise ValueError(
                f"{task}: found the splits {', '.join(tables) or '(none)'}, expected train and "
                f"test (or validation) with answers, for {split}; add a file {split}.jsonl"
            )
    return rows, notes


def silo_rows(task: str, tables: Tables) -> tuple[dict[str, Rows], list[str]]:
    """Return train and, if it is there, validation of one client's own source; see `split_rows`.

    Raises:
        ValueError: there is no train.
    """
    if "train" not in tables:
        raise ValueError(
            f"{task}: found the splits {', '.join(tables) or '(none)'}, expected train; name a "
            "file train.csv, train.jsonl, ..."
        )
    rows = _whole(tables, ("train", "validation"))
    return rows, []


def public_rows(tables: Tables) -> dict[str, Rows]:
    """Return all rows of test; of another split, where there is no test, or no split at all."""
    name = next((name for name in ("test", "validation") if name in tables), next(iter(tables)))
    return {"test": (name, range(len(tables[name])))}


def _whole(tables: Tables, names: Sequence[str]) -> dict[str, Rows]:
    """Return all rows of those of the splits that there are."""
    return {name: (name, range(len(tables[name]))) for name in names if name in tables}


def server_rows(
    task: str,
    tables: Tables,
    column_sets: ColumnSets,
    *,
    seed: int,
    cuts_test: bool = False,
) -> tuple[dict[str, Rows], list[str]]:
    """Return the splits that the server's own source has; see `split_rows`.

    Its train is the server's shard. A lone train is divided; a lone validation is the test too.
    """
    if list(tables) == ["train"]:
        return split_rows(task, tables, column_sets, seed=seed, cuts_test=True)
    rows = _whole(tables, SPLITS)
    if "test" in rows and _why_not_scored(tables["test"], column_sets) is not None:
        del rows["test"]
    notes = []
    if "validation" in rows and "test" not in rows:
        rows["test"] = rows["validation"]
        notes.append(
            "test = the server's validation rows, which also choose the best round: its scores "
            "are too good; give the server a test split"
        )
    return rows, notes


def _cut_train(
    task: str,
    numbers: Sequence[int],
    seed: int,
    *,
    share: int = 10,
    purpose: str = "validation split",
) -> tuple[Rows, Rows]:
    """Return what remains of train, and one part of `share` that is cut, both in file order.

    Args:
        task: its name, for messages.
        numbers: of the rows of train.
        seed: of the run.
        share: how many times the cut part goes into train.
        purpose: of the part, for the order.
    """
    num_rows = len(numbers)
    if num_rows < 2:
        between = " (of a .txt file, an empty line ends one)" if task == "plain_text" else ""
        raise ValueError(
            f"{task}: found {num_rows} rows in train{between}, expected at least 2; add rows, or a "
            "validation"
        )
    order = generator(seed, purpose).permutation(num_rows)
    num_cut = max(1, num_rows // share)
    cut = [numbers[index] for index in np.sort(order[:num_cut])]
    train = [numbers[index] for index in np.sort(order[num_cut:])]
    return ("train", train), ("train", cut)


def _why_not_scored(test: Table | None, column_sets: ColumnSets) -> str | None:
    """Return why test cannot be scored, or None where it can.

    It can where some answer is neither blank nor -1, by which GLUE hides them.
    """
    if test is None:
        return "the source has no split 'test'"
    names = set(test.column_names)
    answer_column = next((columns[-1] for columns in column_sets if set(columns) <= names), None)
    if answer_column is None:
        missing = " or ".join(repr(columns[-1]) for columns in column_sets)
        return f"the split 'test' has no column {missing}"
    hidden: tuple[object, ...] = (None, "", -1, "-1", [])
    if len(test) == 0 or any(answer not in hidden for answer in test[answer_column]):
        return None
    return "the answers of the split 'test' are not public"


def _task_names(
    task: str,
    location: Location,
    columns_by_split: Mapping[str, Sequence[str]],
    *,
    column_sets: ColumnSets,
    unanswered: Container[str] = _UNANSWERED,
) -> dict[str, list[str]]:
    """Return split -> column names, in the task's names.

    Args:
        task: its name, for messages.
        location: of the source.
        columns_by_split: as the source names them.
        column_sets: as in `read`.
        unanswered: the splits that may lack their answers.

    Raises:
        ValueError: data.columns names a column that the task or the source does not have.
    """
    task_columns = list(dict.fromkeys(name for columns in column_sets for name in columns))
    answer_columns = {columns[-1] for columns in column_sets}
    for name, source_name in location.columns.items():
        if name not in task_columns:
            raise ValueError(
                f"data.columns: found {name!r}, expected one of the columns of {task}: "
                f"{', '.join(task_columns)}"
            )
        for split, columns in columns_by_split.items():
            may_lack = split in unanswered and name in answer_columns
            if source_name not in columns and not may_lack:
                raise ValueError(
                    f"data.columns.{name}: found {source_name!r}, which {split} of {location} does "
                    f"not have, expected one of {describe_columns(columns)}"
                )
    return {
        split: list(_new_names(columns, location.columns).values())
        for split, columns in columns_by_split.items()
    }


def _new_names(columns: Sequence[str], source_names: Mapping[str, str]) -> dict[str, str]:
    """Return the task's names of a source's columns by the source's.

    A column is left out if it has the name that a renamed one takes.
    """
    renamed = {
        source_name: name for name, source_name in source_names.items() if source_name in columns
    }
    return {
        column: renamed.get(column, column)
        for column in columns
        if column in renamed or column not in source_names
    }


def _with_task_names(table: Table, source_names: Mapping[str, str]) -> Table:
    """Return the table with the task's names of columns."""
    if not source_names:
        return table
    names = _new_names(table.column_names, source_names)
    return table.select_columns(list(names)).rename_columns(names)


def _require_columns(
    task: str,
    location: Location,
    columns_by_split: Mapping[str, Sequence[str]],
    *,
    column_sets: ColumnSets,
    unanswered: Container[str] = _UNANSWERED,
) -> None:
    """Raise ValueError if a split has none of the sets of columns; see `_task_names`."""
    for split, columns in columns_by_split.items():
        required_sets = column_sets
        if split in unanswered:
            # A test split without answers is not scored, however the file format says that it has
            # none.
            required_sets = [required[:-1] for required in column_sets]
        missing = [[name for name in required if name not in columns] for required in required_sets]
        if all(missing):
            expected = " or ".join(", ".join(required) for required in column_sets)
            raise ValueError(
                f"{task}: found no column {', '.join(map(repr, missing[0]))} in {split} of "
                f"{location}, which has {describe_columns(columns) or 'no columns'}; expected "
                f"{expected}; name them in data.columns, or choose another task"
            )


@contextmanager
def _quiet() -> Iterator[None]:
    """Silence progress bars, warnings and log lines of the libraries for a while."""
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

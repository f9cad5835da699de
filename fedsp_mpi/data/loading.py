"""Load the examples of a task: from the hub, a copy of a hub set, or the user's own files."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Container, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from enum import Enum
from pathlib import Path
from typing import Literal

import datasets

from fedsp_mpi.config.parsing import message_line, shown
from fedsp_mpi.data import found_classes, labels, partition, sources
from fedsp_mpi.data.cells import NoTextError, describe_choices
from fedsp_mpi.data.classification import Reader
from fedsp_mpi.data.examples import Example, without_label
from fedsp_mpi.data.splits import SPLITS
from fedsp_mpi.data.tasks import Splits, Task, find

# The source's names of a column by the task's: one, or one for each choice.
ColumnNames = Mapping[str, str | tuple[str, ...]]

_NUM_ROWS_SHOWN = 5  # row numbers that a note lists
Owner = Literal["all", "silo", "server", "public"]
_PLACE = re.compile(r"row (\d+) of (\w+)")  # what `Example.row` says


class Missing(Enum):
    """What a row lacks that is left out."""

    ANSWER = "without an answer"
    TEXT = "without a text"


def load(
    task: Task | str,
    source: str | None,
    *,
    seed: int,
    limit: Mapping[str, int | None] | None = None,
    columns: ColumnNames | None = None,
    owner: Owner = "all",
    cache: Path | None = None,
    keeps_unlabelled: bool = False,
) -> Splits:
    """Read the examples of a task.

    Test is the split `test` if it is there with its answers, else `validation`. Validation is the
    split `validation` unless test took it; then it is a tenth of `train`, drawn with `seed` and the
    same for every `limit`. A row of train or validation with nothing to teach, and any row with
    nothing to score, is left out. The notes say all of it.

    Args:
        task: the task, or its name.
        source: None for the task's own data set on the hub; a folder with train/validation/test
            files (.jsonl, .jsonl.gz, .json, .csv, .parquet), a copy of a hub set, or one saved by
            `save_to_disk`; or the name of another hub set. "folder:configuration" and
            "name:configuration" choose among several configurations.
        seed: the experiment's seed; it matters only where validation is cut from train.
        limit: maximum number of rows of "train", "validation", "test": the first ones in file
            order, as with lm-eval's `limit`. A cut validation keeps the file order too.
        columns: the source's name of a column by the task's, where they differ.
        owner: whose the source is. "silo": one client's, of which train is needed, and validation
            is what it holds back; "server": of which no split is needed (`sources.server_rows`);
            "public": nobody's, of which test alone is read.
        cache: a folder for what is prepared of the source, instead of the one that all sources
            share; small files are then read into memory alone.
        keeps_unlabelled: whether rows of train without a label are returned as such, and the
            column of labels may be missing.

    Raises:
        ValueError: unknown task, no such folder or hub set, hub out of reach, missing column or
            split, empty split, or a row that does not read; one line with found, expected and what
            to do.
    """
    task = find(task) if isinstance(task, str) else task
    limits = _checked_limits(limit)
    tables, notes = read_tables(
        task, source, columns, cache=cache, may_lack_labels=keeps_unlabelled
    )
    task, class_notes = with_found_classes(task, tables)
    rows, decisions = _split_rows(task, tables, seed, owner=owner)
    notes += class_notes + decisions
    examples: dict[str, tuple[Example, ...]] = dict.fromkeys(SPLITS, ())
    unlabelled: tuple[Example, ...] = ()
    for split in rows:
        origin, numbers = rows[split]
        max_rows = limits.get(split)
        if max_rows is not None and max_rows < len(numbers):
            notes.append(f"{split} = the first {max_rows} of {len(numbers)} rows (limit)")
            numbers = numbers[:max_rows]
        if keeps_unlabelled and split == "train":
            numbers, unlabelled_rows = _by_label(task, tables[origin], origin, numbers=numbers)
            unlabelled = _read_unlabelled(task, tables[origin], origin, numbers=unlabelled_rows)
            if unlabelled:
                notes.append(f"train: {len(unlabelled)} rows without a label, to be labelled")
                if not numbers:
                    continue
        examples[split], split_notes = _examples(
            task, tables[origin], origin, numbers=numbers, split=split
        )
        notes += split_notes
    return Splits(**examples, notes=tuple(dict.fromkeys(notes)), unlabelled=unlabelled)


def read_tables(
    task: Task,
    source: str | None,
    columns: ColumnNames | None,
    *,
    cache: Path | None = None,
    may_lack_labels: bool = False,
) -> tuple[dict[str, datasets.Dataset], list[str]]:
    """Read the tables of a source by split, in the task's names of columns.

    Args:
        task: the task.
        source: as in `load`.
        columns: as in `load`.
        cache: as in `load`.
        may_lack_labels: whether a table may lack the column of the answers, and gets an empty one.

    Returns:
        The tables by split, and notes on what they were made of.

    Raises:
        ValueError: as `load` does.
    """
    location = sources.locate(task.name, task.hub, source, columns=_renamed(columns))
    location = replace(location, cache=cache)
    if not may_lack_labels:
        return sources.read(task.name, location, task.column_sets)
    tables, notes = sources.read(task.name, location, task.column_sets, may_lack_answers=True)
    answer_columns = {columns[-1] for columns in task.column_sets}
    for split, table in tables.items():
        if not answer_columns & set(table.column_names):
            tables[split] = sources.with_empty_column(table, task.columns[-1])
    return tables, notes


def check_columns(task: Task | str, source: str | None, columns: ColumnNames | None = None) -> None:
    """Raise ValueError if `load` would not find its folder or hub set, or a column of it.

    Reads the first row of each split at most.

    Args:
        task: the task, or its name.
        source: as in `load`.
        columns: as in `load`.
    """
    task = find(task) if isinstance(task, str) else task
    location = sources.locate(task.name, task.hub, source, columns=_renamed(columns))
    sources.check(task.name, location, task.column_sets)


def scored_rows(
    task: Task,
    source: str | None,
    *,
    seed: int,
    limit: int | None,
    columns: ColumnNames | None = None,
    owner: Owner = "all",
) -> tuple[datasets.Dataset, list[Example]]:
    """Read the rows of the test split that `load` keeps, with answers in lm-eval's form.

    Args:
        task: the task.
        source: as in `load`.
        seed: as in `load`.
        limit: maximum number of rows.
        columns: as in `load`.
        owner: as in `load`.

    Returns:
        The rows, and their examples.

    Raises:
        ValueError: as `load` does.
    """
    tables, _ = read_tables(task, source, columns)
    task, _ = with_found_classes(task, tables)
    rows, _ = _split_rows(task, tables, seed, owner=owner)
    origin, numbers = rows["test"]
    numbers = numbers[:limit]
    usable = _sort_out(_read_rows(task, tables[origin], origin, numbers=numbers), "test").usable
    table = tables[origin].select([number for number, _ in usable])
    examples = [example for _, example in usable]
    if task.answers_are_positions:
        answer_column = task.columns[-1]
        positions: list[int] | list[str] = [example.gold[0] for example in examples]
        if task.lm_eval and task.lm_eval.labels_are_text:
            positions = [str(position) for position in positions]
        if table[:][answer_column] != positions:
            table = table.remove_columns(answer_column).add_column(answer_column, positions)
    return table, examples


def with_found_classes(
    task: Task, tables: Mapping[str, datasets.Dataset]
) -> tuple[Task, list[str]]:
    """Return the task with the classes of its rows, where the user names none, and notes."""
    if task.reader is None:
        return task, []
    classes, notes = found_classes.find(task.name, tables, task.columns[-1])
    return task.with_classes(classes), notes


def _split_rows(
    task: Task, tables: Mapping[str, datasets.Dataset], seed: int, *, owner: Owner = "all"
) -> tuple[dict[str, sources.Rows], list[str]]:
    if owner == "silo":
        return sources.silo_rows(task.name, tables)
    if owner == "public":
        return sources.public_rows(tables), []
    if owner == "server":
        return sources.server_rows(task.name, tables, task.column_sets, seed=seed)
    return sources.split_rows(
        task.name, tables, task.column_sets, seed=seed, cuts_test=task.hub is None
    )


def class_names(task: Task, tables: Mapping[str, datasets.Dataset]) -> tuple[str, ...]:
    """Return the classes that are found in the rows of a task that has none yet."""
    classes, _ = found_classes.find(task.name, tables, task.columns[-1])
    return classes


def _renamed(columns: ColumnNames | None) -> dict[str, str]:
    """Return the columns that have other names; those of a list are read under their own."""
    return {name: column for name, column in (columns or {}).items() if isinstance(column, str)}


def place(example: Example) -> tuple[str, int]:
    """Return the source's split that an example was loaded from, and the row's number in it."""
    match = _PLACE.fullmatch(example.row)
    assert match is not None, "only a loaded example has a place"
    return match.group(2), int(match.group(1))


def rows_of(tables: Mapping[str, datasets.Dataset], examples: Sequence[Example]) -> sources.Table:
    """Return the rows that examples of one split were loaded from, in the examples' order.

    Args:
        tables: of the source, from `read_tables`.
        examples: from `load`, at least one.
    """
    places = [place(example) for example in examples]
    [origin] = {split for split, _ in places}
    return tables[origin].select([number for _, number in places])


def unlabelled_again(
    task: Task, tables: Mapping[str, datasets.Dataset], examples: Sequence[Example]
) -> list[Example]:
    """Read the rows of examples of train again, in another task's words, without their labels.

    Args:
        task: whose words are other ones.
        tables: of the source, from `read_tables`.
        examples: from `load`, at least one.

    Raises:
        ValueError: a row does not read in these words.
    """
    places = [place(example) for example in examples]
    [origin] = {split for split, _ in places}
    numbers = [number for _, number in places]
    again = _read_unlabelled(task, tables[origin], origin, numbers=numbers)
    if len(again) != len(examples):
        raise ValueError(
            f"found {len(examples) - len(again)} rows of train without a "
            "text in these words, expected one in each; name columns that all rows fill"
        )
    return list(again)


def read_again(task: Task, table: sources.Table) -> list[Example | None]:
    """Read all rows of a table as `load` would read a Parquet file of it; None without a label.

    Raises:
        ValueError: a row does not read.
    """
    table.info.builder_name = "parquet"
    rows = _read_rows(task, table, "the table", numbers=range(len(table)))
    return [None if isinstance(example, Missing) else example for _, example in rows]


def column_values(
    tables: Mapping[str, datasets.Dataset],
    examples: Sequence[Example],
    column: str,
    *,
    columns: ColumnNames,
) -> list[partition.ColumnValue | None]:
    """Return each example's value of a column that the task itself does not read.

    Args:
        tables: of the source, from `read_tables`.
        examples: from `load`, all of one split.
        column: its name, the source's or the task's.
        columns: the source's name of a column by the task's, where they differ.

    Returns:
        The values, [num_examples]: text, number or bool; class names of classes; None where a cell
        is null, blank or not a number.

    Raises:
        ValueError: there is no such column, or it holds anything else.
    """
    task_names = {source_name: name for name, source_name in _renamed(columns).items()}
    table = rows_of(tables, examples)
    name = task_names.get(column, column)
    if name not in table.column_names:
        names = message_line(", ".join(table.column_names), 150)
        raise ValueError(
            f"data.partition_column: found {shown(column)}, expected one of the columns of train: "
            f"{names}; correct the name"
        )
    feature = table.features[name]
    is_class = isinstance(feature, datasets.ClassLabel)
    values: list[partition.ColumnValue | None] = []
    for cell in table[name]:
        if labels.is_missing(cell) or (is_class and cell < 0):
            values.append(None)
        elif is_class:
            values.append(feature.int2str(cell))
        elif isinstance(cell, bool | int | float | str):
            values.append(cell)
        else:
            raise ValueError(
                f"data.partition_column: found cells of type {type(cell).__name__} in "
                f"{shown(column)}, "
                "expected text, numbers or true and false; name another column"
            )
    return values


def _checked_limits(limit: Mapping[str, int | None] | None) -> dict[str, int | None]:
    """Return the limits; raise ValueError if one is of no split, or not a number of rows."""
    limits = dict(limit or {})
    for split, max_rows in limits.items():
        if split not in SPLITS:
            raise ValueError(
                f"found a limit for {split!r}, expected one for {', '.join(SPLITS)}; rename it"
            )
        if max_rows is not None and (not isinstance(max_rows, int) or max_rows < 1):
            raise ValueError(
                f"found limit {max_rows!r} for {split}, expected a whole number from 1, or none "
                "for all rows"
            )
    return limits


def _examples(
    task: Task,
    table: datasets.Dataset,
    origin: str,
    *,
    numbers: Sequence[int],
    split: str,
) -> tuple[tuple[Example, ...], list[str]]:
    """Read the rows `numbers` of the source's split `origin` as examples of `split`.

    Returns:
        The examples, and notes on the rows that were left out.
    """
    names = _class_names(task, table)
    rows = _sort_out(_read_rows(task, table, origin, numbers=numbers, names=names), split)
    if not rows.usable:
        with_empty_choice = f", {len(rows.empty)} with an empty choice" if rows.empty else ""
        # Of a split that was cut from another one, or that stands in for it, say which it is.
        purpose = "" if split == origin else f" for {split}"
        advice = "" if split == origin else f"; give {split} a file of its own"
        raise ValueError(
            f"{task.name}: found no usable row in {origin} ({len(numbers)} read{purpose}"
            f"{with_empty_choice}), expected at least 1{advice}"
        )
    notes = []
    for missing, row_numbers in rows.missing.items():
        notes.append(_left_out_note(split, origin, row_numbers, reason=missing.value))
    if rows.empty:
        notes.append(_left_out_note(split, origin, rows.empty, reason="with an empty choice"))
    if names and names.are_unknown:
        notes.append(
            f"the classes of the column {task.columns[-1]!r} have other names than the task's "
            f"choices ({describe_choices(names.texts)}); 0 was taken for the first choice, 1 for "
            "the second, and so on"
        )
    examples = tuple(
        replace(example, row=f"row {number} of {origin}") for number, example in rows.usable
    )
    return examples, notes


def _by_label(
    task: Task, table: datasets.Dataset, origin: str, *, numbers: Sequence[int]
) -> tuple[list[int], list[int]]:
    """Divide row numbers into those of rows with a label, and those of rows without one."""
    labelled: list[int] = []
    unlabelled: list[int] = []
    for number, example in _read_rows(task, table, origin, numbers=numbers):
        rows = unlabelled if example is Missing.ANSWER else labelled
        rows.append(number)
    return labelled, unlabelled


def _read_unlabelled(
    task: Task, table: datasets.Dataset, origin: str, *, numbers: Sequence[int]
) -> tuple[Example, ...]:
    """Read rows as examples without a label; those without a text are left out.

    Whatever stands in the column of the labels is not read: any label takes its place meanwhile.

    Raises:
        ValueError: a row does not read; the message names it.
    """
    if not numbers:
        return ()
    reader = task.example
    any_label = reader.classes[0] if isinstance(reader, Reader) else 1  # the first or second class
    column = _answer_column(task, table.column_names)
    rows = sources.with_values(table.select(numbers), column, [any_label] * len(numbers))
    examples: list[Example] = []
    for place_in_rows, example in _read_rows(task, rows, origin, numbers=range(len(numbers))):
        if not isinstance(example, Missing):
            row = f"row {numbers[place_in_rows]} of {origin}"
            examples.append(without_label(replace(example, row=row)))
    return tuple(examples)


def _left_out_note(split: str, origin: str, numbers: Sequence[int], *, reason: str) -> str:
    rows = "row" if len(numbers) == 1 else "rows"
    shown = ", ".join(map(str, numbers[:_NUM_ROWS_SHOWN]))
    if len(numbers) > _NUM_ROWS_SHOWN:
        shown += ", ..."
    return f"{split}: {len(numbers)} {rows} {reason} left out ({origin} {shown})"


def _answer_column(task: Task, names: Container[str]) -> str:
    """Return the column that holds the answers: of the first of the task's sets that has it."""
    return next(columns[-1] for columns in task.column_sets if columns[-1] in names)


def _class_names(task: Task, table: datasets.Dataset) -> labels.ClassNames | None:
    """Return the class names that the schema gives to the answers; None if it gives none."""
    feature = table.features.get(_answer_column(task, table.column_names))
    if not isinstance(feature, datasets.ClassLabel):
        return None
    return labels.ClassNames(tuple(feature.names))


def _read_rows(
    task: Task,
    table: datasets.Dataset,
    origin: str,
    *,
    numbers: Sequence[int],
    names: labels.ClassNames | None = None,
) -> Iterator[tuple[int, Example | Missing]]:
    """Yield the number of each row and its example, or what it lacks.

    Raises:
        ValueError: a row does not read; the message names it.
    """
    names = names or _class_names(task, table)
    is_csv = table.info.builder_name == "csv"
    for number, row in zip(numbers, table.select(numbers).to_list()):
        answer_column = _answer_column(task, row)
        label = row[answer_column]
        if label is None:
            yield number, Missing.ANSWER
            continue
        if names:
            row[answer_column] = labels.ClassId(label, names)
        elif is_csv and task.answers_are_positions and not task.has_own_labels:
            row[answer_column] = labels.number_in_cell(label)
        try:
            yield number, task.example(row)
        except labels.NoLabelError:
            yield number, Missing.ANSWER
        except NoTextError:
            yield number, Missing.TEXT
        except ValueError as error:
            raise ValueError(
                f"{task.name}, row {number} of {origin} (counted from 0): {error}"
            ) from error


@dataclass
class _SortedRows:
    """Rows of a split by what can be done with them.

    Attributes:
        usable: number and example of the rows that are kept.
        missing: numbers of the rows that lack something, by what it is.
        empty: numbers of the rows with an empty choice.
    """

    usable: list[tuple[int, Example]] = field(default_factory=list)
    missing: dict[Missing, list[int]] = field(default_factory=lambda: defaultdict(list))
    empty: list[int] = field(default_factory=list)


def _sort_out(rows: Iterable[tuple[int, Example | Missing]], split: str) -> _SortedRows:
    """Separate the rows that can be used in `split` from those that cannot."""
    is_test = split == "test"
    sorted_rows = _SortedRows()
    for number, example in rows:
        if isinstance(example, Missing):
            sorted_rows.missing[example].append(number)
        elif not example.choices:
            sorted_rows.missing[Missing.ANSWER].append(number)
        elif is_test and "" in example.choices:
            # An empty choice has no tokens to score and no length to divide by. Only the test
            # split scores choices.
            sorted_rows.empty.append(number)
        elif not is_test and not example.target.strip():
            sorted_rows.missing[Missing.ANSWER].append(number)
        else:
            sorted_rows.usable.append((number, example))
    return sorted_rows

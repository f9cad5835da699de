"""The tasks, and their examples from the hub, a local folder in the hub's columns, or the user's
own files.

The two generic tasks take the user's own files; data/examples.py reads a row of each.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import datasets

from fedsp_mpi.data import examples, labels, sources
from fedsp_mpi.data.cells import Row, shown_choices
from fedsp_mpi.data.examples import Example

SPLITS = sources.SPLITS


@dataclass(frozen=True)
class Task:
    """What a task needs and how a row of it reads.

    Attributes:
        name: the name in a configuration.
        hub: path and configuration on the Hugging Face hub; None where the user must bring the
            data.
        columns: the columns that `example` reads; the last one holds the answer.
        metric: "multiple_choice" (log-likelihood of the options) or "exact_match" (greedy answer).
        example: row -> Example; raises ValueError, without saying which row.
        other_columns: another set of columns that `example` reads as well.
    """

    name: str
    hub: tuple[str, str | None] | None
    columns: tuple[str, ...]
    metric: str
    example: Callable[[Row], Example]
    other_columns: tuple[str, ...] = ()

    @property
    def answers_are_positions(self) -> bool:
        """Whether the last column holds the number of the right choice, in whatever form."""
        return self.columns[-1] == "label"

    @property
    def column_sets(self) -> tuple[tuple[str, ...], ...]:
        """The sets of columns of which a source must have one."""
        return tuple(columns for columns in (self.columns, self.other_columns) if columns)


@dataclass(frozen=True)
class Splits:
    """The examples of a task, in file order; `notes` says how the splits were made and what was
    left out.
    """

    train: tuple[Example, ...]
    validation: tuple[Example, ...]
    test: tuple[Example, ...]
    notes: tuple[str, ...]


# -- the tasks -------------------------------------------------------------------------------------


def _columns(names: str) -> tuple[str, ...]:
    return tuple(names.split())


_ARC = _columns("question choices answerKey")
_OPENBOOKQA = _columns("question_stem choices answerKey")
_HELLASWAG = _columns("activity_label ctx_a ctx_b endings label")
_SCIQ = _columns("support question distractor1 distractor2 distractor3 correct_answer")
_WEB_QUESTIONS = _columns("question answers")
_RACE, _RACE_LM_EVAL = _columns("article question options answer"), _columns("article problems")
_CHOICE, _MATCH = "multiple_choice", "exact_match"

_ALL_TASKS = (
    Task("arc_easy", ("allenai/ai2_arc", "ARC-Easy"), _ARC, _CHOICE, examples.arc),
    Task("arc_challenge", ("allenai/ai2_arc", "ARC-Challenge"), _ARC, _CHOICE, examples.arc),
    Task("openbookqa", ("allenai/openbookqa", "main"), _OPENBOOKQA, _CHOICE, examples.openbookqa),
    Task(
        "web_questions",
        ("stanfordnlp/web_questions", None),
        _WEB_QUESTIONS,
        _MATCH,
        examples.web_questions,
    ),
    Task("hellaswag", ("Rowan/hellaswag", None), _HELLASWAG, _CHOICE, examples.hellaswag),
    Task("piqa", ("baber/piqa", None), _columns("goal sol1 sol2 label"), _CHOICE, examples.piqa),
    Task("sciq", ("allenai/sciq", None), _SCIQ, _CHOICE, examples.sciq),
    # EleutherAI/race, which lm-eval scores, has a test split only; ehovy/race has all three.
    Task("race", ("ehovy/race", "high"), _RACE, _CHOICE, examples.race, _RACE_LM_EVAL),
    Task("sst2", ("nyu-mll/glue", "sst2"), _columns("sentence label"), _CHOICE, examples.sst2),
    Task(
        "rte", ("nyu-mll/glue", "rte"), _columns("sentence1 sentence2 label"), _CHOICE, examples.rte
    ),
    Task("ag_news", ("fancyzhx/ag_news", None), _columns("text label"), _CHOICE, examples.ag_news),
    Task(
        "multiple_choice",
        None,
        _columns("context choices label"),
        _CHOICE,
        examples.multiple_choice,
    ),
    Task(
        "question_answering", None, _columns("context answers"), _MATCH, examples.question_answering
    ),
)
TASKS: dict[str, Task] = {task.name: task for task in _ALL_TASKS}


def find(name: str) -> Task:
    """Return the task of that name.

    Raises ValueError with the known names, and the one that was probably meant.
    """
    if name in TASKS:
        return TASKS[name]
    near = difflib.get_close_matches(name, TASKS, n=1, cutoff=0.8)
    hint = f"did you mean {near[0]!r}? " if near else ""
    public = ", ".join(task.name for task in _ALL_TASKS if task.hub)
    generic = " or ".join(
        f"{task.name} ({', '.join(task.columns)})" for task in _ALL_TASKS if not task.hub
    )
    raise ValueError(
        f"data.task: found {name!r}, which is not known; {hint}expected one of "
        f"{public}; or for data of your own, "
        f"by columns, {generic}"
    )


# -- a source to examples --------------------------------------------------------------------------


def load(
    task: Task | str,
    source: str | None,
    *,
    seed: int,
    limit: Mapping[str, int | None] | None = None,
    columns: Mapping[str, str] | None = None,
) -> Splits:
    """Read the examples of a task.

    Test is the split `test` if it is there with its answers, else `validation`. Validation is the
    split `validation` unless test took it; then it is a tenth of `train`, drawn with `seed` and the
    same for every `limit`. A row of train or validation with nothing to teach, and any row with
    nothing to score, is left out. All of it stands in the notes.

    Args:
        source: None for the task's own data set on the hub; a folder with train/validation/test
            files (.jsonl, .jsonl.gz, .json, .csv, .parquet), a copy of a hub set, or one saved by
            `save_to_disk`; or the name of another hub set. "folder:configuration" and
            "name:configuration" choose among several configurations.
        seed: the experiment's seed; it matters only where validation is cut from train.
        limit: at most so many rows of "train", "validation", "test": the first ones in file order,
            as with lm-eval's `limit`. A cut validation keeps the file order too.
        columns: by the task's columns, how the source calls them, where it has other names.

    Raises:
        ValueError: unknown task, no such folder or hub set, hub out of reach, missing column or
            split, empty split, or a row that does not read; one line with found, expected and what
            to do.
    """
    task = find(task) if isinstance(task, str) else task
    limits = _limits(limit)
    tables, notes = sources.read(
        task.name, sources.locate(task.name, task.hub, source, columns), task.column_sets
    )
    rows, decisions = sources.split_rows(task.name, tables, task.column_sets, seed)
    notes += decisions
    chosen: dict[str, tuple[Example, ...]] = {}
    for split in SPLITS:
        origin, numbers = rows[split]
        if (most := limits.get(split)) is not None and most < len(numbers):
            notes.append(f"{split} = the first {most} of {len(numbers)} rows (limit)")
            numbers = numbers[:most]
        chosen[split], remarks = _examples(task, tables[origin], origin, numbers, split)
        notes += remarks
    return Splits(**chosen, notes=tuple(dict.fromkeys(notes)))


def check_columns(
    task: Task | str, source: str | None, columns: Mapping[str, str] | None = None
) -> None:
    """Find out in a moment whether `load` would find its folder or hub set and its columns;
    ValueError if not.
    """
    task = find(task) if isinstance(task, str) else task
    sources.check(task.name, sources.locate(task.name, task.hub, source, columns), task.column_sets)


def scored_rows(
    task: Task,
    source: str | None,
    seed: int,
    limit: int | None,
    columns: Mapping[str, str] | None = None,
) -> tuple[datasets.Dataset, list[Example]]:
    """Return the rows of the test split that `load` keeps, with lm-eval's form of their answers,
    and their examples.

    Raises ValueError as `load` does.
    """
    tables, _ = sources.read(
        task.name, sources.locate(task.name, task.hub, source, columns), task.column_sets
    )
    origin, numbers = sources.split_rows(task.name, tables, task.column_sets, seed)[0]["test"]
    numbers = numbers[:limit]
    kept, _, _ = _sorted_out(_read_rows(task, tables[origin], origin, numbers), "test")
    table = tables[origin].select([number for number, _ in kept])
    scored = [example for _, example in kept]
    if task.answers_are_positions:
        answer, gold = task.columns[-1], [example.gold[0] for example in scored]
        numbers_or_texts = list(map(str, gold)) if task.name == "hellaswag" else gold
        if table[:][answer] != numbers_or_texts:
            table = table.remove_columns(answer).add_column(answer, numbers_or_texts)
    return table, scored


def _limits(limit: Mapping[str, int | None] | None) -> dict[str, int | None]:
    limits = dict(limit or {})
    for split, most in limits.items():
        if split not in SPLITS:
            raise ValueError(
                f"found a limit for {split!r}, expected one for {', '.join(SPLITS)}; rename it"
            )
        if most is not None and (not isinstance(most, int) or most < 1):
            raise ValueError(
                f"found limit {most!r} for {split}, expected a whole number from 1, or none "
                "for all rows"
            )
    return limits


def _examples(
    task: Task, table: datasets.Dataset, origin: str, numbers: Sequence[int], split: str
) -> tuple[tuple[Example, ...], list[str]]:
    """The examples of the rows `numbers` of the source's split `origin`, and notes on the rows that
    were left out.
    """
    names = _class_names(task, table)
    kept, unanswered, empty = _sorted_out(_read_rows(task, table, origin, numbers, names), split)
    if not kept:
        empties = f", {len(empty)} with an empty choice" if empty else ""
        raise ValueError(
            f"{task.name}: found no usable row in {origin} ({len(numbers)} read{empties}), "
            "expected at least 1"
        )
    notes = []
    for rows, reason in ((unanswered, "without an answer"), (empty, "with an empty choice")):
        if rows:
            which = ", ".join(map(str, rows[:5])) + (", ..." if len(rows) > 5 else "")
            notes.append(
                f"{split}: {len(rows)} row{'s' if len(rows) > 1 else ''} {reason} left out "
                f"({origin} {which})"
            )
    if names and names.are_unknown:
        notes.append(
            f"the classes of the column {task.columns[-1]!r} have other names than the "
            "task's choices "
            f"({shown_choices(names.texts)}); 0 was taken for the first choice, 1 for the "
            "second, and so on"
        )
    return tuple(
        replace(example, row=f"row {number} of {origin}") for number, example in kept
    ), notes


def _class_names(task: Task, table: datasets.Dataset) -> labels.ClassNames | None:
    """The names that the file's schema gives to the numbers in the column of answers; None if it
    gives none.
    """
    feature = table.features.get(
        next(c[-1] for c in task.column_sets if c[-1] in table.column_names)
    )
    return (
        labels.ClassNames(tuple(feature.names))
        if isinstance(feature, datasets.ClassLabel)
        else None
    )


def _read_rows(
    task: Task,
    table: datasets.Dataset,
    origin: str,
    numbers: Sequence[int],
    names: labels.ClassNames | None = None,
) -> Iterator[tuple[int, Example | None]]:
    """Yield the number of each row and its example, or None where the row has no label.

    Raises ValueError, which names the row, where one does not read.
    """
    names = names or _class_names(task, table)
    is_csv = table.info.builder_name == "csv"
    for number, row in zip(numbers, table.select(numbers).to_list()):
        answer = next(columns[-1] for columns in task.column_sets if columns[-1] in row)
        if row[answer] is None:
            yield number, None
            continue
        if names:
            row[answer] = labels.ClassId(row[answer], names)
        elif is_csv and task.answers_are_positions:
            row[answer] = labels.number_in_cell(row[answer])
        try:
            yield number, task.example(row)
        except labels.NoLabelError:
            yield number, None
        except ValueError as error:
            raise ValueError(
                f"{task.name}, row {number} of {origin} (counted from 0): {error}"
            ) from error


def _sorted_out(
    rows: Iterable[tuple[int, Example | None]], split: str
) -> tuple[list[tuple[int, Example]], list[int], list[int]]:
    """The rows that can be used in `split`, and the numbers of those without an answer, and with an
    empty choice.

    An empty choice has no tokens to score and no length to divide by, which only the test split
    needs.
    """
    kept, unanswered, empty = [], [], []
    for number, example in rows:
        if (
            example is None
            or not example.choices
            or (split != "test" and not example.target.strip())
        ):
            unanswered.append(number)
        elif "" in example.choices and split == "test":
            empty.append(number)
        else:
            kept.append((number, example))
    return kept, unanswered, empty

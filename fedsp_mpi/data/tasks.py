"""The tasks: one small function each turns a row of the hub's columns into context, target and choices.

Templates, choices and right answers are those of lm-eval 0.4.13 (the tasks of the same names; `web_questions` is its
`webqs`), so that a score of this package is a score of lm-eval. The data come from the hub, from a local folder in the
hub's columns, or from the user's own files through the two generic tasks.
"""

from __future__ import annotations

import ast
import difflib
import re
import string
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import datasets

from fedsp_mpi.data import sources

Row = Mapping[str, Any]
SPLITS = sources.SPLITS


@dataclass(frozen=True)
class Example:
    """One example as training and scoring see it.

    Attributes:
        context: what the model is given, for instance "Question: ...\\nAnswer:".
        target: what training teaches, with its leading blank: " Paris".
        choices: the options without the leading blank; " " + choice is scored, len(choice) normalises (lm-eval).
        gold: indices of the right choices: one for multiple choice, all accepted answers for exact match.
        after: what follows the answer, for models that read both ways.
        row: where it stands in the source, for messages: "row 5 of train".
    """

    context: str
    target: str
    choices: tuple[str, ...]
    gold: tuple[int, ...]
    after: str = ""
    row: str = field(default="", compare=False)


@dataclass(frozen=True)
class Task:
    """What a task needs and how a row of it reads.

    Attributes:
        name: the name in a configuration.
        hub: path and configuration on the Hugging Face hub; None where the user must bring the data.
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


@dataclass(frozen=True)
class Splits:
    """The examples of a task, in file order; `notes` says how the splits were made and what was left out."""

    train: tuple[Example, ...]
    validation: tuple[Example, ...]
    test: tuple[Example, ...]
    notes: tuple[str, ...]


# -- rows to examples ----------------------------------------------------------------------------------------------


def _arc(row: Row) -> Example:
    """lm-eval arc_easy and arc_challenge."""
    return _lettered(row, f"Question: {_text(row, 'question')}\nAnswer:")


def _openbookqa(row: Row) -> Example:
    """lm-eval openbookqa: the stem alone, which the answer goes on."""
    return _lettered(row, _text(row, "question_stem"))


def _web_questions(row: Row) -> Example:
    """lm-eval webqs; the target is the first answer, as in FedSP's reference code."""
    return _answers(f"Question: {_text(row, 'question')}\nAnswer:", _texts(row, "answers"))


def _hellaswag(row: Row) -> Example:
    """lm-eval hellaswag: activity, first context, second context with a capital, without the WikiHow marks."""
    context = f"{_text(row, 'activity_label')}: {_text(row, 'ctx_a')} {_text(row, 'ctx_b').capitalize()}"
    endings = [_without_marks(ending) for ending in _texts(row, "endings")]
    label = _text(row, "label")
    return _one_of(_without_marks(context), endings, int(label) if label.isdecimal() else label)


def _piqa(row: Row) -> Example:
    """lm-eval piqa."""
    return _one_of(f"Question: {_text(row, 'goal')}\nAnswer:", [_text(row, "sol1"), _text(row, "sol2")], row["label"])


def _sciq(row: Row) -> Example:
    """lm-eval sciq: the right answer is always the last option."""
    names = ("distractor1", "distractor2", "distractor3", "correct_answer")
    context = f"{_text(row, 'support').lstrip()}\nQuestion: {_text(row, 'question')}\nAnswer:"
    return _one_of(context, [_text(row, name) for name in names], 3)


def _race(row: Row) -> Example:
    """lm-eval race: the article, its earlier problems with their answers, and the last problem's question.

    Reads the columns of EleutherAI/race (all problems of an article in one string) and of ehovy/race (one per row).
    """
    *earlier, last = _problems(row)
    context = f"Article: {_text(row, 'article')}\n\n"
    for problem in earlier:
        question, options = _text(problem, "question"), _texts(problem, "options")
        answer = options[_letter(problem, options)]
        # A cloze question ends in this blank; the answer takes its place, in front of nothing.
        filled = f"{question[:-5]}{answer}\n" if question.endswith("  _  .") else None
        context += filled or f"Question: {question}\nAnswer: {answer}\n"
    options = _texts(last, "options")
    return _one_of(context + _text(last, "question"), options, _letter(last, options))


def _sst2(row: Row) -> Example:
    """lm-eval sst2 (GLUE)."""
    question = f"{_text(row, 'sentence')}\nQuestion: Is this sentence positive or negative?\nAnswer:"
    return _one_of(question, ["negative", "positive"], row["label"])


def _rte(row: Row) -> Example:
    """lm-eval rte (GLUE)."""
    question = f"{_text(row, 'sentence1')}\nQuestion: {_text(row, 'sentence2')} True or False?\nAnswer:"
    return _one_of(question, ["True", "False"], row["label"])


def _ag_news(row: Row) -> Example:
    """Not in lm-eval; a template in the style of its sst2."""
    question = f"{_text(row, 'text')}\nQuestion: Is this news about world, sports, business or technology?\nAnswer:"
    return _one_of(question, ["world", "sports", "business", "technology"], row["label"])


def _multiple_choice(row: Row) -> Example:
    """The user's own multiple choice; nothing is added to the text but the blank before an option."""
    return _one_of(_text(row, "context"), _texts(row, "choices"), row["label"])


def _question_answering(row: Row) -> Example:
    """The user's own questions with their accepted answers; the first is taught."""
    return _answers(_text(row, "context"), _texts(row, "answers"))


def _columns(names: str) -> tuple[str, ...]:
    return tuple(names.split())


_ARC = _columns("question choices answerKey")
_OPENBOOKQA = _columns("question_stem choices answerKey")
_HELLASWAG = _columns("activity_label ctx_a ctx_b endings label")
_SCIQ = _columns("support question distractor1 distractor2 distractor3 correct_answer")
_RACE, _RACE_LM_EVAL = _columns("article question options answer"), _columns("article problems")
_CHOICE, _MATCH = "multiple_choice", "exact_match"

_ALL_TASKS = (
    Task("arc_easy", ("allenai/ai2_arc", "ARC-Easy"), _ARC, _CHOICE, _arc),
    Task("arc_challenge", ("allenai/ai2_arc", "ARC-Challenge"), _ARC, _CHOICE, _arc),
    Task("openbookqa", ("allenai/openbookqa", "main"), _OPENBOOKQA, _CHOICE, _openbookqa),
    Task("web_questions", ("stanfordnlp/web_questions", None), _columns("question answers"), _MATCH, _web_questions),
    Task("hellaswag", ("Rowan/hellaswag", None), _HELLASWAG, _CHOICE, _hellaswag),
    Task("piqa", ("baber/piqa", None), _columns("goal sol1 sol2 label"), _CHOICE, _piqa),
    Task("sciq", ("allenai/sciq", None), _SCIQ, _CHOICE, _sciq),
    # EleutherAI/race, which lm-eval scores, has a test split only; ehovy/race has all three.
    Task("race", ("ehovy/race", "high"), _RACE, _CHOICE, _race, _RACE_LM_EVAL),
    Task("sst2", ("nyu-mll/glue", "sst2"), _columns("sentence label"), _CHOICE, _sst2),
    Task("rte", ("nyu-mll/glue", "rte"), _columns("sentence1 sentence2 label"), _CHOICE, _rte),
    Task("ag_news", ("fancyzhx/ag_news", None), _columns("text label"), _CHOICE, _ag_news),
    Task("multiple_choice", None, _columns("context choices label"), _CHOICE, _multiple_choice),
    Task("question_answering", None, _columns("context answers"), _MATCH, _question_answering),
)
TASKS: dict[str, Task] = {task.name: task for task in _ALL_TASKS}


def find(name: str) -> Task:
    """The task of that name; ValueError with the nearest name if there is none."""
    if name in TASKS:
        return TASKS[name]
    near = difflib.get_close_matches(name, TASKS, n=1, cutoff=0.4)
    hint = f"did you mean {near[0]!r}?" if near else f"expected one of {', '.join(TASKS)}"
    raise ValueError(f"found task {name!r}, which is not known; {hint}")


# -- rows to examples: the common parts ----------------------------------------------------------------------------


def _one_of(context: str, choices: Sequence[str], gold: object) -> Example:
    """Multiple choice with one right option, given by its position.

    Truth values are refused: among ("True", "False") the first option would be taken for the second one.
    """
    if not isinstance(gold, int) or isinstance(gold, bool) or not 0 <= gold < len(choices):
        raise ValueError(
            f"column 'label': found {_shown(gold)}, expected a whole number from 0 to {len(choices) - 1}, the position "
            "of the right choice; correct the row"
        )
    return Example(context, f" {choices[gold]}", tuple(choices), (gold,))


def _lettered(row: Row, context: str) -> Example:
    """Multiple choice whose options have labels, A, B, ... or 1, 2, ...; the answer key is one of them."""
    options = row["choices"]
    if not isinstance(options, Mapping):
        raise ValueError(f"column 'choices': found {_shown(options)}, expected the lists 'text' and 'label'")
    texts, labels = _texts(options, "text"), _texts(options, "label")
    answer = _text(row, "answerKey").lstrip()
    if answer not in labels[: len(texts)]:
        raise ValueError(f"found answer key {answer!r}, expected one of {', '.join(labels)}; correct the row")
    return _one_of(context, texts, labels.index(answer))


def _answers(context: str, answers: Sequence[str]) -> Example:
    """Exact match with one of several answers.

    The choices are sorted and lose every answer that begins with another one, as in lm-eval's webqs: whoever continues
    with the longer one has also given the shorter one.
    """
    choices: list[str] = []
    for answer in sorted(answers):
        if not choices or not answer.startswith(choices[-1]):
            choices.append(answer)
    target = f" {answers[0]}" if answers else ""
    return Example(context, target, tuple(choices), tuple(range(len(choices))))


def _without_marks(text: str) -> str:
    """HellaSwag's text without the marks of WikiHow, as lm-eval cleans it."""
    return re.sub(r"\[.*?\]", "", text.strip().replace(" [title]", ". ")).replace("  ", " ")


def _problems(row: Row) -> list[Row]:
    """The problems of a RACE row: of its string `problems`, or the one that lies in its own columns."""
    if "problems" not in row:
        return [row]
    text = _text(row, "problems")
    try:
        problems = ast.literal_eval(text)
    except (SyntaxError, ValueError):
        problems = None
    if not (isinstance(problems, list) and problems and all(isinstance(p, Mapping) for p in problems)):
        raise ValueError(f"column 'problems': found {_shown(row['problems'])}, expected a Python list of problems")
    return problems


def _letter(problem: Row, options: Sequence[str]) -> int:
    """The position of a RACE problem's answer, which is a letter."""
    answer, letters = _text(problem, "answer"), string.ascii_uppercase[: len(options)]
    if len(answer) != 1 or answer not in letters:
        raise ValueError(f"found answer {answer!r}, expected one of {', '.join(letters)}; correct the row")
    return letters.index(answer)


def _text(row: Row, name: str) -> str:
    value = row.get(name)
    if not isinstance(value, str):
        raise ValueError(f"column {name!r}: found {_shown(value)}, expected text; correct the row")
    return value


def _texts(row: Row, name: str) -> tuple[str, ...]:
    value = row.get(name)
    if not isinstance(value, list) or not all(isinstance(text, str) for text in value):
        raise ValueError(f"column {name!r}: found {_shown(value)}, expected a list of texts; correct the row")
    return tuple(value)


def _shown(value: object) -> str:
    text = repr(value)
    return f"{type(value).__name__} {text if len(text) <= 60 else text[:57] + '...'}"


# -- a source to examples ------------------------------------------------------------------------------------------


def load(
    task: Task | str,
    source: str | None,
    *,
    seed: int,
    limit: Mapping[str, int | None] | None = None,
) -> Splits:
    """Read the examples of a task.

    Test is the split `test` if it is there with its answers, else `validation`. Validation is the split `validation`
    unless test took it; then it is a tenth of `train`, drawn with `seed` and the same for every `limit`. A row of train
    or validation with nothing to teach, and any row with nothing to score, is left out. All of it stands in the notes.

    Args:
        source: None for the task's own data set on the hub; a folder with train/validation/test files (.jsonl,
            .jsonl.gz, .json, .csv, .parquet), a copy of a hub set, or one saved by `save_to_disk`; or the name of
            another hub set. "folder:configuration" and "name:configuration" choose among several configurations.
        seed: the experiment's seed; it matters only where validation is cut from train.
        limit: at most so many rows of "train", "validation", "test": the first ones in file order, as with lm-eval's
            `limit`. A cut validation keeps the file order too.

    Raises:
        ValueError: unknown task, no such folder or hub set, hub out of reach, missing column or split, empty split, or
            a row that does not read; one line with found, expected and what to do.
    """
    task = find(task) if isinstance(task, str) else task
    limits = _limits(limit)
    tables = sources.read(task.name, sources.locate(task.name, task.hub, source), _column_sets(task))
    rows, notes = sources.split_rows(task.name, tables, _column_sets(task), seed)
    examples: dict[str, tuple[Example, ...]] = {}
    for split in SPLITS:
        origin, numbers = rows[split]
        if (most := limits.get(split)) is not None and most < len(numbers):
            notes.append(f"{split} = the first {most} of {len(numbers)} rows (limit)")
            numbers = numbers[:most]
        examples[split], told = _examples(task, tables[origin], origin, numbers, split)
        notes += told
    return Splits(**examples, notes=tuple(notes))


def check_columns(task: Task | str, source: str | None) -> None:
    """Find out in a moment whether `load` would find its folder or hub set and its columns; ValueError if not."""
    task = find(task) if isinstance(task, str) else task
    sources.check(task.name, sources.locate(task.name, task.hub, source), _column_sets(task))


def _column_sets(task: Task) -> tuple[tuple[str, ...], ...]:
    return tuple(columns for columns in (task.columns, task.other_columns) if columns)


def _limits(limit: Mapping[str, int | None] | None) -> dict[str, int | None]:
    limits = dict(limit or {})
    for split, most in limits.items():
        if split not in SPLITS:
            raise ValueError(f"found a limit for {split!r}, expected one for {', '.join(SPLITS)}; rename it")
        if most is not None and (not isinstance(most, int) or most < 1):
            raise ValueError(f"found limit {most!r} for {split}, expected a whole number from 1, or none for all rows")
    return limits


def _examples(
    task: Task, table: datasets.Dataset, origin: str, numbers: Sequence[int], split: str
) -> tuple[tuple[Example, ...], list[str]]:
    """The examples of the rows `numbers` of the source's split `origin`, and notes on the rows that were left out."""
    kept, left_out = [], []
    for number, row in zip(numbers, table.select(numbers).to_list()):
        try:
            example = task.example(row)
        except ValueError as error:
            raise ValueError(f"{task.name}, row {number} of {origin} (counted from 0): {error}") from error
        usable = example.choices and (split == "test" or example.target.strip())
        if usable:
            kept.append(replace(example, row=f"row {number} of {origin}"))
        else:
            left_out.append(number)
    if not kept:
        raise ValueError(f"{task.name}: found no usable row in {origin} ({len(numbers)} read), expected at least 1")
    which = ", ".join(map(str, left_out[:5])) + (", ..." if len(left_out) > 5 else "")
    notes = [f"{split}: {len(left_out)} rows without an answer left out ({origin} {which})"] if left_out else []
    return tuple(kept), notes

"""Turn a row of a data set into context, target and choices: one small function for each task.

Templates, choices and right answers are those of lm-eval 0.4.13 (the tasks of the same names;
`web_questions` is its `webqs`), so that a score of this package is a score of lm-eval.
"""

from __future__ import annotations

import ast
import re
import string
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from fedsp_mpi.data import labels
from fedsp_mpi.data.cells import (
    NoTextError,
    Row,
    as_text,
    describe_cell,
    describe_choices,
    describe_label,
    is_mapping,
    mapping,
    text,
    texts,
)


@dataclass(frozen=True)
class Example:
    """One example as training and scoring see it.

    Attributes:
        context: the text before the answer, for instance "Question: ...\\nAnswer:".
        target: the answer that training teaches, with its leading blank: " Paris".
        choices: the options without the leading blank; " " + choice is scored, len(choice)
            normalises (lm-eval).
        gold: indices of the right choices: one for multiple choice, all accepted answers for exact
            match.
        suffix: what follows the answer, for models that read both ways.
        row: its place in the source, for messages: "row 5 of train".
    """

    context: str
    target: str
    choices: tuple[str, ...]
    gold: tuple[int, ...]
    suffix: str = ""
    row: str = field(default="", compare=False)

    def as_text(self) -> str:
        """Return all fields in one text, which the digests in records are made of.

        Its form never changes, whatever the fields are called: a run could not be resumed.
        """
        return (
            f"Example(context={self.context!r}, target={self.target!r}, choices={self.choices!r}, "
            f"gold={self.gold!r}, after={self.suffix!r}, row={self.row!r})"
        )


def without_label(example: Example) -> Example:
    """Return an example of which neither the answer nor the right choice is known."""
    return replace(example, target="", gold=())


# -- rows to examples ------------------------------------------------------------------------------

# Names that public copies of a data set give its classes, in the order of the task's choices.
_SST2_CLASSES = (("negative", "neg"), ("positive", "pos"))
_RTE_CLASSES = (("true", "entailment"), ("false", "not_entailment", "not entailment"))
_AG_NEWS_CLASSES = (
    ("world",),
    ("sports", "sport"),
    ("business",),
    ("technology", "sci/tech", "tech", "science"),
)


def arc(row: Row) -> Example:
    """Read a row of arc_easy or arc_challenge (lm-eval)."""
    return _lettered(row, f"Question: {text(row, 'question')}\nAnswer:")


def openbookqa(row: Row) -> Example:
    """Read a row of openbookqa (lm-eval); the context is the stem, which the answer completes."""
    return _lettered(row, text(row, "question_stem"))


def web_questions(row: Row) -> Example:
    """Read a row of webqs (lm-eval); the target is the first answer, as in FedSP's own code."""
    return _answers(f"Question: {text(row, 'question')}\nAnswer:", texts(row, "answers"))


def hellaswag(row: Row) -> Example:
    """Read a row of hellaswag (lm-eval).

    The context is the activity, the first context and the capitalised second one, without the
    marks of WikiHow.
    """
    context = (
        f"{text(row, 'activity_label')}: {text(row, 'ctx_a')} {text(row, 'ctx_b').capitalize()}"
    )
    endings = [_without_wikihow_marks(ending) for ending in texts(row, "endings")]
    label = labels.number_in_cell(row.get("label"))
    return _one_of(_without_wikihow_marks(context), endings, label)


def plain_text(row: Row) -> Example:
    """Read a document, all of which is taught and scored.

    Raises:
        NoTextError: it is blank.
    """
    document = text(row, "text")
    if not document.strip():
        raise NoTextError("found a blank document")
    return Example("", document, (document,), (0,))


def piqa(row: Row) -> Example:
    """Read a row of piqa (lm-eval)."""
    context = f"Question: {text(row, 'goal')}\nAnswer:"
    solutions = [text(row, "sol1"), text(row, "sol2")]
    return _one_of(context, solutions, row.get("label"))


def sciq(row: Row) -> Example:
    """Read a row of sciq (lm-eval), whose right answer is always the last option."""
    names = ("distractor1", "distractor2", "distractor3", "correct_answer")
    context = f"{text(row, 'support').lstrip()}\nQuestion: {text(row, 'question')}\nAnswer:"
    return _one_of(context, [text(row, name) for name in names], 3)


def race(row: Row) -> Example:
    """Read a row of race (lm-eval).

    The context is the article, its earlier problems with their answers, and the question of the
    last problem.

    Reads the columns of EleutherAI/race (all problems of an article in one string) and of
    ehovy/race (one per row).
    """
    *earlier, last = _problems(row)
    context = f"Article: {text(row, 'article')}\n\n"
    for problem in earlier:
        question = text(problem, "question")
        options = texts(problem, "options")
        answer = options[_letter(problem, options)]
        if question.endswith("  _  ."):
            # A cloze question ends in this blank. As in lm-eval, the answer replaces all of it but
            # the first space, the full stop included.
            context += f"{question[:-5]}{answer}\n"
        else:
            context += f"Question: {question}\nAnswer: {answer}\n"
    options = texts(last, "options")
    return _one_of(context + text(last, "question"), options, _letter(last, options))


def sst2(row: Row) -> Example:
    """Read a row of sst2 (lm-eval, GLUE)."""
    question = f"{text(row, 'sentence')}\nQuestion: Is this sentence positive or negative?\nAnswer:"
    return _one_of(question, ["negative", "positive"], row.get("label"), synonyms=_SST2_CLASSES)


def rte(row: Row) -> Example:
    """Read a row of rte (lm-eval, GLUE)."""
    question = (
        f"{text(row, 'sentence1')}\nQuestion: {text(row, 'sentence2')} True or False?\nAnswer:"
    )
    return _one_of(question, ["True", "False"], row.get("label"), synonyms=_RTE_CLASSES)


def ag_news(row: Row) -> Example:
    """Read a row of ag_news, which lm-eval does not have; the template follows its sst2."""
    question = (
        f"{text(row, 'text')}\nQuestion: Is this news about world, sports, business or "
        "technology?\nAnswer:"
    )
    topics = ["world", "sports", "business", "technology"]
    return _one_of(question, topics, row.get("label"), synonyms=_AG_NEWS_CLASSES)


def multiple_choice(row: Row, first: int = 0) -> Example:
    """Read a row of the user's own multiple choice.

    Nothing is added to the text but the blank before an option. Options that have labels of their
    own, as in ARC and CommonsenseQA, are understood too.

    Args:
        row: of the table.
        first: number of the first option.
    """
    context = text(row, "context")
    if is_mapping(row, "choices"):
        return _lettered(row, context, answer_column="label")
    return _one_of(context, texts(row, "choices"), row.get("label"), first=first)


@dataclass(frozen=True)
class ChoiceColumns:
    """Read rows of multiple choice whose options have a column each, as in a spreadsheet.

    The last options of a row may be blank: it has fewer than others.

    Attributes:
        names: of the columns, in the order of the options.
        first: number of the first option.
    """

    names: tuple[str, ...]
    first: int = 0

    def __call__(self, row: Row) -> Example:
        """Return the example of a row.

        Raises:
            NoLabelError: the row has no answer.
            ValueError: the row does not read.
        """
        label = row.get("label")
        if labels.is_unlabelled(label):
            raise labels.NoLabelError("found no answer")
        options = [as_text(row, name) for name in self.names]
        while options and not options[-1].strip():
            options.pop()
        if len(options) < 2:
            raise ValueError(
                f"data.columns.choices: found {len(options)} choices in the row, expected at least "
                "2; correct the row"
            )
        # Among options that are numbers, a number may mean one of them by its place or by its name.
        if any(isinstance(row[name], (int, float)) for name in self.names):
            label = str(label)
        return _one_of(text(row, "context"), options, label, first=self.first)


def question_answering(row: Row) -> Example:
    """Read a row of the user's own questions with their accepted answers; the first is taught."""
    return _answers(text(row, "context"), texts(row, "answers"))


# -- the common parts ----------------------------------------------------------------------------


def _one_of(
    context: str,
    choices: Sequence[str],
    label: object,
    *,
    synonyms: labels.Synonyms = (),
    first: int = 0,
) -> Example:
    """Build a multiple choice with one right option.

    Args:
        context: what the model is asked with.
        choices: the options.
        label: the right option, in any form that `labels.position` reads.
        synonyms: of the options, where they are the task's classes.
        first: number of the first option.
    """
    gold = labels.position(label, choices, synonyms, first=first)
    return Example(context, f" {choices[gold]}", tuple(choices), (gold,))


def _lettered(row: Row, context: str, *, answer_column: str = "answerKey") -> Example:
    """Build a multiple choice whose options have labels (A, B, ... or 1, 2, ...).

    The answer key is one of the labels.

    Args:
        row: of the table.
        context: what the model is asked with.
        answer_column: holds the answer key.
    """
    options = mapping(row, "choices")
    choices = texts(options, "text")
    letters = texts(options, "label")
    answer = labels.key(row.get(answer_column))
    if answer not in letters[: len(choices)]:
        raise ValueError(
            f"found answer key {describe_label(answer)}, expected one of "
            f"{describe_choices(letters)}; correct the row"
        )
    gold = letters.index(answer)
    return Example(context, f" {choices[gold]}", choices, (gold,))


def _answers(context: str, answers: Sequence[str]) -> Example:
    """Build an exact match with one of several answers.

    The choices are sorted and lose every answer that begins with another one, as in lm-eval's
    webqs: whoever continues with the longer one has also given the shorter one.
    """
    choices: list[str] = []
    for answer in sorted(answers):
        if not choices or not answer.startswith(choices[-1]):
            choices.append(answer)
    target = f" {answers[0]}" if answers else ""
    return Example(context, target, tuple(choices), tuple(range(len(choices))))


def _without_wikihow_marks(text: str) -> str:
    """Return a text of HellaSwag without the marks of WikiHow, as lm-eval cleans it."""
    return re.sub(r"\[.*?\]", "", text.strip().replace(" [title]", ". ")).replace("  ", " ")


def _problems(row: Row) -> list[Row]:
    """Return the problems of a RACE row: of its column `problems`, or the one that it is."""
    if "problems" not in row:
        return [row]
    cell = text(row, "problems")
    try:
        problems = ast.literal_eval(cell)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        problems = None
    is_list = isinstance(problems, list) and len(problems) > 0
    if not is_list or not all(isinstance(problem, Mapping) for problem in problems):
        raise ValueError(
            f"column 'problems': found {describe_cell(row['problems'])}, expected a Python list "
            "of problems"
        )
    return problems


def _letter(problem: Row, options: Sequence[str]) -> int:
    """Return the position of a RACE problem's answer, which is a letter."""
    answer = labels.key(problem.get("answer"))
    letters = string.ascii_uppercase[: len(options)]
    if len(answer) != 1 or answer not in letters:
        raise ValueError(
            f"found answer {describe_label(answer)}, expected one of {', '.join(letters)}; "
            "correct the row"
        )
    return letters.index(answer)

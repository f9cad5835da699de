"""A row of a data set to context, target and choices: one small function each task, in lm-eval's
words.

Templates, choices and right answers are those of lm-eval 0.4.13 (the tasks of the same names;
`web_questions` is its `webqs`), so that a score of this package is a score of lm-eval.
"""

from __future__ import annotations

import ast
import re
import string
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from fedsp_mpi.data import labels
from fedsp_mpi.data.cells import Row, mapping, shown, shown_choices, shown_label, text, texts


@dataclass(frozen=True)
class Example:
    """One example as training and scoring see it.

    Attributes:
        context: what the model is given, for instance "Question: ...\\nAnswer:".
        target: what training teaches, with its leading blank: " Paris".
        choices: the options without the leading blank; " " + choice is scored, len(choice)
            normalises (lm-eval).
        gold: indices of the right choices: one for multiple choice, all accepted answers for exact
            match.
        after: what follows the answer, for models that read both ways.
        row: where it stands in the source, for messages: "row 5 of train".
    """

    context: str
    target: str
    choices: tuple[str, ...]
    gold: tuple[int, ...]
    after: str = ""
    row: str = field(default="", compare=False)


# -- rows to examples ------------------------------------------------------------------------------

# What public copies of a data set call its classes, in the order of the task's choices.
_SST2_CLASSES = (("negative", "neg"), ("positive", "pos"))
_RTE_CLASSES = (("true", "entailment"), ("false", "not_entailment", "not entailment"))
_AG_NEWS_CLASSES = (
    ("world",),
    ("sports", "sport"),
    ("business",),
    ("technology", "sci/tech", "tech", "science"),
)


def arc(row: Row) -> Example:
    """lm-eval arc_easy and arc_challenge."""
    return _lettered(row, f"Question: {text(row, 'question')}\nAnswer:")


def openbookqa(row: Row) -> Example:
    """lm-eval openbookqa: the stem alone, which the answer goes on."""
    return _lettered(row, text(row, "question_stem"))


def web_questions(row: Row) -> Example:
    """lm-eval webqs; the target is the first answer, as in FedSP's reference code."""
    return _answers(f"Question: {text(row, 'question')}\nAnswer:", texts(row, "answers"))


def hellaswag(row: Row) -> Example:
    """lm-eval hellaswag: activity, first context, second context with a capital, without the
    WikiHow marks.
    """
    context = (
        f"{text(row, 'activity_label')}: {text(row, 'ctx_a')} {text(row, 'ctx_b').capitalize()}"
    )
    endings = [_without_marks(ending) for ending in texts(row, "endings")]
    return _one_of(_without_marks(context), endings, labels.number_in_cell(row.get("label")))


def piqa(row: Row) -> Example:
    """lm-eval piqa."""
    return _one_of(
        f"Question: {text(row, 'goal')}\nAnswer:",
        [text(row, "sol1"), text(row, "sol2")],
        row.get("label"),
    )


def sciq(row: Row) -> Example:
    """lm-eval sciq: the right answer is always the last option."""
    names = ("distractor1", "distractor2", "distractor3", "correct_answer")
    context = f"{text(row, 'support').lstrip()}\nQuestion: {text(row, 'question')}\nAnswer:"
    return _one_of(context, [text(row, name) for name in names], 3)


def race(row: Row) -> Example:
    """lm-eval race: the article, its earlier problems with their answers, and the last problem's
    question.

    Reads the columns of EleutherAI/race (all problems of an article in one string) and of
    ehovy/race (one per row).
    """
    *earlier, last = _problems(row)
    context = f"Article: {text(row, 'article')}\n\n"
    for problem in earlier:
        question, options = text(problem, "question"), texts(problem, "options")
        answer = options[_letter(problem, options)]
        # A cloze question ends in this blank; the answer takes its place, in front of nothing.
        filled = f"{question[:-5]}{answer}\n" if question.endswith("  _  .") else None
        context += filled or f"Question: {question}\nAnswer: {answer}\n"
    options = texts(last, "options")
    return _one_of(context + text(last, "question"), options, _letter(last, options))


def sst2(row: Row) -> Example:
    """lm-eval sst2 (GLUE)."""
    question = f"{text(row, 'sentence')}\nQuestion: Is this sentence positive or negative?\nAnswer:"
    return _one_of(question, ["negative", "positive"], row.get("label"), _SST2_CLASSES)


def rte(row: Row) -> Example:
    """lm-eval rte (GLUE)."""
    question = (
        f"{text(row, 'sentence1')}\nQuestion: {text(row, 'sentence2')} True or False?\nAnswer:"
    )
    return _one_of(question, ["True", "False"], row.get("label"), _RTE_CLASSES)


def ag_news(row: Row) -> Example:
    """Not in lm-eval; a template in the style of its sst2."""
    question = (
        f"{text(row, 'text')}\nQuestion: Is this news about world, sports, business or "
        "technology?\nAnswer:"
    )
    return _one_of(
        question, ["world", "sports", "business", "technology"], row.get("label"), _AG_NEWS_CLASSES
    )


def multiple_choice(row: Row) -> Example:
    """The user's own multiple choice; nothing is added to the text but the blank before an option."""
    return _one_of(text(row, "context"), texts(row, "choices"), row.get("label"))


def question_answering(row: Row) -> Example:
    """The user's own questions with their accepted answers; the first is taught."""
    return _answers(text(row, "context"), texts(row, "answers"))


# -- the common parts ----------------------------------------------------------------------------


def _one_of(
    context: str, choices: Sequence[str], label: object, classes: labels.Synonyms = ()
) -> Example:
    """Multiple choice with one right option, given by a label of any form that `labels.position`
    reads.
    """
    gold = labels.position(label, choices, classes)
    return Example(context, f" {choices[gold]}", tuple(choices), (gold,))


def _lettered(row: Row, context: str) -> Example:
    """Multiple choice whose options have labels, A, B, ...

    or 1, 2, ...; the answer key is one of them.
    """
    options = mapping(row, "choices")
    choices, letters = texts(options, "text"), texts(options, "label")
    answer = labels.key(row.get("answerKey"))
    if answer not in letters[: len(choices)]:
        raise ValueError(
            f"found answer key {shown_label(answer)}, expected one of "
            f"{shown_choices(letters)}; correct the row"
        )
    gold = letters.index(answer)
    return Example(context, f" {choices[gold]}", choices, (gold,))


def _answers(context: str, answers: Sequence[str]) -> Example:
    """Exact match with one of several answers.

    The choices are sorted and lose every answer that begins with another one, as in lm-eval's
    webqs: whoever continues with the longer one has also given the shorter one.
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
    """The problems of a RACE row: of its string `problems`, or the one that lies in its own
    columns.
    """
    if "problems" not in row:
        return [row]
    written = text(row, "problems")
    try:
        problems = ast.literal_eval(written)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        problems = None
    if not (
        isinstance(problems, list) and problems and all(isinstance(p, Mapping) for p in problems)
    ):
        raise ValueError(
            f"column 'problems': found {shown(row['problems'])}, expected a Python list of problems"
        )
    return problems


def _letter(problem: Row, options: Sequence[str]) -> int:
    """The position of a RACE problem's answer, which is a letter."""
    answer, letters = labels.key(problem.get("answer")), string.ascii_uppercase[: len(options)]
    if len(answer) != 1 or answer not in letters:
        raise ValueError(
            f"found answer {shown_label(answer)}, expected one of {', '.join(letters)}; "
            "correct the row"
        )
    return letters.index(answer)

"""The tasks: where their data are, how a row of them reads, and all else that is known of one task.

The generic tasks take the user's own files. data/examples.py turns a row of each task into an
example, data/loading.py reads them all.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from fedsp_mpi.data import classification, examples
from fedsp_mpi.data.cells import Row
from fedsp_mpi.data.examples import Example

PLAIN_TEXT = "plain_text"  # the name of the task without questions


@dataclass(frozen=True)
class LmEvalTask:
    """The same task in lm-eval.

    Attributes:
        name: lm-eval's name of the task.
        folder: its folder among lm-eval's tasks; to search all of them takes ten seconds.
        columns: the columns that lm-eval needs, where the task also reads rows without them.
        labels_are_text: whether lm-eval expects the position of the right choice as text.
    """

    name: str
    folder: str
    columns: tuple[str, ...] = ()
    labels_are_text: bool = False


@dataclass(frozen=True)
class TextLengths:
    """Lengths of a task's training texts, context and answer, in tokens.

    Attributes:
        tokens: mean number of tokens of a text.
        answers: mean number of tokens of its answer.
        longest: number of tokens of the longest text.
        source: where the numbers come from.
    """

    tokens: int
    answers: int
    longest: int
    source: str = "measured"


ASSUMED_LENGTHS = TextLengths(64, 4, 256, source="assumed")


@dataclass(frozen=True)
class Task:
    """What a task needs and how a row of it reads.

    Attributes:
        name: the name in a configuration.
        hub: path and configuration on the Hugging Face hub; None where the user must bring the
            data.
        column_sets: the sets of columns that `example` reads, the usual one first; a source must
            have one of them. The last column of a set holds the answer.
        metric: "multiple_choice" (log-likelihood of the options), "exact_match" (greedy answer) or
            "perplexity" (of all tokens; there is no question).
        example: row -> Example; raises ValueError, without saying which row.
        lm_eval: the same task in lm-eval; None where lm-eval does not have it.
        num_classes: number of choices, where all rows have the same ones; else None.
        lengths: of the training texts with GPT-2's tokenizer (of sciq: of the validation texts,
            which all have their support).
        reader: classes -> `example`; None unless the classes are those of the user's rows, which
            are yet to be found.
        has_own_labels: whether `example` knows itself what a label that is a text may mean, so that
            those of CSV stay as they are.
    """

    name: str
    hub: tuple[str, str | None] | None
    column_sets: tuple[tuple[str, ...], ...]
    metric: str
    example: Callable[[Row], Example]
    lm_eval: LmEvalTask | None = None
    num_classes: int | None = None
    lengths: TextLengths = ASSUMED_LENGTHS
    reader: Callable[[tuple[str, ...]], Callable[[Row], Example]] | None = None
    has_own_labels: bool = False

    def with_classes(self, classes: Sequence[str]) -> Task:
        """Return the task with the classes of its rows.

        Raises:
            ValueError: its own words do not fit the classes.
        """
        assert self.reader is not None
        return replace(
            self, example=self.reader(tuple(classes)), num_classes=len(classes), reader=None
        )

    @property
    def columns(self) -> tuple[str, ...]:
        """The usual set of columns."""
        return self.column_sets[0]

    @property
    def answers_are_positions(self) -> bool:
        """Whether the last column holds the number of the right choice, in whatever form."""
        return self.columns[-1] == "label"

    @property
    def lm_eval_name(self) -> str:
        """The name of the task in lm-eval; its own name where lm-eval does not have it."""
        return self.lm_eval.name if self.lm_eval else self.name


@dataclass(frozen=True)
class Splits:
    """The examples of a task, in file order.

    Attributes:
        train: examples that are taught.
        validation: examples that choose among prompts.
        test: examples that are scored.
        notes: how the splits were made, and what was left out.
        unlabelled: examples of train without a label, where they are asked for.
    """

    train: tuple[Example, ...]
    validation: tuple[Example, ...]
    test: tuple[Example, ...]
    notes: tuple[str, ...]
    unlabelled: tuple[Example, ...] = ()


# -- the tasks -------------------------------------------------------------------------------------

# As long as a model and data.max_length allow, every token an answer.
_BLOCKS = TextLengths(10_000_000, 10_000_000, 10_000_000, source="blocks without padding")
_ARC_COLUMNS = ("question", "choices", "answerKey")

_ALL_TASKS = (
    Task(
        name="arc_easy",
        hub=("allenai/ai2_arc", "ARC-Easy"),
        column_sets=(_ARC_COLUMNS,),
        metric="multiple_choice",
        example=examples.arc,
        lm_eval=LmEvalTask("arc_easy", folder="arc"),
        lengths=TextLengths(32, 5, 124),
    ),
    Task(
        name="arc_challenge",
        hub=("allenai/ai2_arc", "ARC-Challenge"),
        column_sets=(_ARC_COLUMNS,),
        metric="multiple_choice",
        example=examples.arc,
        lm_eval=LmEvalTask("arc_challenge", folder="arc"),
        lengths=TextLengths(36, 6, 143),
    ),
    Task(
        name="openbookqa",
        hub=("allenai/openbookqa", "main"),
        column_sets=(("question_stem", "choices", "answerKey"),),
        metric="multiple_choice",
        example=examples.openbookqa,
        lm_eval=LmEvalTask("openbookqa", folder="openbookqa"),
        lengths=TextLengths(16, 4, 80),
    ),
    Task(
        name="web_questions",
        hub=("stanfordnlp/web_questions", None),
        column_sets=(("question", "answers"),),
        metric="exact_match",
        example=examples.web_questions,
        lm_eval=LmEvalTask("webqs", folder="webqs"),
        lengths=TextLengths(18, 3, 107),
    ),
    Task(
        name="hellaswag",
        hub=("Rowan/hellaswag", None),
        column_sets=(("activity_label", "ctx_a", "ctx_b", "endings", "label"),),
        metric="multiple_choice",
        example=examples.hellaswag,
        lm_eval=LmEvalTask("hellaswag", folder="hellaswag", labels_are_text=True),
        lengths=TextLengths(77, 28, 145),
    ),
    Task(
        name="piqa",
        hub=("baber/piqa", None),
        column_sets=(("goal", "sol1", "sol2", "label"),),
        metric="multiple_choice",
        example=examples.piqa,
        lm_eval=LmEvalTask("piqa", folder="piqa"),
        lengths=TextLengths(30, 20, 256, source="estimated"),
    ),
    Task(
        name="sciq",
        hub=("allenai/sciq", None),
        column_sets=(
            (
                "support",
                "question",
                "distractor1",
                "distractor2",
                "distractor3",
                "correct_answer",
            ),
        ),
        metric="multiple_choice",
        example=examples.sciq,
        lm_eval=LmEvalTask("sciq", folder="sciq"),
        lengths=TextLengths(110, 2, 572),
    ),
    # EleutherAI/race, which lm-eval scores, has a test split only; ehovy/race has all three.
    Task(
        name="race",
        hub=("ehovy/race", "high"),
        column_sets=(("article", "question", "options", "answer"), ("article", "problems")),
        metric="multiple_choice",
        example=examples.race,
        lm_eval=LmEvalTask("race", folder="race", columns=("article", "problems")),
        lengths=TextLengths(400, 8, 1024, source="estimated"),
    ),
    Task(
        name="sst2",
        hub=("nyu-mll/glue", "sst2"),
        column_sets=(("sentence", "label"),),
        metric="multiple_choice",
        example=examples.sst2,
        lm_eval=LmEvalTask("sst2", folder="glue/sst2"),
        num_classes=2,
        lengths=TextLengths(26, 1, 75),
    ),
    Task(
        name="rte",
        hub=("nyu-mll/glue", "rte"),
        column_sets=(("sentence1", "sentence2", "label"),),
        metric="multiple_choice",
        example=examples.rte,
        lm_eval=LmEvalTask("rte", folder="glue/rte"),
        num_classes=2,
        lengths=TextLengths(78, 1, 264),
    ),
    Task(
        name="ag_news",
        hub=("fancyzhx/ag_news", None),
        column_sets=(("text", "label"),),
        metric="multiple_choice",
        example=examples.ag_news,
        num_classes=4,
        lengths=TextLengths(61, 1, 336),
    ),
    Task(
        name="classification",
        hub=None,
        column_sets=((classification.TEXT, "label"),),
        metric="multiple_choice",
        example=classification.needs_classes,
        reader=classification.Reader,
        has_own_labels=True,
    ),
    Task(
        name="multiple_choice",
        hub=None,
        column_sets=(("context", "choices", "label"),),
        metric="multiple_choice",
        example=examples.multiple_choice,
    ),
    Task(
        name="question_answering",
        hub=None,
        column_sets=(("context", "answers"),),
        metric="exact_match",
        example=examples.question_answering,
    ),
    Task(
        name=PLAIN_TEXT,
        hub=None,
        column_sets=(("text",),),
        metric="perplexity",
        example=examples.plain_text,
        lengths=_BLOCKS,
    ),
)
TASKS: dict[str, Task] = {task.name: task for task in _ALL_TASKS}


def find(name: str) -> Task:
    """Return the task of that name.

    Raises:
        ValueError: there is no such task; the message lists the tasks, and suggests a similar one.
    """
    if name in TASKS:
        return TASKS[name]
    similar = difflib.get_close_matches(name, TASKS, n=1, cutoff=0.8)
    hint = f"did you mean {similar[0]!r}? " if similar else ""
    public = ", ".join(task.name for task in _ALL_TASKS if task.hub)
    generic = " or ".join(
        f"{task.name} ({', '.join(task.columns)})" for task in _ALL_TASKS if not task.hub
    )
    raise ValueError(
        f"data.task: found {name!r}, which is not known; {hint}expected one of {public}; "
        f"or for data of your own, by columns, {generic}"
    )

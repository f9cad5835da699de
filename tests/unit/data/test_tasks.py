"""Contexts, choices and answers equal lm-eval's on every local data set; a row that does not read
says why.
"""

import json
import os
from pathlib import Path

import datasets
import pytest

from fedsp_mpi.data import loading
from fedsp_mpi.data.tasks import TASKS, Example
from helpers.paths import SHARED

DATA = SHARED / "data"
# FULL_LM_EVAL=1 compares every row of every split; else the scored split whole and the first rows
# of the others.
OTHER_ROWS = None if os.environ.get("FULL_LM_EVAL") else 300

# Package task -> (lm-eval task, the split that both score in the local copy).
LM_EVAL = {
    "arc_easy": ("arc_easy", "test"),
    "arc_challenge": ("arc_challenge", "test"),
    "openbookqa": ("openbookqa", "test"),
    "web_questions": ("webqs", "test"),
    "hellaswag": ("hellaswag", "validation"),
    "sciq": ("sciq", "validation"),
    "sst2": ("sst2", "validation"),
    "rte": ("rte", "validation"),
}
MANY_ROWS_ARE_SLOW = [
    pytest.param(name, marks=pytest.mark.slow) if name in ("hellaswag", "arc_easy") else name
    for name in LM_EVAL
]
CHOICE_ROW = {"context": "Q: 1 + 1?\nA:", "choices": ["two", "three"], "label": 0}
ARC_ROW = {
    "question": "Why?",
    "choices": {"text": ["so", "no"], "label": ["1", "2"]},
    "answerKey": "2",
}
PROBLEM = {"question": "I have  _  .", "answer": "B", "options": ["a cat", "a dog", "3", "[x]"]}
AWKWARD = {
    "piqa": [
        {"goal": "Boil {{water}} ", "sol1": 'it\'s "hot"\n', "sol2": "  no", "label": 1},
        {"goal": "42", "sol1": "é", "sol2": "\\n", "label": 0},
    ],
    "arc_easy": [ARC_ROW, ARC_ROW | {"question": ' {% "a" %} ', "answerKey": "1"}],
    "openbookqa": [{"question_stem": "Ice is ", "choices": ARC_ROW["choices"], "answerKey": " 2"}],
    "hellaswag": [
        {
            "activity_label": "Home and Garden ",
            "ctx_a": "[header] How to mow [title] First. [step] Take  a   mower.",
            "ctx_b": "the Man [substeps]",
            "endings": ["[step] goes [title] on", " [title] [a] [b]", "x [unclosed", "l'été  "],
            "label": "3",
        },
        {
            "activity_label": "A",
            "ctx_a": "b.",
            "ctx_b": "",
            "endings": ["c", "d", "e", "f"],
            "label": "0",
        },
    ],
    "sciq": [
        {
            "support": " \n Water boils.  ",
            "question": "At?",
            "distractor1": "1'",
            "distractor2": '2"',
            "distractor3": " 3",
            "correct_answer": "100 °C",
        }
    ],
}


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory, monkeypatch):
    """What `datasets` prepares goes to a folder of this test run."""
    monkeypatch.setattr(
        datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.getbasetemp() / "cache"
    )


def local(name: str) -> str:
    if not (DATA / name).is_dir():
        pytest.skip(f"no local copy of {name} in ../shared/data")
    return str(DATA / name)


def write(folder: Path, **files: object) -> str:
    """Rows to folder/<split>.jsonl; a text is written as it is, under a name with _ for the dot."""
    folder.mkdir(exist_ok=True)
    for name, content in files.items():
        path = folder / (name.replace("_", ".") if "_" in name else f"{name}.jsonl")
        text = (
            content
            if isinstance(content, str)
            else "".join(json.dumps(row) + "\n" for row in content)
        )
        path.write_text(text)
    return str(folder)


# -- equality with lm-eval -------------------------------------------------------------------------


def lm_eval_task(name: str, data: datasets.DatasetDict, monkeypatch):
    """lm-eval's own object for a task, over the given data instead of the hub's."""
    lm_eval_tasks = pytest.importorskip("lm_eval.tasks")
    folder = Path(lm_eval_tasks.__file__).parent
    rooms = [
        str(folder / room)
        for room in ("arc", "openbookqa", "webqs", "hellaswag", "piqa", "sciq", "race", "glue")
    ]
    manager = lm_eval_tasks.TaskManager(include_path=rooms, include_defaults=False)
    monkeypatch.setattr(datasets, "load_dataset", lambda path, name=None, **_: data)
    return manager.load(name)["tasks"][name]


def requests_of(task) -> list[tuple[str, list[str], tuple[int, ...]]]:
    """What lm-eval sends to a model for each document it scores: context, continuations; and the
    right ones.
    """
    task.build_all_requests(limit=None, rank=0, world_size=1)
    by_doc: dict[int, tuple] = {}
    for instance in task.instances:
        context, continuation = instance.args
        if instance.doc_id not in by_doc:
            by_doc[instance.doc_id] = (context, [], positions(task.doc_to_target(instance.doc)))
        by_doc[instance.doc_id][1].append(continuation)
    return [by_doc[k] for k in sorted(by_doc)]


def positions(gold: int | list[int]) -> tuple[int, ...]:
    return tuple(gold) if isinstance(gold, list) else (gold,)


def same(example: Example, context: str, continuations: list[str], gold: tuple[int, ...]) -> None:
    assert example.context == context
    assert [f" {choice}" for choice in example.choices] == continuations
    assert example.gold == gold


@pytest.mark.parametrize("name", MANY_ROWS_ARE_SLOW)
def test_what_is_scored_equals_lm_eval(name, monkeypatch):
    data = datasets.load_dataset(local(name))
    other, split = LM_EVAL[name]
    if name == "sciq":  # lm-eval has a test split in mind that the local copy does not have
        data["test"] = data["validation"]
    splits = loading.load(name, local(name), seed=0)
    ours = splits.validation if name == "sst2" else splits.test
    theirs = requests_of(lm_eval_task(other, data, monkeypatch))
    assert len(ours) == len(theirs) == len(data[split])
    for example, (context, continuations, gold) in zip(ours, theirs):
        same(example, context, continuations, gold)


@pytest.mark.parametrize(
    "name",
    [pytest.param(n, marks=[pytest.mark.slow] if n == "hellaswag" else []) for n in LM_EVAL],
)
def test_every_other_row_equals_lm_eval(name, monkeypatch):
    data = datasets.load_dataset(local(name))
    if name == "sciq":  # lm-eval has a test split in mind that the local copy does not have
        data["test"] = data["validation"]
    theirs = lm_eval_task(LM_EVAL[name][0], data, monkeypatch)
    process = theirs.config.process_docs or (lambda table: table)
    for table in data.values():
        table = table.select(range(min(len(table), OTHER_ROWS or len(table))))
        for row, doc in zip(table, process(table)):
            expected = [f" {choice}" for choice in theirs.doc_to_choice(doc)]
            same(
                TASKS[name].example(row),
                theirs.doc_to_text(doc),
                expected,
                positions(theirs.doc_to_target(doc)),
            )


@pytest.mark.parametrize("name", AWKWARD)
def test_awkward_rows_equal_lm_eval(name, tmp_path, monkeypatch):
    """What the local copies do not show: WikiHow marks, numbered labels, blanks, quotes, braces, a
    whole data set.
    """
    rows = AWKWARD[name]
    source = write(tmp_path / name, train=rows * 10, validation=rows, test=rows)
    theirs = requests_of(lm_eval_task(name, datasets.load_dataset(source), monkeypatch))
    ours = loading.load(name, source, seed=0).test
    assert len(ours) == len(theirs) == len(rows)
    for example, expected in zip(ours, theirs):
        same(example, *expected)


def race_rows() -> list[dict]:
    last = {
        "question": "What is it's {{name}}?",
        "answer": "D",
        "options": ["a", 'b "c"', "d\n", "ü"],
    }
    plain = {"question": "Why _ ?", "answer": "A", "options": ["w", "x", "y", "z"]}
    stories = [[last], [PROBLEM, last], [plain, PROBLEM, PROBLEM], [last, plain]]
    return [
        {"article": f"Text {k}.\n ", "problems": repr(problems)}
        for k, problems in enumerate(stories)
    ]


def test_race_equals_lm_eval_in_both_forms_of_columns(tmp_path, monkeypatch):
    rows = race_rows()
    source = write(tmp_path / "race", train=rows, validation=rows, test=rows)
    theirs = requests_of(lm_eval_task("race", datasets.load_dataset(source), monkeypatch))
    ours = loading.load("race", source, seed=0).test
    assert len(ours) == len(theirs) == 4
    for example, expected in zip(ours, theirs):
        same(example, *expected)
    single = {"article": "Text 0.\n ", "question": "What is it's {{name}}?", "answer": "D"}
    assert TASKS["race"].example(single | {"options": ["a", 'b "c"', "d\n", "ü"]}) == ours[0]
    assert ours[1].context == "Article: Text 1.\n \n\nI have a dog\nWhat is it's {{name}}?"


# -- what is taught --------------------------------------------------------------------------------


def test_the_target_is_the_right_choice_after_a_blank():
    for name in ("arc_easy", "openbookqa", "hellaswag", "sst2", "ag_news"):
        train = loading.load(name, local(name), seed=0, limit={"train": 200}).train
        assert len(train) == 200
        assert all(example.target == f" {example.choices[example.gold[0]]}" for example in train)


def test_web_questions_teach_the_first_answer_and_accept_all():
    example = TASKS["web_questions"].example(
        {"question": "who?", "answers": ["Zoe", "Ann Lee", "Ann"]}
    )
    assert example == Example("Question: who?\nAnswer:", " Zoe", ("Ann", "Zoe"), (0, 1))


def test_the_generic_tasks_add_nothing_to_the_text():
    assert TASKS["multiple_choice"].example(CHOICE_ROW) == Example(
        "Q: 1 + 1?\nA:", " two", ("two", "three"), (0,)
    )
    answered = TASKS["question_answering"].example({"context": "Say it:", "answers": ["b", "a"]})
    assert answered == Example("Say it:", " b", ("a", "b"), (0, 1))


@pytest.mark.parametrize(
    ("name", "row", "words"),
    [
        ("arc_easy", ARC_ROW | {"answerKey": "E"}, ["answer key 'E'", "1, 2"]),
        ("arc_easy", ARC_ROW | {"choices": ["so", "no"]}, ["'choices'", "'text' and 'label'"]),
        (
            "openbookqa",
            {"question_stem": None},
            ["'question_stem': found NoneType", "expected text"],
        ),
        ("race", {"article": "a", "problems": "[{"}, ["'problems'", "Python list"]),
        ("race", {"article": "a", "problems": "[1, 2]"}, ["'problems'", "Python list"]),
        ("race", {"article": "a"} | PROBLEM | {"answer": "E"}, ["answer 'E'", "A, B, C, D"]),
        ("piqa", AWKWARD["piqa"][0] | {"label": None}, ["'label': found NoneType", "0 to 1"]),
        ("sst2", {"sentence": "x", "label": 2}, ["'label': found int 2", "0 to 1"]),
        (
            "rte",
            {"sentence1": "x", "sentence2": "y", "label": True},
            ["'label': found bool True", "0 to 1"],
        ),
        (
            "multiple_choice",
            CHOICE_ROW | {"label": False},
            ["'label': found bool False", "a whole number"],
        ),
        (
            "multiple_choice",
            CHOICE_ROW | {"label": 0.5},
            ["'label': found float 0.5", "a whole number"],
        ),
        (
            "web_questions",
            {"question": "x", "answers": "y"},
            ["'answers': found str of 1 characters", "list of texts"],
        ),
    ],
)
def test_mistakes_in_a_row(name, row, words):
    with pytest.raises(ValueError) as told:
        TASKS[name].example(row)
    assert all(word in str(told.value) for word in words), str(told.value)

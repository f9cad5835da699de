"""A label of any form is a choice's number, or the row says why not; what schema names mean is
compared.
"""

from pathlib import Path

import datasets
import pytest

from fedsp_mpi.data import loading, tasks
from fedsp_mpi.data.labels import ClassId, ClassNames, NoLabelError, position

CHOICES = ("negative", "positive")
LETTERS = ("red", "green", "blue", "black")


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory, monkeypatch):
    """What `datasets` prepares goes to a folder of this test run."""
    monkeypatch.setattr(
        datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.getbasetemp() / "cache"
    )


@pytest.mark.parametrize(
    ("label", "choices", "number"),
    [
        (1, CHOICES, 1),
        (1.0, CHOICES, 1),
        ("1", CHOICES, 1),
        ("1.0", CHOICES, 1),
        (" Positive ", CHOICES, 1),
        ("C", LETTERS, 2),
        ("d", LETTERS, 3),
        ("b", ("B", "b"), 1),  # exactly, before without case
        ("1", ("0", "1"), 1),  # the word and the number agree
        (ClassId(0, ClassNames(("Positive", "negative"))), CHOICES, 1),
        (ClassId(1, ClassNames(("D", "A", "B", "C"))), LETTERS, 0),
    ],
)
def test_a_label_of_any_form_is_the_number_of_its_choice(label, choices, number):
    assert position(label, choices) == number


@pytest.mark.parametrize(
    ("label", "choices", "words"),
    [
        ("1", ("1", "2"), "choice 0 by its words, choice 1 by its number"),
        ("A", ("B", "A"), "choice 1 by its words, choice 0 by its letter"),
        ("X", ("x", "X "), "found 'X'"),  # two choices without case, none exactly
        (0.5, CHOICES, "found float 0.5"),
        (True, ("True", "False"), "found bool True"),
        (2, CHOICES, "found int 2"),
        ("somebody's secret", CHOICES, "found str of 17 characters"),
        (
            ClassId(0, ClassNames(("negative", "neutral", "positive"))),
            CHOICES,
            "3 classes in the order negative, neu",
        ),
        (
            ClassId(0, ClassNames(("positive", "other"))),
            CHOICES,
            "in the order positive, other, expected the 2 choices",
        ),
        (ClassId(-1, ClassNames(("positive", "negative"))), CHOICES, "found class -1"),
    ],
)
def test_a_label_without_one_meaning_is_refused(label, choices, words):
    with pytest.raises(ValueError) as error:
        position(label, choices)
    assert words in str(error.value) and "secret" not in str(error.value)


@pytest.mark.parametrize("label", [None, "", " ", float("nan")])
def test_no_label_is_told_from_a_wrong_one(label):
    with pytest.raises(NoLabelError):
        position(label, CHOICES)


def folder_of_classes(folder: Path, form: str, column: str, names: list[str]) -> str:
    """Splits of four rows of the classes 0 and 1, whose names stand in the file's schema."""
    features = datasets.Features(
        {column: datasets.Value("string"), "label": datasets.ClassLabel(names=names)}
    )
    table = datasets.Dataset.from_list(
        [{column: f"text {k}", "label": k % 2} for k in range(4)], features=features
    )
    if form == "saved":
        datasets.DatasetDict(train=table, validation=table, test=table).save_to_disk(folder)
    for split in ("train", "validation", "test") if form == "parquet" else ():
        folder.mkdir(exist_ok=True)
        table.to_parquet(folder / f"{split}.parquet")
    return str(folder)


@pytest.mark.parametrize("form", ["parquet", "saved"])
def test_class_numbers_go_by_the_names_of_the_schema(tmp_path, form):
    def gold(name: str, *names: str) -> list[int]:
        source = folder_of_classes(tmp_path / name, form, "sentence", list(names))
        splits = loading.load("sst2", source, seed=0)
        assert splits.train == splits.validation == splits.test
        assert (len(splits.notes) == 1) == (name == "strange"), splits.notes
        table, examples = loading.scored_rows(tasks.TASKS["sst2"], source, seed=0, limit=3)
        assert (
            table[:]["label"] == [example.gold[0] for example in examples] and len(table) == 3
        )  # lm-eval's form
        return [example.gold[0] for example in splits.test]

    assert gold("same", "negative", "positive") == gold("short", "neg", "pos") == [0, 1, 0, 1]
    assert gold("reversed", "Positive", "Negative") == [1, 0, 1, 0]
    assert gold("strange", "bad", "good") == [0, 1, 0, 1]
    with pytest.raises(
        ValueError,
        match=r"row 0 of train .*found 3 classes in the order a, b, c, expected the 2 choices",
    ):
        gold("three", "a", "b", "c")


def test_classes_of_another_task_are_refused(tmp_path):
    two = folder_of_classes(tmp_path / "two", "parquet", "text", ["neg", "pos"])
    with pytest.raises(
        ValueError, match="2 classes in the order neg, pos, expected the 4 choices world, sports, "
    ):
        loading.load("ag_news", two, seed=0)
    own = folder_of_classes(
        tmp_path / "own", "parquet", "text", ["World", "Sci/Tech", "Sports", "Business"]
    )
    assert [example.gold[0] for example in loading.load("ag_news", own, seed=0).test] == [
        0,
        3,
        0,
        3,
    ]

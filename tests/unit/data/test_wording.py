"""Templates and verbalisers: the user's own words around a text and for its classes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from fedsp_mpi import config
from fedsp_mpi.data import tasks
from fedsp_mpi.data.tasks import Example
from fedsp_mpi.data.templates import Template, with_wording
from fedsp_mpi.run.inputs import ExperimentInputs
from helpers.configs import refused
from helpers.runs import FEDPROMPT, short

SST2 = {"sentence": "a fine film ", "label": 1}
RTE = {"sentence1": "It rains.", "sentence2": "It is wet.", "label": 0}


def example(
    name: str, row: dict, template: str | None = None, verbaliser: tuple[str, ...] = ()
) -> Example:
    return with_wording(tasks.find(name), template, verbaliser).example(row)


def test_without_words_of_the_user_a_task_is_itself():
    assert with_wording(tasks.find("sst2"), None, ()) is tasks.find("sst2")


def test_a_template_takes_columns_and_words():
    found = example("sst2", SST2, "{sentence} It was {mask}.")
    assert found == Example("a fine film  It was", " positive", ("negative", "positive"), (1,), ".")
    found = example("rte", RTE, "{{{sentence1}}} {sentence2}? {mask}")
    assert found == Example("{It rains.} It is wet.?", " True", ("True", "False"), (0,), "")
    assert (
        example("rte", RTE, "{mask}, {sentence1} or {sentence2}").suffix
        == ", It rains. or It is wet."
    )


def test_a_verbaliser_gives_each_class_its_word():
    found = example("sst2", SST2, None, ("terrible", "great"))
    assert (found.choices, found.target, found.gold) == (("terrible", "great"), " great", (1,))
    assert found.context == tasks.find("sst2").example(SST2).context


def test_both_together():
    found = example("sst2", SST2, "{sentence}It was {mask}", ("terrible", "great"))
    assert found == Example("a fine film It was", " great", ("terrible", "great"), (1,))


@pytest.mark.parametrize(
    ("template", "words"),
    [
        ("{text} is {mask}", ("found {text}", "expected one of {sentence}, {mask}")),
        ("{sentence} is", ("{mask} 0 times", "once")),
        ("{sentence} {mask} {mask}", ("{mask} 2 times",)),
        ("{sentence} {label} {mask}", ("found {label}",)),
        ("{sentence {mask}", ("expected columns in braces",)),
        ("{sentence!r} {mask}", ("plain names",)),
        ("{sentence:>9} {mask}", ("plain names",)),
        ("{} {mask}", ("found {}",)),
    ],
)
def test_a_bad_template_is_one_line(template, words):
    refused(lambda: Template.of(template, ("sentence",)), "data.template", *words)


@pytest.mark.parametrize("words", [("good", "good"), ("good ", "bad"), ("", "bad")])
def test_a_bad_verbaliser_is_one_line(words):
    refused(
        lambda: with_wording(tasks.find("sst2"), None, words),
        "data.verbaliser",
        "different words without blanks",
    )


def test_questions_without_classes_have_no_words():
    refused(
        lambda: with_wording(tasks.find("web_questions"), "{question} {mask}", ()),
        "web_questions",
        "multiple choice",
    )


def test_rows_that_do_not_fit_are_named():
    with pytest.raises(
        ValueError, match=r"found 3 words for 2 classes .negative, positive., expected one for each"
    ):
        example("sst2", SST2, None, ("a", "b", "c"))
    task = with_wording(tasks.find("multiple_choice"), None, ("a", "b"))
    task.example({"context": "x", "choices": ["no", "yes"], "label": 0})
    with pytest.raises(ValueError, match="found rows with different choices"):
        task.example({"context": "x", "choices": ["cat", "dog"], "label": 0})
    with pytest.raises(ValueError, match="column 'choices': found list, expected text"):
        example(
            "multiple_choice",
            {"context": "x", "choices": ["no", "yes"], "label": 0},
            "{choices} {mask}",
        )


@pytest.fixture
def films(tmp_path) -> str:
    """Rows of SST-2's columns in the words of the embedded model's world."""
    folder = tmp_path / "films"
    folder.mkdir()
    for split, size in {"train": 32, "validation": 8, "test": 8}.items():
        rows = [
            {
                "sentence": f"Which paint goes with {'Tosith' if i % 2 else 'Noudroth'}?",
                "label": i % 2,
            }
            for i in range(size)
        ]
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(folder)


def settings(films: str, *more: str) -> list[str]:
    return ["data.task=sst2", f"data.source={films}", "data.limit.train=32", *more]


def test_mistakes_are_found_before_weights_are_loaded(films):
    def checks(*more: str):
        return ExperimentInputs(config.load(None, settings(films, *more))).check

    checks("data.template={sentence} Answer:{mask}", "data.verbaliser=[grey, blue]")()
    refused(
        checks("data.template={sentence} It was {mask}."),
        "data.template",
        "'.' behind {mask}",
        "gpt2",
        "at the end",
    )
    refused(checks("data.template={text} {mask}"), "data.template", "{sentence}, {mask}")
    with pytest.raises(
        ValueError, match=r"sst2, row 0 of train .*data.verbaliser: found 1 words for 2 classes"
    ):
        checks("data.verbaliser=[grey]")()


def test_a_run_is_trained_and_scored_in_the_users_words(tmp_path, films):
    own = ('data.template="{sentence} Answer: {mask}"', "data.verbaliser=[grey, blue]")
    run = short(tmp_path / "run", *FEDPROMPT, *settings(films, *own))
    other = (
        'data.template="{sentence} Answer: {mask}"',
        "data.verbaliser=[cat, dog]",
    )  # its own are unknown here
    usual = short(tmp_path / "usual", *FEDPROMPT, *settings(films, *other))
    assert run.config["data"]["verbaliser"] == ["grey", "blue"]
    assert run.results["loss"][-1] != usual.results["loss"][-1]
    materials = ExperimentInputs(config.load(Path(run.file.parent) / "config.yaml"))
    assert {question.lengths for question in materials.test} == {(4, 4)}
    assert materials.candidates is None or len(materials.candidates) == 2

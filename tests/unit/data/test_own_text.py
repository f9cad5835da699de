"""Any labelled text by configuration alone: sets of the hub and tables of the user's own.

Their rows equal those that are written as multiple choice.
"""

from __future__ import annotations

import csv
import gzip
import json
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import datasets
import pytest
import yaml

from fedsp_mpi import config
from fedsp_mpi.commands import split as split_command
from fedsp_mpi.config import DataConfig
from fedsp_mpi.config.parsing import parse
from fedsp_mpi.data import loading, own_tasks
from fedsp_mpi.data.tasks import Splits
from fedsp_mpi.log import Log
from fedsp_mpi.run.inputs import ExperimentInputs
from fedsp_mpi.run.silo_inputs import SiloInputs, SiloText
from helpers.configs import refused
from helpers.paths import ROOT
from helpers.runs import FEDPROMPT, here, short

SPLITS = ("train", "validation", "test")
CLASSES = ("bad", "good")
# A text with what tables quote: a comma, a semicolon, quotes and a line end.
TEXTS = [f'Film {number}, "so; so",\nßé' for number in range(30)]
GOLD = [number % 3 % 2 for number in range(30)]
QUESTION = "{}\nQuestion: Is this bad or good?\nAnswer:"

Rows = Sequence[dict[str, Any]]


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory, monkeypatch):
    """What `datasets` prepares goes to a folder of this test run."""
    monkeypatch.setattr(
        datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.getbasetemp() / "cache"
    )


def read(source: object, **section: object) -> Splits:
    """Read a source as a configuration's section `data` says."""
    data = parse(DataConfig, {"task": "classification", **section}, "data")
    return loading.load(own_tasks.configured(data), str(source), seed=1, columns=data.columns)


def as_json_lines(rows: Rows, path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def parts(splits: Splits) -> list[tuple]:
    return [(split.context, split.choices, split.gold, split.target) for split in all_of(splits)]


def all_of(splits: Splits) -> list:
    return [*splits.train, *splits.validation, *splits.test]


def plainly(folder: Path, contexts: Sequence[str], choices: object, gold: Sequence[int]) -> Splits:
    """Write rows in the columns of multiple_choice into one file, and read them."""
    each_choices = [choices] * len(gold) if isinstance(choices, tuple) else list(choices)
    rows = [
        {"context": context, "choices": list(options), "label": label}
        for context, options, label in zip(contexts, each_choices, gold)
    ]
    return read(as_json_lines(rows, folder / "plain.jsonl"), task="multiple_choice")


# -- sets of the hub -------------------------------------------------------------------------------


def from_hub(folder: Path, rows: Rows, **features: object) -> Path:
    """Write one split as the hub's Parquet, with the features in its schema."""
    table = datasets.Dataset.from_list(list(rows), features=datasets.Features(features))
    folder.mkdir(parents=True)
    table.to_parquet(folder / "train-00000-of-00001.parquet")
    return folder


TEXT = datasets.Value("string")
TREC_COARSE = ("ABBR", "ENTY", "DESC", "HUM", "LOC", "NUM")
TREC_FINE = tuple(f"KIND:{number}" for number in range(50))


def test_a_hub_set_with_two_classes_like_imdb(tmp_path):
    rows = [{"text": text, "label": label} for text, label in zip(TEXTS, GOLD)]
    source = from_hub(
        tmp_path / "imdb", rows, text=TEXT, label=datasets.ClassLabel(names=["neg", "pos"])
    )
    found = read(source)
    contexts = [QUESTION.replace("bad", "neg").replace("good", "pos").format(t) for t in TEXTS]
    assert parts(found) == parts(plainly(tmp_path, contexts, ("neg", "pos"), GOLD))
    assert any("2 classes, found in its schema: neg, pos" in note for note in found.notes)
    # The schema's names are not the user's: they are taken in their order, and this is said.
    named = read(source, classes=["bad", "good"])
    assert parts(named) == parts(
        plainly(tmp_path, [QUESTION.format(text) for text in TEXTS], CLASSES, GOLD)
    )
    assert any("neg, pos" in note and "0 was taken for the first" in note for note in named.notes)
    # Names that are there in another order are followed.
    other = read(source, classes=["pos", "neg"])
    assert [e.target for e in all_of(other)] == [e.target for e in all_of(found)]


@pytest.mark.parametrize(("column", "size"), [("coarse_label", 6), ("fine_label", 50)])
def test_a_hub_set_with_several_labels_like_trec(tmp_path, column, size):
    gold = [7 * number % size for number in range(60)]
    rows = [
        {"text": f"Q{k}?", "coarse_label": label % 6, "fine_label": label}
        for k, label in enumerate(gold)
    ]
    source = from_hub(
        tmp_path / "trec",
        rows,
        text=TEXT,
        coarse_label=datasets.ClassLabel(names=list(TREC_COARSE)),
        fine_label=datasets.ClassLabel(names=list(TREC_FINE)),
    )
    names = TREC_COARSE if size == 6 else TREC_FINE
    found = read(source, columns={"label": column}, template="{text}\nKind:")
    contexts = [f"Q{k}?\nKind:" for k in range(60)]
    assert parts(found) == parts(plainly(tmp_path, contexts, names, gold))


def test_a_hub_set_with_numbers_and_names_like_subj(tmp_path):
    names = ("objective", "subjective")
    rows = [
        {"text": text, "label": label, "label_text": names[label]}
        for text, label in zip(TEXTS, GOLD)
    ]
    source = as_json_lines(rows, tmp_path / "subj" / "train.jsonl").parent
    plain = plainly(tmp_path, [f"{t}\nIs it" for t in TEXTS], names, GOLD)
    by_name = read(source, columns={"label": "label_text"}, template="{text}\nIs it")
    by_number = read(source, classes=list(names), template="{text}\nIs it {mask}")
    assert parts(by_name) == parts(by_number) == parts(plain)


def test_a_hub_set_with_choices_like_commonsense_qa(tmp_path):
    options = {"label": ["A", "B", "C"], "text": ["oak", "elm", "fir"]}
    rows = [
        {
            "id": f"{k:x}",
            "question": f"Which tree {k}?",
            "question_concept": "tree",
            "choices": options,
            "answerKey": "ABC"[k % 3],
        }
        for k in range(30)
    ]
    hidden = [row | {"answerKey": ""} for row in rows[:5]]
    for split, split_rows in {"train": rows, "validation": rows[:9], "test": hidden}.items():
        as_json_lines(split_rows, tmp_path / "csqa" / f"{split}.jsonl")
    found = read(
        tmp_path / "csqa",
        task="multiple_choice",
        columns={"context": "question", "label": "answerKey"},
        template="{question_concept}: {question}\nAnswer:",
    )
    assert [len(s) for s in (found.train, found.validation, found.test)] == [27, 3, 9]
    example = found.test[4]
    assert example.context == "tree: Which tree 4?\nAnswer:"
    assert (example.choices, example.gold) == (("oak", "elm", "fir"), (1,))


# -- tables of the user's own ----------------------------------------------------------------------


def as_csv(path: Path, labels: Sequence[object], separator: str, encoding: str = "utf-8") -> Path:
    """Write a table as a spreadsheet does, with a column that nobody needs."""
    with path.open("w", encoding=encoding, newline="") as file:
        if encoding == "utf-16":
            file.write(f"sep={separator}\n")
        writer = csv.writer(file, delimiter=separator)
        writer.writerow(["id", "review", "outcome"])
        writer.writerows(zip(range(len(TEXTS)), TEXTS, labels))
    return path


def compressed(path: Path) -> Path:
    target = path.with_suffix(f"{path.suffix}.gz")
    target.write_bytes(gzip.compress(path.read_bytes()))
    path.unlink()
    return target


def table(labels: Sequence[object]) -> datasets.Dataset:
    return datasets.Dataset.from_list(
        [{"review": text, "outcome": label} for text, label in zip(TEXTS, labels)]
    )


def saved(folder: Path) -> Path:
    """Save a table whose classes stand in another order than the user's."""
    features = datasets.Features(
        {"review": TEXT, "outcome": datasets.ClassLabel(names=["GOOD", "bad"])}
    )
    table([1 - label for label in GOLD]).cast(features).save_to_disk(folder / "own")
    return folder / "own"


def written(path: Path, labels: Sequence[object]) -> Path:
    table(labels).to_parquet(path)
    return path


WORDS = [CLASSES[label] for label in GOLD]
MESSY = [f" {word.upper()}" if k % 2 else word for k, word in enumerate(WORDS)]
SHAPES: dict[str, tuple[Callable[[Path], Path], dict[str, object]]] = {
    "CSV": (lambda folder: as_csv(folder / "own.csv", WORDS, ","), {}),
    "CSV of a folder": (lambda folder: as_csv(folder / "a.csv", WORDS, ",").parent, {}),
    "semicolons and a byte order mark": (
        lambda folder: as_csv(folder / "own.csv", GOLD, ";", "utf-8-sig"),
        {"classes": list(CLASSES)},
    ),
    "UTF-16 and sep=": (
        lambda folder: as_csv(folder / "own.csv", [f"{k}.0" for k in GOLD], ";", "utf-16"),
        {"classes": list(CLASSES)},
    ),
    "tabs": (lambda folder: as_csv(folder / "own.tsv", MESSY, "\t"), {}),
    "compressed CSV with tabs": (
        lambda folder: compressed(as_csv(folder / "own.csv", WORDS, "\t")),
        {"classes": list(CLASSES)},
    ),
    "JSON lines of true and false": (
        lambda folder: as_json_lines(
            [{"review": t, "outcome": bool(k)} for t, k in zip(TEXTS, GOLD)], folder / "own.jsonl"
        ),
        {"classes": list(CLASSES)},
    ),
    "JSON that counts from 1": (
        lambda folder: as_json_lines(
            [{"review": t, "outcome": k + 1} for t, k in zip(TEXTS, GOLD)], folder / "own.json"
        ),
        {"classes": list(CLASSES), "first_label": 1},
    ),
    "Parquet with stars": (
        lambda folder: written(folder / "own.parquet", [4 * k + 1 for k in GOLD]),
        {"classes": ["1", "5"], "verbaliser": list(CLASSES)},
    ),
    "Parquet with stars that are found": (
        lambda folder: written(folder / "own.parquet", [4.0 * k + 1 for k in GOLD]),
        {"verbaliser": list(CLASSES)},
    ),
    "saved, classes in another order": (saved, {"classes": list(CLASSES)}),
}


@pytest.mark.parametrize("shape", SHAPES)
def test_a_table_of_any_shape_is_read_as_multiple_choice(tmp_path, shape):
    write, section = SHAPES[shape]
    source = write(tmp_path)
    found = read(source, columns={"text": "review", "label": "outcome"}, **section)
    plain = plainly(tmp_path / "plain", [QUESTION.format(text) for text in TEXTS], CLASSES, GOLD)
    assert parts(found) == parts(plain)
    assert [len(s) for s in (found.train, found.validation, found.test)] == [22, 2, 6]
    assert any("test = 6 rows cut from 'train' with seed 1" in note for note in found.notes)


def test_a_template_takes_any_columns_and_numbers(tmp_path):
    rows = [
        {"title": "Rain", "age": 7, "body": None, "topic": "wet"},
        {"title": None, "age": None, "body": "Sun. ", "topic": "dry"},
    ] * 10
    found = read(
        as_json_lines(rows, tmp_path / "own.jsonl"),
        columns={"headline": "title", "label": "topic"},
        template="{headline} ({age}): {body}\nTopic:\n",
    )
    assert {example.context for example in all_of(found)} == {
        "Rain (7): \nTopic:",
        " (): Sun. \nTopic:",
    }


def test_rows_without_label_or_text_are_left_out_and_counted(tmp_path):
    rows = [{"text": "a", "label": 0}, {"text": "b", "label": 1}] * 6
    rows[3] = {"text": "c", "label": -1}
    rows[4] = {"text": "d", "label": None}
    rows[5] = {"text": " ", "label": 1}
    for split in SPLITS:
        as_json_lines(rows, tmp_path / "own" / f"{split}.jsonl")
    found = read(tmp_path / "own", classes=list(CLASSES))
    assert [len(s) for s in (found.train, found.validation, found.test)] == [9, 9, 9]
    assert "train: 2 rows without an answer left out (train 3, 4)" in found.notes
    assert "test: 1 row without a text left out (test 5)" in found.notes
    assert any("-1 was taken for no label" in note for note in read(tmp_path / "own").notes)
    # -1 is a class where the user says so.
    three = read(tmp_path / "own", classes=["-1", "0", "1"], verbaliser=["low", "mid", "high"])
    assert {example.target for example in three.train} == {" low", " mid", " high"}


ANSWERS = {
    "letters": (lambda k: "abc"[k], 0),
    "numbers": (lambda k: str(k), 0),
    "numbers from 1": (lambda k: str(k + 1), 1),
    "texts": (lambda k: ["oak", "elm", "fir"][k], 0),
}


@pytest.mark.parametrize("answers", ANSWERS)
def test_choices_in_columns(tmp_path, answers):
    answer, first_label = ANSWERS[answers]
    gold = [k % 3 if k % 4 else 0 for k in range(30)]
    with (tmp_path / "own.csv").open("w", newline="") as file:
        writer = csv.writer(file, delimiter=";")
        writer.writerow(["question", "a", "b", "c", "right"])
        for k, label in enumerate(gold):
            # Every fourth question has two choices.
            writer.writerow([f"Tree {k}?", "oak", "elm", "fir" if k % 4 else "", answer(label)])
    found = read(
        tmp_path / "own.csv",
        task="multiple_choice",
        columns={"context": "question", "choices": ["a", "b", "c"], "label": "right"},
        first_label=first_label,
    )
    contexts = [f"Tree {k}?" for k in range(30)]
    choices = [("oak", "elm", "fir") if k % 4 else ("oak", "elm") for k in range(30)]
    assert parts(found) == parts(plainly(tmp_path / "plain", contexts, choices, gold))


# -- a run -----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def paints(tmp_path_factory) -> Path:
    """Two folders of the same rows in the words of the embedded model's world."""
    folder = tmp_path_factory.mktemp("paints")
    for split, size in {"train": 32, "validation": 8, "test": 8}.items():
        rows = [
            {"note": f"Which paint goes with {'Tosith' if k % 2 else 'Noudroth'}?", "paint": k % 2}
            for k in range(size)
        ]
        as_json_lines(rows, folder / "own" / f"{split}.jsonl")
        plain = [
            {
                "context": f"{row['note']} Answer:",
                "choices": ["grey", "blue"],
                "label": row["paint"],
            }
            for row in rows
        ]
        as_json_lines(plain, folder / "plain" / f"{split}.jsonl")
    return folder


OWN = (
    "data.task=classification",
    "data.columns={text: note, label: paint}",
    'data.template="{text} Answer:"',
    "data.classes=[grey, blue]",
)


def test_scores_are_those_of_the_same_rows_as_multiple_choice(tmp_path, paints):
    settings = (*FEDPROMPT, "federation.rounds=1", "federation.clients=1")
    own = short(tmp_path / "own", *settings, *OWN, f"data.source={paints / 'own'}")
    plain = short(tmp_path / "plain", *settings, f"data.source={paints / 'plain'}")
    for name in ("acc", "loss"):
        assert own.results[name].tobytes() == plain.results[name].tobytes()


def test_plan_and_fetch_take_the_task(tmp_path, paints):
    settings = [f"--set={key}" for key in (*OWN, f"data.source={paints / 'own'}")]
    assert "classification: assumed" in here(["plan", *settings]).stdout
    assert "data classification: " in here(["fetch", *settings]).stdout


def test_check_says_what_is_read_and_left_out(tmp_path, paints):
    rows = [json.loads(line) for line in (paints / "own" / "train.jsonl").open()]
    rows[3]["paint"] = -1
    source = as_json_lines(rows, tmp_path / "own.jsonl")
    found = ("data.classes=[]", "data.verbaliser=[grey, blue]")
    settings = [*OWN, *found, f"data.source={source}", f"run.folder={tmp_path}"]
    lines = here(["check", *(f"--set={key}" for key in settings)]).stdout
    assert "2 classes, found in the rows: 0, 1" in lines
    assert "-1 was taken for no label" in lines and "without an answer left out" in lines


def test_evaluate_scores_the_same_rows(tmp_path):
    rows = [{"text": text, "label": label} for text, label in zip(TEXTS, WORDS)]
    source = str(as_json_lines([{"text": "?", "label": ""}, *rows], tmp_path / "own.jsonl"))
    task = own_tasks.configured(DataConfig(task="classification"))
    _, examples = loading.scored_rows(task, source, seed=1, limit=5)
    limited = loading.load(task, source, seed=1, limit={"test": 5})
    assert examples == list(limited.test)


def test_texts_that_lose_their_beginning_are_counted(paints):
    settings = [*OWN, f"data.source={paints / 'own'}", "data.max_length=6"]
    inputs = ExperimentInputs(config.load(None, settings))
    [train, _] = [note for note in inputs.warnings if "only the end is read" in note]
    assert train.startswith("train: 32 of 32 texts are longer than the 6 tokens that fit")
    assert {len(text.ids) for text in inputs.shard(0)} == {6}


def test_the_readme_s_own_data_are_read_by_the_configuration_that_is_shipped(tmp_path):
    chapter = (ROOT / "README.md").read_text(encoding="utf-8").partition("## Your own data")[2]
    _, table_text, settings, *_ = re.split(r"```(?:yaml)?\n", chapter.replace("```\n```", "```"))
    shipped = (ROOT / "configs" / "silos" / "sites.yaml").read_text(encoding="utf-8")
    assert yaml.safe_load(settings) == yaml.safe_load(shipped)
    (tmp_path / "north.csv").write_text(table_text)
    section = yaml.safe_load(settings)["data"]
    examples = all_of(read(str(tmp_path / "north.csv"), **section))
    assert [example.choices for example in examples] == [CLASSES] * 5


# -- mistakes --------------------------------------------------------------------------------------

MISTAKES: dict[str, tuple[dict[str, object], tuple[str, ...]]] = {
    "one class": ({"classes": ["bad"]}, ("data.classes", "two or more")),
    "one class twice": ({"classes": ["bad", "Bad "]}, ("data.classes", "bad, Bad")),
    "too few words": (
        {"classes": ["a", "b"], "verbaliser": ["c"]},
        ("data.verbaliser", "1 words for 2 classes"),
    ),
    "an answer in the template": ({"template": "{label} {text}"}, ("data.template", "{label}")),
    "an answer by its own name": (
        {"template": "{text} {y}", "columns": {"label": "y"}},
        ("data.template", "{y}", "the answer"),
    ),
    "no column in the template": ({"template": "It is"}, ("data.template", "without a column")),
    "a list for a text": ({"columns": {"text": ["a", "b"]}}, ("data.columns.text", "a list")),
    "one choice": (
        {"task": "multiple_choice", "columns": {"choices": ["a"]}},
        ("data.columns.choices", "two or more"),
    ),
    "classes elsewhere": ({"task": "sst2", "classes": ["a", "b"]}, ("data.classes", "sst2")),
    "first label elsewhere": ({"task": "sst2", "first_label": 1}, ("data.first_label", "sst2")),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes_in_the_section(mistake):
    section, words = MISTAKES[mistake]
    data = parse(DataConfig, {"task": "classification", **section}, "data")
    refused(lambda: own_tasks.configured(data), *words)


SECRET = "secret words of somebody"
ROWS_REFUSED: dict[str, tuple[object, dict[str, object], tuple[str, ...]]] = {
    "an unknown class": (
        [("a", "bad"), ("b", "ugly")],
        {"classes": list(CLASSES)},
        ("row 1 of train", "found 'ugly'", "expected one of bad, good", "0 to 1", "data.classes"),
    ),
    "a number too high": (
        [("a", 0), ("b", 2)],
        {"classes": list(CLASSES)},
        ("row 1 of train", "found int 2", "0 to 1"),
    ),
    "texts for labels": (
        [(f"{k}", f"{SECRET} {k}") for k in range(101)],
        {},
        ("101 different labels in the column 'label'", "2 to 100", "data.columns.label"),
    ),
    "one label": ([("a", "bad")] * 3, {}, ("1 different labels", "2 to 100")),
    "no label": ([("a", None)] * 3, {}, ("0 different labels",)),
    "lists for labels": ([("a", ["x"])] * 3, {}, ("list", "one label a row")),
    "a text that is a list": (
        [(["a"], 0), (["b"], 1)],
        {},
        ("row 0 of train", "column 'text': found list"),
    ),
    "a column that is missing": ([("a", 0)] * 3, {"template": "{titel}"}, ("no column 'titel'",)),
}


@pytest.mark.parametrize("mistake", ROWS_REFUSED)
def test_mistakes_in_the_rows(tmp_path, mistake):
    rows, section, words = ROWS_REFUSED[mistake]
    source = tmp_path / "own"
    for split in SPLITS:
        as_json_lines([{"text": t, "label": k} for t, k in rows], source / f"{split}.jsonl")
    require_line(lambda: read(source, **section), words)


def require_line(call: Callable[[], object], words: Sequence[str]) -> None:
    with pytest.raises(ValueError) as told:
        call()
    message = str(told.value)
    assert "\n" not in message and "secret" not in message and len(message) <= 400, message
    assert all(word in message for word in words), message


def test_files_that_are_no_tables_are_refused_with_what_to_do(tmp_path):
    for name, words in {
        "own.xlsx": ("own.xlsx", "save own.xlsx as CSV UTF-8"),
        "own.pdf": ("own.pdf", "expected a table (.jsonl", "convert it"),
    }.items():
        (tmp_path / name).write_bytes(b"PK secret")
        require_line(lambda name=name: read(tmp_path / name), words)
    require_line(lambda: read(tmp_path / "no.csv"), ("found no file", "no.csv", "correct the path"))
    require_line(lambda: read(tmp_path), ("no data file", "save own.xlsx as CSV UTF-8"))
    (tmp_path / "latin.csv").write_bytes("text,label\nsecret é,1\n".encode("cp1252"))
    require_line(
        lambda: read(tmp_path / "latin.csv"), ("latin.csv", "expected .csv files in UTF-8")
    )
    # Without a header, the first row's text would be the name of a column.
    (tmp_path / "bare.csv").write_text(f"{SECRET} in one long line of a table,1\na,0\n")
    require_line(lambda: read(tmp_path / "bare.csv"), ("no column 'text', 'label'", "(a name of"))


# -- silos -----------------------------------------------------------------------------------------


def test_a_split_of_own_text_is_read_back_by_its_silos(tmp_path):
    source = as_csv(tmp_path / "own.csv", MESSY, ";")
    settings = [
        "data.task=classification",
        f"data.source={source}",
        "data.columns={text: review, label: outcome}",
        'data.template="{review} Verdict:"',
        "federation.clients=3",
        "data.partition=labels",
        "data.alpha=0.1",
    ]
    lines: list[str] = []
    split_command.split(None, settings, tmp_path / "silos", log=Log(lines.append))
    simulated = ExperimentInputs(config.load(None, settings))
    dealt_out = config.load(tmp_path / "silos" / "silos.yaml")
    assert dealt_out.data.classes == CLASSES
    for client, silo in enumerate(SiloInputs(dealt_out).config.federation.silos):
        text = SiloText(dealt_out, client, SiloInputs(dealt_out))
        rows = simulated.shards[client + 1]
        assert list(text.splits.train) == [simulated.splits.train[row] for row in rows], silo


def test_silos_with_a_table_each(tmp_path, paints):
    rows = [json.loads(line) for line in (paints / "own" / "train.jsonl").open()]
    names = ("north", "east")
    for k, name in enumerate(names):
        with (tmp_path / f"{name}.csv").open("w", newline="") as file:
            writer = csv.writer(file, delimiter=";,"[k])
            writer.writerow(["note", "paint"])
            writer.writerows(
                [row["note"], ("grey", "blue")[row["paint"]]] for row in rows[16 * k : 16 * k + 16]
            )
    silos = ", ".join(f"{{name: {name}, source: {tmp_path / name}.csv}}" for name in names)
    own = [key for key in OWN if not key.startswith("data.source")]
    run = short(
        tmp_path / "run",
        *FEDPROMPT,
        *own,
        "federation.clients=2",
        "data.source=null",
        f"federation.silos=[{silos}]",
        f"server.data={{source: {paints / 'own'}}}",
        "federation.rounds=1",
    )
    assert sorted(set(run.clients["client"].tolist())) == [0, 1]
    assert set(run.clients["status"].tolist()) <= {b"ok", "ok"}

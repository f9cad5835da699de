"""Where the rows come from: forms of a source, how they make three splits, and users' mistakes told
in one line.
"""

import contextlib
import errno
import gzip
import http.server
import json
import os
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import datasets
import pytest

from fedsp_mpi.data import loading, tasks
from helpers.paths import ROOT, SHARED

DATA = SHARED / "data"
CHOICE_ROW = {"context": "Q: 1 + 1?\nA:", "choices": ["two", "three"], "label": 0}
ARC_ROW = {
    "question": "Why?",
    "choices": {"text": ["so", "no"], "label": ["1", "2"]},
    "answerKey": "2",
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


# -- splits, limits, forms of a source -------------------------------------------------------------


def test_splits_as_they_are():
    splits = loading.load("arc_easy", local("arc_easy"), seed=0)
    assert [len(s) for s in (splits.train, splits.validation, splits.test)] == [2251, 570, 2376]
    assert splits.notes == ()


def test_a_missing_validation_is_cut_from_train():
    whole = datasets.load_dataset(local("web_questions"), split="train")["question"]
    splits, other = (
        loading.load("web_questions", local("web_questions"), seed=seed) for seed in (0, 1)
    )
    assert [len(s) for s in (splits.train, splits.validation, splits.test)] == [3401, 377, 2032]
    assert "validation = 377 rows cut from 'train' with seed 0" in splits.notes[0]
    assert other.validation != splits.validation
    order = [f"Question: {question}\nAnswer:" for question in whole]
    for part in (splits.train, splits.validation):
        assert is_subsequence([example.context for example in part], order)
    both = sorted(example.context for example in splits.train + splits.validation)
    assert both == sorted(order)


def is_subsequence(part: list[str], whole: list[str]) -> bool:
    rest = iter(whole)
    return all(text in rest for text in part)


def test_where_validation_is_scored_train_gives_a_new_one():
    splits = loading.load("hellaswag", local("hellaswag"), seed=0)
    assert [len(s) for s in (splits.train, splits.validation, splits.test)] == [35915, 3990, 10042]
    assert splits.notes[0] == "test = the split 'validation': the source has no split 'test'"


def test_a_test_split_with_hidden_answers_is_not_scored(tmp_path):
    hidden = [CHOICE_ROW | {"label": -1}] * 4
    source = write(
        tmp_path / "own", train=[CHOICE_ROW] * 20, validation=[CHOICE_ROW] * 3, test=hidden
    )
    splits = loading.load("multiple_choice", source, seed=0)
    assert [len(s) for s in (splits.train, splits.validation, splits.test)] == [18, 2, 3]
    assert "the answers of the split 'test' are not public" in splits.notes[0]


def test_limit_takes_the_first_rows_and_moves_nothing_else():
    whole = loading.load("web_questions", local("web_questions"), seed=0)
    limits = {"train": 50, "validation": 20, "test": 7}
    part = loading.load("web_questions", local("web_questions"), seed=0, limit=limits)
    assert (part.train, part.validation, part.test) == (
        whole.train[:50],
        whole.validation[:20],
        whole.test[:7],
    )
    assert "test = the first 7 of 2032 rows (limit)" in part.notes


def test_rows_with_nothing_to_teach_are_left_out_of_training_alone(tmp_path):
    empty = CHOICE_ROW | {"choices": [" ", "b"]}
    rows = [CHOICE_ROW, empty, CHOICE_ROW, empty]
    source = write(tmp_path / "own", train=rows, validation=[CHOICE_ROW], test=rows)
    splits = loading.load("multiple_choice", source, seed=0)
    assert (len(splits.train), len(splits.test)) == (2, 4)
    assert splits.notes == ("train: 2 rows without an answer left out (train 1, 3)",)
    unanswered = {"context": "?", "answers": []}
    rows = [{"context": "?", "answers": ["a"]}, unanswered]
    splits = loading.load(
        "question_answering", write(tmp_path / "qa", train=rows * 5, test=rows), seed=0
    )
    assert len(splits.test) == 1


@pytest.mark.parametrize(
    "form", ["jsonl", "jsonl.gz", "json", "csv", "parquet", "saved", "snapshot"]
)
def test_forms_of_a_local_source(tmp_path, form):
    rows = [{"sentence": f"text {k}", "label": k % 2} for k in range(10)]
    for split in ("train", "validation", "test"):
        table = datasets.Dataset.from_list(rows)
        if form in ("jsonl", "jsonl.gz"):
            text = "".join(json.dumps(row) + "\n" for row in rows).encode()
            (tmp_path / f"{split}.{form}").write_bytes(
                gzip.compress(text) if form == "jsonl.gz" else text
            )
        elif form == "json":
            (tmp_path / f"{split}.json").write_text(json.dumps(rows))
        elif form == "csv":
            table.to_csv(tmp_path / f"{split}.csv")
        elif form == "parquet":
            table.to_parquet(tmp_path / f"{split}.parquet")
        elif form == "snapshot":  # as the hub lays its files out
            (tmp_path / "data").mkdir(exist_ok=True)
            table.to_parquet(tmp_path / "data" / f"{split}-00000-of-00001.parquet")
    if form == "saved":
        parts = {
            split: datasets.Dataset.from_list(rows) for split in ("train", "validation", "test")
        }
        datasets.DatasetDict(parts).save_to_disk(tmp_path)
    splits = loading.load("sst2", str(tmp_path), seed=0)
    assert splits.train == splits.validation == splits.test
    assert [example.gold for example in splits.test] == [(0,), (1,)] * 5
    loading.check_columns("sst2", str(tmp_path))


@pytest.mark.parametrize("form", ["saved", "folder"])
def test_a_further_split_may_have_columns_of_its_own(tmp_path, form):
    parts = {split: [CHOICE_ROW] * 4 for split in ("train", "validation", "test")} | {
        "unsupervised": [{"text": "a"}]
    }
    if form == "saved":
        datasets.DatasetDict(
            {name: datasets.Dataset.from_list(rows) for name, rows in parts.items()}
        ).save_to_disk(tmp_path / "own")
    else:
        write(tmp_path / "own", **parts)
    loading.check_columns("multiple_choice", str(tmp_path / "own"))
    splits = loading.load("multiple_choice", str(tmp_path / "own"), seed=0)
    assert [len(s) for s in (splits.train, splits.validation, splits.test)] == [4, 4, 4]


def test_configurations_of_a_folder(tmp_path):
    for config, word in (("ARC-Easy", "easy"), ("ARC-Challenge", "hard")):
        (tmp_path / config).mkdir()
        for split in ("train", "validation", "test"):
            write(tmp_path / config, **{split: [ARC_ROW | {"question": word}] * 3})
    head = "".join(
        f"- config_name: {config}\n  data_files:\n"
        + "".join(
            f"  - split: {s}\n    path: {config}/{s}.jsonl\n"
            for s in ("train", "validation", "test")
        )
        for config in ("ARC-Easy", "ARC-Challenge")
    )
    (tmp_path / "README.md").write_text(f"---\nconfigs:\n{head}---\n")
    assert "easy" in loading.load("arc_easy", str(tmp_path), seed=0).test[0].context
    assert "hard" in loading.load("arc_challenge", str(tmp_path), seed=0).test[0].context
    assert "hard" in loading.load("arc_easy", f"{tmp_path}:ARC-Challenge", seed=0).test[0].context
    with pytest.raises(ValueError, match="found the configurations ARC-"):
        loading.load("arc_easy", f"{tmp_path}:ARC-Middle", seed=0)


def test_a_changed_file_is_read_again(tmp_path):
    source = write(
        tmp_path / "own", train=[CHOICE_ROW] * 5, validation=[CHOICE_ROW] * 2, test=[CHOICE_ROW] * 2
    )
    assert len(loading.load("multiple_choice", source, seed=0).test) == 2
    write(tmp_path / "own", test=[CHOICE_ROW] * 3)
    assert len(loading.load("multiple_choice", source, seed=0).test) == 3


def test_nobody_is_told_what_is_read(tmp_path, monkeypatch):
    sought = []

    def no_network(host: str, *_: object, **__: object) -> None:
        sought.append(host)
        raise OSError("no network")

    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(socket, "getaddrinfo", no_network)
    rows = {split: [CHOICE_ROW] * 3 for split in ("train", "validation", "test")}
    loading.load("multiple_choice", write(tmp_path / "own", **rows), seed=0)
    assert not sought


def test_the_settings_of_the_library_are_as_before():
    datasets.enable_progress_bars()
    loading.load("arc_easy", local("arc_easy"), seed=0)
    assert not datasets.are_progress_bars_disabled()


LOAD = "from fedsp_mpi.data import loading; print(len(loading.load('sst2', {!r}, seed=0).train))"


def test_two_processes_may_load_at_once_and_nothing_is_written_into_the_source(tmp_path):
    rows = [{"sentence": f"text {k}", "label": k % 2} for k in range(20000)]
    source = write(tmp_path / "own", train=rows, validation=rows[:10], test=rows[:10])
    before = sorted(path.name for path in (tmp_path / "own").iterdir())
    env = os.environ | {"HF_HOME": str(tmp_path / "home"), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", LOAD.format(source)]
    running = [
        subprocess.Popen(
            command, cwd=ROOT, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        for _ in range(2)
    ]
    for process in running:
        out, err = process.communicate(timeout=120)
        assert (process.returncode, out, err) == (0, "20000\n", "")
    assert sorted(path.name for path in (tmp_path / "own").iterdir()) == before
    assert list((tmp_path / "home").rglob("*.arrow"))


# -- what real folders hold ------------------------------------------------------------------------

SST2 = "sentence,label\na,0\nb,1\nc,0\n"
ALL = {"train_csv": SST2, "validation_csv": SST2, "test_csv": SST2}


def gold(source: str, split: str = "train") -> list[int]:
    return [example.gold[0] for example in getattr(loading.load("sst2", source, seed=0), split)]


def as_files(folder: Path, form: str, labels: list[int]) -> str:
    """Three splits of sst2 in files of one size and one time, whatever the labels."""
    folder.mkdir(exist_ok=True)
    rows = [{"sentence": f"text {k}", "label": label} for k, label in enumerate(labels)]
    for split in ("train", "validation", "test"):
        path = folder / f"{split}.{'jsonl' if form == 'declared' else form}"
        table = datasets.Dataset.from_list(rows)
        if form == "parquet":
            table.to_parquet(path)
        elif form == "csv":
            table.to_csv(path)
        else:
            path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        os.utime(path, ns=(0, 0))
    if form == "declared":
        files = "".join(
            f"  - split: {split}\n    path: {split}.jsonl\n"
            for split in ("train", "validation", "test")
        )
        (folder / "README.md").write_text(
            f"---\nconfigs:\n- config_name: default\n  data_files:\n{files}---\n"
        )
    return str(folder)


@pytest.mark.parametrize("form", ["jsonl", "csv", "parquet", "declared"])
def test_the_rows_that_are_there_are_read_whatever_the_time_of_the_file(tmp_path, form):
    for labels in ([0, 1, 0], [1, 0, 1]):
        assert gold(as_files(tmp_path / "own", form, labels)) == labels


def test_several_files_of_a_split_are_named_with_their_rows(tmp_path):
    source = write(tmp_path / "own", **ALL, train_old_csv=SST2 + "d,1\n", notes_csv=SST2)
    splits = loading.load("sst2", source, seed=0)
    assert [example.gold[0] for example in splits.train] == [0, 1, 0, 0, 1, 0, 1]
    assert splits.notes[0].startswith("train = 2 files: train.csv (3 rows), train.old.csv (4 rows)")
    assert splits.notes[1] == "not read, because their names say no split: notes.csv"


def test_shards_are_one_file_and_a_missing_one_is_named(tmp_path):
    (tmp_path / "own" / "data").mkdir(parents=True)
    for k in range(2):
        (tmp_path / "own" / "data" / f"train-0000{k}-of-00002.csv").write_text(SST2)
    source = write(tmp_path / "own", validation_csv=SST2, test_csv=SST2)
    splits = loading.load("sst2", source, seed=0)
    assert (len(splits.train), splits.notes) == (6, ())
    (tmp_path / "own" / "data" / "train-00000-of-00002.csv").unlink()
    with pytest.raises(
        ValueError, match=r"found 1 of the 2 shards of train in .*number 0 is missing"
    ):
        loading.load("sst2", source, seed=0)


@pytest.mark.parametrize("form", ["files", "saved"])
@pytest.mark.parametrize("name", ["dev", "valid", "val", "eval", "Validation"])
def test_splits_by_their_other_names(tmp_path, form, name):
    rows = [CHOICE_ROW] * 4
    parts = {"training": rows, name: rows[:2], "test": rows[:3]}
    if form == "files":
        source = write(tmp_path / "own", **parts)
    else:
        source = str(tmp_path / "own")
        tables = {split: datasets.Dataset.from_list(rows) for split, rows in parts.items()}
        datasets.DatasetDict(tables).save_to_disk(source)
    splits = loading.load("multiple_choice", source, seed=0)
    assert [len(s) for s in (splits.train, splits.validation, splits.test)] == [4, 2, 3]
    assert splits.notes == ()


def test_two_sources_for_a_split_are_refused(tmp_path):
    def refusal(name: str, **files: str) -> str:
        with pytest.raises(ValueError) as told:
            loading.load("sst2", write(tmp_path / name, **ALL, **files), seed=0)
        return str(told.value)

    assert "found dev.csv and validation.csv in" in refusal("dev", dev_csv=SST2)
    assert "found Train.csv and train.csv in" in refusal("copy", Train_csv=SST2)
    assert (
        "train.tsv in" in (message := refusal("format", train_tsv=SST2))
        and "expected files of one format" in message
    )
    assert "whose name says train and test, expected one split" in refusal(
        "both", **{"train-test_csv": SST2}
    )
    table = datasets.Dataset.from_list([CHOICE_ROW])
    datasets.DatasetDict(train=table, dev=table, validation=table).save_to_disk(tmp_path / "saved")
    with pytest.raises(
        ValueError, match="found the splits dev and validation, which both mean validation"
    ):
        loading.check_columns("multiple_choice", str(tmp_path / "saved"))


def test_a_folder_whose_name_is_a_pattern(tmp_path):
    assert gold(write(tmp_path / "my set [v2] *?", **ALL)) == [0, 1, 0]


def test_a_table_is_text_as_it_stands(tmp_path):
    """Words that pandas takes for nothing, numbers, lists; a blank label alone is none."""
    words = ["NA", "None", "null", "nan", "", "7"]
    text = (
        "sentence,label\n"
        + "".join(f'"{word}",{k % 2}\n' for k, word in enumerate(words))
        + "x,\ny,positive\n"
    )
    splits = loading.load("sst2", write(tmp_path / "own", **ALL | {"train_csv": text}), seed=0)
    assert [example.context.split("\n")[0] for example in splits.train] == [*words, "y"]
    assert [example.gold[0] for example in splits.train] == [0, 1, 0, 1, 0, 1, 1]
    assert splits.notes == ("train: 1 row without an answer left out (train 6)",)
    text = 'context\tchoices\tlabel\nQ\t["a, b", "c"]\t1\n'
    tsv = write(
        tmp_path / "tsv", **{f"{split}_tsv": text for split in ("train", "validation", "test")}
    )
    assert loading.load("multiple_choice", tsv, seed=0).train[0].choices == ("a, b", "c")


def test_columns_by_the_names_of_the_file(tmp_path):
    text = "label,review,stars\nx,good film,positive\nx,bad film,0\n"
    source = write(
        tmp_path / "own", train_csv=text, validation_csv=text, test_csv="label,review\nx,a film\n"
    )
    names = {"sentence": "review", "label": "stars"}
    loading.check_columns("sst2", source, names)
    splits = loading.load("sst2", source, seed=0, columns=names)
    assert [example.gold[0] for example in splits.test] == [1, 0] and splits.test[
        0
    ].context.startswith("good film\n")
    for wrong, words in (
        (
            {"text": "review"},
            "data.columns: found 'text', expected one of the columns of sst2: sentence, label",
        ),
        (
            {"sentence": "reviews"},
            "data.columns.sentence: found 'reviews', which train of .* expected one of label, re",
        ),
    ):
        with pytest.raises(ValueError, match=words):
            loading.check_columns("sst2", source, wrong)


@pytest.mark.parametrize("form", ["csv", "jsonl", "parquet"])
def test_a_test_split_without_labels_is_not_scored_in_any_format(tmp_path, form):
    source = as_files(tmp_path / "own", form, [0, 1] * 10)
    table = datasets.Dataset.from_list([{"sentence": "x"}] * 3)
    path = tmp_path / "own" / f"test.{form}"
    {"csv": table.to_csv, "jsonl": table.to_json, "parquet": table.to_parquet}[form](path)
    loading.check_columns("sst2", source)
    splits = loading.load("sst2", source, seed=0)
    assert len(splits.test) == 20 and len(splits.validation) == 2
    assert (
        splits.notes[0] == "test = the split 'validation': the split 'test' has no column 'label'"
    )


def test_rows_with_an_empty_choice_are_left_out_and_named(tmp_path):
    empty = CHOICE_ROW | {"choices": ["two", ""]}
    source = write(
        tmp_path / "own",
        train=[CHOICE_ROW, empty],
        validation=[CHOICE_ROW],
        test=[empty, CHOICE_ROW],
    )
    splits = loading.load("multiple_choice", source, seed=0)
    assert (
        len(splits.train) == 2 and len(splits.test) == 1
    )  # what is trained on has its answer, and is not scored
    assert "test: 1 row with an empty choice left out (test 0)" in splits.notes
    answers = [
        {"context": "?", "answers": ["", "a"]},
        {"context": "?", "answers": ["a"]},
    ]  # "" begins every answer
    assert (
        len(
            loading.load(
                "question_answering",
                write(tmp_path / "qa", train=answers * 4, test=answers),
                seed=0,
            ).test
        )
        == 1
    )


def run_elsewhere(folder: Path, **variables: str) -> str:
    """The one line of a run in a process of its own that cannot use the cache; within seconds, with
    status 2.
    """
    env = {
        k: v for k, v in os.environ.items() if k not in ("HF_HOME", "HF_DATASETS_CACHE")
    } | variables
    command = [sys.executable, "-m", "fedsp_mpi", "run", "--set", f"run.folder={folder / 'runs'}"]
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=60)
    assert done.returncode == 2 and len(done.stderr.splitlines()) == 1, done.stderr
    return done.stderr


def test_a_cache_that_cannot_be_written(tmp_path):
    message = run_elsewhere(tmp_path, HOME="/proc/none")
    assert (
        "cannot write /proc/none/.cache/huggingface/datasets" in message
        and "set HF_HOME or HF_" in message
    )


def test_a_cache_without_file_locks_is_named_and_nothing_waits(tmp_path):
    (tmp_path / "sitecustomize.py").write_text(
        f"import fcntl\n\ndef flock(file, operation):\n    raise OSError({errno.ENOLCK}, "
        "'no')\n\nfcntl.flock = flock\n"
    )
    (tmp_path / "home" / "datasets").mkdir(parents=True)
    path = os.pathsep.join([str(tmp_path), str(ROOT), os.environ.get("PYTHONPATH", "")])
    message = run_elsewhere(tmp_path, HF_HOME=str(tmp_path / "home"), PYTHONPATH=path)
    assert f"cannot lock {tmp_path}/home/datasets/.lock-" in message and "HF_HOME" in message


# -- mistakes --------------------------------------------------------------------------------------

GOOD = {"train": [CHOICE_ROW] * 4, "validation": [CHOICE_ROW], "test": [CHOICE_ROW]}
MISTAKES = {
    "nothing there": ({}, ["found no data file in", "train.jsonl"]),
    "an empty file": (GOOD | {"train": ""}, ["found the empty file", "train.jsonl"]),
    "no train": ({"test": [CHOICE_ROW] * 4}, ["found the splits test,", "add a file train.jsonl"]),
    "one row": (
        {"train": [CHOICE_ROW], "test": [CHOICE_ROW]},
        ["found 1 rows in train", "at least 2"],
    ),
    "no column": (
        {split: [{"context": "a", "label": 1}] * 4 for split in GOOD},
        [
            "no column 'choices' in train",
            "which has context, label",
            "expected context, choices, label",
        ],
    ),
    "no column in test": (
        GOOD | {"test": [{"context": "a", "label": 1}]},
        ["no column 'choices' in test", "which has context, label"],
    ),
    "a label too high": (
        GOOD | {"test": [CHOICE_ROW, CHOICE_ROW | {"label": 2}]},
        ["row 1 of test", "column 'label': found int 2", "from 0 to 1"],
    ),
    "a hidden label": (
        GOOD | {"train": [CHOICE_ROW, CHOICE_ROW | {"label": -1}]},
        ["row 1 of train", "found int -1"],
    ),
    "a label that is true or false": (
        {split: [CHOICE_ROW | {"label": label} for label in (False, True)] for split in GOOD},
        [
            "row 0 of train",
            "column 'label': found bool False",
            "expected a whole number from 0 to 1",
        ],
    ),
    "a label in words": (
        GOOD | {"test": [CHOICE_ROW | {"label": "four"}]},
        ["row 0 of test", "found 'four'", "0 to 1"],
    ),
    "choices in one text": (
        {split: [CHOICE_ROW | {"choices": "two, three"}] * 2 for split in GOOD},
        [
            "row 0 of train",
            "column 'choices': found str of 10 characters",
            "a list of texts",
            '["a", "b"]',
        ],
    ),
    "a context that is a number": (
        {split: [CHOICE_ROW | {"context": 7}] * 2 for split in GOOD},
        ["row 0 of train", "column 'context': found int 7", "expected text"],
    ),
    "not JSON": (
        GOOD | {"train": '{"context": "a"\n!'},
        ["found ArrowInvalid: JSON parse error", "while reading"],
    ),
    "two formats": (
        {"train": [CHOICE_ROW] * 4, "test_csv": "context,label\na,1\n"},
        ["expected files of one format"],
    ),
    "broken lines with secrets": (
        GOOD
        | {
            "train": (
                '{"context": "a", "label": "secret"}\n{"context": ["secret"], "label": '
                '{"secret": 1}}\n!'
            )
        },
        ["while reading train.jsonl in", "expected .jsonl files"],
    ),
    "a table of a head only": (
        {"train_csv": "context,choices,label\n", "test_csv": "context,choices,label\n"},
        ["found no row while reading train.csv in"],
    ),
    "nothing to validate on": (
        {"train": [*[CHOICE_ROW | {"choices": ["", "b"]}] * 19, CHOICE_ROW], "test": [CHOICE_ROW]},
        ["no usable row in train (2 read for validation", "give validation a file of its own"],
    ),
    "nothing to teach": (
        GOOD | {"train": [CHOICE_ROW | {"choices": ["", "b"]}]},
        ["no usable row in train (1 read)"],
    ),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes_in_the_files(tmp_path, mistake):
    files, words = MISTAKES[mistake]
    with pytest.raises(ValueError) as told:
        loading.load("multiple_choice", write(tmp_path / "own", **files), seed=0)
    require_line(str(told.value), words)


def require_line(message: str, words: list[str]) -> None:
    assert "\n" not in message and "multiple_choice" in message and "secret" not in message
    assert all(word in message for word in words), message


def test_mistakes_in_the_call(tmp_path):
    source = write(tmp_path / "own", **GOOD)
    for call, words in (
        (lambda: loading.load("multiple_chice", None, seed=0), "did you mean 'multiple_choice'?"),
        (lambda: tasks.find("sentiment"), "is not known; expected one of arc_easy, "),
        (lambda: tasks.find("text_classification"), "did you mean 'classification'?"),
        (
            lambda: tasks.find("text_classification"),
            "for data of your own, by columns, classification (text, label) or multiple_choice (c",
        ),
        (
            lambda: loading.load("arc_easy", str(tmp_path / "nowhere"), seed=0),
            f"found no folder {tmp_path}/nowhere",
        ),
        (lambda: loading.load("arc_easy", f"{source}/train.jsonl", seed=0), "expected a folder"),
        (lambda: loading.load("multiple_choice", None, seed=0), "found no source"),
        (
            lambda: loading.load("multiple_choice", source, seed=0, limit={"tran": 1}),
            "found a limit for 'tran'",
        ),
        (
            lambda: loading.load("multiple_choice", source, seed=0, limit={"train": 0}),
            "found limit 0 for train",
        ),
        (
            lambda: loading.load("arc_easy", source, seed=0),
            "found no column 'question', 'answerKey' in train",
        ),
        (
            lambda: loading.load("arc_easy", write(tmp_path / "one", train=[ARC_ROW] * 4), seed=0),
            "found the splits train, expected train and test (or validation) with answers, for tes",
        ),
        (
            lambda: loading.check_columns("arc_easy", source),
            "found no column 'question', 'answerKey' in train",
        ),
    ):
        with pytest.raises(ValueError) as told:
            call()
        assert words in str(told.value) and "\n" not in str(told.value)


def load_with_hub_at(address: str, source: str | None, home: Path) -> str:
    """The message of `load` in a process of its own, whose hub is at another address."""
    names = (
        "HF_HUB_OFFLINE",
        "HF_DATASETS_OFFLINE",
        "HTTP_PROXY",
        "http_proxy",
        "ALL_PROXY",
        "all_proxy",
    )
    env = {name: value for name, value in os.environ.items() if name not in names}
    program = f"from fedsp_mpi.data import loading\nloading.load('arc_easy', {source!r}, seed=0)"
    command = [sys.executable, "-c", program]
    env |= {"HF_ENDPOINT": address, "HF_HOME": str(home)}
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=60)
    assert done.returncode == 1
    return done.stderr.strip().splitlines()[-1]


def test_a_node_without_the_hub_says_so_at_once(tmp_path):
    for source, name in ((None, "allenai/ai2_arc"), ("some/set:easy", "some/set")):
        message = load_with_hub_at("http://127.0.0.1:9", source, tmp_path)
        assert message.startswith("ValueError: arc_easy: found no folder")
        assert f"cannot reach the hub for {name}" in message and "give a local folder" in message


class NoSuchSet(http.server.BaseHTTPRequestHandler):
    """A hub that knows no data set."""

    def do_GET(self) -> None:
        self.send_response(404)
        self.send_header("X-Error-Code", "RepoNotFound")
        self.end_headers()

    def log_message(self, *_: object) -> None:
        pass


@contextlib.contextmanager
def empty_hub() -> Iterator[str]:
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), NoSuchSet) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


def test_a_name_that_the_hub_does_not_know(tmp_path):
    with empty_hub() as address:
        message = load_with_hub_at(address, "some/set", tmp_path)
    assert "no data set some/set on the hub" in message and "correct the name" in message

"""Where the rows come from: forms of a source, how they make three splits, and users' mistakes told in one line."""

import contextlib
import gzip
import http.server
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import datasets
import pytest

from fedsp_mpi.data import tasks

ROOT = Path(__file__).resolve().parent.parent
SHARED = ROOT.parent / "shared" / "data"
CHOICE_ROW = {"context": "Q: 1 + 1?\nA:", "choices": ["two", "three"], "label": 0}
ARC_ROW = {"question": "Why?", "choices": {"text": ["so", "no"], "label": ["1", "2"]}, "answerKey": "2"}


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory, monkeypatch):
    """What `datasets` prepares goes to a folder of this test run."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.getbasetemp() / "cache")


def local(name: str) -> str:
    if not (SHARED / name).is_dir():
        pytest.skip(f"no local copy of {name} in ../shared/data")
    return str(SHARED / name)


def write(folder: Path, **files: object) -> str:
    """Rows to folder/<split>.jsonl; a text is written as it is, under a name with _ for the dot."""
    folder.mkdir(exist_ok=True)
    for name, content in files.items():
        path = folder / (name.replace("_", ".") if "_" in name else f"{name}.jsonl")
        text = content if isinstance(content, str) else "".join(json.dumps(row) + "\n" for row in content)
        path.write_text(text)
    return str(folder)


# -- splits, limits, forms of a source -----------------------------------------------------------------------------


def test_splits_as_they_are():
    splits = tasks.load("arc_easy", local("arc_easy"), seed=0)
    assert [len(s) for s in (splits.train, splits.validation, splits.test)] == [2251, 570, 2376]
    assert splits.notes == ()


def test_a_missing_validation_is_cut_from_train():
    whole = datasets.load_dataset(local("web_questions"), split="train")["question"]
    splits, other = (tasks.load("web_questions", local("web_questions"), seed=seed) for seed in (0, 1))
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
    splits = tasks.load("hellaswag", local("hellaswag"), seed=0)
    assert [len(s) for s in (splits.train, splits.validation, splits.test)] == [35915, 3990, 10042]
    assert splits.notes[0] == "test = the split 'validation': the source has no split 'test'"


def test_a_test_split_with_hidden_answers_is_not_scored(tmp_path):
    hidden = [CHOICE_ROW | {"label": -1}] * 4
    source = write(tmp_path / "own", train=[CHOICE_ROW] * 20, validation=[CHOICE_ROW] * 3, test=hidden)
    splits = tasks.load("multiple_choice", source, seed=0)
    assert [len(s) for s in (splits.train, splits.validation, splits.test)] == [18, 2, 3]
    assert "the answers of the split 'test' are not public" in splits.notes[0]


def test_limit_takes_the_first_rows_and_moves_nothing_else():
    whole = tasks.load("web_questions", local("web_questions"), seed=0)
    limits = {"train": 50, "validation": 20, "test": 7}
    part = tasks.load("web_questions", local("web_questions"), seed=0, limit=limits)
    assert (part.train, part.validation, part.test) == (whole.train[:50], whole.validation[:20], whole.test[:7])
    assert "test = the first 7 of 2032 rows (limit)" in part.notes


def test_rows_with_nothing_to_teach_are_left_out_of_training_alone(tmp_path):
    empty = CHOICE_ROW | {"choices": [" ", "b"]}
    rows = [CHOICE_ROW, empty, CHOICE_ROW, empty]
    source = write(tmp_path / "own", train=rows, validation=[CHOICE_ROW], test=rows)
    splits = tasks.load("multiple_choice", source, seed=0)
    assert (len(splits.train), len(splits.test)) == (2, 4)
    assert splits.notes == ("train: 2 rows without an answer left out (train 1, 3)",)
    unanswered = {"context": "?", "answers": []}
    rows = [{"context": "?", "answers": ["a"]}, unanswered]
    splits = tasks.load("question_answering", write(tmp_path / "qa", train=rows * 5, test=rows), seed=0)
    assert len(splits.test) == 1


@pytest.mark.parametrize("form", ["jsonl", "jsonl.gz", "json", "csv", "parquet", "saved", "snapshot"])
def test_forms_of_a_local_source(tmp_path, form):
    rows = [{"sentence": f"text {k}", "label": k % 2} for k in range(10)]
    for split in ("train", "validation", "test"):
        table = datasets.Dataset.from_list(rows)
        if form in ("jsonl", "jsonl.gz"):
            text = "".join(json.dumps(row) + "\n" for row in rows).encode()
            (tmp_path / f"{split}.{form}").write_bytes(gzip.compress(text) if form == "jsonl.gz" else text)
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
        parts = {split: datasets.Dataset.from_list(rows) for split in ("train", "validation", "test")}
        datasets.DatasetDict(parts).save_to_disk(tmp_path)
    splits = tasks.load("sst2", str(tmp_path), seed=0)
    assert splits.train == splits.validation == splits.test
    assert [example.gold for example in splits.test] == [(0,), (1,)] * 5
    tasks.check_columns("sst2", str(tmp_path))


@pytest.mark.parametrize("form", ["saved", "folder"])
def test_a_further_split_may_have_columns_of_its_own(tmp_path, form):
    parts = {split: [CHOICE_ROW] * 4 for split in ("train", "validation", "test")} | {"unsupervised": [{"text": "a"}]}
    if form == "saved":
        datasets.DatasetDict({name: datasets.Dataset.from_list(rows) for name, rows in parts.items()}).save_to_disk(
            tmp_path / "own"
        )
    else:
        write(tmp_path / "own", **parts)
    tasks.check_columns("multiple_choice", str(tmp_path / "own"))
    splits = tasks.load("multiple_choice", str(tmp_path / "own"), seed=0)
    assert [len(s) for s in (splits.train, splits.validation, splits.test)] == [4, 4, 4]


def test_configurations_of_a_folder(tmp_path):
    for config, word in (("ARC-Easy", "easy"), ("ARC-Challenge", "hard")):
        (tmp_path / config).mkdir()
        for split in ("train", "validation", "test"):
            write(tmp_path / config, **{split: [ARC_ROW | {"question": word}] * 3})
    head = "".join(
        f"- config_name: {config}\n  data_files:\n"
        + "".join(f"  - split: {s}\n    path: {config}/{s}.jsonl\n" for s in ("train", "validation", "test"))
        for config in ("ARC-Easy", "ARC-Challenge")
    )
    (tmp_path / "README.md").write_text(f"---\nconfigs:\n{head}---\n")
    assert "easy" in tasks.load("arc_easy", str(tmp_path), seed=0).test[0].context
    assert "hard" in tasks.load("arc_challenge", str(tmp_path), seed=0).test[0].context
    assert "hard" in tasks.load("arc_easy", f"{tmp_path}:ARC-Challenge", seed=0).test[0].context
    with pytest.raises(ValueError, match="found the configurations ARC-"):
        tasks.load("arc_easy", f"{tmp_path}:ARC-Middle", seed=0)


def test_a_changed_file_is_read_again(tmp_path):
    source = write(tmp_path / "own", train=[CHOICE_ROW] * 5, validation=[CHOICE_ROW] * 2, test=[CHOICE_ROW] * 2)
    assert len(tasks.load("multiple_choice", source, seed=0).test) == 2
    write(tmp_path / "own", test=[CHOICE_ROW] * 3)
    assert len(tasks.load("multiple_choice", source, seed=0).test) == 3


def test_the_settings_of_the_library_are_as_before():
    datasets.enable_progress_bars()
    tasks.load("arc_easy", local("arc_easy"), seed=0)
    assert not datasets.are_progress_bars_disabled()


LOAD = "from fedsp_mpi.data import tasks; print(len(tasks.load('sst2', {!r}, seed=0).train))"


def test_four_processes_may_load_at_once_and_nothing_is_written_into_the_source(tmp_path):
    rows = [{"sentence": f"text {k}", "label": k % 2} for k in range(20000)]
    source = write(tmp_path / "own", train=rows, validation=rows[:10], test=rows[:10])
    before = sorted(path.name for path in (tmp_path / "own").iterdir())
    env = os.environ | {"HF_HOME": str(tmp_path / "home"), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", LOAD.format(source)]
    running = [
        subprocess.Popen(command, cwd=ROOT, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        for _ in range(4)
    ]
    for process in running:
        out, err = process.communicate(timeout=120)
        assert (process.returncode, out, err) == (0, "20000\n", "")
    assert sorted(path.name for path in (tmp_path / "own").iterdir()) == before
    assert list((tmp_path / "home").rglob("*.arrow"))


# -- mistakes ------------------------------------------------------------------------------------------------------

GOOD = {"train": [CHOICE_ROW] * 4, "validation": [CHOICE_ROW], "test": [CHOICE_ROW]}
MISTAKES = {
    "nothing there": ({}, ["found no data file in", "train.jsonl"]),
    "an empty file": (GOOD | {"train": ""}, ["found the empty file", "train.jsonl"]),
    "no test": ({"train": [CHOICE_ROW] * 4}, ["found the splits train,", "test", "add a file test.jsonl"]),
    "no train": ({"test": [CHOICE_ROW] * 4}, ["found the splits test,", "add a file train.jsonl"]),
    "one row": ({"train": [CHOICE_ROW], "test": [CHOICE_ROW]}, ["found 1 rows in train", "at least 2"]),
    "no column": (
        {split: [{"context": "a", "label": 1}] * 4 for split in GOOD},
        ["no column 'choices' in train", "which has context, label", "expected context, choices, label"],
    ),
    "no column in test": (
        GOOD | {"test": [{"context": "a", "label": 1}]},
        ["no column 'choices' in test", "which has context, label"],
    ),
    "a label too high": (
        GOOD | {"test": [CHOICE_ROW, CHOICE_ROW | {"label": 2}]},
        ["row 1 of test", "column 'label': found int 2", "from 0 to 1"],
    ),
    "a hidden label": (GOOD | {"train": [CHOICE_ROW, CHOICE_ROW | {"label": -1}]}, ["row 1 of train", "found int -1"]),
    "a label that is true or false": (
        {split: [CHOICE_ROW | {"label": label} for label in (False, True)] for split in GOOD},
        ["row 0 of train", "column 'label': found bool False", "expected a whole number from 0 to 1"],
    ),
    "a label in words": (
        GOOD | {"test": [CHOICE_ROW | {"label": "four"}]},
        ["row 0 of test", "found 'four'", "0 to 1"],
    ),
    "choices in one text": (
        {split: [CHOICE_ROW | {"choices": "two, three"}] * 2 for split in GOOD},
        ["row 0 of train", "column 'choices': found str of 10 characters", "a list of texts", '["a", "b"]'],
    ),
    "a context that is a number": (
        {split: [CHOICE_ROW | {"context": 7}] * 2 for split in GOOD},
        ["row 0 of train", "column 'context': found int 7", "expected text"],
    ),
    "not JSON": (GOOD | {"train": '{"context": "a"\n!'}, ["found ArrowInvalid: JSON parse error", "while reading"]),
    "two formats": ({"train": [CHOICE_ROW] * 4, "test_csv": "context,label\na,1\n"}, ["expected files of one format"]),
    "nothing to teach": (GOOD | {"train": [CHOICE_ROW | {"choices": ["", "b"]}]}, ["no usable row in train (1 read)"]),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes_in_the_files(tmp_path, mistake):
    files, words = MISTAKES[mistake]
    with pytest.raises(ValueError) as told:
        tasks.load("multiple_choice", write(tmp_path / "own", **files), seed=0)
    require_line(str(told.value), words)


def require_line(message: str, words: list[str]) -> None:
    assert "\n" not in message and "multiple_choice" in message
    assert all(word in message for word in words), message


def test_mistakes_in_the_call(tmp_path):
    source = write(tmp_path / "own", **GOOD)
    for call, words in (
        (lambda: tasks.load("multiple_chice", None, seed=0), "did you mean 'multiple_choice'?"),
        (lambda: tasks.load("arc_easy", str(tmp_path / "nowhere"), seed=0), f"found no folder {tmp_path}/nowhere"),
        (lambda: tasks.load("arc_easy", f"{source}/train.jsonl", seed=0), "expected a folder"),
        (lambda: tasks.load("multiple_choice", None, seed=0), "found no source"),
        (lambda: tasks.load("multiple_choice", source, seed=0, limit={"tran": 1}), "found a limit for 'tran'"),
        (lambda: tasks.load("multiple_choice", source, seed=0, limit={"train": 0}), "found limit 0 for train"),
        (lambda: tasks.load("arc_easy", source, seed=0), "found no column 'question', 'answerKey' in train"),
        (lambda: tasks.check_columns("arc_easy", source), "found no column 'question', 'answerKey' in train"),
    ):
        with pytest.raises(ValueError) as told:
            call()
        assert words in str(told.value) and "\n" not in str(told.value)


def load_with_hub_at(address: str, source: str | None, home: Path) -> str:
    """The message of `load` in a process of its own, whose hub is at another address."""
    names = ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy")
    env = {name: value for name, value in os.environ.items() if name not in names}
    program = f"from fedsp_mpi.data import tasks\ntasks.load('arc_easy', {source!r}, seed=0)"
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

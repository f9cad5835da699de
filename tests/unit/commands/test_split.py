"""`split`: folders from which each owner reads the very examples that the simulation gives it."""

from __future__ import annotations

import csv
import hashlib
import json
from collections import Counter
from pathlib import Path

import datasets
import pyarrow.parquet
import pytest

from fedsp_mpi import cli, config
from fedsp_mpi.commands.split import split
from fedsp_mpi.config.yaml_reader import read_yaml
from fedsp_mpi.data import loading, tasks
from fedsp_mpi.data.tokens import encode
from fedsp_mpi.files import ownership
from fedsp_mpi.log import Log
from fedsp_mpi.run.inputs import ExperimentInputs

# A server without examples only averages.
AVERAGES = ("server.tuning.steps=0", "distillation.stage.steps=0")
USER = ["data.partition=column", "data.partition_column=user", *AVERAGES]
USERS = ("zoe", "bo/../b", "Ünal", " ", "")  # the last two are nobody


def settings_of(folder: Path) -> list[str]:
    """The settings of a task of two classes in CSV files, whose columns have other names."""
    return [
        f"data.source={folder}",
        "data.task=sst2",
        "data.columns={sentence: text, label: outcome}",
        "federation.clients=3",
    ]


def write_table(folder: Path, labels: tuple[str, str] = ("0", "1")) -> list[dict[str, str]]:
    """Write CSV files; every tenth label is blank. Return the rows of train."""
    folder.mkdir()
    for name, num_rows in {"train": 60, "validation": 6, "test": 8}.items():
        rows = [
            {
                "text": f"{name} {number} is {'good' if number % 3 else 'bad'}",
                "outcome": labels[number % 3 > 0] if number % 10 != 9 else "",
                "user": USERS[number % 7 % 5],
            }
            for number in range(num_rows)
        ]
        with (folder / f"{name}.csv").open("w", newline="") as file:
            writer = csv.DictWriter(file, ["text", "outcome", "user"])
            writer.writeheader()
            writer.writerows(rows)
        if name == "train":
            train = rows
    return train


def run(folder: Path, settings: list[str], **options: bool) -> list[str]:
    """Split; return the lines of the log."""
    lines: list[str] = []
    split(None, settings, folder, log=Log(lines.append), **options)
    return lines


def manifest(folder: Path) -> dict:
    return json.loads((folder / "manifest.json").read_text(encoding="utf-8"))


def table(folder: Path, split: str = "train") -> list[dict]:
    return pyarrow.parquet.read_table(folder / f"{split}.parquet").to_pylist()


def read_back(task: tasks.Task, folder: Path, owner: str, copy: Path) -> tasks.Splits:
    """Read an owner's training examples, and the server's others, as any folder is read."""
    copy.mkdir(parents=True)
    for name, source in {"train": owner, "validation": "server", "test": "server"}.items():
        (copy / f"{name}.parquet").symlink_to(folder / source / f"{name}.parquet")
    return loading.load(task, str(copy), seed=0)


def require_same_examples(folder: Path, settings: list[str], tmp_path: Path) -> None:
    """Compare every folder with what the simulation of these settings trains and scores on."""
    simulation = ExperimentInputs(config.load(None, settings))
    entries = manifest(folder)["owners"]
    names = [entry["name"] for entry in entries]
    assert names[0] == "server" and names[1:] == sorted(names[1:])
    assert len(names) == len(simulation.shards)
    assert {path.name for path in folder.iterdir() if path.is_dir()} == set(names)
    for owner, (entry, shard) in enumerate(zip(entries, simulation.shards)):
        assert entry["rows"].get("train", 0) == len(shard)
        if not len(shard):
            assert not (folder / entry["folder"] / "train.parquet").exists()
            continue
        copy = tmp_path / "copies" / entry["name"]
        splits = read_back(simulation.task, folder, entry["name"], copy)
        assert list(splits.train) == [simulation.splits.train[row] for row in shard]
        assert splits.validation == simulation.splits.validation
        assert splits.test == simulation.splits.test
        texts = encode(simulation.tokenizer, splits.train, simulation.max_length)
        expected = simulation.shard(owner)
        assert [text.ids.tolist() for text in texts] == [text.ids.tolist() for text in expected]


CASES = {
    "iid": [],
    "quantity": ["data.partition=quantity", "data.server_share=0.2", "data.limit.train=100"],
    "no shard": ["data.server_share=0", *AVERAGES, "data.limit.test=5"],
}


@pytest.mark.parametrize("case", CASES)
def test_folders_hold_the_simulations_examples(case, tmp_path):
    settings = ["federation.clients=2", "data.limit.train=30", *CASES[case]]
    run(tmp_path / "silos", settings)
    require_same_examples(tmp_path / "silos", settings, tmp_path)


TABLE_CASES = {
    "labels": (("0", "1"), ["data.partition=labels"]),
    "shots": (("negative", "positive"), ["data.shots=6", "data.verbaliser=[bad, good]"]),
    "mixed": (("0", "positive"), ["data.limit.train=31"]),
    "column": (("0", "1"), USER),
    "column and share": (("0", "1"), [*USER, "data.server_share=7"]),
}


@pytest.mark.parametrize("case", TABLE_CASES)
def test_folders_of_a_table_hold_the_simulations_examples(case, tmp_path):
    labels, more = TABLE_CASES[case]
    write_table(tmp_path / "table", labels)
    settings = [*settings_of(tmp_path / "table"), *more]
    run(tmp_path / "silos", settings)
    require_same_examples(tmp_path / "silos", settings, tmp_path)


def test_a_column_makes_a_client_of_each_value(tmp_path):
    rows = write_table(tmp_path / "table")
    given = tmp_path / "given.yaml"  # which does not say how many clients there are
    given.write_text("recipe: paper\nmodel: {name: embedded}\nprompt: {num_tokens: 8}\n")
    lines: list[str] = []
    settings = [*settings_of(tmp_path / "table")[:-1], *USER]
    split(str(given), settings, tmp_path / "silos", log=Log(lines.append))
    assert read_yaml(tmp_path / "silos" / "silos.yaml")["federation"]["clients"] == 3
    clients = manifest(tmp_path / "silos")["owners"][1:]
    assert [(client["name"], client["value"]) for client in clients] == [
        ("000_bo_.._b", "bo/../b"),
        ("001_zoe", "zoe"),
        ("002_Unal", "Ünal"),
    ]
    answered = [row for row in rows if row["outcome"]]
    for client in clients:
        written = table(tmp_path / "silos" / client["folder"])
        expected = [row for row in answered if row["user"] == client["value"]]
        assert len(written) == client["rows"]["train"]
        assert sorted(row["sentence"] for row in written) == sorted(r["text"] for r in expected)
        assert {row["user"] for row in written} == {client["value"]}
        assert client["labels"]["train"] == {
            "negative": sum(row["outcome"] == "0" for row in expected),
            "positive": sum(row["outcome"] == "1" for row in expected),
        }
    num_nobody = sum(not row["user"].strip() for row in answered)
    assert manifest(tmp_path / "silos")["left_out"] == num_nobody > 0
    assert any(f"{num_nobody} of {len(answered)} examples without a value" in s for s in lines)


def test_the_manifest_says_what_is_there_and_not_where(tmp_path):
    write_table(tmp_path / "table")
    run(tmp_path / "silos", [*settings_of(tmp_path / "table"), "run.seed=5"])
    text = (tmp_path / "silos" / "manifest.json").read_text()
    assert str(tmp_path) not in text and " is good" not in text
    content = manifest(tmp_path / "silos")
    assert (content["version"], content["seed"], content["left_out"]) == (1, 5, 0)
    assert content["data"]["source"] == "table" and content["data"]["task"] == "sst2"
    for owner in content["owners"]:
        for name, num_rows in owner["rows"].items():
            rows = table(tmp_path / "silos" / owner["folder"], name)
            lines = [json.dumps(row, sort_keys=True, ensure_ascii=False) + "\n" for row in rows]
            assert len(rows) == num_rows
            assert owner["digests"][name] == hashlib.sha256("".join(lines).encode()).hexdigest()
            numbers = Counter(row["label"] for row in rows)
            assert owner["labels"][name] == {"negative": numbers[0], "positive": numbers[1]}
    sizes = [owner["rows"] for owner in content["owners"]]
    assert sum(size["train"] for size in sizes) == 54
    assert sizes[0] == {"train": 14, "validation": 6, "test": 8}


def test_classes_keep_their_names(tmp_path):
    names = datasets.ClassLabel(names=["pos", "neg"])
    features = datasets.Features({"sentence": datasets.Value("string"), "label": names})
    rows = {"sentence": [f"text {number}" for number in range(9)], "label": [0, 1, 1] * 3}
    (tmp_path / "table").mkdir()
    for name in ("train", "validation", "test"):
        made = datasets.Dataset.from_dict(rows, features=features)
        made.to_parquet(tmp_path / "table" / f"{name}.parquet")
    settings = [f"data.source={tmp_path / 'table'}", "data.task=sst2", "federation.clients=2"]
    run(tmp_path / "silos", settings)
    require_same_examples(tmp_path / "silos", settings, tmp_path)
    path = str(tmp_path / "silos" / "client_000" / "train.parquet")
    written = datasets.Dataset.from_parquet(path, cache_dir=str(tmp_path / "cache"))
    assert written.features == features


def test_the_configuration_deals_nothing_out_again(tmp_path):
    write_table(tmp_path / "table")
    given = tmp_path / "given.yaml"
    given.write_text(
        "extends: base.yaml\ndata: {shots: 4, limit: {train: 50}, partition: labels,"
        f" columns: {{sentence: text, label: outcome}}, source: {tmp_path / 'table'}}}\n"
    )
    (tmp_path / "base.yaml").write_text("model: {name: embedded}\ndata: {task: sst2}\n")
    overrides = ["federation.clients=2", "run.seed=7"]
    split(str(given), overrides, tmp_path / "silos", log=Log())
    after = config.load(tmp_path / "silos" / "silos.yaml")
    silos = [(silo.name, silo.source) for silo in after.federation.silos]
    names = ["client_000", "client_001"]
    assert silos == [(name, f"{tmp_path}/silos/{name}") for name in names]
    assert after.server.data.source == f"{tmp_path}/silos/server"
    assert (after.run.seed, after.model.name, after.federation.clients) == (7, "embedded", 2)
    data = after.data
    assert (data.source, data.shots, data.server_share) == (None, None, None)
    assert (data.partition, data.partition_column) == ("iid", None)
    assert data.limit == config.LimitConfig()
    # The files have the task's names, and the base's renaming must not reach them.
    assert loading.check_columns("sst2", copied(tmp_path), data.columns) is None
    assert data.columns == {"sentence": "sentence", "label": "label"}


def copied(tmp_path: Path) -> str:
    read_back(tasks.find("sst2"), tmp_path / "silos", "client_001", tmp_path / "copy")
    return str(tmp_path / "copy")


# -- whose folder it is ----------------------------------------------------------------------------


def test_somebody_elses_folder_stays_as_it_is(tmp_path):
    folder = tmp_path / "silos"
    (folder / "client_000").mkdir(parents=True)
    (folder / "client_000" / "train.parquet").write_text("mine")
    (folder / "manifest.json").write_text('{"owners": [{"folder": "client_000"}]}')
    for options in ({}, {"replace": True}):
        with pytest.raises(ValueError, match="found 'client_000' and no sign that a split wrote"):
            run(folder, [], **options)
    assert (folder / "client_000" / "train.parquet").read_text() == "mine"
    assert len(list(folder.iterdir())) == 2
    file = tmp_path / "file"
    file.write_text("mine")
    with pytest.raises(ValueError, match="no sign that a split wrote it"):
        run(file, [])


def test_a_complete_split_is_replaced_when_that_is_asked_for(tmp_path):
    folder = tmp_path / "silos"
    run(folder, ["federation.clients=4"])
    (folder / "client_003" / "notes.txt").write_text("mine")
    before = manifest(folder)
    with pytest.raises(ValueError, match=r"found a complete split.*--replace"):
        run(folder, ["federation.clients=2"])
    assert manifest(folder) == before and len(table(folder / "client_003")) == 112
    run(folder, ["federation.clients=2"], replace=True)
    names = {path.name for path in folder.iterdir() if path.is_dir()}
    assert names == {"server", "client_000", "client_001", "client_003"}
    assert [path.name for path in (folder / "client_003").iterdir()] == ["notes.txt"]
    assert len(manifest(folder)["owners"]) == 3


def test_what_is_split_does_not_lie_where_it_is_written(tmp_path):
    folder = tmp_path / "silos"
    run(folder, ["federation.clients=2"])
    source = f"data.source={folder / 'server'}"
    with pytest.raises(ValueError, match=r"of data.source in the split's folder.*another --to"):
        run(folder, [source], replace=True)
    (folder / "mine.yaml").write_text("model: {name: embedded}\ndata: {source: embedded}\n")
    with pytest.raises(ValueError, match="of the configuration in the split's folder"):
        split(str(folder / "mine.yaml"), [], folder, log=Log(), replace=True)
    assert len(manifest(folder)["owners"]) == 3


class Stopped(BaseException):
    """What no part of the package catches, as nothing does after kill -9."""


@pytest.mark.parametrize("num_lines", [1, 4])
def test_an_interrupted_split_has_no_manifest_and_is_written_anew(num_lines, tmp_path):
    folder = tmp_path / "silos"
    settings = ["federation.clients=3", "data.limit.train=40", "data.limit.validation=100"]
    run(tmp_path / "whole", settings)
    run(folder, ["federation.clients=4"])  # so that a manifest must go first
    seen: list[str] = []

    def stop(line: str) -> None:
        seen.append(line)
        if line.startswith(("folder ", "3 silos")):
            lines.append(line)
        if len(lines) == num_lines:
            raise Stopped

    lines: list[str] = []
    with pytest.raises(Stopped):
        split(None, settings, folder, log=Log(stop, every=0), replace=True)
    names = {path.name for path in folder.iterdir()}
    assert "unfinished.json" in names and "manifest.json" not in names, seen
    assert "silos.yaml" not in names and "client_003" not in names
    run(folder, settings)  # an unfinished one needs no --replace
    assert manifest(folder) == manifest(tmp_path / "whole")
    assert "unfinished.json" not in {path.name for path in folder.iterdir()}
    for owner in manifest(folder)["owners"]:
        assert len(table(folder / owner["folder"])) == owner["rows"]["train"]


def test_a_split_that_only_just_began_is_ours(tmp_path):
    (tmp_path / "unfinished.json.part").write_text("")
    ownership.require_split(tmp_path, replace=False)
    (tmp_path / "unfinished.json").write_text("{}")
    with pytest.raises(ValueError, match="no sign that a split wrote it"):
        ownership.require_split(tmp_path, replace=True)


def test_a_manifest_names_no_folder_outside(tmp_path):
    """A manifest may come from anywhere: what it names is not removed unless it lies inside."""
    (tmp_path / "outside").mkdir()
    (tmp_path / "outside" / "train.parquet").write_text("mine")
    folder = tmp_path / "silos"
    folder.mkdir()
    owners = [{"folder": name} for name in ("../outside", "..", "client_000", "linked")]
    content = {"format": ownership.SPLIT_FORMAT, "version": 1, "owners": owners}
    (folder / "manifest.json").write_text(json.dumps(content))
    (folder / "linked").symlink_to(tmp_path / "outside")
    run(folder, ["federation.clients=1"], replace=True)
    assert (tmp_path / "outside" / "train.parquet").read_text() == "mine"
    assert len(manifest(folder)["owners"]) == 2


# -- mistakes --------------------------------------------------------------------------------------

MISTAKES = {
    "silos": (
        [
            "federation.silos=[{source: a}, {source: b}, {source: c}, {source: d}]",
            "data.source=null",
            "server.data.source=s",
        ],
        ["federation.silos: found 4", "divided already"],
    ),
    "attack": (["attack.target=1"], ["attack.target: found 1", "--set attack.target=null"]),
    "no client": (["federation.clients=0"], ["federation.clients: found 0", "from 1 to 5000"]),
    "too many": (["federation.clients=9000"], ["found 9000", "from 1 to 5000"]),
    "other number": (USER, ["federation.clients: found 4 with 3", "set it to 3"]),
    "no column": (
        ["data.partition=column"],
        ["data.partition_column: found null", "partition=column"],
    ),
    "no partition": (["data.partition_column=user"], ["found 'user' with data.partition=iid"]),
    "unknown": (
        [*USER, "data.partition_column=person"],
        ["data.partition_column: found 'person'", "sentence, label, user"],
    ),
    "server takes all": (
        [*USER, "data.server_share=38"],
        ["data.partition_column: found no example of", "lower data.server_share"],
    ),
    "server tunes": (USER[:2], ["server.tuning.steps: found 8", "data.server_share"]),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes_are_told_in_one_line(mistake, tmp_path, capsys):
    settings, words = MISTAKES[mistake]
    write_table(tmp_path / "table")
    settings = [*settings_of(tmp_path / "table"), "federation.clients=4", *settings]
    arguments = [word for setting in settings for word in ("--set", setting)]
    assert cli.main(["split", "--to", str(tmp_path / "silos"), *arguments]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and len(error) <= 320, error
    assert all(word in error for word in ["found", "expected", *words]), error
    assert not (tmp_path / "silos").exists()


def test_the_picture_is_drawn(tmp_path):
    pytest.importorskip("matplotlib")
    run(tmp_path / "silos", ["federation.clients=2"])
    assert (tmp_path / "silos" / "labels.png").read_bytes().startswith(b"\x89PNG")

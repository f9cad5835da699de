"""Rows of a silo without a label: null, blank, -1, or no column at all; read without any."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from fedsp_mpi.config import DataConfig
from fedsp_mpi.data import loading, own_tasks
from fedsp_mpi.data.tasks import Splits

TEXTS = ["good one", "bad one", "no idea", "", "another"]


def write(folder: Path, name: str, labels: list[object] | None) -> Path:
    """Write a table of the texts in a folder of its own, with these labels or without a column."""
    folder.mkdir()
    rows: list[dict[str, object]] = [{"text": text} for text in TEXTS]
    for row, label in zip(rows, labels or []):
        row["label"] = label
    path = folder / name
    if name.endswith(".csv"):
        lines = [",".join(rows[0]), *(",".join(map(str, row.values())) for row in rows)]
        path.write_text("\n".join(lines) + "\n")
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def load(folder: Path, **settings: object) -> Splits:
    data = DataConfig(task="classification", classes=("bad", "good"), **settings)
    return loading.load(
        own_tasks.configured(data),
        str(folder),
        seed=1,
        owner="silo",
        columns=data.columns,
        keeps_unlabelled=True,
    )


@pytest.mark.parametrize(
    ("name", "labels"),
    [
        ("train.jsonl", ["good", "bad", None, None, "good"]),
        ("train.jsonl", [1, 0, None, None, 1]),
        ("train.jsonl", [1, 0, -1, -1, 1]),
        ("train.csv", ["good", "bad", "", "", "good"]),
    ],
)
def test_rows_with_and_without_a_label(tmp_path, name, labels):
    splits = load(write(tmp_path / "a", name, labels).parent)
    assert [example.gold for example in splits.train] == [(1,), (0,), (1,)]
    [unlabelled] = splits.unlabelled  # the other one has no text
    assert (unlabelled.gold, unlabelled.target, unlabelled.choices) == ((), "", ("bad", "good"))
    assert unlabelled.context.startswith("no idea\n") and unlabelled.row == "row 2 of train"
    assert "1 rows without a label, to be labelled" in " ".join(splits.notes)


@pytest.mark.parametrize("name", ["train.jsonl", "train.csv"])
def test_a_table_without_a_column_of_labels(tmp_path, name):
    splits = load(write(tmp_path / "a", name, None).parent)
    assert splits.train == () and len(splits.unlabelled) == 4


def test_a_column_that_other_silos_call_by_another_name(tmp_path):
    folder = write(tmp_path / "a", "train.jsonl", None).parent
    assert len(load(folder, columns={"label": "outcome"}).unlabelled) == 4


def test_other_owners_must_have_labels(tmp_path):
    data = DataConfig(task="classification", classes=("bad", "good"))
    folder = write(tmp_path / "a", "train.jsonl", None).parent
    with pytest.raises(ValueError, match="found no column 'label'"):
        loading.load(own_tasks.configured(data), str(folder), seed=1, owner="silo")


def test_rows_read_again_in_other_words_have_no_label_either(tmp_path):
    folder = write(tmp_path / "a", "train.jsonl", ["good", "bad", None, None, "good"]).parent
    splits = load(folder)
    other = own_tasks.configured(
        DataConfig(
            task="classification", classes=("bad", "good"), template="{text}. All in all {mask}"
        )
    )
    tables, _ = loading.read_tables(other, str(folder), {})
    again = loading.unlabelled_again(other, tables, splits.train)
    assert [example.context for example in again] == [
        f"{TEXTS[row]}. All in all" for row in (0, 1, 4)
    ]
    assert all(example.gold == () and example.target == "" for example in again)

"""The run record: what goes in comes back, also after a cut, a fold and a resume; damaged files are
clear messages.
"""

from __future__ import annotations

import ast
import math
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import safetensors.numpy

import fedsp_mpi.record as room
from fedsp_mpi.record import (
    RecordError,
    ResultRow,
    RoundRow,
    RunRecord,
    WireRow,
    atomic,
    read,
    reader,
    tables,
)
from fedsp_mpi.record.hdf5 import require_round_files
from fedsp_mpi.record.lock import RunLock, is_abandoned
from helpers.record_samples import assert_same_bits, make, results, tensors

# --- round trip ---


def test_everything_comes_back(tmp_path: Path) -> None:
    folder = tmp_path / "runs" / "one"
    record = make(
        folder, odd={"path": tmp_path, "numbers": (1, np.float32(2)), "text": "größer\0\udc80"}
    )
    record.describe(models={"backbone": 124}, versions={"torch": "2"})
    record.describe(models={"auxiliary": 46}, long={"text": "x" * 200_000})
    record.write_wire(
        [WireRow(name="p", shape=(8, 4), dtype="float32", direction="up", count=6, bytes=768)]
    )
    record.write_results([*results(0.7), ResultRow(method="fedsp", split="validation", n=3)])
    record.write_results([ResultRow(method="fedsp", split="test", n=401)])
    run = read(folder)
    assert run.name == "one" and run.status == "running" and run.committed_rounds == 3
    assert run.config == record.run.config
    assert run.config["odd"] == {
        "path": str(tmp_path),
        "numbers": [1, 2.0],
        "text": "größer\0\udc80",
    }
    assert run.config_text == (folder / "config.yaml").read_text() == "run: {seed: 1}\n"
    assert (
        run.sections["models"] == {"backbone": 124, "auxiliary": 46}
        and len(run.sections["long"]["text"]) == 200_000
    )
    assert run.rounds["validation_loss"].tolist() == [2.0, 1.0, 2.0 / 3] and math.isnan(
        run.rounds["seconds_merge"][0]
    )
    assert run.rounds["is_best"].all() and run.clients["rank"].tolist() == [1, 2] * 3
    assert [tuple(row) for row in run.wire] == [("p", "[8, 4]", "float32", "up", 6, 768, "", 0)]
    expected = [("zero-shot", 400), ("server-only", 400), ("fedsp", 3), ("fedsp", 401)]
    assert [(row["method"], row["n"]) for row in run.results] == expected
    assert_same_bits(run.prompts(2), tensors(2))
    with pytest.raises(ValueError, match="read-only"):
        run.rounds["round"] = 0


def test_plain_h5py_follows_the_link(tmp_path: Path) -> None:
    make(tmp_path / "a")
    with h5py.File(tmp_path / "a" / "run.h5") as file:
        assert np.array_equal(
            file["prompts/0002/z.prefix"][()], tensors(2)["z.prefix"], equal_nan=True
        )


def test_finish_folds_into_one_file(tmp_path: Path) -> None:
    record = make(tmp_path / "a")
    before = read(tmp_path / "a")
    record.finish()
    assert not (tmp_path / "a" / "rounds").exists()
    alone = shutil.move(tmp_path / "a" / "run.h5", tmp_path / "moved.h5")
    run = read(alone)
    assert run.status == "complete" and run.committed_rounds == 3
    for round in (1, 2, 3):
        assert_same_bits(run.prompts(round), tensors(round))
    with pytest.raises(ValueError, match="after finish"):
        record.describe(more={})
    shutil.move(alone, tmp_path / "a" / "run.h5")
    assert_same_bits(before.prompts(1), tensors(1))  # a view from before the fold still finds them


def test_reading_prompts_while_they_are_folded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    record = make(tmp_path / "a")
    run, linked_round = read(tmp_path / "a"), reader.linked_round

    def finish_after_opening(opened: reader.OpenFile, name: str) -> Path | None:
        monkeypatch.setattr(reader, "linked_round", linked_round)
        record.finish()  # the opened file still links to rounds/, which is gone now
        return linked_round(opened, name)

    monkeypatch.setattr(reader, "linked_round", finish_after_opening)
    assert_same_bits(run.prompts(2), tensors(2))
    assert read(tmp_path / "a").status == "complete"


@pytest.mark.parametrize("status", ["complete", "stopped"])
def test_open_goes_on_where_it_ended(tmp_path: Path, status: str) -> None:
    make(tmp_path / "a").finish(status, "signal 10")
    assert (read(tmp_path / "a").status, read(tmp_path / "a").reason) == (status, "signal 10")
    record = RunRecord.open(tmp_path / "a")
    record.commit_round(RoundRow(round=4), [], tensors(4))
    run = read(tmp_path / "a")
    assert (run.status, run.reason, run.prompt_rounds) == ("running", "", (1, 2, 3, 4))
    record.finish()
    for round in run.prompt_rounds:
        assert_same_bits(read(tmp_path / "a").prompts(round), tensors(round))


def test_cut_removes_what_came_after(tmp_path: Path) -> None:
    record = make(tmp_path / "a", rounds=4)
    record.write_results(results(0.7))
    record.cut(4)
    assert len(read(tmp_path / "a").results) == 3
    (tmp_path / "a" / "rounds" / "0005.h5").write_bytes(b"left by a kill")
    record.cut(1)
    run = read(tmp_path / "a")
    assert (
        run.committed_rounds == 1
        and run.rounds["round"].tolist() == [1]
        and run.clients["round"].tolist() == [1, 1]
    )
    assert [row["method"] for row in run.results] == ["zero-shot", "server-only"]
    assert sorted(p.name for p in (tmp_path / "a" / "rounds").iterdir()) == ["0001.h5"]
    record.commit_round(RoundRow(round=2), [], tensors(9))
    assert_same_bits(read(tmp_path / "a").prompts(2), tensors(9))


def test_rounds_must_follow_each_other(tmp_path: Path) -> None:
    record = make(tmp_path / "a", rounds=2)
    for round in (2, 4):
        with pytest.raises(ValueError, match=f"found round {round}, expected 3"):
            record.commit_round(RoundRow(round=round))


def test_without_prompts(tmp_path: Path) -> None:
    record = make(tmp_path / "a", keep=False)
    record.finish()
    run = read(tmp_path / "a")
    assert (
        run.prompt_rounds == ()
        and run.committed_rounds == 3
        and not (tmp_path / "a" / "rounds").exists()
    )
    with pytest.raises(ValueError, match="kept no prompts"):
        run.prompts(1)


def test_an_existing_run_is_refused_or_replaced(tmp_path: Path) -> None:
    make(tmp_path / "a")
    with pytest.raises(ValueError, match=r"found a run \(run.h5\), expected a new folder"):
        make(tmp_path / "a")
    record = (tmp_path / "a" / "run.h5").rename(tmp_path / "run.h5")
    for if_exists in ("refuse", "replace"):  # somebody's folder with a configuration in it
        with pytest.raises(ValueError, match=r"config\.yaml"):
            RunRecord.create(
                tmp_path / "a", config={}, config_text="", environment={}, if_exists=if_exists
            )
    record.rename(tmp_path / "a" / "run.h5")
    (tmp_path / "a" / "slurm.out").write_text("kept")
    again = RunRecord.create(
        tmp_path / "a", config={}, config_text="", environment={}, if_exists="replace"
    )
    assert again.run.committed_rounds == 0
    assert sorted(p.name for p in (tmp_path / "a").iterdir()) == [
        "config.yaml",
        "run.h5",
        "slurm.out",
    ]
    with pytest.raises(ValueError, match="file of that name"):
        make(tmp_path / "a" / "slurm.out")


def test_rows_above_the_commit_mark_are_not_trusted(tmp_path: Path) -> None:
    make(tmp_path / "a")
    with h5py.File(tmp_path / "a" / "run.h5", "r+") as file:
        file.attrs["committed_rounds"] = 2
    run = read(tmp_path / "a")
    assert (
        run.rounds["round"].tolist() == [1, 2]
        and run.clients["round"].max() == 2
        and run.prompt_rounds == (1, 2)
    )


# --- damaged ---


def foreign(file: Path) -> None:
    with h5py.File(file, "w") as h5:
        h5["weights"] = np.zeros(3)


def newer(file: Path) -> None:
    with h5py.File(file, "r+") as h5:
        h5.attrs["layout"] = 99


def incomplete(file: Path) -> None:
    with h5py.File(file, "r+") as h5:
        del h5["clients"]


def other_columns(file: Path) -> None:
    with h5py.File(file, "r+") as h5:
        del h5["clients"]
        h5["clients"] = np.zeros(3, dtype=[("round", "i8")])


@pytest.mark.parametrize(
    "damage, message",
    [
        (Path.unlink, "found no such file"),
        (lambda file: file.write_bytes(b""), "found 0 bytes"),
        (lambda file: file.write_bytes(b"{}"), "found 2 bytes"),
        (lambda file: os.truncate(file, file.stat().st_size - 1), "an end that is cut off"),
        (lambda file: os.truncate(file, 1000), "truncated"),
        (foreign, "something else .it holds weights."),
        (newer, "found layout 99, expected 1"),
        (incomplete, "cannot be read .*clients"),
        (other_columns, "table clients has no column client"),
    ],
)
def test_a_bad_file_is_a_clear_message(
    tmp_path: Path, damage: Callable[[Path], Any], message: str
) -> None:
    make(tmp_path / "a")
    damage(tmp_path / "a" / "run.h5")
    with pytest.raises(ValueError, match=f"run.h5: .*{message}"):
        read(tmp_path / "a")
    with pytest.raises(ValueError, match=message):
        RunRecord.open(tmp_path / "a")


def test_damaged_prompts_are_noticed(tmp_path: Path) -> None:
    make(tmp_path / "a", rounds=2)
    file = tmp_path / "a" / "rounds" / "0001.h5"
    data = bytearray(file.read_bytes())
    with h5py.File(file) as h5:
        chunk = h5["prompt/z.prefix"].id.get_chunk_info(0)
    data[chunk.byte_offset + chunk.size // 2] ^= 1
    file.write_bytes(data)
    run = read(tmp_path / "a")
    with pytest.raises(ValueError, match=r"0001\.h5: found bytes that are not what was written"):
        run.prompts(1)
    (tmp_path / "a" / "rounds" / "0002.h5").unlink()
    with pytest.raises(ValueError, match="rounds/ folder"):
        run.prompts(2)
    with pytest.raises(ValueError, match="found no prompts of round 7, expected one of 1-2"):
        run.prompts(7)


def test_a_failed_commit_can_be_tried_again(tmp_path: Path) -> None:
    record = make(tmp_path / "a", rounds=1, keep=False)
    (tmp_path / "a" / "rounds").write_text("in the way")
    with pytest.raises(RecordError, match=r"0002\.h5: cannot be written"):
        record.commit_round(RoundRow(round=2), [], tensors(2))
    assert record.run.committed_rounds == read(tmp_path / "a").committed_rounds == 1
    (tmp_path / "a" / "rounds").unlink()
    record.commit_round(RoundRow(round=2), [], tensors(2))
    assert_same_bits(read(tmp_path / "a").prompts(2), tensors(2))


def test_a_failed_write_of_the_tables_changes_nothing(tmp_path: Path) -> None:
    record = make(tmp_path / "a", rounds=1)
    (tmp_path / "a" / "run.h5.part").mkdir()
    for attempt in (
        lambda: record.commit_round(RoundRow(round=2), [], tensors(2)),
        lambda: record.describe(models={"more": 1}),
        lambda: record.cut(0),
        lambda: record.finish(),
    ):
        with pytest.raises(
            RecordError, match=r"run\.h5: cannot be written .*; the record keeps its 1 rounds"
        ):
            attempt()
    assert record.run.committed_rounds == read(tmp_path / "a").committed_rounds == 1
    (tmp_path / "a" / "run.h5.part").rmdir()
    record.commit_round(RoundRow(round=2), [], tensors(2))
    record.finish()
    assert read(tmp_path / "a").sections == {} and read(tmp_path / "a").prompt_rounds == (1, 2)


@pytest.mark.parametrize("kind", ["folder", "pipe"])
def test_what_is_in_the_way_of_a_file_is_named_and_not_waited_for(tmp_path: Path, kind) -> None:
    path = tmp_path / "a"

    def be_in_the_way(name: str) -> None:
        (os.mkfifo if kind == "pipe" else os.mkdir)(tmp_path / name)

    be_in_the_way("a.part")
    with pytest.raises(RecordError, match=rf"{path}: .*{path}.part: .*; move away what is there"):
        atomic.write(path, [b"x"], "nothing is lost")
    be_in_the_way("b")
    with pytest.raises(RecordError, match=r"b: cannot be written \(.*; move away what is there"):
        atomic.append(tmp_path / "b", 0, b"x", intact="nothing is lost")
    RunLock.take(tmp_path / "run").release()
    (tmp_path / "run" / "lock").unlink()
    make(tmp_path / "run")
    be_in_the_way("run/lock")
    with pytest.raises(RecordError, match=r"lock: cannot be written \(.*; move away what is there"):
        RunLock.take(tmp_path / "run")
    assert not is_abandoned(tmp_path / "run")
    assert (tmp_path / "run" / "lock").exists()


def test_a_model_that_cannot_be_written_is_an_error_of_the_record(tmp_path: Path) -> None:
    target = tmp_path / "nowhere" / "model.safetensors"
    with (
        pytest.raises(RecordError, match=r"a: cannot be written \(.*\); the rounds are there; "),
        atomic.saving(tmp_path / "a", "the rounds are there"),
    ):
        safetensors.numpy.save_file({"a": np.zeros(2)}, target)
    assert RecordError.explains_itself


@pytest.mark.parametrize("damage", ["missing", "folder", "cut"])
def test_a_run_without_the_prompts_of_a_round_does_not_go_on(tmp_path: Path, damage) -> None:
    """It would fail at its end, when they move into run.h5."""
    run = make(tmp_path / "a", rounds=2).run
    require_round_files(run, 2)
    path = tmp_path / "a" / "rounds" / "0002.h5"
    image = path.read_bytes()
    path.unlink()
    if damage == "folder":
        path.mkdir()
    elif damage == "cut":
        path.write_bytes(image[:-9])
    with pytest.raises(ValueError, match=r"0002\.h5: found .*copy the (whole )?run folder again"):
        require_round_files(run, 2)
    require_round_files(run, 1)  # the other round is done again


def test_what_json_cannot_hold_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="config: found a set; expected numbers"):
        RunRecord.create(tmp_path / "a", config={"a": {1}}, config_text="", environment={})
    assert not (tmp_path / "a").exists()


# --- the room ---


def test_the_room_imports_no_heavy_library() -> None:
    heavy = {"torch", "transformers", "peft", "datasets", "mpi4py", "deepspeed"}
    for path in Path(room.__file__).parent.glob("*.py"):
        tree = ast.parse(path.read_text())
        named = [
            n.name for node in ast.walk(tree) if isinstance(node, ast.Import) for n in node.names
        ]
        named += [node.module or "" for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)]
        assert not heavy & {name.split(".")[0] for name in named}
        assert "print(" not in path.read_text()
        assert path.name not in ("report.py", "compare.py") or "h5py" not in named


# The columns of the first records. Each that came later has a value for records that lack it.
FIRST_COLUMNS = {
    "rounds": "round num_clients num_failed server_loss_first server_loss_last validation_merged "
    "validation_loss control_validation_loss is_best bytes_down bytes_up seconds_broadcast "
    "seconds_control seconds_clients seconds_merge seconds_server seconds_validation seconds_total",
    "clients": "round client rank status reason samples loss_model_first loss_model_last "
    "loss_prompt_first loss_prompt_last seconds_model seconds_prompt seconds_other bytes_down "
    "bytes_up",
    "results": "method split round n acc acc_norm exact_match stderr loss seconds",
    "wire": "name shape dtype direction count bytes phase bytes_crossed",
}


def test_a_record_of_an_earlier_version_is_read(tmp_path: Path) -> None:
    record = make(tmp_path / "run")
    record.write_results(results(0.7))
    record.finish()
    file = tmp_path / "run" / "run.h5"
    with h5py.File(file, "r+") as h5:
        for name in tables.LATER_TABLES:
            del h5[name]
        for name, columns in FIRST_COLUMNS.items():
            stored = h5[name][:]
            names = [column for column in stored.dtype.names if column in columns.split()]
            kind = np.dtype([(column, stored.dtype[column]) for column in names])
            del h5[name]
            h5[name] = np.array([tuple(row) for row in stored[names]], dtype=kind)
    earlier_run = read(tmp_path / "run")
    assert np.isnan(earlier_run.results["perplexity"]).all()
    assert earlier_run.results["loss"].tolist() == record.run.results["loss"].tolist()

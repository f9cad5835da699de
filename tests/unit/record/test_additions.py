"""A large record: commits write what is new, and all is read as if they had written the whole."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest

from fedsp_mpi.record import ClientRow, RoundRow, Run, RunRecord, WireRow, read, writer
from fedsp_mpi.record.additions import MARK, NAME
from helpers.record_samples import assert_same_bits, make, results, tensors


@pytest.fixture
def large(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let every record count as large from its first byte."""
    monkeypatch.setattr(writer, "_MAX_REWRITTEN", 0)


def assert_same(found: Run, expected: Run) -> None:
    for field in dataclasses.fields(Run):
        first, second = getattr(found, field.name), getattr(expected, field.name)
        if isinstance(first, np.ndarray):
            np.testing.assert_equal(first.tolist(), second.tolist(), err_msg=field.name)
            assert first.dtype == second.dtype, field.name
        elif field.name != "digest":
            assert first == second, field.name


def fill(folder: Path) -> RunRecord:
    """Make a record with all that additions can hold."""
    record = make(folder, rounds=2)
    row = ClientRow(
        round=3, client=0, rank=1, status="failed", reason="größer\0", extra={"norm": 0.1}
    )
    record.commit_round(RoundRow(round=3, num_clients=1), [row])
    record.commit_round(RoundRow(round=4), [], tensors(4))
    wire = WireRow(name="p", shape=(8, 4), dtype="float32", direction="up", count=6, bytes=768)
    record.write_wire([wire])
    record.write_results(results(0.7))
    record.write_results(results(0.8)[2:])
    record.describe(models={"auxiliary": 46}, odd={"text": "größer\0\udc80"})
    return record


def test_additions_are_read_as_a_record_that_is_written_as_a_whole(large, tmp_path: Path) -> None:
    record = fill(tmp_path / "a")
    image = (tmp_path / "a" / "run.h5").read_bytes()
    assert_same(read(tmp_path / "a"), record.run)
    record.cut(3)
    assert (tmp_path / "a" / "run.h5").read_bytes() == image  # written once
    assert_same(read(tmp_path / "a"), record.run)
    assert record.run.prompt_rounds == (1, 2)
    record.commit_round(RoundRow(round=4), [], tensors(9))
    run = read(tmp_path / "a")
    assert_same(run, record.run)
    assert_same_bits(run.prompts(4), tensors(9))
    record.finish()
    assert sorted(path.name for path in (tmp_path / "a").iterdir()) == ["config.yaml", "run.h5"]
    assert_same(read(tmp_path / "a"), record.run)
    assert_same_bits(read(tmp_path / "a").prompts(4), tensors(9))


@pytest.mark.parametrize("status", ["stopped", "complete"])
def test_a_large_record_goes_on(large, tmp_path: Path, status: str) -> None:
    fill(tmp_path / "a").finish(status, "signal 10")
    assert (read(tmp_path / "a").status, read(tmp_path / "a").reason) == (status, "signal 10")
    record = RunRecord.open(tmp_path / "a")
    record.commit_round(RoundRow(round=5), [], tensors(5))
    run = read(tmp_path / "a")
    assert (run.status, run.committed_rounds, run.prompt_rounds) == ("running", 5, (1, 2, 4, 5))


def test_additions_to_an_earlier_file_do_not_count(large, tmp_path: Path) -> None:
    """A kill between the new run.h5 and the removal of what it holds leaves them there."""
    record = fill(tmp_path / "a")
    left = {name: (tmp_path / "a" / name).read_bytes() for name in (NAME, MARK)}
    record.finish("stopped", "signal 10")
    expected = record.run
    for name, content in left.items():
        (tmp_path / "a" / name).write_bytes(content)
    assert_same(read(tmp_path / "a"), expected)
    record = RunRecord.open(tmp_path / "a")
    record.commit_round(RoundRow(round=5))
    assert_same(read(tmp_path / "a"), record.run)


def test_what_a_kill_left_behind_the_mark_does_not_count(large, tmp_path: Path) -> None:
    record = fill(tmp_path / "a")
    with (tmp_path / "a" / NAME).open("ab") as file:
        file.write(b"half of the next")
    assert_same(read(tmp_path / "a"), record.run)
    record.commit_round(RoundRow(round=5))
    assert_same(read(tmp_path / "a"), record.run)


def test_many_prompts_stay_where_they_are(
    large, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They would be written a second time, and take twice the disk meanwhile."""
    monkeypatch.setattr(writer, "_MAX_FOLDED", 1000)
    record = fill(tmp_path / "a")
    record.finish()
    run = read(tmp_path / "a")
    assert (run.status, run.prompt_rounds) == ("complete", (1, 2, 4))
    assert_same_bits(run.prompts(4), tensors(4))
    assert len(list((tmp_path / "a" / "rounds").iterdir())) == 3
    assert RunRecord.open(tmp_path / "a").run.prompt_rounds == (1, 2, 4)


def test_a_commit_writes_what_is_new(tmp_path: Path) -> None:
    """And a whole record little more than it is long."""
    record = RunRecord.create(
        tmp_path / "a", config={}, config_text="", environment={"notes": "x" * 300_000}
    )
    sizes = []
    for number in range(1, 41):
        clients = [ClientRow(round=number, client=c, rank=1, samples=c) for c in range(100)]
        record.commit_round(RoundRow(round=number, num_clients=100), clients)
        sizes.append((tmp_path / "a" / NAME).stat().st_size)
    steps = np.diff(sizes)
    assert steps[-1] < 1.2 * steps[0]
    record.finish()
    assert sizes[-1] < 0.3 * (tmp_path / "a" / "run.h5").stat().st_size

"""TensorBoard's event files: every number of the record once, also after a second stretch."""

from __future__ import annotations

import struct
from pathlib import Path

import pytest

from fedsp_mpi import config
from fedsp_mpi.config.parsing import ConfigError
from fedsp_mpi.log import Log
from fedsp_mpi.record import event_files
from fedsp_mpi.record.hdf5 import read
from fedsp_mpi.run import execute
from helpers.runs import SHORT


def _scalars(folder: Path) -> list[tuple[str, int, float]]:
    """Read all scalars: each record is a length, its checksum, an event and its checksum."""
    from tensorboardX.proto.event_pb2 import Event

    scalars = []
    for file in folder.glob("tensorboard/events*"):
        data = file.read_bytes()
        position = 0
        while position < len(data):
            (length,) = struct.unpack_from("<Q", data, position)
            event = Event.FromString(data[position + 12 : position + 12 + length])
            scalars += [(v.tag, event.step, v.simple_value) for v in event.summary.value]
            position += length + 16
    return scalars


def test_the_files_say_what_the_record_says_and_no_step_twice(tmp_path):
    pytest.importorskip("tensorboardX")
    settings = [*SHORT, f"run.folder={tmp_path}", "run.name=run", "record.tensorboard=true"]
    settings += ["distillation.engine=torch", "federation.rounds=2", "federation.clients=2"]
    execute.execute(config.load(None, settings), "run", Log())
    run = read(tmp_path / "run")
    first = _scalars(tmp_path / "run")
    losses = {step: value for tag, step, value in first if tag == "round/validation_loss"}
    assert losses == pytest.approx({1: run.rounds[0]["validation_loss"], 2: losses[2]})
    assert {step for tag, step, _ in first if tag == "round/bytes_up"} == {1, 2}
    assert any(tag.startswith("client_1/") for tag, _, _ in first)
    assert any(tag.endswith("/test/acc") for tag, _, _ in first)
    event_files.EventFiles(tmp_path / "run", run).finish(run)  # as a resumed run does
    assert sorted(_scalars(tmp_path / "run")) == sorted(first)
    assert len({(tag, step) for tag, step, _ in first}) == len(first)


def test_a_missing_library_is_one_line(monkeypatch):
    monkeypatch.setattr(event_files, "_LIBRARY", "no_such_library_here")
    with pytest.raises(ConfigError, match=r"record\.tensorboard: found no no_such_library_here"):
        event_files.require_library()

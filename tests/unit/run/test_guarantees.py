"""Guarantees that no other test covers: what is synced before what, ties, the quorum, the lock."""

from __future__ import annotations

import gc
import math
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from fedsp_mpi import config
from fedsp_mpi.cli import main
from fedsp_mpi.comm import Refused, guard
from fedsp_mpi.log import Log
from fedsp_mpi.record import Checkpoints, RoundRow, read
from fedsp_mpi.record.lock import RunLock
from fedsp_mpi.report import difference
from fedsp_mpi.roles import Best
from fedsp_mpi.run.execute import execute
from fedsp_mpi.tensors import NamedTensors, Schema
from helpers.paths import ROOT
from helpers.record_samples import make, tensors
from helpers.runs import SHORT

# --- on disk before it has its name, and the name before the next file ---


class Disk:
    """Takes note of what the kernel is asked for, in order: ("sync", path) and ("name", path)."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self._folder, self.calls = folder, list[tuple[str, str]]()
        fsync, replace = os.fsync, os.replace

        def noting_fsync(handle: int) -> None:
            self._note("sync", str(Path(f"/proc/self/fd/{handle}").readlink()))
            fsync(handle)

        def noting_replace(part: str, path: str, **places: int) -> None:
            self._note("name", str(path))
            replace(part, path, **places)

        monkeypatch.setattr(os, "fsync", noting_fsync)
        monkeypatch.setattr(os, "replace", noting_replace)

    def _note(self, what: str, path: str) -> None:
        self.calls.append((what, os.path.relpath(path, self._folder)))

    def of(self, act: Callable[[], object]) -> list[tuple[str, str]]:
        self.calls.clear()
        act()
        return self.calls.copy()


def whole(path: str) -> list[tuple[str, str]]:
    """Return the calls that put a file on disk before it has its name, and then the name."""
    return [("sync", f"{path}.part"), ("name", path), ("sync", str(Path(path).parent))]


def test_a_commit_is_on_disk_when_it_returns_and_in_this_order(tmp_path, monkeypatch):
    disk = Disk(tmp_path / "a", monkeypatch)
    record = make(tmp_path / "a", rounds=1)
    calls = disk.of(lambda: record.commit_round(RoundRow(round=2), [], tensors(2)))
    assert calls == whole("rounds/0002.h5") + whole("run.h5")
    assert disk.of(lambda: record.describe(models={"a": 1})) == whole("run.h5")
    assert disk.of(record.finish) == whole("run.h5") * 2  # complete; then with the prompts in it


def test_a_checkpoint_is_on_disk_before_its_mark(tmp_path, monkeypatch):
    disk, place = Disk(tmp_path / "checkpoints", monkeypatch), Checkpoints(tmp_path)
    state = {"w": np.zeros(3, "f4")}
    client, name = place.write_client(0, 1, state), "client-00000-0001.safetensors"
    assert disk.of(lambda: place.sync([name])) == [("sync", name)]
    calls = disk.of(lambda: place.commit(1, state, {0: client}, keep=1))
    assert calls == whole("server-0001.safetensors") + whole("0001.json")
    calls = disk.of(lambda: place.write_distillation(40, state, {"a": 1}))
    assert calls == whole("distillation-40.safetensors") + whole("distillation.json")


# --- which of equals ---


def test_of_rounds_with_equal_losses_the_first_is_the_best():
    start, first, second = (
        NamedTensors(Schema.of([("p", (1,))]), np.array([x], "f4")) for x in (0, 1, 2)
    )
    best = Best(start)
    assert (
        best.update_if_better(lambda: first, 1, 0.5)
        and not best.update_if_better(lambda: second, 2, 0.5)
        and not best.update_if_better(lambda: second, 3, math.nan)
    )
    assert (best.round, best.loss) == (1, 0.5) and best.exported is first
    assert best.update_if_better(lambda: second, 4, math.nextafter(0.5, 0)) and best.round == 4


def test_updates_that_the_rule_rejects_are_missing_from_the_quorum_of_a_run(tmp_path, capsys):
    rule = (
        "federation.clients=3",
        "federation.rule=reject_outliers",
        "federation.outlier_deviations=0",
    )
    short = (
        *SHORT,
        "distillation.stage.steps=0",
        "client.alignment.steps=0",
        "evaluation.server_only=false",
    )
    settings = [*short, *rule, "federation.min_clients=3", f"run.folder={tmp_path}"]
    with pytest.raises(SystemExit) as end:  # of one process; a job of several is aborted
        main(["run", "--name", "a", *(word for setting in settings for word in ("--set", setting))])
    stderr = capsys.readouterr().err
    assert (
        end.value.code == 1
        and "found 2 updates, expected at least federation.min_clients=3: client" in stderr
    )
    assert "rejected: " in stderr and "Traceback" not in stderr
    assert read(tmp_path / "a").committed_rounds == 0


# --- every round once ---


def stopped_after_round_1(settings: list[str]) -> tuple[int, str]:
    """Run until round 1 is recorded; return status and message of the refusal to go on."""

    def stop(line: str) -> None:
        guard.stop_requested = guard.stop_requested or line.startswith("round 1/")

    try:
        execute(config.load(None, settings), "a", Log(stop))
    except Refused as refusal:
        return refusal.exit_status, str(refusal)
    finally:
        guard.stop_requested = False
    raise AssertionError("the run went on to its end")


def test_a_stopped_run_goes_on_with_the_round_behind_its_checkpoint(tmp_path):
    settings = [*SHORT, "distillation.stage.steps=0", f"run.folder={tmp_path}"]
    status, message = stopped_after_round_1([*settings, "run.name=run"])
    assert status == 75 and "told to stop after round 1" in message
    gc.collect()  # the refusal's traceback holds the folder's lock
    execute(config.load(None, [*settings, "run.name=run", "run.resume=must"]), "a", Log())
    execute(config.load(None, [*settings, "run.name=whole"]), "a", Log())
    run, undisturbed = read(tmp_path / "run"), read(tmp_path / "whole")
    assert run.rounds["round"].tolist() == [1, 2] and difference(undisturbed, run) == []
    assert run.clients["client"].tolist() == [0, 1, 2] * 2


# --- one job for one folder ---

HOLDER = """
import sys, time
from pathlib import Path
from fedsp_mpi.record.lock import RunLock
lock = RunLock.take(Path(sys.argv[1]))
print("held", flush=True)
time.sleep(60)
"""


def test_a_folder_is_refused_while_another_process_holds_it_and_taken_when_that_is_killed(tmp_path):
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", HOLDER, str(tmp_path / "a")]
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) as holder:
        try:
            assert holder.stdout is not None and holder.stdout.readline() == "held\n"
            for _ in range(2):  # a refusal leaves the lock as it is
                with pytest.raises(
                    ValueError, match=f"found a run that process {holder.pid} on host .* is writing"
                ):
                    RunLock.take(tmp_path / "a")
        finally:
            holder.send_signal(signal.SIGKILL)
    RunLock.take(tmp_path / "a").release()

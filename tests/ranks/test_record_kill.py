"""The run record under SIGKILL at random moments, on a full disk, in a read-only folder."""

from __future__ import annotations

import ctypes
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fedsp_mpi.record import RunRecord, read
from helpers.paths import ROOT
from helpers.record_samples import assert_same_bits, make

WRITER = """
import sys
from pathlib import Path
import numpy as np
from fedsp_mpi.record import ClientRow, RecordError, RoundRow, RunRecord, WireRow

def prompts(round, size):
    rng = np.random.default_rng(round)
    names = ("layer.0/key", "layer.0/value")
    return {name: rng.standard_normal(size, dtype=np.float32) for name in names}

def commit(record, size):
    number = record.run.committed_rounds + 1
    clients = [ClientRow(round=number, client=c, rank=1, reason="long " * 50) for c in range(8)]
    entry = {"name": "layer.0/key", "shape": (size,), "dtype": "float32", "direction": "up"}
    wire = [WireRow(**entry, count=number, bytes=4 * size)]
    row = RoundRow(round=number, num_clients=8)
    record.commit_round(row, clients, prompts(number, size), wire=wire)
    print("committed", number, flush=True)

def create(folder):
    config = {"run": {"seed": 1}}
    return RunRecord.create(folder, config=config, config_text="run: {seed: 1}", environment={})
"""


def start(code: str, *arguments: Any, **options: Any) -> subprocess.Popen[str]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", WRITER + code, *map(str, arguments)]
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True, **options)


# --- killed ---

LOOP = """
record = create(sys.argv[1])
print("created", flush=True)
while True:
    commit(record, 200_000)
"""

LARGE_LOOP = """
from fedsp_mpi.record import writer
writer._MAX_REWRITTEN = 0
record = create(sys.argv[1])
print("created", flush=True)
while True:
    commit(record, 2_000)
    if record.run.committed_rounds % 20 == 0:
        record = RunRecord.open(sys.argv[1])
"""

FOLD_LOOP = """
record = create(sys.argv[1])
for _ in range(3):
    commit(record, 20_000)
print("created", flush=True)
while True:
    record.finish()
    record = RunRecord.open(sys.argv[1])
    record.cut(record.run.committed_rounds - 1)
    print("cut", record.run.committed_rounds, flush=True)
    commit(record, 20_000)
    if record.run.committed_rounds < 9:
        commit(record, 20_000)
"""


def kill_at(code: str, folder: Path, delay: float) -> list[str]:
    """Start the writer, SIGKILL it `delay` seconds after it has made its record, return what it
    said.
    """
    child = start(code, folder)
    assert child.stdout is not None
    lines = []
    try:
        for line in child.stdout:
            lines.append(line.strip())
            if lines[-1] == "created":
                break
        time.sleep(delay)
        live = read(folder)  # reading goes on while it writes
        assert live.status in ("running", "complete")
    finally:
        child.send_signal(signal.SIGKILL)
        last_words = child.stdout.read()
        child.wait(10)
        child.stdout.close()
    return lines + last_words.splitlines()


def expected_prompts(round: int, size: int) -> dict[str, np.ndarray]:
    space: dict[str, Any] = {}
    exec(WRITER, space)
    return space["prompts"](round, size)


@pytest.mark.parametrize(
    "code, size, moments",
    [(LOOP, 200_000, 12), (LARGE_LOOP, 2_000, 12), (FOLD_LOOP, 20_000, 8)],
    ids=["commits", "additions", "folds"],
)
def test_killed_at_any_moment_keeps_every_committed_round(
    tmp_path: Path, code: str, size: int, moments: int
) -> None:
    dice = random.Random(7)
    for moment in range(moments):
        folder = tmp_path / str(moment)
        output = kill_at(code, folder, dice.uniform(0, 0.35))
        claimed = [int(line.split()[1]) for line in output if line.startswith(("committed", "cut"))]
        run = read(folder)
        # a commit, or a cut of one round, may be on disk before it was said
        last = claimed[-1] if claimed else 0
        assert last <= run.committed_rounds + (code is FOLD_LOOP)
        assert run.committed_rounds <= last + 1
        assert list(run.rounds["round"]) == list(range(1, run.committed_rounds + 1))
        assert len(run.clients) == 8 * run.committed_rounds
        assert run.prompt_rounds == tuple(range(1, run.committed_rounds + 1))
        for round in run.prompt_rounds:
            assert_same_bits(run.prompts(round), expected_prompts(round, size))
        record = RunRecord.open(folder)  # and it goes on
        assert record.run.status == "running" and not list(folder.rglob("*.part"))
        shutil.rmtree(folder)


# --- cannot write ---

FULL_DISK = """
import resource
folder, limit = Path(sys.argv[1]), int(sys.argv[2])
record = create(folder)
for _ in range(2):
    commit(record, 20_000)
resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
try:
    record.finish() if limit > 120_000 else commit(record, 20_000)
except RecordError as error:
    print("error", error, flush=True)
"""


@pytest.mark.parametrize(
    "limit, what", [(120_000, "rounds/0003.h5"), (200_000, "run.h5")], ids=["commit", "fold"]
)
def test_full_disk_keeps_the_last_state(tmp_path: Path, limit: int, what: str) -> None:
    child = start(FULL_DISK, tmp_path / "a", limit, stderr=subprocess.PIPE)
    output, complaints = child.communicate(timeout=30)
    assert child.returncode == 0, complaints
    assert f"{what}: cannot be written" in output and "keeps its 2 rounds" in output, output
    assert "File too large" in output or "write failed" in output or "flush" in output, output
    run = read(tmp_path / "a")
    assert run.committed_rounds == 2 and not list(tmp_path.rglob("*.part"))
    for round in (1, 2):
        assert_same_bits(run.prompts(round), expected_prompts(round, 20_000))


READ_ONLY = """
folder = Path(sys.argv[1])
for attempt in (lambda: commit(RunRecord.open(folder), 10), lambda: create(folder / "below")):
    try:
        attempt()
        print("written")
    except RecordError as error:
        print("error", error, flush=True)
"""


def _obey_permissions() -> None:
    """Root writes where it likes; without CAP_DAC_OVERRIDE (1) in its bounding set the next program
    does not.
    """
    if os.geteuid() == 0 and ctypes.CDLL(None).prctl(24, 1, 0, 0, 0):
        os._exit(77)


def test_read_only_folder(tmp_path: Path) -> None:
    make(tmp_path / "a")
    before = (tmp_path / "a" / "run.h5").read_bytes()
    (tmp_path / "a").chmod(0o555)
    try:
        child = start(
            READ_ONLY, tmp_path / "a", stderr=subprocess.PIPE, preexec_fn=_obey_permissions
        )
        output, complaints = child.communicate(timeout=30)
    finally:
        (tmp_path / "a").chmod(0o755)
    if child.returncode == 77:
        pytest.skip("root, and its right to write everywhere cannot be given up here")
    assert child.returncode == 0, complaints
    lines = output.splitlines()
    assert (
        "run.h5: cannot be written (Permission denied); the record keeps its 3 rounds" in lines[0]
    )
    assert "below: cannot be written (Permission denied); no run was started" in lines[1]
    assert (tmp_path / "a" / "run.h5").read_bytes() == before

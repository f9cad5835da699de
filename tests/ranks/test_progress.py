"""How far the clients are within a long round: one rank says so, now and then."""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
import struct
import subprocess
import sys
import termios

import pytest

from fedsp_mpi import config
from fedsp_mpi.log import Log, RoundProgress
from fedsp_mpi.run import execute
from helpers.mpi import both_ends, run_mpi
from helpers.paths import ROOT
from helpers.runs import SHORT, here


def test_a_line_is_due_only_when_enough_time_has_passed(monkeypatch):
    lines: list[str] = []
    seconds = [100.0]
    monkeypatch.setattr("time.monotonic", lambda: seconds[0])
    progress = RoundProgress(lines.append, every=60)
    silent = RoundProgress(lines.append, every=None)
    for round in (1, 2):
        for reporter in (progress, silent):
            reporter.begin(round)
            reporter.client(7, 2, 3)
            reporter.stage("iteration", 8)
        for _ in range(8):
            seconds[0] += 25 if round == 2 else 5
            progress.step()
            silent.step()
    where = "round 2: client 7 (2 of 3 on this rank) at iteration"
    assert lines == [f"{where} 3 of 8", f"{where} 6 of 8"]


def test_every_stage_of_fedsp_says_how_far_it_is(tmp_path):
    lines: list[str] = []
    settings = [
        *SHORT,
        f"run.folder={tmp_path}",
        "distillation.engine=torch",
        "record.progress_seconds=0",
    ]
    settings += [
        "federation.clients=2",
        "client.alignment.steps=2",
        "client.tuning.steps=1",
        "federation.rounds=1",
    ]
    execute.execute(config.load(None, settings), "progress", Log(), client_log=Log(lines.append))
    stages = ("alignment step 1 of 2", "alignment step 2 of 2", "tuning step 1 of 1")
    assert lines == [
        f"round 1: client {id} ({id + 1} of 2 on this rank) at {s}" for id in (0, 1) for s in stages
    ]


@pytest.mark.slow
def test_one_rank_says_how_far_a_search_is(tmp_path):
    """Of three ranks the server plays no client and two play one each: the first of them speaks,
    and it alone.
    """
    more = ("method=fedbpt", "server.tuning.steps=0", "federation.clients=2", "federation.rounds=1")
    more += (
        "search.iterations=3",
        "search.dimension=4",
        "record.progress_seconds=0",
        f"run.folder={tmp_path}",
    )
    settings = [item for setting in (*SHORT, *more) for item in ("--set", setting)]
    result = run_mpi(3, ["-m", "fedsp_mpi", "run", *settings], timeout=120)
    lines = re.findall("round 1: client.*", result.stdout)
    assert lines == [f"round 1: client {lines[0][16]} at iteration {n} of 3" for n in (1, 2, 3)], (
        both_ends(result)
    )


def on_a_terminal(arguments: list[str]) -> str:
    """Run the program on a terminal of 40 lines of 100 columns; return all that it wrote there."""
    ours, theirs = os.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 40, 100, 0, 0))
    environment = {**os.environ, "TERM": "xterm", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(
        [sys.executable, "-m", "fedsp_mpi", *arguments],
        cwd=ROOT,
        env=environment,
        stdin=theirs,
        stdout=theirs,
        stderr=theirs,
    )
    os.close(theirs)
    written = b""
    with contextlib.suppress(OSError):  # what a terminal says when nobody writes to it any more
        while part := os.read(ours, 1 << 16):
            written += part
    os.close(ours)
    assert process.wait(60) == 0, written.decode()
    return written.decode()


def test_a_terminal_has_bars_below_the_lines_of_a_file(tmp_path):
    settings = [*SHORT, f"run.folder={tmp_path}", "distillation.engine=torch"]
    words = [word for setting in settings for word in ("--set", setting)]
    written = on_a_terminal(["run", "--name", "terminal", *words])
    for label in ("distilling", "round 2: client 1 (2 of 3)", "round 1: server"):
        assert re.search(rf"\r{re.escape(label)}: +\d+%\|", written), (label, written)
    assert "scoring fedsp: " in written
    # What a line feed ends, less what a carriage return has written over, is what stays.
    lines = [line.rpartition("\r")[2] for line in written.replace("\r\n", "\n").split("\n")]
    in_a_file = here(["run", "--name", "file", *words])
    assert not re.search(r"[\r\x1b]|%\|", in_a_file.stdout + in_a_file.stderr)
    plain = [re.sub(r"\d+|file|terminal", "#", line) for line in in_a_file.stdout.splitlines()]
    kept = {re.sub(r"\d+|file|terminal", "#", line) for line in lines}
    missing = [line for line in plain if line not in kept and "distill" not in line]
    assert not missing, written

"""One failure on real processes: the job ends within seconds, with one report."""

from __future__ import annotations

import subprocess
import sys
import threading
from pathlib import Path

import pytest

from fedsp_mpi.comm import Refused, guard
from helpers.mpi import both_ends, only_report, run_mpi
from helpers.paths import PROGRAMS


def crash(
    who: str, where: str, how: str, *folder: Path, processes: int = 4
) -> subprocess.CompletedProcess[str]:
    run = run_mpi(
        processes, [PROGRAMS / "crash.py", who, where, how, *folder], timeout=15, status=None
    )
    assert run.returncode != 0, both_ends(run)
    return run


@pytest.mark.each_once
@pytest.mark.parametrize("where", ["import", "handout", "local", "broadcast"])
@pytest.mark.parametrize("who", ["one", "clients"])
def test_a_clients_crash_ends_the_job_with_one_report(tmp_path: Path, who: str, where: str) -> None:
    title = only_report(crash(who, where, "raise", tmp_path))
    scene = {"local": "round 0, client ", "broadcast": "round 1, phase 'round'"}.get(
        where, "phase 'start-up'"
    )
    assert "of 4 on host " in title and scene in title
    assert who == "clients" or title.startswith("crash failed: rank 1 of 4")
    if where != "import":
        assert (tmp_path / "failure.txt").read_text().startswith(title)


@pytest.mark.parametrize("where", ["import", "handout", "merge", "broadcast"])
def test_the_servers_crash_ends_the_job_with_one_report(where: str) -> None:
    title = only_report(crash("server", where, "raise"))
    assert title.startswith("crash failed: rank 0 of 4")
    assert where != "merge" or "round 0, phase 'merge'" in title


@pytest.mark.each_once
@pytest.mark.parametrize("where", ["import", "handout"])
@pytest.mark.parametrize("with_folder", [False, True])
def test_everybody_crashing_at_once_makes_one_report(
    tmp_path: Path, with_folder: bool, where: str
) -> None:
    only_report(crash("all", where, "raise", *([tmp_path] if with_folder else []), processes=6))


def test_the_report_of_an_earlier_run_does_not_silence_this_one(tmp_path: Path) -> None:
    (tmp_path / "failure.txt").write_text("an earlier one")
    title = only_report(crash("clients", "local", "raise", tmp_path))
    assert (tmp_path / "failure.txt").read_text().startswith(title)
    assert [path.read_text() for path in tmp_path.glob("failure-*.txt")] == ["an earlier one"]


def test_a_folder_that_is_gone_does_not_silence_the_report(tmp_path: Path) -> None:
    only_report(crash("one", "local", "raise", tmp_path / "missing"))


def test_another_threads_crash_ends_the_job() -> None:
    assert "thread 'helper'" in only_report(crash("one", "local", "thread"))


@pytest.mark.parametrize("how", ["exit", "exit0"])
def test_leaving_while_others_wait_is_a_crash(how: str) -> None:
    run = crash("one", "local", how)
    assert "SystemExit" in run.stderr and "client 0" in only_report(run)
    assert run.returncode == (3 if how == "exit" else 1)


@pytest.mark.parametrize("how", ["interrupt", "term", "kill"])
@pytest.mark.parametrize("who", ["server", "one"])
def test_a_signal_ends_the_whole_job_without_a_report(who: str, how: str) -> None:
    assert "Traceback" not in crash(who, "merge" if who == "server" else "local", how).stderr


def test_the_deadline_names_the_rank_that_is_missing() -> None:
    run = crash("one", "local", "stop", processes=3)
    assert only_report(run).startswith("crash failed: rank 0 of 3")
    assert "DeadlineError: gather: found nothing from rank 1 after" in run.stderr


def test_a_client_names_the_server_that_is_late() -> None:
    run = crash("server", "broadcast", "late", processes=3)
    assert "DeadlineError: broadcast: found nothing from rank 0 after" in run.stderr
    only_report(run)


def test_before_mpi_and_alone_a_crash_is_reported_and_leaves_status_1() -> None:
    run = run_mpi(0, [PROGRAMS / "crash.py", "all", "import", "raise"], status=1)
    assert only_report(run).startswith("crash failed: rank 0 of 1")
    run_mpi(0, [PROGRAMS / "crash.py", "all", "import", "exit"], status=3)
    assert (
        "Traceback"
        not in run_mpi(0, [PROGRAMS / "crash.py", "all", "import", "interrupt"], status=130).stderr
    )


@pytest.mark.parametrize("status", [0, 2, 3])
def test_ranks_leave_with_their_status_and_all_that_they_have_said(status: int) -> None:
    """Several times: of ranks that end without MPICH's handlers, some jobs have another status."""
    for _ in range(3):
        run = run_mpi(3, [PROGRAMS / "leaves.py", str(status)], status=status)
        assert run.stdout.count("the last line") == 3, both_ends(run)


def test_phases_nest_and_an_error_remembers_its_own() -> None:
    with pytest.raises(RuntimeError) as caught, guard.phase("round", round=3):
        with guard.phase("local training", client=5):
            assert str(guard.phase_info()) == "round 3, client 5, phase 'local training'"
        assert str(guard.phase_info()) == "round 3, phase 'round'"
        with guard.phase("merge"):
            raise RuntimeError
    assert str(guard.phase_info(caught.value)) == "round 3, phase 'merge'"
    assert str(guard.phase_info()) == "phase 'start-up'"


def test_the_guard_passes_on_what_harms_nobody() -> None:
    hook = threading.excepthook
    for error in (Refused("no"), SystemExit(2), SystemExit(0)):
        with pytest.raises(type(error)) as caught, guard("test"):
            raise error
        assert caught.value is error
    assert threading.excepthook is hook


def test_a_request_to_stop_does_not_kill_what_is_about_to_end() -> None:
    """At exit Python restores the signals' default action, which is to kill."""
    code = """
import os, signal, sys
from fedsp_mpi.comm import guard

class Late:
    def __del__(self, kill=os.kill, me=os.getpid(), number=signal.SIGUSR1, write=os.write):
        kill(me, number)
        write(1, b"alive")

late = Late()
with guard("run"):
    pass
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout) == (0, "alive"), done.stderr

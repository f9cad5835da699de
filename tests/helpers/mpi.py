"""Start programs under the real mpirun, with a hard time-out that leaves no process behind."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest

from helpers import warm
from helpers.paths import ROOT, TESTS

# Open MPI refuses root and more ranks than cores unless told otherwise; MPICH does not look at
# these.
_ALLOW = {
    "OMPI_ALLOW_RUN_AS_ROOT": "1",
    "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1",
    "PRTE_MCA_rmaps_default_mapping_policy": ":oversubscribe",
}
_AT_START = dict(os.environ)  # before a test changes it
_FAULT_ABSENT = "faulty.py: found no "


def mpirun() -> str:
    """The mpirun next to this Python, or the one on PATH; skips the test if there is none."""
    beside = Path(sys.executable).parent / "mpirun"
    found = str(beside) if beside.exists() else shutil.which("mpirun")
    return found or pytest.skip("there is no mpirun next to Python or on PATH")


def environment_of_ranks(base: Mapping[str, str] = os.environ) -> dict[str, str]:
    """The test's own environment, with one thread a process, and this checkout to import from."""
    paths = os.pathsep.join([str(ROOT), str(TESTS)])
    return {**base, "OMP_NUM_THREADS": "1", "PYTHONPATH": paths, **_ALLOW}


def run_mpi(
    n: int,
    args: Sequence[str | os.PathLike[str]],
    timeout: float = 60,
    env: Mapping[str, str] | None = None,
    status: int | None = 0,
) -> subprocess.CompletedProcess[str]:
    """Run `mpirun -n N python ARGS` in the repository's root and return its status and output.

    Args:
        n: number of processes; 0 runs `python ARGS` without mpirun.
        args: arguments of Python.
        timeout: seconds, after which every process of the run is killed and the test fails.
        env: variables on top of the test's own environment.
        status: the expected exit status; the test fails on another one. None expects nothing, but
            that the place of a fault (mpi_programs/faulty.py) was there.
    """
    launcher = [mpirun(), "-n", str(n)] if n else []
    environment = {**environment_of_ranks(), **(env or {})}
    python = warm.python(os.fspath(args[0]), environment, environment_of_ranks(_AT_START))
    command = [*launcher, *python, *(os.fspath(arg) for arg in args)]
    # Files, not pipes: a process that outlives mpirun would keep a pipe open, and us waiting.
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as err:
        process = subprocess.Popen(
            command,
            stdout=out,
            stderr=err,
            stdin=subprocess.DEVNULL,
            cwd=ROOT,
            env=environment,
            start_new_session=True,
        )
        late = False
        try:
            process.wait(timeout)
        except subprocess.TimeoutExpired:
            late = True
        finally:
            kill_tree(process)
            warm.wait_for_none()
        out.seek(0)
        err.seek(0)
        result = subprocess.CompletedProcess(command, process.returncode, out.read(), err.read())
    if late or status not in (None, result.returncode):
        reason = (
            f"still running after {timeout} s"
            if late
            else f"exit status {result.returncode}, expected {status}"
        )
        pytest.fail(f"{' '.join(command)}: {reason}\n{both_ends(result)}", pytrace=False)
    if status is None and _FAULT_ABSENT in result.stderr:
        pytest.fail(f"{' '.join(command)}: {both_ends(result)}", pytrace=False)
    return result


def both_ends(result: subprocess.CompletedProcess[str], length: int = 3000) -> str:
    """Beginning and end of what a run wrote."""
    shown = []
    for name, text in (("stdout", result.stdout), ("stderr", result.stderr)):
        cut = text if len(text) <= 2 * length else f"{text[:length]}\n[...]\n{text[-length:]}"
        shown.append(f"--- {name} ---\n{cut}")
    return "\n".join(shown)


def only_report(run: subprocess.CompletedProcess[str], *, stack: bool = True) -> str:
    """The title of the report, of which there is one, with a stack or without."""
    titles = [line for line in run.stderr.split("\n") if " failed: rank " in line]
    assert len(titles) == 1 and run.stderr.count("Traceback") == stack, both_ends(run)
    return titles[0]


def kill_tree(process: subprocess.Popen[bytes]) -> None:
    """Kill a process and all its descendants.

    A launcher gives every rank a group of its own, so groups do not help.
    """
    family = [process.pid] if process.poll() is None else []
    for pid in family:
        family += _children(pid)
    for pid in family:
        try:
            os.kill(pid, signal.SIGKILL)
        except ProcessLookupError:
            continue
    process.wait()
    while any(_running(pid) for pid in family[1:]):
        time.sleep(0.01)


def _stat(pid: int) -> list[str]:
    """Fields of /proc/PID/stat from the process's state on; empty if it is gone."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return []


def _running(pid: int) -> bool:
    return _stat(pid)[:1] not in ([], ["Z"])


def _children(parent: int) -> list[int]:
    pids = [int(path.name) for path in Path("/proc").iterdir() if path.name.isdecimal()]
    return [pid for pid in pids if _stat(pid)[1:2] == [str(parent)]]

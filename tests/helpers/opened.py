"""Which rank opens which file: a program under strace."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

from helpers.mpi import both_ends, environment_of_ranks, mpirun
from helpers.paths import ROOT

# Each rank's own trace, by the number that MPICH's mpirun gives it.
_STRACE = 'exec strace -f --seccomp-bpf -qq -s 4096 -e trace=open,openat -o "$0/$PMI_RANK" "$@"'
_OPENED = re.compile(r'open(?:at)?\([^"]*"([^"]+)".* = \d')


def opened_files(
    folder: Path, n: int, args: Sequence[object], timeout: float = 150
) -> dict[Path, set[int]]:
    """Run `mpirun -n N python ARGS`; return the ranks that have opened each file.

    Args:
        folder: for the traces; is made.
        n: number of processes.
        args: arguments of Python.
        timeout: seconds.
    """
    if not shutil.which("strace"):
        pytest.skip("there is no strace")
    folder.mkdir()
    command = [mpirun(), "-n", n, "sh", "-c", _STRACE, folder, sys.executable, *args]
    ended = subprocess.run(
        list(map(str, command)),
        cwd=ROOT,
        env=environment_of_ranks(),
        capture_output=True,
        text=True,
        timeout=timeout,
    )
    assert ended.returncode == 0, both_ends(ended)
    ranks: dict[Path, set[int]] = {}
    for trace in folder.iterdir():
        for name in set(_OPENED.findall(trace.read_text())):
            path = ROOT / name  # which a relative path is relative to
            if path.is_file():
                ranks.setdefault(path, set()).add(int(trace.name))
    return ranks

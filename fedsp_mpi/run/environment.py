"""Where a run was made, for its record: versions, commit, machine, job."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import subprocess
from collections.abc import Sequence
from pathlib import Path

from fedsp_mpi.comm import launcher_name
from fedsp_mpi.files.untrusted import JsonObject
from fedsp_mpi.run.ranks import RankInfo

VERSIONS = (
    "torch",
    "transformers",
    "peft",
    "datasets",
    "deepspeed",
    "cmaes",
    "mpi4py",
    "cryptography",
    "h5py",
    "numpy",
    "tokenizers",
)

_JOB_VARIABLES = ("SLURM_JOB_ID", "SLURM_JOB_NAME")


def threads(ranks: Sequence[RankInfo]) -> str:
    """Write the threads of each role as "server 2, client 1 or 4"."""
    counts_by_role: dict[str, set[int]] = {}
    for rank in ranks:
        for role, device in rank.devices.items():
            counts_by_role.setdefault(role, set()).add(device.threads)
    return ", ".join(
        f"{role} {' or '.join(map(str, sorted(counts)))}" for role, counts in counts_by_role.items()
    )


def environment(ranks: Sequence[RankInfo]) -> JsonObject:
    """Return versions, commit, machine, ranks and job of the run that begins here, for JSON."""
    versions = {
        "fedsp_mpi": importlib.metadata.version("fedsp_mpi"),
        "python": platform.python_version(),
    }
    return {
        "versions": versions | {name: importlib.metadata.version(name) for name in VERSIONS},
        "commit": _commit(),
        "hosts": [rank.to_json() for rank in ranks],
        "launcher": launcher_name(),
        "directory": str(Path.cwd()),  # which relative paths of the configuration are relative to
        "machine": (
            f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores, "
            f"{platform.system()}"
        ),
        "job": {key: value for key, value in os.environ.items() if key in _JOB_VARIABLES},
    }


def _commit() -> str:
    """Return the commit that the package runs from, with + if it was changed since.

    It is empty outside a checkout of the package's own.
    """
    root = Path(__file__).resolve().parent.parent.parent

    def git(*words: str) -> str:
        process = subprocess.run(
            ["git", "-C", str(root), *words], capture_output=True, text=True, timeout=10
        )
        return process.stdout.strip()

    try:
        if git("rev-parse", "--show-toplevel") != str(root):
            return ""
        return git("describe", "--always", "--abbrev=12", "--dirty=+", "--exclude=*")
    except (OSError, subprocess.TimeoutExpired):
        return ""

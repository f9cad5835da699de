"""What a record says about where it was made: versions, commit, machine, job."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import subprocess
from pathlib import Path
from typing import Any

VERSIONS = (
    "torch",
    "transformers",
    "peft",
    "datasets",
    "deepspeed",
    "cmaes",
    "mpi4py",
    "h5py",
    "numpy",
    "tokenizers",
)


def threads(hosts: list[dict[str, Any]]) -> str:
    """How many each role has: "server 2, client 1 or 4"."""
    found: dict[str, set[int]] = {}
    for host in hosts:
        for role, device in host["devices"].items():
            found.setdefault(role, set()).add(device["threads"])
    return ", ".join(
        f"{role} {' or '.join(map(str, sorted(some)))}" for role, some in found.items()
    )


def environment(hosts: list[dict[str, Any]]) -> dict[str, Any]:
    """Versions, commit, machine and job of the run that begins here; `hosts` is what each rank said
    of itself.
    """
    versions = {
        "fedsp_mpi": importlib.metadata.version("fedsp_mpi"),
        "python": platform.python_version(),
    }
    return {
        "versions": versions | {name: importlib.metadata.version(name) for name in VERSIONS},
        "commit": _commit(),
        "hosts": hosts,
        "machine": (
            f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores, "
            f"{platform.system()}"
        ),
        "job": {
            key: value
            for key, value in os.environ.items()
            if key in ("SLURM_JOB_ID", "SLURM_JOB_NAME")
        },
    }


def _commit() -> str:
    """The commit that the package runs from, with + if it was changed since; empty outside a
    checkout of its own.
    """
    root = Path(__file__).resolve().parent.parent.parent

    def git(*words: str) -> str:
        done = subprocess.run(
            ["git", "-C", str(root), *words], capture_output=True, text=True, timeout=10
        )
        return done.stdout.strip()

    try:
        if git("rev-parse", "--show-toplevel") != str(root):
            return ""
        return git("describe", "--always", "--abbrev=12", "--dirty=+", "--exclude=*")
    except (OSError, subprocess.TimeoutExpired):
        return ""

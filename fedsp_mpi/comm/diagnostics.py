"""Measurements before a run: memory, MPI library, speed of the wire, clocks of the ranks."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path, PurePosixPath
from statistics import median

import numpy as np

from fedsp_mpi.tensors import Contract, NamedTensors, Schema, Update

from .messages import RoundBroadcast
from .solo import Solo
from .topology import library_name
from .wire import Wire

_LEVELS = ("single", "funneled", "serialized", "multiple")  # of MPI's thread support, ascending


def contract(num_values: int) -> Contract:
    """Return the contract that `speed` needs: one tensor of `num_values` fp32 values."""
    schema = Schema.of([("prompt", [num_values])])
    return Contract(schema, schema)


def library(wire: Wire | Solo) -> dict[str, str]:
    """Return {"library": name and version of MPI, "level": its thread level}."""
    if isinstance(wire, Solo):
        return {"library": "none, one process", "level": "none"}
    from mpi4py import MPI

    levels = (MPI.THREAD_SINGLE, MPI.THREAD_FUNNELED, MPI.THREAD_SERIALIZED, MPI.THREAD_MULTIPLE)
    return {"library": library_name(), "level": _LEVELS[levels.index(MPI.Query_thread())]}


def speed(wire: Wire | Solo, repeats: int = 5) -> dict[str, float]:
    """Time broadcasts of one tensor to all client ranks, and gathers of one from each.

    Collective, after a hand-out with `contract`. A broadcast counts until the server has received
    a reply from all ranks.

    Returns:
        On the server the medians "broadcast_seconds" and "gather_seconds"; the first round is not
        counted. Elsewhere, and where nothing travels, an empty dict.
    """
    if isinstance(wire, Solo):
        return {}
    assert wire.contract is not None
    schema = wire.contract.up
    tensors = NamedTensors(schema, np.zeros(schema.num_values, dtype=np.float32))
    results = [] if wire.is_server else [Update(wire.topology.rank - 1, 1.0, tensors)]
    broadcast_seconds: list[float] = []
    gather_seconds: list[float] = []
    for round in range(1 + repeats):
        start = time.perf_counter()
        wire.broadcast(RoundBroadcast(round, tensors=tensors) if wire.is_server else None)
        wire.collect({})  # not a gather: two gathers must have a broadcast between them
        broadcast_end = time.perf_counter()
        updates = wire.gather(round, results)
        if updates is not None:
            updates.drain()
        broadcast_seconds.append(broadcast_end - start)
        gather_seconds.append(time.perf_counter() - broadcast_end)
    if not wire.is_server:
        return {}
    return {
        "broadcast_seconds": median(broadcast_seconds[1:]),
        "gather_seconds": median(gather_seconds[1:]),
    }


def clocks(wire: Wire | Solo, repeats: int = 5) -> list[tuple[float, float]]:
    """Measure how far every rank's clock is ahead of the server's, by the quickest of some queries.

    Collective.

    Returns:
        On the server (seconds ahead, largest error of that number) by rank; elsewhere nothing.
    """
    offsets: list[tuple[float, float]] = []
    smallest_error = math.inf
    for _ in range(repeats):
        query_time = time.time()
        wire.agree(None)
        replies = wire.collect({"clock": time.time()})
        reply_time = time.time()
        # A rank read its clock at some time between the two.
        error = (reply_time - query_time) / 2
        if replies and error < smallest_error:
            smallest_error = error
            middle = (query_time + reply_time) / 2
            offsets = [(reply["clock"] - middle, error) for reply in replies]
    if offsets:
        offsets[0] = (0.0, 0.0)  # the server's own
    return offsets


def free_memory(
    groups: Path = Path("/proc/self/cgroup"), root: Path = Path("/sys/fs/cgroup")
) -> int:
    """Return the bytes that this process can still allocate on the host.

    A control group (a Slurm job's) may have less than the host.

    Args:
        groups: file with the control groups of this process.
        root: where the control groups' files are mounted.
    """
    lines = Path("/proc/meminfo").read_text().splitlines()
    available = next(
        int(line.split()[1]) << 10 for line in lines if line.startswith("MemAvailable:")
    )
    return max(0, min([available, *_group_memory(groups, root)]))


def _group_memory(groups: Path, root: Path) -> Iterator[int]:
    """Yield the free bytes of each control group that limits this process (cgroups v1 and v2)."""
    lines = groups.read_text().splitlines() if groups.exists() else []
    for line in lines:
        _, controllers, group_path = line.split(":", 2)
        if controllers == "":  # version 2
            base = root
            limit_file = "memory.max"
            usage_file = "memory.current"
            idle_key = "inactive_file"
        elif controllers == "memory":  # version 1
            base = root / "memory"
            limit_file = "memory.limit_in_bytes"
            usage_file = "memory.usage_in_bytes"
            idle_key = "total_inactive_file"
        else:
            continue
        group = PurePosixPath(group_path)
        for ancestor in (group, *group.parents):
            folder = base / str(ancestor).lstrip("/")
            with suppress(OSError, ValueError):  # the root has no limit, "max" is none
                limit = int((folder / limit_file).read_text())
                usage = int((folder / usage_file).read_text())
                stat_lines = (folder / "memory.stat").read_text().splitlines()
                stat = dict(stat_line.split() for stat_line in stat_lines)
                # Cached files that nobody uses count as usage, but can be dropped.
                yield limit - usage + int(stat.get(idle_key, 0))

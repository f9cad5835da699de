"""What ranks find out before a run: their memory, the MPI library, the speed of the wire between
them, their clocks.
"""

from __future__ import annotations

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

_LEVELS = ("single", "funneled", "serialized", "multiple")


def contract(num_values: int) -> Contract:
    """What `speed` sends: one tensor of that many values."""
    schema = Schema.of([("prompt", [num_values])])
    return Contract(schema, schema)


def library(wire: Wire | Solo) -> dict[str, str]:
    """The MPI library's name and version, and the thread level that it gives: {"library": ...,
    "level": ...}.
    """
    if isinstance(wire, Solo):
        return {"library": "none, one process", "level": "none"}
    from mpi4py import MPI

    levels = (MPI.THREAD_SINGLE, MPI.THREAD_FUNNELED, MPI.THREAD_SERIALIZED, MPI.THREAD_MULTIPLE)
    return {"library": library_name(), "level": _LEVELS[levels.index(MPI.Query_thread())]}


def speed(wire: Wire | Solo, repeats: int = 5) -> dict[str, float]:
    """Time broadcasts of the contract's tensor to all client ranks, and gathers of one from each.

    Collective, after a hand-out with `contract`. A broadcast counts until the server has heard from
    everybody.

    Returns:
        On the server the medians "broadcast_seconds" and "gather_seconds"; the first round is not
        counted. Elsewhere, and where nothing travels, an empty dict.
    """
    if isinstance(wire, Solo):
        return {}
    assert wire.contract is not None
    schema = wire.contract.up
    tensors = NamedTensors(schema, np.zeros(schema.num_values, dtype=np.float32))
    mine = [] if wire.is_server else [Update(wire.topology.rank - 1, 1.0, tensors)]
    times: list[tuple[float, float]] = []
    for round in range(1 + repeats):
        begin = time.perf_counter()
        wire.broadcast(RoundBroadcast(round, tensors=tensors) if wire.is_server else None)
        wire.collect({})  # and no gather: between two of them something must go down
        middle = time.perf_counter()
        updates = wire.gather(round, mine)
        if updates is not None:
            updates.drain()
        times.append((middle - begin, time.perf_counter() - middle))
    down, up = (median(some) for some in zip(*times[1:]))
    return {"broadcast_seconds": down, "gather_seconds": up} if wire.is_server else {}


def clocks(wire: Wire | Solo, repeats: int = 5) -> list[tuple[float, float]]:
    """How far every rank's clock is ahead of the server's, from the quickest of some questions to
    all of them.

    Collective. Returns, on the server, (seconds ahead, largest error of that number) by rank;
    elsewhere nothing.
    """
    best: list[tuple[float, float]] = []
    for _ in range(repeats):
        asked = time.time()
        wire.agree(None)
        answers = wire.collect({"clock": time.time()})
        heard = time.time()
        error = (heard - asked) / 2
        if answers and (not best or error < best[0][1]):
            best = [(answer["clock"] - (asked + heard) / 2, error) for answer in answers]
    return best[:1] and [(0.0, 0.0), *best[1:]]


def free_memory(
    groups: Path = Path("/proc/self/cgroup"), root: Path = Path("/sys/fs/cgroup")
) -> int:
    """Bytes that this process can still get: of the host, or of a control group (a Slurm job's)
    that has less.
    """
    lines = Path("/proc/meminfo").read_text().splitlines()
    available = next(
        int(line.split()[1]) << 10 for line in lines if line.startswith("MemAvailable:")
    )
    return max(0, min([available, *_group_memory(groups, root)]))


def _group_memory(groups: Path, root: Path) -> Iterator[int]:
    lines = groups.read_text().splitlines() if groups.exists() else []
    for _, kinds, path in (line.split(":", 2) for line in lines):
        if kinds == "":
            base, limit, usage, idle = root, "memory.max", "memory.current", "inactive_file"
        elif kinds == "memory":
            base, limit, usage = root / "memory", "memory.limit_in_bytes", "memory.usage_in_bytes"
            idle = "total_inactive_file"
        else:
            continue
        for group in (PurePosixPath(path), *PurePosixPath(path).parents):
            here = base / str(group).lstrip("/")
            with suppress(OSError, ValueError):  # the root has no limit, "max" is none
                most, used = int((here / limit).read_text()), int((here / usage).read_text())
                stat = dict(
                    line.split() for line in (here / "memory.stat").read_text().splitlines()
                )
                yield most - used + int(stat.get(idle, 0))

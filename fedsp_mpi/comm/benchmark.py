"""What the wire costs: against the bare MPI calls, and for a server that computes while others
wait.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial
from statistics import median
from typing import TYPE_CHECKING

import numpy as np

from fedsp_mpi.tensors import Contract, NamedTensors, Schema, Update

from .messages import Handout, RoundBroadcast
from .wire import Wire

if TYPE_CHECKING:
    from mpi4py import MPI


def measure(num_values: int = 6_144_000, repeats: int = 15) -> dict[str, float]:
    """Time one round's broadcast and gather through the wire against blocking `Bcast` and `Gather`
    of bare buffers.

    Collective: run by every rank of an MPI world of two or more, one client on each rank but the
    server. The two take turns in one run, after one round that is not counted.

    Args:
        num_values: fp32 values of one message; the default is a GPT2-XL prompt of 40 tokens (48
            layers x 2 x 1600).
        repeats: rounds that are counted.

    Returns:
        On the server: "ranks", "num_values", "wire_seconds" and "bare_seconds" (medians of a
        round), "ratio" (of the medians). Elsewhere an empty dict.
    """
    from mpi4py import MPI

    wire = Wire(MPI.COMM_WORLD)
    _hand_out(wire, num_values)
    room = np.zeros((wire.topology.size if wire.is_server else 0, num_values), dtype=np.float32)
    vector = np.zeros(num_values, dtype=np.float32)
    seconds: dict[str, list[float]] = {"wire": [], "bare": []}
    for round in range(1 + repeats):
        seconds["wire"].append(
            _together(MPI.COMM_WORLD, partial(_through_wire, wire, round, vector))
        )
        seconds["bare"].append(
            _together(MPI.COMM_WORLD, partial(_bare, MPI.COMM_WORLD, vector, room))
        )
    wire.finish()
    if not wire.is_server:
        return {}
    ours, bare = (median(seconds[name][1:]) for name in ("wire", "bare"))
    sizes = {"ranks": wire.topology.size, "num_values": num_values}
    return {**sizes, "wire_seconds": ours, "bare_seconds": bare, "ratio": ours / bare}


def measure_waiting(seconds: float = 1.0, repeats: int = 5) -> dict[str, float]:
    """Time matrix products on the server while all other ranks wait for it, against the same while
    they are asleep.

    Collective. "Wait" is both kinds: for a broadcast that does not come, and in a gather that is
    not read.

    Args:
        seconds: about how long the work of one measurement takes.
        repeats: measurements of each kind.

    Returns:
        On the server: "ranks", "broadcast_slowdown", "gather_slowdown" (ratios of medians, 1 =
        waiting is free), and "waiting_cores", the part of a core that one rank uses while it waits
        for a broadcast (the highest median), which unlike the slow-downs does not depend on what
        else the machine does. Elsewhere an empty dict.
    """
    from mpi4py import MPI

    wire = Wire(
        MPI.COMM_WORLD, 1 << 18
    )  # several pieces: the server takes the first at once, the others wait for it
    _hand_out(wire, 1 << 18)
    work = _work(seconds) if wire.is_server else (lambda: 0.0)
    vector = np.zeros(1 << 18, dtype=np.float32)
    times: dict[str, list[float]] = {"asleep": [], "broadcast": [], "gather": []}
    cores: list[list[float]] = []
    for round in range(repeats):
        used, start = time.process_time(), time.perf_counter()
        times["broadcast"].append(work())
        wire.broadcast(_down(wire, round, vector))
        share = (time.process_time() - used) / (time.perf_counter() - start)
        updates = wire.gather(round, _answer(wire, vector, cores=share))
        times["gather"].append(work())
        if updates is not None:
            cores.append([report.metrics["cores"] for report in updates.reports])
            updates.drain()
        times["asleep"].append(_alone(MPI.COMM_WORLD, work, 1.5 * seconds))
    wire.finish()
    if not wire.is_server:
        return {}
    base = median(times["asleep"])
    slowdown = {f"{kind}_slowdown": median(times[kind]) / base for kind in ("broadcast", "gather")}
    return {
        "ranks": wire.topology.size,
        **slowdown,
        "waiting_cores": max(median(some) for some in zip(*cores)),
    }


def _hand_out(wire: Wire, num_values: int) -> None:
    schema = Schema.of([("prompt", [num_values])])
    nothing = NamedTensors(Schema(), np.empty(0, dtype=np.float32))
    wire.handout(
        Handout({}, nothing, Contract(schema, schema, ("cores",))) if wire.is_server else None
    )


def _down(wire: Wire, round: int, vector: np.ndarray) -> RoundBroadcast | None:
    return (
        RoundBroadcast(round, tensors=NamedTensors(Schema.of([("prompt", vector.shape)]), vector))
        if wire.is_server
        else None
    )


def _answer(wire: Wire, vector: np.ndarray, **metrics: float) -> list[Update]:
    tensors = NamedTensors(Schema.of([("prompt", vector.shape)]), vector)
    return [] if wire.is_server else [Update(wire.topology.rank - 1, 1.0, tensors, metrics)]


def _through_wire(wire: Wire, round: int, vector: np.ndarray) -> None:
    wire.broadcast(_down(wire, round, vector))
    updates = wire.gather(round, _answer(wire, vector))
    if updates is not None:
        updates.drain()


def _bare(comm: MPI.Intracomm, vector: np.ndarray, room: np.ndarray) -> None:
    comm.Bcast(vector, root=0)
    comm.Gather(vector, room if comm.rank == 0 else None, root=0)


def _together(comm: MPI.Intracomm, action: Callable[[], None]) -> float:
    comm.Barrier()
    start = time.perf_counter()
    action()
    return time.perf_counter() - start


def _alone(comm: MPI.Intracomm, work: Callable[[], float], pause: float) -> float:
    """Work on the server while the others are not waiting for it, but asleep."""
    comm.Barrier()
    if comm.rank != 0:
        time.sleep(pause)
    return work()


def _work(seconds: float) -> Callable[[], float]:
    matrix = np.ones((512, 512), dtype=np.float32)

    def multiply(times: int) -> float:
        start = time.perf_counter()
        for _ in range(times):
            matrix @ matrix
        return time.perf_counter() - start

    times = max(1, round(seconds / (min(multiply(20) for _ in range(20)) / 20)))
    return lambda: multiply(times)

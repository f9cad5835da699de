"""Cost of the wire: against bare MPI calls, and for a server that computes while others wait."""

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

_WAITING_VALUES = 1 << 18
_WAITING_CHUNK_BYTES = 1 << 18


def measure(num_values: int = 6_144_000, repeats: int = 15) -> dict[str, float]:
    """Time a round's broadcast and gather on the wire, against blocking calls on bare buffers.

    Collective: run by every rank of an MPI world of two or more, one client on each rank but the
    server. The wire, another one that seals what goes up, and the bare calls (`Bcast` and `Gather`)
    take turns in one run, after one round that is not counted.

    Args:
        num_values: fp32 values of one message; the default is a GPT2-XL prompt of 40 tokens (48
            layers x 2 x 1600).
        repeats: rounds that are counted.

    Returns:
        On the server: "ranks", "num_values", "wire_seconds", "sealed_seconds" and "bare_seconds"
        (medians of a round), "ratio" (of wire to bare). Elsewhere an empty dict.
    """
    from mpi4py import MPI

    comm = MPI.COMM_WORLD
    wire = Wire(comm)
    _hand_out(wire, num_values)
    sealed_wire = _sealed_wire(comm, num_values)
    num_rows = wire.topology.size if wire.is_server else 0
    gathered = np.zeros((num_rows, num_values), dtype=np.float32)
    vector = np.zeros(num_values, dtype=np.float32)
    wire_times: list[float] = []
    sealed_times: list[float] = []
    bare_times: list[float] = []
    for round in range(1 + repeats):
        wire_times.append(_time_together(comm, partial(_wire_round, wire, round, vector)))
        sealed_times.append(_time_together(comm, partial(_wire_round, sealed_wire, round, vector)))
        bare_times.append(_time_together(comm, partial(_bare_round, comm, vector, gathered)))
    wire.finish()
    sealed_wire.finish()
    if not wire.is_server:
        return {}
    wire_seconds = median(wire_times[1:])
    bare_seconds = median(bare_times[1:])
    return {
        "ranks": wire.topology.size,
        "num_values": num_values,
        "wire_seconds": wire_seconds,
        "sealed_seconds": median(sealed_times[1:]),
        "bare_seconds": bare_seconds,
        "ratio": wire_seconds / bare_seconds,
    }


def measure_waiting(seconds: float = 1.0, repeats: int = 5) -> dict[str, float]:
    """Time matrix products on the server while all other ranks wait for it, and while they sleep.

    Collective. Ranks wait in two ways: for a broadcast that does not come, and in a gather that is
    not read.

    Args:
        seconds: approximate duration of the work of one measurement.
        repeats: measurements of each kind.

    Returns:
        On the server: "ranks", "broadcast_slowdown", "gather_slowdown" (ratios of medians, 1 =
        waiting is free), and "waiting_cores", the part of a core that one rank uses while it waits
        for a broadcast (the highest median), which unlike the slowdowns does not depend on what
        else the machine does. Elsewhere an empty dict.
    """
    from mpi4py import MPI

    # Several chunks: the server receives the first at once, and the ranks wait with the others.
    wire = Wire(MPI.COMM_WORLD, _WAITING_CHUNK_BYTES)
    _hand_out(wire, _WAITING_VALUES)
    work = _matrix_work(seconds) if wire.is_server else (lambda: 0.0)
    vector = np.zeros(_WAITING_VALUES, dtype=np.float32)
    asleep: list[float] = []
    in_broadcast: list[float] = []
    in_gather: list[float] = []
    core_shares: list[list[float]] = []  # by repeat and client
    for round in range(repeats):
        cpu_start = time.process_time()
        start = time.perf_counter()
        in_broadcast.append(work())
        wire.broadcast(_round_broadcast(wire, round, vector))
        cores = (time.process_time() - cpu_start) / (time.perf_counter() - start)
        updates = wire.gather(round, _results(wire, vector, cores=cores))
        in_gather.append(work())
        if updates is not None:
            core_shares.append([report.metrics["cores"] for report in updates.reports])
            updates.drain()
        asleep.append(_work_while_others_sleep(MPI.COMM_WORLD, work, 1.5 * seconds))
    wire.finish()
    if not wire.is_server:
        return {}
    return {
        "ranks": wire.topology.size,
        "broadcast_slowdown": median(in_broadcast) / median(asleep),
        "gather_slowdown": median(in_gather) / median(asleep),
        "waiting_cores": max(median(shares) for shares in zip(*core_shares)),
    }


def _hand_out(wire: Wire, num_values: int) -> None:
    handout = None
    if wire.is_server:
        schema = Schema.of([("prompt", [num_values])])
        no_tensors = NamedTensors(Schema(), np.empty(0, dtype=np.float32))
        handout = Handout({}, no_tensors, Contract(schema, schema, ("cores",)))
    wire.handout(handout)


def _sealed_wire(comm: MPI.Intracomm, num_values: int) -> Wire:
    """Return a wire whose clients, one on each rank but the server, seal what they send."""
    wire = Wire(comm)
    wire.exchange_keys()
    _hand_out(wire, num_values)
    wire.exchange_client_keys([(), *((client,) for client in range(wire.topology.size - 1))])
    return wire


def _prompt(vector: np.ndarray) -> NamedTensors:
    return NamedTensors(Schema.of([("prompt", vector.shape)]), vector)


def _round_broadcast(wire: Wire, round: int, vector: np.ndarray) -> RoundBroadcast | None:
    return RoundBroadcast(round, tensors=_prompt(vector)) if wire.is_server else None


def _results(wire: Wire, vector: np.ndarray, **metrics: float) -> list[Update]:
    if wire.is_server:
        return []
    return [Update(wire.topology.rank - 1, 1.0, _prompt(vector), metrics)]


def _wire_round(wire: Wire, round: int, vector: np.ndarray) -> None:
    wire.broadcast(_round_broadcast(wire, round, vector))
    updates = wire.gather(round, _results(wire, vector))
    if updates is not None:
        updates.drain()


def _bare_round(comm: MPI.Intracomm, vector: np.ndarray, gathered: np.ndarray) -> None:
    comm.Bcast(vector, root=0)
    comm.Gather(vector, gathered if comm.rank == 0 else None, root=0)


def _time_together(comm: MPI.Intracomm, action: Callable[[], None]) -> float:
    """Run an action on all ranks at the same time; return its seconds on this rank."""
    comm.Barrier()
    start = time.perf_counter()
    action()
    return time.perf_counter() - start


def _work_while_others_sleep(comm: MPI.Intracomm, work: Callable[[], float], pause: float) -> float:
    """Run `work`, which is that of the server, while the other ranks sleep for `pause` seconds."""
    comm.Barrier()
    if comm.rank != 0:
        time.sleep(pause)
    return work()


def _matrix_work(seconds: float) -> Callable[[], float]:
    """Return a function that multiplies matrices for about `seconds`, and returns its seconds."""
    matrix = np.ones((512, 512), dtype=np.float32)

    def multiply(times: int) -> float:
        start = time.perf_counter()
        for _ in range(times):
            matrix @ matrix
        return time.perf_counter() - start

    seconds_each = min(multiply(20) for _ in range(20)) / 20
    times = max(1, round(seconds / seconds_each))
    return lambda: multiply(times)

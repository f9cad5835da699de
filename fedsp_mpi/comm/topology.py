"""Who am I: the server or a client rank, on which host, and which virtual clients live where.

Nothing here imports MPI when the module is loaded: help texts, reports and the guard ask the
launcher's environment.
"""

from __future__ import annotations

import math
import os
import socket
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from mpi4py import MPI

# (rank, number of ranks) as each process manager tells them; the first pair that is there counts,
# because an mpirun inside a Slurm step is nearer to us than the step itself.
_LAUNCHERS = (
    ("PMI_RANK", "PMI_SIZE"),
    ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE"),
    ("PMIX_RANK", "OMPI_COMM_WORLD_SIZE"),
)

_CORES = 8192  # the most that Linux numbers


def _number(name: str) -> int | None:
    text = os.environ.get(name, "").strip()
    return int(text) if text.isdecimal() else None


def _slurm(name: str) -> int | None:
    # The shell of a batch job has SLURM_PROCID too, but it is not a task of a step.
    return _number(name) if "SLURM_STEP_ID" in os.environ else None


def launcher_rank() -> int | None:
    """Rank of this process as the launcher (mpirun, srun) tells it, without starting MPI; None
    without a launcher.
    """
    ranks = [_number(rank) for rank, _ in _LAUNCHERS] + [_slurm("SLURM_PROCID")]
    return next((rank for rank in ranks if rank is not None), None)


def launcher_size() -> int | None:
    """Number of processes that the launcher started, without starting MPI; None if no launcher says
    so.
    """
    if launcher_rank() is None:
        return None
    # SLURM_STEP_NUM_TASKS first: inside an interactive step SLURM_NTASKS is the size of the
    # allocation.
    slurm = (_slurm("SLURM_STEP_NUM_TASKS"), _slurm("SLURM_NTASKS"))
    sizes = [_number(size) for rank, size in _LAUNCHERS if _number(rank) is not None]
    return next((size for size in (*sizes, *slurm) if size is not None), None)


def library_name() -> str:
    """Name and version of the MPI library that mpi4py loads."""
    from mpi4py import MPI

    first = MPI.Get_library_version().strip("\0\n ").splitlines()[0]
    return " ".join(first.split(",")[0].split())


def refuse_singletons(world_size: int, library: str = "") -> None:
    """Raise ValueError if the launcher started several processes and each of them believes that it
    is alone.

    Args:
        world_size: size of MPI's world as this process sees it.
        library: what the MPI library calls itself, for the message.
    """
    tasks = launcher_size()
    if tasks is not None and tasks > 1 and world_size == 1:
        raise ValueError(
            f"found an MPI world of 1 process, expected {tasks}: the launcher started "
            f"{tasks} processes that do not "
            "see each other, because the MPI library that mpi4py loads "
            f"({library or 'unknown'}) and the "
            "launcher's PMI do not match; start them with the mpirun of that library, or "
            "with srun --mpi=pmi2 (MPICH) "
            "or srun --mpi=pmix (Open MPI); srun --mpi=list shows what this Slurm has"
        )


@dataclass(frozen=True)
class Topology:
    """Where this process stands.

    Attributes:
        rank, size: in the world; rank 0 is the server.
        local_rank, local_size: among the processes that share this host's memory.
        host: name of the machine.
        cores: this process's share of the cores that it may run on, at least one: a core that other
            processes of this host may run on counts for each of them in part.
        is_server: this process aggregates.
        solo: there is no other process: server and clients take turns here.
    """

    rank: int
    size: int
    local_rank: int
    local_size: int
    host: str
    is_server: bool
    solo: bool
    cores: int = 1

    @classmethod
    def alone(cls) -> Topology:
        """The topology of one process without MPI."""
        return cls(0, 1, 0, 1, socket.gethostname(), True, True, len(os.sched_getaffinity(0)))

    @classmethod
    def of(cls, comm: MPI.Intracomm) -> Topology:
        """The place of this process in `comm`. Collective: all its ranks call it."""
        import numpy as np
        from mpi4py import MPI

        shared = comm.Split_type(MPI.COMM_TYPE_SHARED)
        local_rank, local_size = shared.rank, shared.size
        users = np.zeros(_CORES, dtype=np.int32)
        users[mine := [core for core in os.sched_getaffinity(0) if core < _CORES]] = 1
        shared.Allreduce(MPI.IN_PLACE, users)
        cores = max(1, int(sum(1 / users[mine]) + 1e-6))
        shared.Free()
        rank, size = comm.rank, comm.size
        return cls(
            rank, size, local_rank, local_size, socket.gethostname(), rank == 0, size == 1, cores
        )


def spread(work: Sequence[float], num_ranks: int) -> list[tuple[int, ...]]:
    """Virtual clients over client ranks: the largest first, each to the rank with the least work so
    far.

    Args:
        work: expected work per client, in any one unit; the index is the client id.
        num_ranks: number of client ranks.

    Returns:
        Per client rank (the first is MPI rank 1) its client ids, ascending; no rank is without one.
        The same arguments give the same answer on every machine.

    Raises:
        ValueError: fewer clients than ranks, or work that is negative or not finite.
    """
    assert num_ranks >= 1
    if len(work) < num_ranks:
        raise ValueError(
            f"found {len(work)} clients on {num_ranks} client ranks, expected at least one "
            "client for each rank; "
            f"start {len(work) + 1} processes or fewer, or raise the number of clients to "
            f"{num_ranks} or more"
        )
    if not all(math.isfinite(amount) and amount >= 0 for amount in work):
        raise ValueError(
            f"found work {list(work)}, expected a finite number that is not negative for "
            "every client"
        )
    ranks: list[list[int]] = [[] for _ in range(num_ranks)]
    load = [0.0] * num_ranks
    for client in sorted(range(len(work)), key=lambda client: (-work[client], client)):
        target = min(range(num_ranks), key=lambda rank: (load[rank], len(ranks[rank]), rank))
        ranks[target].append(client)
        load[target] += work[client]
    return [tuple(sorted(clients)) for clients in ranks]

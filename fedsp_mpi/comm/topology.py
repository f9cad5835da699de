"""Place of this process among the others: rank, host, cores, and which rank hosts which clients.

This module does not import MPI when it is loaded: help texts, reports and the guard ask the
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

# Environment variables of (rank, number of ranks) for each process manager. The first pair that is
# set counts, because an mpirun inside a Slurm step is nearer to this process than the step itself.
_LAUNCHERS = (
    ("PMI_RANK", "PMI_SIZE"),
    ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE"),
    ("PMIX_RANK", "OMPI_COMM_WORLD_SIZE"),
)

_MAX_CORES = 8192  # largest number of CPUs that Linux supports


def _number(name: str) -> int | None:
    """Return the number in an environment variable; None if there is none."""
    text = os.environ.get(name, "").strip()
    return int(text) if text.isdecimal() else None


def _slurm_number(name: str) -> int | None:
    """Return the number in an environment variable of a Slurm step; None outside of one."""
    # The shell of a batch job has SLURM_PROCID too, but it is not a task of a step.
    return _number(name) if "SLURM_STEP_ID" in os.environ else None


def launcher_rank() -> int | None:
    """Return this process's rank as the launcher (mpirun, srun) set it; None without a launcher.

    Does not start MPI.
    """
    candidates = [_number(rank) for rank, _ in _LAUNCHERS]
    candidates.append(_slurm_number("SLURM_PROCID"))
    return next((rank for rank in candidates if rank is not None), None)


def launcher_size() -> int | None:
    """Return the number of processes that the launcher started; None if no launcher sets it.

    Does not start MPI.
    """
    if launcher_rank() is None:
        return None
    candidates = [_number(size) for rank, size in _LAUNCHERS if _number(rank) is not None]
    # SLURM_STEP_NUM_TASKS first: inside an interactive step SLURM_NTASKS is the size of the
    # allocation.
    candidates.append(_slurm_number("SLURM_STEP_NUM_TASKS"))
    candidates.append(_slurm_number("SLURM_NTASKS"))
    return next((size for size in candidates if size is not None), None)


def launcher_name() -> str:
    """Return the command that starts ranks here, as far as the environment shows it."""
    is_mpirun = "HYDI_CONTROL_FD" in os.environ or "OMPI_COMM_WORLD_RANK" in os.environ
    return "srun" if "SLURM_STEP_ID" in os.environ and not is_mpirun else "mpirun"


def library_name() -> str:
    """Return name and version of the MPI library that mpi4py loads."""
    from mpi4py import MPI

    first_line = MPI.Get_library_version().strip("\0\n ").splitlines()[0]
    return " ".join(first_line.split(",")[0].split())


def refuse_singletons(world_size: int, library: str = "") -> None:
    """Raise ValueError if the launcher's processes do not see each other.

    Then each of several processes believes that it is alone.

    Args:
        world_size: size of MPI's world as this process sees it.
        library: name of the MPI library, for the message.
    """
    num_started = launcher_size()
    if num_started is not None and num_started > 1 and world_size == 1:
        raise ValueError(
            f"found an MPI world of 1 process, expected {num_started}: the launcher started "
            f"{num_started} processes that do not see each other, because the MPI library that "
            f"mpi4py loads ({library or 'unknown'}) and the launcher's PMI do not match; start "
            "them with the mpirun of that library, or with srun --mpi=pmi2 (MPICH) or "
            "srun --mpi=pmix (Open MPI); srun --mpi=list shows what this Slurm has"
        )


@dataclass(frozen=True)
class Topology:
    """Place of this process among the others.

    Attributes:
        rank: rank in the world; rank 0 is the server.
        size: number of processes in the world.
        local_rank: rank among the processes on this host.
        local_size: number of processes on this host.
        host: name of the machine.
        is_server: this process aggregates.
        solo: there is no other process: server and clients take turns here.
        cores: this process's share of the cores that it may run on, at least one: a core that other
            processes of this host may run on counts for each of them in part.
        host_cores: cores that the processes on this host may run on, all together.
    """

    rank: int
    size: int
    local_rank: int
    local_size: int
    host: str
    is_server: bool
    solo: bool
    cores: int = 1
    host_cores: int = 1

    @property
    def is_crowded(self) -> bool:
        """Whether this host has more processes than cores for them."""
        return self.local_size > self.host_cores

    @classmethod
    def alone(cls) -> Topology:
        """Return the topology of one process without MPI."""
        num_cores = len(os.sched_getaffinity(0))
        return cls(
            rank=0,
            size=1,
            local_rank=0,
            local_size=1,
            host=socket.gethostname(),
            is_server=True,
            solo=True,
            cores=num_cores,
            host_cores=num_cores,
        )

    @classmethod
    def of(cls, comm: MPI.Intracomm) -> Topology:
        """Return the topology of this process in `comm`. Collective."""
        import numpy as np
        from mpi4py import MPI

        on_host = comm.Split_type(MPI.COMM_TYPE_SHARED)
        my_cores = [core for core in os.sched_getaffinity(0) if core < _MAX_CORES]
        num_users = np.zeros(_MAX_CORES, dtype=np.int32)  # processes that may run on each core
        num_users[my_cores] = 1
        on_host.Allreduce(MPI.IN_PLACE, num_users)
        share = sum(1 / num_users[my_cores])
        topology = cls(
            rank=comm.rank,
            size=comm.size,
            local_rank=on_host.rank,
            local_size=on_host.size,
            host=socket.gethostname(),
            is_server=comm.rank == 0,
            solo=comm.size == 1,
            cores=max(1, int(share + 1e-6)),  # rounding errors must not cost a core
            host_cores=int(np.count_nonzero(num_users)),
        )
        on_host.Free()
        return topology


def spread(work: Sequence[float], num_ranks: int) -> list[tuple[int, ...]]:
    """Assign clients to client ranks: the most work first, each to the least loaded rank.

    Args:
        work: expected work per client, in any one unit; the index is the client id.
        num_ranks: number of client ranks.

    Returns:
        The client ids of each client rank (the first is MPI rank 1), ascending; no rank is empty.
        The same arguments give the same assignment on every machine.

    Raises:
        ValueError: fewer clients than ranks, or work that is negative or not finite.
    """
    assert num_ranks >= 1
    if len(work) < num_ranks:
        raise ValueError(
            f"found {len(work)} clients on {num_ranks} client ranks, expected at least one client "
            f"for each rank; start {len(work) + 1} processes or fewer, or raise the number of "
            f"clients to {num_ranks} or more"
        )
    if not all(math.isfinite(amount) and amount >= 0 for amount in work):
        raise ValueError(
            f"found work {list(work)}, expected a finite number that is not negative for "
            "every client"
        )
    ranks: list[list[int]] = [[] for _ in range(num_ranks)]
    load = [0.0] * num_ranks
    # Ties are broken by number of clients (work may be 0), then by id, so that the order is total.
    for client in sorted(range(len(work)), key=lambda client: (-work[client], client)):
        target = min(range(num_ranks), key=lambda rank: (load[rank], len(ranks[rank]), rank))
        ranks[target].append(client)
        load[target] += work[client]
    return [tuple(sorted(clients)) for clients in ranks]


def called_rank(rank: int, num_servers: int) -> int:
    """Return the server's rank that a client rank calls: client ranks take them in turn."""
    return (rank - num_servers) % num_servers

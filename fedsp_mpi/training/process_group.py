"""Several ranks in one role: each takes its part of the work, and what they add up is the same on
all of them.
"""

from __future__ import annotations

import json
import os
import socket
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch
from torch import Tensor, distributed

from fedsp_mpi.comm import DeadlineError
from fedsp_mpi.log import one_line


class Rendezvous:
    """Where a team meets.

    Attributes:
        address, port: of the leader.
        size: ranks that are to come.
        store: the open door itself, at the leader.
    """

    def __init__(self, address: str, port: int, size: int, store: Any = None) -> None:
        self.address, self.port, self.size, self.store = address, port, size, store

    @classmethod
    def open(cls, size: int, one_host: bool) -> Rendezvous:
        """The leader's: a port that is free, on an address that the others reach. A team of one
        needs none.
        """
        if size == 1:
            return cls("localhost", 0, 1)
        address = "localhost" if one_host else socket.gethostname()
        store = distributed.TCPStore("localhost", 0, size, is_master=True, wait_for_workers=False)
        return cls(address, store.port, size, store)


class ServerGroup:
    """The ranks that share a role's work. They call the same things in the same order; alone, every
    call is free.

    Sums are of all ranks and bit-equal on all of them, so what follows from sums alone stays equal
    without being sent.

    Attributes:
        rank, size: among the team; rank 0 leads.
        device: where `tell` and `totals` compute.
    """

    def __init__(self, rank: int = 0, size: int = 1, device: torch.device | None = None) -> None:
        self.rank, self.size = rank, size
        self.device = device or torch.device("cpu")

    @classmethod
    def join(
        cls, meeting: Rendezvous, rank: int, device: torch.device, seconds: float | None
    ) -> ServerGroup:
        """Wait for the others at the meeting point: gloo for tensors on the CPU, NCCL for those on
        GPUs.

        Args:
            meeting: as the leader opened it, or heard of it.
            rank: of this process in the team.
            device: of this process's work.
            seconds: longest wait for the others in any later call; None: a day.

        Raises:
            DeadlineError: not everybody came.
        """
        if meeting.size == 1:
            return cls(device=device)
        if meeting.address == "localhost":
            os.environ.setdefault(
                "GLOO_SOCKET_IFNAME", "lo"
            )  # a host's name need not lead to itself
        backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
        patience = timedelta(seconds=seconds or 86400)
        with _deadline():
            store = meeting.store or distributed.TCPStore(
                meeting.address, meeting.port, meeting.size, timeout=patience
            )
            distributed.init_process_group(
                backend, store=store, rank=rank, world_size=meeting.size, timeout=patience
            )
        return cls(rank, meeting.size, device)

    def sum(self, tensors: Iterable[Tensor]) -> None:
        """Put the sum over all ranks into each tensor, in place."""
        if self.size > 1:
            with _deadline():
                for tensor in tensors:
                    distributed.all_reduce(tensor)

    def lead(self, tensors: Iterable[Tensor]) -> None:
        """Put the leader's values into each tensor, in place."""
        if self.size > 1:
            with _deadline():
                for tensor in tensors:
                    distributed.broadcast(tensor.detach(), 0)

    def totals(self, numbers: Sequence[float]) -> list[float]:
        """The sums over all ranks of some numbers, in fp64."""
        if self.size == 1:
            return list(numbers)
        sums = torch.tensor(numbers, dtype=torch.float64, device=self.device)
        self.sum([sums])
        return sums.tolist()

    def any(self, here: bool) -> bool:
        """Whether one of the ranks says so."""
        return self.totals([here])[0] > 0

    def is_mine(self, index: int) -> bool:
        """Whether this rank does piece `index` of some work that is dealt out."""
        return index % self.size == self.rank

    def tell(self, value: Any = None) -> Any:
        """What the leader says, which is anything that JSON can say; the others pass nothing."""
        if self.size == 1:
            return value
        said = json.dumps(value).encode() if self.rank == 0 else b""
        size = int(self.totals([len(said)])[0])
        letter = torch.frombuffer(bytearray(said.ljust(size)), dtype=torch.uint8).to(self.device)
        self.lead([letter])
        return json.loads(bytes(letter.tolist()))

    def leave(self) -> None:
        """The end of the team; whoever leaves first does not disturb the others."""
        if self.size > 1:
            self.totals([0])
            distributed.destroy_process_group()


@contextmanager
def _deadline() -> Iterator[None]:
    """Say what it means that the others did not come in time."""
    try:
        yield
    except RuntimeError as error:
        if "imed out" not in str(error) and "imeout" not in str(error):
            raise
        raise DeadlineError(
            "server's ranks: found one that did not take part in time "
            f"({one_line(error, first_line=True)}); look at what "
            "they were doing, or raise deadlines.server"
        ) from None


SINGLE_RANK = ServerGroup()

"""Several ranks in one role: each does its part of the work, and sums are the same on all."""

from __future__ import annotations

import json
import math
import os
import socket
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import numpy as np
import torch
from torch import Tensor, distributed

from fedsp_mpi.comm import DeadlineError
from fedsp_mpi.log import one_line

_DAY = 86400.0  # seconds


class Rendezvous:
    """The place where the ranks of a group connect.

    Attributes:
        address: of the leader's host.
        port: of its store.
        size: ranks that are to come.
        store: the open store itself, on the leader; None elsewhere.
    """

    def __init__(
        self,
        address: str,
        port: int,
        size: int,
        *,
        store: distributed.TCPStore | None = None,
    ) -> None:
        self.address = address
        self.port = port
        self.size = size
        self.store = store

    @classmethod
    def open(cls, size: int, one_host: bool) -> Rendezvous:
        """Open a store on a free port of this host, which the leader does.

        A group of one rank needs none.

        Args:
            size: ranks that are to come.
            one_host: whether all of them run on this host.
        """
        if size == 1:
            return cls("localhost", 0, 1)
        address = "localhost" if one_host else socket.gethostname()
        store = distributed.TCPStore("localhost", 0, size, is_master=True, wait_for_workers=False)
        return cls(address, store.port, size, store=store)


class ServerGroup:
    """The ranks that share a role's work; with one rank, every method returns at once.

    All ranks call the same methods in the same order. Sums are over all ranks and bit-equal on all
    of them, so what follows from sums alone stays equal without being sent.

    Attributes:
        rank: of this process in the group; rank 0 leads.
        size: number of ranks.
        device: that `tell` and `totals` compute on.
    """

    def __init__(self, rank: int = 0, size: int = 1, device: torch.device | None = None) -> None:
        self.rank = rank
        self.size = size
        self.device = device or torch.device("cpu")

    @classmethod
    def join(
        cls, meeting: Rendezvous, rank: int, device: torch.device, *, seconds: float | None
    ) -> ServerGroup:
        """Return a group that is connected to the other ranks.

        Args:
            meeting: as the leader opened it, or with the address that it told.
            rank: of this process in the group.
            device: of this process's work.
            seconds: longest wait for the others, here and in any later call; None: a day.

        Raises:
            DeadlineError: a rank did not come in time.
        """
        group = cls(rank, meeting.size, device)
        group.connect(meeting, seconds=seconds)
        return group

    def connect(self, meeting: Rendezvous, *, seconds: float | None) -> None:
        """Connect to the other ranks: by gloo for tensors on the CPU, by NCCL for those on GPUs.

        Args:
            meeting: see `join`.
            seconds: see `join`.

        Raises:
            DeadlineError: a rank did not come in time.
        """
        if self.size == 1:
            return
        if meeting.address == "localhost":
            # The name of a host need not resolve to the host itself.
            os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
        backend = "cpu:gloo,cuda:nccl" if self.device.type == "cuda" else "gloo"
        timeout = timedelta(seconds=seconds or _DAY)
        with _deadline():
            store = meeting.store or distributed.TCPStore(
                meeting.address, meeting.port, meeting.size, timeout=timeout
            )
            distributed.init_process_group(
                backend, store=store, rank=self.rank, world_size=self.size, timeout=timeout
            )

    def sum(self, tensors: Iterable[Tensor]) -> None:
        """Replace each tensor [*shape] by its sum over all ranks, in place."""
        if self.size > 1:
            with _deadline():
                for tensor in tensors:
                    distributed.all_reduce(tensor)

    def lead(self, tensors: Iterable[Tensor], rank: int = 0) -> None:
        """Replace each tensor [*shape] by that of one rank, by default the leader, in place."""
        if self.size > 1:
            with _deadline():
                for tensor in tensors:
                    distributed.broadcast(tensor.detach(), rank)

    def totals(self, numbers: Sequence[float]) -> list[float]:
        """Return the sum of each number over all ranks, computed in fp64."""
        if self.size == 1:
            return list(numbers)
        sums = torch.tensor(numbers, dtype=torch.float64, device=self.device)
        self.sum([sums])
        return sums.tolist()

    def any(self, flag: bool) -> bool:
        """Return whether the flag is set on any rank."""
        return self.totals([flag])[0] > 0

    def owner_of(self, index: int) -> int:
        """Return the rank that does item `index` of work that is dealt out to all ranks."""
        return index % self.size

    def is_mine(self, index: int) -> bool:
        """Return whether this rank does item `index` of work that is dealt out to all ranks."""
        return self.owner_of(index) == self.rank

    def tell(self, value: Any = None, rank: int = 0) -> Any:
        """Return the value of one rank, by default the leader's, which JSON can express.

        The other ranks pass nothing.
        """
        if self.size == 1:
            return value
        message = json.dumps(value).encode() if self.rank == rank else b""
        return json.loads(self._tell_bytes(message, rank))

    def tell_arrays(self, arrays: Mapping[str, np.ndarray], rank: int) -> dict[str, np.ndarray]:
        """Return the arrays of one rank, each [*shape], by name; those of others are not used."""
        if self.size == 1:
            return dict(arrays)
        layout = [[name, array.dtype.str, array.shape] for name, array in arrays.items()]
        message = b"".join(array.tobytes() for array in arrays.values())
        layout = self.tell(layout, rank)
        content = self._tell_bytes(message if self.rank == rank else b"", rank)
        received: dict[str, np.ndarray] = {}
        start = 0
        for name, dtype, shape in layout:
            num_values = math.prod(shape)
            values = np.frombuffer(content, dtype, num_values, start)
            received[name] = values.reshape(shape).copy()
            start += values.nbytes
        return received

    def _tell_bytes(self, message: bytes, rank: int) -> bytes:
        """Return the message of one rank; the other ranks pass an empty one."""
        num_bytes = int(self.totals([len(message)])[0])
        if not num_bytes:
            return b""
        padded = bytearray(message.ljust(num_bytes))
        buffer = torch.frombuffer(padded, dtype=torch.uint8).to(self.device)
        self.lead([buffer], rank)
        return buffer.cpu().numpy().tobytes()

    def leave(self) -> None:
        """Wait until all ranks are done, and disconnect: from then on each of them is alone."""
        if self.size > 1:
            self.totals([0])
            distributed.destroy_process_group()
            self.rank = 0
            self.size = 1


@contextmanager
def _deadline() -> Iterator[None]:
    """Turn a timeout inside the block into a DeadlineError."""
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

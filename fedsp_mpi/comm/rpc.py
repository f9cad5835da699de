"""Remote calls during a round: clients that hold no model call, and the server's ranks respond.

Each client rank calls one rank of the server, always the same one, and tells it when it makes no
more calls in this round. A request and its response are a header and fp32 values each. Where keys
are exchanged, both parts of a request are sealed by the client, and open on the rank that it calls.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from types import ModuleType
from typing import TYPE_CHECKING, Protocol

import numpy as np

from fedsp_mpi.tensors import seal

from .envelope import SEAL_BYTES
from .inspection import ProtocolError, reading
from .messages import HEADER_BYTES, NO_CALLS, CallStats, Header, Kind
from .topology import called_rank

if TYPE_CHECKING:
    from mpi4py import MPI

    from .keys import Seals

Answer = Callable[[np.ndarray], np.ndarray]  # fp32 values of a request to those of its response
_HEADER_TAG = 3  # wire.py has the others
_VALUES_TAG = 4
_PHASE = "remote calls"  # for errors
# The server may have other requests to handle first: a caller waits as long as for its broadcast.
_CALLER_DEADLINE = "broadcast"
_SERVER_DEADLINE = "gather"


class Wait(Protocol):
    """Waits like `Wire._wait`: the deadline of `phase`, or of another phase named by `limit`."""

    def __call__(
        self,
        is_done: Callable[[], bool],
        phase: str,
        *,
        limit: str = "",
        moving: bool = False,
        missing: Callable[[], Collection[int]] = tuple,
    ) -> None: ...


class RpcEndpoint:
    """One rank's end of remote calls: `call` and `close` on client ranks, `serve` on the server.

    Args:
        comm: communicator of all ranks.
        mpi: the module `mpi4py.MPI`.
        servers: number of server ranks, which are the first; client ranks call them in turn.
        wait: waits for MPI.

    Attributes:
        seals: of this rank; None: nothing is sealed.
    """

    def __init__(self, comm: MPI.Intracomm, mpi: ModuleType, servers: int, *, wait: Wait) -> None:
        self._comm = comm
        self._mpi = mpi
        self._wait = wait
        self._is_server = comm.rank < servers
        self._server = called_rank(comm.rank, servers)  # of a client rank
        self._callers = [
            rank for rank in range(servers, comm.size) if called_rank(rank, servers) == comm.rank
        ]
        self.seals: Seals | None = None
        self._calls: dict[int, CallStats] = {}

    def call(self, client: int, values: np.ndarray) -> np.ndarray:
        """Send a client's fp32 values [num_values] to the server and return its response.

        Returns:
            fp32 values [any number].

        Raises:
            DeadlineError: it takes longer than the deadline of the broadcast.
            ValueError: the message that comes is not a response.
        """
        assert not self._is_server, "the server does not call"
        server = self._server
        request = Header(Kind.REQUEST, client=client, num_values=values.size).pack()
        if self.seals is None:
            self._send(request, values, server, limit=_CALLER_DEADLINE)
        else:
            request = self.seals.seal_call(client, request)  # first: messages are counted
            sealed = self.seals.seal_request(client, values)
            self._send(request, sealed, server, limit=_CALLER_DEADLINE)
        header, _ = self._receive_header(server, lambda: (server,), limit=_CALLER_DEADLINE)
        header.require(Kind.RESPONSE, f"rank {server}")
        response = self._receive_values(header, server, limit=_CALLER_DEADLINE)
        stats = self._calls.get(client, NO_CALLS)
        is_sealed = self.seals is not None
        self._calls[client] = stats.add_call(values.size, response.size, is_sealed=is_sealed)
        return response

    def close(self) -> dict[int, CallStats]:
        """End this rank's calls of the round, and return them by client id."""
        if not self._is_server:
            close = Header(Kind.REQUEST).pack()
            if self.seals is not None:
                close = self.seals.seal_close(close)
            self._send(close, None, self._server, limit=_CALLER_DEADLINE)
        calls = self._calls
        self._calls = {}
        return calls

    def serve(self, answer: Answer) -> None:
        """Respond to one request after the other, until all ranks that call this one have closed.

        Raises:
            DeadlineError: none of them sends anything within the deadline of the gather.
            ProtocolError: a message is not a request, or `answer` refuses it; names the rank.
            SealedTensorError: the response is in the memory of the global model.
        """
        open_ranks = set(self._callers)
        while open_ranks:
            header, rank = self._receive_header(
                self._mpi.ANY_SOURCE, lambda: open_ranks, limit=_SERVER_DEADLINE
            )
            if rank not in open_ranks or header.kind is not Kind.REQUEST:
                raise ProtocolError(
                    f"rank {rank}: found a message of kind {header.kind.name}, expected a REQUEST "
                    f"from one of the ranks {sorted(open_ranks)}"
                )
            if not header.num_values:  # this is how a rank closes
                open_ranks.remove(rank)
                continue
            request = self._receive_values(header, rank, limit=_SERVER_DEADLINE)
            try:
                values = answer(request)
            except ValueError as error:
                raise ProtocolError(
                    f"request of client {header.client} from rank {rank}: {error}"
                ) from error
            seal.check_array(values)
            response = Header(Kind.RESPONSE, client=header.client, num_values=values.size)
            self._send(response.pack(), values, rank, limit=_SERVER_DEADLINE)

    def _send(self, header: bytes, values: np.ndarray | None, rank: int, *, limit: str) -> None:
        """Send a header, and what follows it: fp32 [num_values], sealed uint8, or nothing."""
        requests = [self._comm.Isend([header, self._mpi.BYTE], rank, _HEADER_TAG)]
        if values is not None:
            kind = self._mpi.FLOAT if values.dtype == np.float32 else self._mpi.BYTE
            requests.append(self._comm.Isend([values, kind], rank, _VALUES_TAG))
        for request in requests:
            self._wait(request.Test, _PHASE, limit=limit, moving=True, missing=lambda: (rank,))

    def _receive_header(
        self, source: int, missing: Callable[[], Collection[int]], *, limit: str
    ) -> tuple[Header, int]:
        """Receive a header; return it and the rank that sent it."""
        is_sealed = self._is_server and self.seals is not None
        raw = bytearray(HEADER_BYTES + (SEAL_BYTES if is_sealed else 0))
        status = self._mpi.Status()
        request = self._comm.Irecv([raw, self._mpi.BYTE], source, _HEADER_TAG)
        self._wait(lambda: request.Test(status), _PHASE, limit=limit, missing=missing)
        message = bytes(raw)
        if self._is_server and self.seals is not None:
            message = self.seals.open_call(status.source, message)
        with reading(status.source, "a header"):
            return Header.unpack(message, f"rank {status.source}"), status.source

    def _receive_values(self, header: Header, rank: int, *, limit: str) -> np.ndarray:
        """Receive the values that a header announces.

        Raises:
            ProtocolError: another number of values comes.
        """
        status = self._mpi.Status()
        messages: list[MPI.Message] = []

        def poll() -> bool:
            message = self._comm.Improbe(rank, _VALUES_TAG, status)
            if message is not None:
                messages.append(message)
            return bool(messages)

        self._wait(poll, _PHASE, limit=limit, moving=True, missing=lambda: (rank,))
        # Memory is allocated for what has come, not for what a header announces.
        num_bytes = status.Get_count(self._mpi.BYTE)
        is_sealed = self._is_server and self.seals is not None
        if num_bytes != 4 * header.num_values + (SEAL_BYTES if is_sealed else 0):
            raise ProtocolError(
                f"rank {rank}: found {num_bytes} bytes behind a header that announces "
                f"{header.num_values} values"
            )
        arrived = np.empty(num_bytes, dtype=np.uint8)
        request = messages[0].Irecv([arrived, self._mpi.BYTE])
        self._wait(request.Test, _PHASE, limit=limit, moving=True, missing=lambda: (rank,))
        if self._is_server and self.seals is not None:
            return self.seals.open_request(header.client, rank, sealed=arrived)
        return arrived.view(np.float32)

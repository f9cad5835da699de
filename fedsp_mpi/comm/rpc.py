"""Questions during a round: clients that hold no model ask, and the server's ranks answer.

Each client rank asks one rank of the server, always the same, and says when it has no more
questions in this round. A question and its answer are a header and fp32 values; both sides of it
stand next to each other here.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np

from fedsp_mpi.tensors import seal

from .inspection import ProtocolError, reading
from .messages import HEADER_BYTES, NO_CALLS, CallStats, Header, Kind

if TYPE_CHECKING:
    from mpi4py import MPI

Answer = Callable[[np.ndarray], np.ndarray]  # fp32 values to fp32 values
_HEADERS, _VALUES = 3, 4  # tags


class RpcEndpoint:
    """One rank's part in the questions of each round.

    Args:
        comm, mpi: what the messages go over, and its module.
        servers: ranks of the server, from 0; client ranks ask them in turns.
        wait: how to wait (`Wire._wait`).
    """

    def __init__(
        self, comm: MPI.Intracomm, mpi: Any, servers: int, wait: Callable[..., None]
    ) -> None:
        self._comm, self._mpi, self._wait = comm, mpi, wait
        own, clients = comm.rank, range(servers, comm.size)
        self._is_server, self._mine = own < servers, (own - servers) % servers
        self._askers = [rank for rank in clients if (rank - servers) % servers == own]
        self._asked: dict[int, CallStats] = {}

    def ask(self, client: int, values: np.ndarray) -> np.ndarray:
        """What the server answers to a client's fp32 values [any number]; fp32 [any number].

        Raises DeadlineError if that takes longer than the deadline of the broadcast, ValueError if
        it is no answer.
        """
        assert not self._is_server, "the server answers"
        self._send(
            Header(Kind.QUESTION, client=client, num_values=values.size),
            values,
            self._mine,
            "broadcast",
        )
        # The server may have other questions before this one: the limit is the one for its work.
        header, _ = self._header(self._mine, "broadcast", lambda: (self._mine,))
        header.require(Kind.ANSWER, f"rank {self._mine}")
        found = self._receive(header, self._mine, "broadcast")
        before = self._asked.get(client, NO_CALLS)
        self._asked[client] = before.one_more(values.size, found.size)
        return found

    def close(self) -> dict[int, CallStats]:
        """This rank has no more questions in this round. What its clients asked in it."""
        if not self._is_server:
            self._send(Header(Kind.QUESTION), None, self._mine, "broadcast")
        asked, self._asked = self._asked, {}
        return asked

    def serve(self, answer: Answer) -> None:
        """Answer one question after the other, until all ranks that ask here have no more.

        Raises DeadlineError if none of them is heard of within the deadline of the gather,
        ProtocolError, naming the rank, for what is no question, SealedTensorError for an answer in
        the memory of the global model.
        """
        left = set(self._askers)
        while left:
            header, rank = self._header(self._mpi.ANY_SOURCE, "gather", lambda: left)
            if rank not in left or header.kind is not Kind.QUESTION:
                raise ProtocolError(
                    f"rank {rank}: found a message of kind {header.kind.name}, expected "
                    "a QUESTION, "
                    "from one of the "
                    f"ranks {sorted(left)}"
                )
            if not header.num_values:
                left.remove(rank)
                continue
            question = self._receive(header, rank, "gather")
            try:
                found = answer(question)
            except ValueError as error:
                raise ProtocolError(
                    f"question of client {header.client} from rank {rank}: {error}"
                ) from error
            seal.check_array(found)
            self._send(
                Header(Kind.ANSWER, client=header.client, num_values=found.size),
                found,
                rank,
                "gather",
            )

    def _send(self, header: Header, values: np.ndarray | None, rank: int, limit: str) -> None:
        requests = [self._comm.Isend([header.pack(), self._mpi.BYTE], rank, _HEADERS)]
        if values is not None:
            requests.append(self._comm.Isend([values, self._mpi.FLOAT], rank, _VALUES))
        for request in requests:
            self._wait(request.Test, "questions", limit=limit, moving=True, missing=lambda: (rank,))

    def _header(self, source: int, limit: str, missing: Callable[[], Any]) -> tuple[Header, int]:
        raw, status = bytearray(HEADER_BYTES), self._mpi.Status()
        request = self._comm.Irecv([raw, self._mpi.BYTE], source, _HEADERS)
        self._wait(lambda: request.Test(status), "questions", limit=limit, missing=missing)
        with reading(status.source, "a header"):
            return Header.unpack(bytes(raw), f"rank {status.source}"), status.source

    def _receive(self, header: Header, rank: int, limit: str) -> np.ndarray:
        """The values that a header announces.

        Raises ProtocolError if another number of them comes.
        """
        status, messages = self._mpi.Status(), []

        def look() -> bool:
            if (message := self._comm.Improbe(rank, _VALUES, status)) is not None:
                messages.append(message)
            return bool(messages)

        self._wait(look, "questions", limit=limit, moving=True, missing=lambda: (rank,))
        size = status.Get_count(
            self._mpi.BYTE
        )  # memory is taken for what is there, not for what a header says
        if size != 4 * header.num_values:
            raise ProtocolError(
                f"rank {rank}: found {size} bytes behind a header that announces "
                f"{header.num_values} values"
            )
        values = np.empty(header.num_values, dtype=np.float32)
        request = messages[0].Irecv([values, self._mpi.FLOAT])
        self._wait(request.Test, "questions", limit=limit, moving=True, missing=lambda: (rank,))
        return values

"""Server and clients over MPI. Both sides of each step of the protocol stand next to each other.

Every rank calls the same operations in the same order, and inside them the same collectives: how
many there are follows from the contract alone. What says who sends how much (headers) goes from
client to server as letters, so that the server knows who has not reported yet. Payload is fp32
straight from and to the vectors' memory, never pickled. Updates are gathered piece by piece, with
sends whose size the server looks at before it receives: MPI's own gather leaves the server's memory
as it was where a rank sends less than it announced, and that would be averaged. What a client rank
says is inspected (inspection.py) before anything follows from it.
"""

from __future__ import annotations

import json
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np

from fedsp_mpi.tensors import Contract, Failure, NamedTensors, Update

from .guard import Refused, guard
from .incoming import Incoming
from .inspection import (
    MAX_JSON_BYTES,
    Expected,
    ProtocolError,
    failures_of,
    open_json,
    read_headers,
    require_one_rank_each,
)
from .ledger import Direction, Ledger
from .messages import (
    CHUNK_BYTES,
    HEADER_BYTES,
    LIMIT,
    MAX_ANSWER_BYTES,
    NO_CALLS,
    CallStats,
    Handout,
    Header,
    JsonPhase,
    Kind,
    RoundBroadcast,
    checked,
    down_header,
    handout_content,
    handout_from,
    pack_answers,
    reports_of,
    require_handout,
    slices,
    to_json,
)
from .rpc import Answer, RpcEndpoint
from .topology import Topology
from .updates import Updates
from .waiting import Deadlines, wait

if TYPE_CHECKING:
    from mpi4py import MPI

_WINDOW = 4  # pieces of one vector that flow down at the same time
_SERVER = 0
_ANSWERS, _JSON, _PIECES = (
    1,
    2,
    5,
)  # tags: a client may be a letter ahead of another; desk.py has 3 and 4


class Wire:
    """One rank's end of the wire.

    Attributes:
        topology: where this rank stands.
        is_server: this rank aggregates.
        is_client: this rank hosts clients.
        deadlines: seconds per phase; may be replaced at any time, each rank has its own.
        contract: what may travel; None before the hand-out.
    """

    def __init__(
        self,
        comm: MPI.Intracomm,
        chunk_bytes: int = CHUNK_BYTES,
        deadlines: Deadlines | None = None,
    ) -> None:
        from mpi4py import MPI

        self._mpi = MPI
        self.deadlines = deadlines or Deadlines()
        # Ranks arrive at different times; what follows is blocking, and would spin.
        self._wait(comm.Ibarrier().Test, "start_up")
        self._comm = comm.Dup()
        self.topology = Topology.of(self._comm)
        self.is_server, self.is_client = self.topology.is_server, not self.topology.is_server
        self.contract: Contract | None = None
        self._chunk = max(1, chunk_bytes // 4)
        self._ledger = Ledger()
        self._open: Updates | None = None
        self._desk: RpcEndpoint | None = None
        self._others = self.topology.size - 1

    # The operations, in the order of a run.

    def collect(
        self, info: Mapping[str, Any], phase: JsonPhase = "start-up"
    ) -> list[dict[str, Any]] | None:
        """Gather one JSON-able dict of every rank at the server: the list by rank there, None
        elsewhere.

        Args:
            info: this rank's own.
            phase: for the manifest and the deadline: "start-up", "checkpoint" at the end of a
                round, or "end".
        """
        with self._operation(phase):
            body, limit = to_json(info), LIMIT[phase]
            if not self.is_server:
                letter = (
                    Header(Kind.JSON, client=self.topology.rank, num_values=len(body)).pack() + body
                )
                # After a round the server reads letters when its own work is done.
                self._write(letter, _JSON, limit if phase == "start-up" else "broadcast")
                self._count_json(phase, phase, "(json)", len(body), (1, 1))
                return None
            letters = self._read_all(
                _JSON, limit, dict.fromkeys(range(self.topology.size), MAX_JSON_BYTES)
            )
            for letter in letters.values():
                self._count_json(phase, phase, "(json)", len(letter) - HEADER_BYTES, (1, 1))
            return [json.loads(body)] + [open_json(letters[rank], rank) for rank in sorted(letters)]

    def agree(self, verdict: Refused | None, phase: str = "start_up", note: Any = None) -> Any:
        """The server says whether the run goes on; other ranks pass None. `phase` names the
        deadline.

        Returns:
            On every rank the server's `note`, which is anything that JSON can say.

        Raises:
            Refused: on every rank, what the server passed.
        """
        with self._operation("agree"):
            assert self.is_server or verdict is None, "the server decides"
            said = [str(verdict), verdict.exit_status] if verdict else None
            raw = self._bytes_down(to_json([said, note]), phase)
            self._count_json("start-up", "agree", "(verdict)", len(raw), self._deliveries)
            heard, note = json.loads(raw)
            if heard is not None:
                raise Refused(*heard)
            return note

    def handout(self, handout: Handout | None) -> Handout:
        """The server's hand-out for everybody; other ranks pass None. Seals the contract.

        Raises:
            ValueError: more metrics than a header has room for.
            SealedTensorError: tensors in the memory of the global model.
        """
        with self._operation("handout"):
            assert (handout is not None) == self.is_server
            if handout is not None:
                require_handout(handout)
            raw = self._bytes_down(
                b"" if handout is None else to_json(handout_content(handout, self._chunk)),
                "handout",
            )
            self._count_json("handout", "handout", "(meta)", len(raw), self._deliveries)
            given, self._chunk = (
                (handout, self._chunk) if handout is not None else handout_from(json.loads(raw))
            )
            self._pour(given.tensors.flat, "handout")
            self._ledger.tensors("handout", "handout", given.tensors.schema, *self._deliveries)
            self.contract = given.contract
            if given.contract.servers:
                self._desk = RpcEndpoint(self._comm, self._mpi, given.contract.servers, self._wait)
            return given

    def ask(self, client: int, values: np.ndarray) -> np.ndarray:
        """What the server answers to a client's fp32 values, while `outgoing` of a `gather` is
        read.
        """
        assert self._desk is not None, "the contract says whether clients may ask"
        return self._desk.ask(client, values)

    def broadcast(self, down: RoundBroadcast | None) -> RoundBroadcast:
        """The server's tensors of a round, or its word to stop, for everybody; other ranks pass
        None.

        Raises:
            ValueError: the tensors are not those of the contract.
            SealedTensorError: tensors in the memory of the global model.
        """
        with self._operation("broadcast", None if down is None else down.round):
            assert (down is not None) == self.is_server
            contract, crossed = self._sealed(), self._deliveries[1]
            header = self._announce(
                None if down is None else down_header(down, contract), "broadcast"
            )
            if header.kind is Kind.STOP:
                self._ledger.header("down", "broadcast", 0, crossed)
                return down or RoundBroadcast(header.round, stop=True)
            tensors = _room(header, contract) if down is None else down.tensors
            assert tensors is not None
            self._pour(tensors.flat, "broadcast")
            self._ledger.broadcast(contract.down, 0, crossed)
            return down or RoundBroadcast(header.round, tensors=tensors)

    def serve(self, answer: Answer) -> None:
        """Answer the calls of clients that hold no model, until all of them have done their work.

        The server's ranks call it while the clients train, if the contract says that they may call.
        """
        with self._operation("local training"):
            if self._desk is not None:
                self._desk.serve(answer)

    def gather(
        self,
        round: int,
        results: Iterable[Update | Failure],
        expected: Expected | None = None,
    ) -> Updates | None:
        """Send the results of this rank's clients; the server passes none and receives the Updates.

        An update that cannot be averaged goes up as a Failure. If one comes up all the same, or a
        client is silent, or a piece is of another length, the server makes a Failure of it. Updates
        must not share memory with each other.

        Args:
            round: that the results are of.
            results: of this rank's clients that take part, updates of fp32 values.
            expected: who answers and what they may say, on the server; without it, what follows
                from that is not looked at.

        Raises:
            ValueError: on the sender, a result is not what the contract says.
            ProtocolError: on the server, the same, where that means that it cannot tell what the
                rank sends next.
            SealedTensorError: tensors in the memory of the global model.
        """
        with self._operation("gather", round):
            contract = self._sealed()
            checked_results = [checked(result, contract, round) for result in results]
            checked_results.sort(key=lambda result: result.client)
            if self.is_server:
                assert not checked_results, "the server has no clients"
                return self._take(round, contract, expected)
            calls = self._desk.close() if self._desk else {}
            self._give(round, checked_results, contract, calls)
            return None

    def finish(self) -> None:
        """Wait politely until every rank is done: the end of MPI itself spins."""
        with self._operation("finish"):
            self._wait(self._comm.Ibarrier().Test, "finish")

    @property
    def manifest(self) -> list[dict[str, Any]]:
        """Everything that travelled so far, as this rank saw it: the entries of `ledger.Entry`,
        JSON-able.
        """
        return self._ledger.manifest()

    def round_bytes(self) -> dict[str, dict[int, int]]:
        """Logical bytes of the last round by client, {"down": {client: bytes}, "up": {client:
        bytes}}.

        A client is handed the broadcast once a round even where its rank hosts several: 4 bytes a
        value and a header.
        """
        return self._ledger.round_bytes()

    # Up: letters, then columns.

    def _give(
        self,
        round: int,
        mine: list[Update | Failure],
        contract: Contract,
        asked: Mapping[int, CallStats],
    ) -> None:
        headers = [Header.of(item, round, asked.get(item.client, NO_CALLS)) for item in mine]
        self._write(pack_answers(headers, contract.metrics), _ANSWERS, "gather")
        updates = [item for item in mine if isinstance(item, Update)]
        failures = {
            header.client: header.num_values for header in headers if header.kind is Kind.FAILURE
        }
        flats = [update.tensors.flat for update in updates]
        for part in slices(contract.up.num_values, self._chunk) if flats else ():
            rows = (
                flats[0][part]
                if len(flats) == 1
                else np.concatenate([flat[part] for flat in flats])
            )
            request = self._comm.Isend([rows, self._mpi.FLOAT], dest=_SERVER, tag=_PIECES)
            # The server reads while it merges, or after it learned: the limit is the one for the
            # server's work, and nothing is known to move before the first piece has left.
            self._wait(
                request.Test,
                "gather",
                limit="broadcast",
                moving=part.start > 0,
                missing=lambda: (_SERVER,),
            )
        self._ledger.answers(contract, [update.client for update in updates], failures, True, asked)

    def _take(self, round: int, contract: Contract, expected: Expected | None) -> Updates:
        ranks = range(self.topology.size)
        most = (
            {rank: MAX_ANSWER_BYTES * len(expected.of_rank(rank)) for rank in ranks}
            if expected
            else None
        )
        headers: list[list[Header]] = [[] for _ in range(self.topology.size)]
        for rank, letter in self._read_all(_ANSWERS, "gather", most).items():
            headers[rank] = read_headers(letter, rank, contract, round, expected)
        everyone = [header for of_rank in headers for header in of_rank]
        senders = [
            [header.client for header in of_rank if header.kind is Kind.UPDATE]
            for of_rank in headers
        ]
        require_one_rank_each(senders)
        failures = {
            failure.client: failure for failure in failures_of(everyone, contract, round, expected)
        }
        incoming = Incoming(
            self._receive_pieces, senders, contract.up.num_values, self._chunk, round
        )
        for client, reason in incoming.first().items():
            failures.setdefault(client, Failure(client, round, "check", reason))
        reports = reports_of(everyone, failures)
        self._open = Updates(
            reports,
            sorted(failures.values(), key=lambda failure: failure.client),
            contract.up,
            incoming.columns({report.client for report in reports}),
        )
        asked = {header.client: header.asked for header in everyone if header.asked.questions}
        sent = sorted(client for of_rank in senders for client in of_rank)
        told = {
            header.client: header.num_values for header in everyone if header.kind is Kind.FAILURE
        }
        self._ledger.answers(contract, sent, told, True, asked)
        return self._open

    def _receive_pieces(self, targets: Mapping[int, np.ndarray]) -> dict[int, int]:
        """Receive the next piece of each rank into contiguous fp32 memory of its own.

        Returns:
            The number of bytes that a rank sent, for those that sent another number than there is
            memory for. What they sent is thrown away.
        """
        flowing: dict[int, MPI.Request] = {}
        wrong: dict[int, int] = {}
        waiting = set(targets)
        status = self._mpi.Status()

        def look() -> bool:
            for rank in list(waiting):
                if rank not in flowing:
                    message = self._comm.Improbe(rank, _PIECES, status)
                    if message is None:
                        continue
                    size = status.Get_count(self._mpi.BYTE)
                    target = targets[rank]
                    if size != target.nbytes:
                        wrong[rank] = size
                        target = np.empty(size, dtype=np.uint8)
                    flowing[rank] = message.Irecv([target, self._mpi.BYTE])
                if flowing[rank].Test():
                    waiting.discard(rank)
            return not waiting

        self._wait(look, "gather", moving=True, missing=lambda: waiting)
        return wrong

    def _write(self, letter: bytes, tag: int, phase: str) -> None:
        request = self._comm.Isend([letter, self._mpi.BYTE], dest=_SERVER, tag=tag)
        self._wait(request.Test, phase, missing=lambda: (_SERVER,))

    def _read_all(
        self, tag: int, phase: str, most: Mapping[int, int] | None = None
    ) -> dict[int, bytes]:
        """One letter of every other rank, by rank; `most`: of how many bytes at most."""
        arriving: dict[int, tuple[MPI.Request, bytearray]] = {}
        letters: dict[int, bytes] = {}
        status = self._mpi.Status()

        def look() -> bool:
            while (message := self._comm.Improbe(self._mpi.ANY_SOURCE, tag, status)) is not None:
                rank, size = status.source, status.Get_count(self._mpi.BYTE)
                if rank in letters.keys() | arriving.keys():
                    raise ProtocolError(
                        f"rank {rank}: found a second letter in {phase}, expected one"
                    )
                if most is not None and size > most[rank]:
                    raise ProtocolError(
                        f"rank {rank}: found a letter of {size} bytes in {phase}, expected at most "
                        f"{most[rank]}"
                    )
                letter = bytearray(size)
                arriving[rank] = (message.Irecv([letter, self._mpi.BYTE]), letter)
            for rank in [rank for rank, (request, _) in arriving.items() if request.Test()]:
                letters[rank] = bytes(arriving.pop(rank)[1])
            return len(letters) == self._others

        everyone = set(range(1, self._others + 1))
        self._wait(look, phase, missing=lambda: everyone - letters.keys())
        return letters

    # Down: a header, then what it announces.

    def _announce(self, header: Header | None, phase: str) -> Header:
        raw = bytearray(HEADER_BYTES) if header is None else bytearray(header.pack())
        request = self._comm.Ibcast([raw, self._mpi.BYTE], root=_SERVER)
        self._wait(request.Test, phase, missing=lambda: () if self.is_server else (_SERVER,))
        return header or Header.unpack(bytes(raw), "the server")

    def _bytes_down(self, body: bytes, phase: str) -> bytes:
        header = self._announce(
            Header(Kind.JSON, num_values=len(body)) if self.is_server else None, phase
        )
        header.require(Kind.JSON, "the server")
        raw = bytearray(body) if self.is_server else bytearray(header.num_values)
        self._wait(self._comm.Ibcast([raw, self._mpi.BYTE], root=_SERVER).Test, phase)
        return bytes(raw)

    def _pour(self, flat: np.ndarray, phase: str) -> None:
        """A vector flows from the server's memory to everybody's, in pieces."""
        flowing: deque[MPI.Request] = deque()
        for part in slices(flat.size, self._chunk):
            flowing.append(self._comm.Ibcast([flat[part], self._mpi.FLOAT], root=_SERVER))
            if len(flowing) == _WINDOW:
                self._wait(flowing.popleft().Test, phase, moving=True)
        for request in flowing:
            self._wait(request.Test, phase, moving=True)

    # Small things.

    @contextmanager
    def _operation(self, name: str, round: int | None = None) -> Iterator[None]:
        with guard.phase(name, round=round):
            if self._open is not None:
                self._open.drain()
                self._open = None
            yield

    def _wait(
        self,
        done: Callable[[], bool],
        phase: str,
        *,
        limit: str = "",
        moving: bool = False,
        missing: Callable[[], Iterable[int]] = tuple,
    ) -> None:
        wait(done, phase, getattr(self.deadlines, limit or phase), moving=moving, missing=missing)

    def _sealed(self) -> Contract:
        assert self.contract is not None, "the hand-out comes first"
        return self.contract

    @property
    def _deliveries(self) -> tuple[int, int]:
        """(logical, real) messages of something that goes from the server to every rank, as this
        rank sees them.
        """
        return (self._others, self._others) if self.is_server else (1, 1)

    def _count_json(
        self, direction: Direction, phase: str, name: str, size: int, deliveries: tuple[int, int]
    ) -> None:
        self._ledger.header(direction, phase, *deliveries)
        self._ledger.raw(direction, phase, name, size, *deliveries)


def _room(header: Header, contract: Contract) -> NamedTensors:
    header.require(Kind.BROADCAST, "the server")
    assert header.digest == contract.down.digest, "the server sent what it had not handed out"
    return NamedTensors(contract.down, np.empty(header.num_values, dtype=np.float32))

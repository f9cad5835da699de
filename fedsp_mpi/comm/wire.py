"""Server and clients over MPI, with both sides of each step of the protocol next to each other.

Every rank calls the same operations in the same order, and inside them the same collectives: their
number follows from the contract alone. Headers, which say who sends how much, go from client ranks
to the server as messages of their own, so that the server knows which ranks are missing. Payload is
fp32, straight from and to the vectors' memory, or the bytes of compressed changes (exchange.py),
never pickled. Updates are gathered chunk by chunk with sends whose size the server probes before it
receives: MPI's own gather leaves the server's memory as it was where a rank sends less than it
announced, and that would be averaged. Everything that a client rank sends is inspected
(inspection.py) before it has any effect. Once keys are exchanged (keys.py), all that goes up is
sealed: each message of a rank, and each client's header and chunks by themselves.
"""

from __future__ import annotations

import json
from collections import deque
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np

from fedsp_mpi.tensors import Contract, Failure, NamedTensors, Update

from ..files.untrusted import JsonMapping, JsonObject
from .compression import byte_range
from .envelope import SEAL_BYTES, num_chunks
from .exchange import Exchange
from .guard import Refused, guard
from .incoming import IncomingUpdates
from .inspection import (
    MAX_JSON_BYTES,
    Expected,
    ProtocolError,
    collect_failures,
    open_json,
    read_headers,
    require_one_rank_each,
)
from .ledger import Direction, Ledger
from .messages import (
    BEFORE_ROUNDS,
    CHUNK_BYTES,
    DEADLINE_OF,
    DIRECTION_OF,
    HEADER_BYTES,
    MAX_RESULT_BYTES,
    NO_CALLS,
    CallStats,
    Handout,
    Header,
    JsonPhase,
    Kind,
    RoundBroadcast,
    accepted_reports,
    allocate_handout,
    broadcast_header,
    checked_results,
    chunk_slices,
    describe_handout,
    no_numbers,
    pack_results,
    payload,
    reason_bytes,
    require_handout,
    to_json,
)
from .rpc import Answer, RpcEndpoint
from .solo import Solo
from .topology import Topology
from .updates import Updates
from .waiting import Deadlines, wait

if TYPE_CHECKING:
    from mpi4py import MPI

    from .dialogue import Dialogue
    from .keys import Seals

_SERVER = 0  # rank
_CHUNKS_IN_FLIGHT = 4  # of one vector on its way down
# A rank's message may arrive while the server still waits for one of another kind.
_RESULTS_TAG = 1
# A tag for each phase: a rank may send the next phase's message before the server has read all of
# this one's. rpc.py has tags 3 and 4.
_JSON_TAGS: dict[JsonPhase, int] = {phase: tag for tag, phase in enumerate(DEADLINE_OF, 10)}
_CHUNK_TAG = 5
_MEETING_TAG = 6


class Wire:
    """One rank's end of the wire; `Solo` has the same interface in one process.

    Collective: all ranks create it together.

    Args:
        comm: communicator of all ranks.
        chunk_bytes: size of the chunks in which one vector travels; the server's choice counts from
            the hand-out on.
        deadlines: longest waits; default: for ever.
        server_plays: whether the server's rank hosts clients, too.

    Attributes:
        topology: rank, host and cores of this process.
        is_server: this rank aggregates.
        is_client: this rank hosts clients.
        deadlines: may be replaced at any time; each rank has its own.
        contract: what may travel; None before the hand-out.
    """

    def __init__(
        self,
        comm: MPI.Intracomm,
        chunk_bytes: int = CHUNK_BYTES,
        deadlines: Deadlines | None = None,
        *,
        server_plays: bool = False,
    ) -> None:
        from mpi4py import MPI

        self._mpi = MPI
        self.deadlines = deadlines or Deadlines()
        # Ranks arrive at different times, and the collectives that follow would spin until then.
        self._wait(comm.Ibarrier().Test, "start_up")
        self._comm = comm.Dup()
        self.topology = Topology.of(self._comm)
        self.is_server = self.topology.is_server
        self.is_client = server_plays or not self.topology.is_server
        self.contract: Contract | None = None
        self._chunk = max(1, chunk_bytes // 4)
        self._exchange: Exchange | None = None
        self._ledger = Ledger()
        self._open_updates: Updates | None = None
        self._rpc: RpcEndpoint | None = None
        self._seals: Seals | None = None  # from `exchange_keys` on
        self._sealed_chunk = np.empty(0, dtype=np.uint8)  # of this rank's clients, reused

    def among_first(self, num_ranks: int) -> Wire | Solo:
        """Return a wire between the first ranks alone, whose server's rank hosts clients, too.

        Collective among these ranks, which wait for each other as the server's ranks do. What
        travels there is in a ledger of its own.

        Args:
            num_ranks: how many, from rank 0 on.
        """
        if num_ranks == 1:
            return Solo(self._chunk * 4)
        all_ranks = self._comm.Get_group()
        first_ranks = all_ranks.Incl(range(num_ranks))
        comm = self._comm.Create_group(first_ranks)
        first_ranks.Free()
        all_ranks.Free()
        seconds = self.deadlines.server
        deadlines = Deadlines(**dict.fromkeys(Deadlines.__dataclass_fields__, seconds))
        wire = Wire(comm, self._chunk * 4, deadlines, server_plays=True)
        comm.Free()  # the wire has a duplicate
        return wire

    # The operations, in the order of a run.

    def collect(self, info: JsonMapping, phase: JsonPhase = "start-up") -> list[JsonObject] | None:
        """Gather a JSON-able mapping of every rank on the server.

        Args:
            info: this rank's mapping.
            phase: for the manifest and the deadline: "start-up", "silos", "declaration",
                "evaluation" or "checkpoint" at the end of a round, or "end".

        Returns:
            On the server the mappings by rank, as JSON represents them; None elsewhere.

        Raises:
            ProtocolError: on the server, if a rank's message cannot be read.
        """
        with self._operation(phase):
            content = to_json(info)
            if not self.is_server:
                header = Header(Kind.JSON, client=self.topology.rank, num_values=len(content))
                message = header.pack() + content
                if self._seals is not None:
                    message = self._seals.seal_json(message)
                # After a round the server reads messages only when its own work is done.
                limit = DEADLINE_OF[phase] if phase in BEFORE_ROUNDS else "broadcast"
                self._send_message(message, _JSON_TAGS[phase], limit)
                self._count_collected(phase, len(content))
                return None
            max_bytes = dict.fromkeys(range(self.topology.size), MAX_JSON_BYTES)
            messages = self._receive_messages(_JSON_TAGS[phase], DEADLINE_OF[phase], max_bytes)
            infos = [json.loads(content)]
            for rank, message in sorted(messages.items()):
                if self._seals is not None:
                    message = self._seals.open_json(rank, message)
                self._count_collected(phase, len(message) - HEADER_BYTES)
                infos.append(open_json(message, rank))
            return infos

    def exchange_keys(self) -> None:
        """Exchange and prove the keys of all ranks: what they send from now on is sealed.

        Collective.

        Raises:
            ProtocolError: a rank, or the server, has another key than it says.
        """
        from .keys import Seals  # which imports the library of ciphers

        with self._operation("introduction"):
            self._seals = Seals.agree_with_ranks(self)
            self._ledger.is_sealed = True
            self._seals.confirm_ranks(self)

    def exchange_client_keys(self, assignment: Sequence[Collection[int]]) -> None:
        """Exchange and prove a key for each client, by which its results are sealed.

        Collective, after the hand-out.

        Args:
            assignment: the ids of each rank's clients.

        Raises:
            ProtocolError: a rank has not the key that it has sent for a client.
        """
        with self._operation("introduction"):
            assert self._seals is not None, "the keys of the ranks come first"
            servers = self._sealed_contract().servers
            self._seals.introduce_clients(self, assignment, servers)
            if self._rpc is not None:
                self._rpc.seals = self._seals

    def open_dialogue(self) -> Dialogue:
        """Exchange the keys of two ranks, of which one asks, and return this rank's end.

        Collective.

        Raises:
            ProtocolError: a rank has another key than it says.
        """
        from .dialogue import Dialogue

        self.exchange_keys()
        assert self._seals is not None
        return Dialogue(self, self._seals)

    @property
    def fingerprints(self) -> JsonObject | None:
        """Cipher and fingerprints of all public keys; None where nothing is sealed."""
        return None if self._seals is None else self._seals.fingerprints

    def agree(self, verdict: Refused | None, phase: str = "start_up", note: Any = None) -> Any:
        """Broadcast the server's decision whether the run goes on; other ranks pass None.

        Args:
            verdict: why the run does not go on; None if it does.
            phase: names the deadline.
            note: any JSON value of the server.

        Returns:
            On every rank the server's note.

        Raises:
            Refused: on every rank, the server's verdict.
        """
        with self._operation("agree"):
            assert self.is_server or verdict is None, "the server decides"
            refusal = [str(verdict), verdict.exit_status] if verdict else None
            raw = self._broadcast_json(to_json([refusal, note]), phase)
            self._count_json(
                "start-up",
                "agree",
                "(verdict)",
                size=len(raw),
                num_receivers=self._num_receivers,
            )
            refusal, note = json.loads(raw)
            if refusal is not None:
                text, exit_status = refusal
                raise Refused(text, exit_status)
            return note

    def handout(self, handout: Handout | None) -> Handout:
        """Send the server's hand-out to all ranks, which fixes the contract; other ranks pass None.

        Raises:
            ValueError: more metrics than a header has room for.
            SealedTensorError: tensors in the memory of the global model.
        """
        with self._operation("handout"):
            assert (handout is not None) == self.is_server
            content = b""
            if handout is not None:
                require_handout(handout)
                content = to_json(describe_handout(handout, self._chunk))
            raw = self._broadcast_json(content, "handout")
            if handout is None:
                handout, self._chunk = allocate_handout(json.loads(raw))
            self._send_chunks(handout.tensors.flat, "handout")
            self.contract = handout.contract
            self._exchange = handout.exchange
            if self._exchange is not None:
                self._send_chunks(self._exchange.reference, "handout")
                self._chunk = self._exchange.chunk(self._chunk)
            self._ledger.num_chunks = num_chunks(self.contract.up.num_values, self._chunk)
            if self.contract.servers:
                self._rpc = RpcEndpoint(
                    self._comm, self._mpi, self.contract.servers, wait=self._wait
                )
            num_receivers = self._num_receivers
            self._count_json(
                "handout", "handout", "(meta)", size=len(raw), num_receivers=num_receivers
            )
            self._ledger.add_tensors(
                "handout",
                "handout",
                handout.tensors.schema,
                messages=num_receivers,
                crossed=num_receivers,
            )
            if self._exchange is not None:
                self._ledger.add_tensors(
                    "handout",
                    "reference",
                    self.contract.down,
                    messages=num_receivers,
                    crossed=num_receivers,
                )
            return handout

    def broadcast(self, down: RoundBroadcast | None, evaluated_by: int = 0) -> RoundBroadcast:
        """Send the server's broadcast of a round to all ranks; other ranks pass None.

        Args:
            down: what a round begins with, or what its end has brought.
            evaluated_by: number of clients that judge it on their own text; 0: a round begins.

        Returns:
            What clients get: of a compressed exchange, on the server too, what they make of it. All
            values are nan where no change can be sent because they are not finite: clients fail at
            them as they would without compression.

        Raises:
            ValueError: the tensors are not those of the contract.
            SealedTensorError: tensors in the memory of the global model.
        """
        with self._operation("broadcast", None if down is None else down.round):
            assert (down is not None) == self.is_server
            contract = self._sealed_contract()
            header = None
            if down is not None:
                header = broadcast_header(down, contract, self._exchange)
            header = self._broadcast_header(header, "broadcast")
            if header.kind is Kind.STOP:
                self._ledger.add_headers(
                    "down", "broadcast", messages=0, crossed=self._num_receivers
                )
                return down or RoundBroadcast(header.round, stop=True)
            if down is None:
                header.require(Kind.BROADCAST, "the server")
                assert header.digest == contract.down.digest, "the server sent another schema"
            tensors = None if down is None else down.tensors
            if not header.num_values:
                tensors = no_numbers(contract.down)
            elif self._exchange is not None:
                tensors = self._send_changes(tensors, self._exchange, is_start=not evaluated_by)
            else:
                if tensors is None:
                    memory = np.empty(header.num_values, dtype=np.float32)
                    tensors = NamedTensors(contract.down, memory)
                self._send_chunks(tensors.flat, "broadcast")
            if self.is_server and self.is_client:
                tensors = tensors.copy()  # clients cannot write into the server's memory
            down = RoundBroadcast(header.round, tensors=tensors)
            self._ledger.add_broadcasts(
                contract,
                messages=evaluated_by,
                crossed=self._num_receivers,
                phase="evaluation" if evaluated_by else "broadcast",
            )
            return down

    def call(self, client: int, values: np.ndarray) -> np.ndarray:
        """Send a client's fp32 values [num_values] to the server and return its response.

        While the server's ranks `serve`, on client ranks. Returns fp32 values [any number].
        """
        assert self._rpc is not None, "the contract says whether clients may call"
        return self._rpc.call(client, values)

    def serve(self, answer: Answer) -> None:
        """Respond to the calls of clients that hold no model, until all of them have been trained.

        The server's ranks call it while the clients train; it returns at once if the contract
        allows no calls. `answer` computes the response to a request.
        """
        with self._operation("local training"):
            if self._rpc is not None:
                self._rpc.serve(answer)

    def gather(
        self,
        round: int,
        results: Sequence[Update | Failure],
        expected: Expected | None = None,
    ) -> Updates | None:
        """Gather the results of all clients on the server.

        An update that cannot be averaged is sent as a Failure. If one arrives all the same, or a
        client is silent, or a chunk has another length, the server makes a Failure of it. Updates
        must not share memory with each other.

        Args:
            round: number of the round.
            results: results of this rank's clients; none on a server that hosts none.
            expected: on the server, the clients that take part; without it nothing is known about
                who is missing.

        Returns:
            On the server the updates; None elsewhere.

        Raises:
            ValueError: on a client rank, if a result differs from the contract.
            ProtocolError: on the server, if a result differs so that it cannot know what the rank
                sends next.
            SealedTensorError: tensors in the memory of the global model.
        """
        with self._operation("gather", round):
            contract = self._sealed_contract()
            results = checked_results(results, contract, round)
            if self.is_server:
                assert self.is_client or not results, "the server has no clients"
                return self._receive_updates(round, contract, expected, own_results=results)
            calls = self._rpc.close() if self._rpc is not None else {}
            self._send_updates(round, contract, results, calls=calls)
            return None

    def meet_as_server(self, num_ranks: int) -> None:
        """Have the server's other ranks wait here for the first one, which waits for clients.

        They wait as long as clients may wait for the next round; what the server's ranks do
        together afterwards has a deadline that is too short for that.

        Args:
            num_ranks: of the server, from rank 0 on; they alone call this.
        """
        if num_ranks == 1:
            return
        with self._operation("gather"):
            nothing = [bytearray(), self._mpi.BYTE]
            if self.is_server:
                sends = [
                    self._comm.Isend(nothing, rank, _MEETING_TAG) for rank in range(1, num_ranks)
                ]
                self._wait(lambda: self._mpi.Request.Testall(sends), "gather", limit="server")
            else:
                receive = self._comm.Irecv(nothing, _SERVER, _MEETING_TAG)
                self._wait(receive.Test, "gather", limit="broadcast", missing=lambda: (_SERVER,))

    def finish(self) -> None:
        """Wait, without spinning, until every rank is done: MPI_Finalize would spin."""
        with self._operation("finish"):
            self._wait(self._comm.Ibarrier().Test, "finish")
        if self._seals is not None:
            self._seals.close()

    @property
    def manifest(self) -> list[JsonObject]:
        """Everything that travelled so far, as this rank saw it: `ledger.Entry` as dicts."""
        return self._ledger.manifest()

    def round_bytes(self) -> dict[str, dict[int, int]]:
        """Return logical bytes of the last round: {"down": {client: bytes}, "up": ...}.

        Every client counts as receiving the broadcast once a round, even where its rank hosts
        several: 4 bytes a value and a header.
        """
        return self._ledger.round_bytes()

    def evaluation_bytes(self) -> int:
        """Return logical bytes of the last broadcast that was evaluated: once for each client."""
        return self._ledger.evaluation_bytes

    # Up: one message with all headers of a rank, then the chunks of its updates.

    def _send_updates(
        self,
        round: int,
        contract: Contract,
        results: Sequence[Update | Failure],
        *,
        calls: Mapping[int, CallStats],
    ) -> None:
        """Send the results of this rank's clients, in the order of `results`."""
        headers = [
            Header.of(result, round, calls.get(result.client, NO_CALLS)) for result in results
        ]
        self._send_message(self._pack(headers, contract, round), _RESULTS_TAG, "gather")
        updates = [result for result in results if isinstance(result, Update)]
        payloads = {update.client: payload(update, self._exchange) for update in updates}
        if payloads:
            for part in chunk_slices(contract.up.num_values, self._chunk):
                where = part if self._exchange is None else byte_range(part, contract.compression)
                self._send_chunk(payloads, where, round)
        self._ledger.add_round(
            contract,
            [update.client for update in updates],
            reason_bytes(headers),
            calls=calls,
            crossed=True,
        )

    def _pack(self, headers: Sequence[Header], contract: Contract, round: int) -> bytes:
        """Return the message of this rank's headers, each sealed by itself if they are."""
        if self._seals is None:
            return pack_results(headers, contract.metrics)
        return b"".join(
            self._seals.seal_result(header.client, pack_results([header], contract.metrics), round)
            for header in headers
        )

    def _send_chunk(self, payloads: Mapping[int, np.ndarray], part: slice, round: int) -> None:
        """Send one slice of all this rank's updates, by client, one after the other."""
        chunks = {client: vector[part] for client, vector in payloads.items()}
        if self._seals is not None:
            chunk = self._seal_chunk(chunks, round)
        elif len(chunks) == 1:
            [chunk] = chunks.values()  # a view: no copy
        else:
            chunk = np.concatenate(list(chunks.values()))
        kind = self._mpi.FLOAT if chunk.dtype == np.float32 else self._mpi.BYTE
        request = self._comm.Isend([chunk, kind], dest=_SERVER, tag=_CHUNK_TAG)
        # The server receives while it aggregates, or after its own training: the deadline is that
        # of its work, and the payload may not be moving before the first chunk has been received.
        self._wait(
            request.Test,
            "gather",
            limit="broadcast",
            moving=part.start > 0,
            missing=lambda: (_SERVER,),
        )

    def _seal_chunk(self, chunks: Mapping[int, np.ndarray], round: int) -> np.ndarray:
        """Seal a chunk of each client, fp32 or uint8 [num_values], into the message to be sent."""
        assert self._seals is not None
        num_bytes = sum(values.nbytes + SEAL_BYTES for values in chunks.values())
        if self._sealed_chunk.size < num_bytes:
            self._sealed_chunk = np.empty(num_bytes, dtype=np.uint8)
        begin = 0
        for client, values in chunks.items():
            end = begin + values.nbytes + SEAL_BYTES
            self._seals.seal_values(client, self._sealed_chunk[begin:end], values, round=round)
            begin = end
        return self._sealed_chunk[:num_bytes]

    def _receive_updates(
        self,
        round: int,
        contract: Contract,
        expected: Expected | None,
        *,
        own_results: Sequence[Update | Failure],
    ) -> Updates:
        """Receive all results on the server; the chunks behind the first are left for later.

        Results of the server's own clients are inspected like all others.
        """
        size = self.topology.size
        max_bytes = None
        if expected is not None:
            result_bytes = MAX_RESULT_BYTES + (0 if self._seals is None else SEAL_BYTES)
            max_bytes = {rank: result_bytes * len(expected.of_rank(rank)) for rank in range(size)}
        messages = self._receive_messages(_RESULTS_TAG, "gather", max_bytes)
        if own_results:
            assert self._seals is None and self._exchange is None, "what stays here is plain"
            own_headers = [Header.of(result, round) for result in own_results]
            messages[_SERVER] = pack_results(own_headers, contract.metrics)
        headers: list[Header] = []
        senders: list[list[int]] = [[] for _ in range(size)]
        for rank, message in sorted(messages.items()):
            if self._seals is not None:
                message = self._seals.open_results(message, rank, round=round, expected=expected)
            rank_headers = read_headers(message, rank, contract, round=round, expected=expected)
            headers += rank_headers
            senders[rank] = [header.client for header in rank_headers if header.kind is Kind.UPDATE]
        require_one_rank_each(senders)

        failures = {
            failure.client: failure
            for failure in collect_failures(headers, contract, round=round, expected=expected)
        }
        own_updates = [result for result in own_results if isinstance(result, Update)]
        incoming = IncomingUpdates(
            partial(self._receive_chunks, own_chunks=self._cut(own_updates, contract)),
            senders,
            contract.up.num_values,
            chunk=self._chunk,
            round=round,
            exchange=self._exchange,
            seals=self._seals,
        )
        for client, reason in incoming.receive_first().items():
            failures.setdefault(client, Failure(client, round, "check", reason))
        reports = accepted_reports(headers, failures)
        self._ledger.add_round(
            contract,
            sorted(client for clients in senders for client in clients),
            reason_bytes(headers),
            calls={header.client: header.calls for header in headers if header.calls.num_calls},
            crossed=True,
        )
        self._open_updates = Updates(
            reports,
            sorted(failures.values(), key=lambda failure: failure.client),
            contract.up,
            source=incoming.columns({report.client for report in reports}),
        )
        return self._open_updates

    def _cut(self, updates: Sequence[Update], contract: Contract) -> Iterator[np.ndarray]:
        """Yield the chunks of the server's own clients, fp32 [num_updates, num_values of it]."""
        for part in chunk_slices(contract.up.num_values, self._chunk):
            yield np.stack([update.tensors.flat[part] for update in updates])

    def _receive_chunks(
        self, targets: Mapping[int, np.ndarray], own_chunks: Iterator[np.ndarray]
    ) -> dict[int, int]:
        """Receive the next chunk of each rank into its contiguous memory, fp32 or uint8.

        Args:
            targets: memory by rank.
            own_chunks: of the server's own clients.

        Returns:
            The number of bytes that a rank sent, for ranks that sent another number than their
            memory holds; their chunk is dropped.
        """
        if _SERVER in targets:
            targets[_SERVER][...] = next(own_chunks)
        receiving: dict[int, MPI.Request] = {}
        wrong_sizes: dict[int, int] = {}
        waiting_for = set(targets) - {_SERVER}
        status = self._mpi.Status()

        def poll() -> bool:
            for rank in list(waiting_for):
                if rank not in receiving:
                    message = self._comm.Improbe(rank, _CHUNK_TAG, status)
                    if message is None:
                        continue
                    num_bytes = status.Get_count(self._mpi.BYTE)
                    target = targets[rank]
                    if num_bytes != target.nbytes:
                        wrong_sizes[rank] = num_bytes
                        target = np.empty(num_bytes, dtype=np.uint8)
                    receiving[rank] = message.Irecv([target, self._mpi.BYTE])
                if receiving[rank].Test():
                    waiting_for.discard(rank)
            return not waiting_for

        self._wait(poll, "gather", moving=True, missing=lambda: waiting_for)
        return wrong_sizes

    def _send_message(self, message: bytes, tag: int, phase: str) -> None:
        """Send a message of any length to the server."""
        request = self._comm.Isend([message, self._mpi.BYTE], dest=_SERVER, tag=tag)
        self._wait(request.Test, phase, missing=lambda: (_SERVER,))

    def _receive_messages(
        self, tag: int, phase: str, max_bytes: Mapping[int, int] | None = None
    ) -> dict[int, bytes]:
        """Receive one message of every other rank.

        Args:
            tag: kind of the messages.
            phase: for the deadline.
            max_bytes: longest message that is received, by rank; None: of any length.

        Returns:
            The messages by rank, in no particular order.

        Raises:
            ProtocolError: a rank sends two messages, or one that is too long.
        """
        receiving: dict[int, tuple[MPI.Request, bytearray]] = {}
        messages: dict[int, bytes] = {}
        missing = set(range(self.topology.size)) - {_SERVER}
        status = self._mpi.Status()

        def poll() -> bool:
            while True:
                arrived = self._comm.Improbe(self._mpi.ANY_SOURCE, tag, status)
                if arrived is None:
                    break
                rank = status.source
                num_bytes = status.Get_count(self._mpi.BYTE)
                if rank in messages or rank in receiving:
                    raise ProtocolError(
                        f"rank {rank}: found a second message in {phase}, expected one"
                    )
                if max_bytes is not None and num_bytes > max_bytes[rank]:
                    raise ProtocolError(
                        f"rank {rank}: found a message of {num_bytes} bytes in {phase}, expected "
                        f"at most {max_bytes[rank]}"
                    )
                buffer = bytearray(num_bytes)
                receiving[rank] = (arrived.Irecv([buffer, self._mpi.BYTE]), buffer)
            for rank, (request, buffer) in list(receiving.items()):
                if request.Test():
                    messages[rank] = bytes(buffer)
                    del receiving[rank]
                    missing.discard(rank)
            return not missing

        self._wait(poll, phase, missing=lambda: missing)
        return messages

    # Down: a header, then what it announces.

    def _broadcast_header(self, header: Header | None, phase: str) -> Header:
        """Broadcast the server's header; other ranks pass None."""
        raw = bytearray(HEADER_BYTES) if header is None else bytearray(header.pack())
        request = self._comm.Ibcast([raw, self._mpi.BYTE], root=_SERVER)
        self._wait(request.Test, phase, missing=lambda: () if self.is_server else (_SERVER,))
        return header or Header.unpack(bytes(raw), "the server")

    def _broadcast_json(self, content: bytes, phase: str) -> bytes:
        """Broadcast the server's bytes; those of other ranks are not used."""
        header = Header(Kind.JSON, num_values=len(content)) if self.is_server else None
        header = self._broadcast_header(header, phase).require(Kind.JSON, "the server")
        raw = bytearray(content) if self.is_server else bytearray(header.num_values)
        request = self._comm.Ibcast([raw, self._mpi.BYTE], root=_SERVER)
        self._wait(request.Test, phase)
        return bytes(raw)

    def _send_chunks(self, flat: np.ndarray, phase: str) -> None:
        """Broadcast the server's fp32 vector [num_values] into that of all ranks, in chunks."""
        in_flight: deque[MPI.Request] = deque()
        for part in chunk_slices(flat.size, self._chunk):
            in_flight.append(self._comm.Ibcast([flat[part], self._mpi.FLOAT], root=_SERVER))
            if len(in_flight) == _CHUNKS_IN_FLIGHT:
                self._wait(in_flight.popleft().Test, phase, moving=True)
        for request in in_flight:
            self._wait(request.Test, phase, moving=True)

    def _send_changes(
        self, tensors: NamedTensors | None, exchange: Exchange, *, is_start: bool
    ) -> NamedTensors:
        """Broadcast the change of the server's tensors against what all ranks hold, in chunks.

        Args:
            tensors: the server's; other ranks pass None.
            exchange: this rank's.
            is_start: whether a round begins.

        Returns:
            What all ranks hold now; on client ranks a copy, which clients may write to.
        """
        contract = self._sealed_contract()
        in_flight: deque[tuple[MPI.Request, slice, np.ndarray]] = deque()

        def complete() -> None:
            request, part, packed = in_flight.popleft()
            self._wait(request.Test, "broadcast", moving=True)
            if tensors is None:
                exchange.decode_broadcast(packed, part)

        for part in chunk_slices(contract.down.num_values, self._chunk):
            if tensors is not None:
                packed = exchange.encode_broadcast(tensors.flat[part], part, is_start=is_start)
            else:
                packed = np.empty(exchange.num_bytes(part), dtype=np.uint8)
            request = self._comm.Ibcast([packed, self._mpi.BYTE], root=_SERVER)
            in_flight.append((request, part, packed))
            if len(in_flight) == _CHUNKS_IN_FLIGHT:
                complete()
        while in_flight:
            complete()
        held = NamedTensors(contract.down, exchange.reference)
        return held if self.is_server else held.copy()

    # Helpers of both sides.

    @contextmanager
    def _operation(self, name: str, round: int | None = None) -> Iterator[None]:
        """Name the phase for the guard; receive first what remains of the last gather."""
        with guard.phase(name, round=round):
            if self._open_updates is not None:
                self._open_updates.drain()
                self._open_updates = None
            yield

    def _wait(
        self,
        is_done: Callable[[], bool],
        phase: str,
        *,
        limit: str = "",
        moving: bool = False,
        missing: Callable[[], Collection[int]] = tuple,
    ) -> None:
        """Wait with the deadline of `phase`, or of another phase named by `limit`."""
        deadline = getattr(self.deadlines, limit or phase)
        wait(is_done, phase, deadline, moving=moving, missing=missing)

    def _sealed_contract(self) -> Contract:
        assert self.contract is not None, "the hand-out comes first"
        return self.contract

    @property
    def _num_receivers(self) -> int:
        """Number of ranks, as this rank sees it, that receive what the server sends to all."""
        return self.topology.size - 1 if self.is_server else 1

    def _count_json(
        self, direction: Direction, phase: str, name: str, *, size: int, num_receivers: int
    ) -> None:
        """Add a header and `size` bytes for each receiver to the ledger."""
        self._ledger.add_headers(direction, phase, messages=num_receivers, crossed=num_receivers)
        self._ledger.add_bytes(
            direction, phase, name, size=size, messages=num_receivers, crossed=num_receivers
        )

    def _count_collected(self, phase: JsonPhase, size: int) -> None:
        """Add a rank's JSON message of `size` bytes to the ledger."""
        direction = DIRECTION_OF[phase]
        self._count_json(direction, phase, "(json)", size=size, num_receivers=1)
        if self._seals is not None:
            self._ledger.add_seals(direction, phase, num_seals=1, messages=1, crossed=1)

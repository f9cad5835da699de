"""The interface of `Wire` in one process, which is the server and every client in turn.

For notebooks, tests and single machines.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np

from fedsp_mpi.tensors import Contract, Failure, NamedTensors, Update, seal

from ..files.untrusted import JsonMapping, JsonObject
from .envelope import SEAL_BYTES, num_chunks
from .exchange import Exchange
from .guard import Refused, guard
from .inspection import Expected, collect_failures, read_headers
from .ledger import Ledger
from .messages import (
    CHUNK_BYTES,
    NO_CALLS,
    CallStats,
    Handout,
    Header,
    JsonPhase,
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
    unpack_results,
)
from .rpc import Answer
from .topology import Topology
from .updates import Columns, Updates
from .waiting import Deadlines

if TYPE_CHECKING:
    from .keys import Seals


class Solo:
    """The operations of `Wire`, with the same checks, chunks and logical bytes; nothing crosses.

    The hand-out and the broadcasts are copied, so that clients cannot write into the server's
    memory. Where keys are exchanged, results and requests are sealed, and opened again.

    Args:
        chunk_bytes: size of the chunks in which updates are read.
        deadlines: kept for the sake of the same interface: there is no rank to wait for.

    Attributes:
        topology: rank, host and cores of this process.
        is_server: True.
        is_client: True.
        deadlines: not used.
        contract: what may travel; None before the hand-out.
    """

    is_server = True
    is_client = True

    def __init__(self, chunk_bytes: int = CHUNK_BYTES, deadlines: Deadlines | None = None) -> None:
        self.topology = Topology.alone()
        self.deadlines = deadlines or Deadlines()
        self.contract: Contract | None = None
        self._chunk = max(1, chunk_bytes // 4)
        self._exchange: Exchange | None = None
        self._ledger = Ledger()
        self._answer: Answer | None = None
        self._calls: dict[int, CallStats] = {}
        self._seals: Seals | None = None

    def among_first(self, num_ranks: int) -> Solo:
        """Return another wire of this process; see `Wire.among_first`."""
        assert num_ranks == 1, "there is one process"
        return Solo(self._chunk * 4)

    # The operations, in the order of a run.

    def collect(self, info: JsonMapping, phase: JsonPhase = "start-up") -> list[JsonObject]:
        """Return a list with this process's mapping alone, as JSON represents it."""
        return [json.loads(to_json(info))]

    def agree(self, verdict: Refused | None, phase: str = "start_up", note: Any = None) -> Any:
        """Return the note, or raise the verdict if there is one.

        Args:
            verdict: why the run does not go on; None if it does.
            phase: not used.
            note: any JSON value.

        Raises:
            Refused: the verdict.
        """
        if verdict is not None:
            raise verdict
        return note

    def exchange_keys(self) -> None:
        """Make the keys of this rank; see `Wire.exchange_keys`."""
        from .keys import Seals  # which imports the library of ciphers

        with guard.phase("introduction"):
            self._seals = Seals.agree_with_ranks(self)
            self._ledger.is_sealed = True

    def exchange_client_keys(self, assignment: Sequence[Collection[int]]) -> None:
        """Make a key for each client; see `Wire.exchange_client_keys`.

        Args:
            assignment: the ids of the clients, in a list of one.
        """
        with guard.phase("introduction"):
            assert self._seals is not None, "the keys of the ranks come first"
            servers = self._sealed_contract().servers
            self._seals.introduce_clients(self, assignment, servers)

    @property
    def fingerprints(self) -> JsonObject | None:
        """Cipher and fingerprints of all public keys; None where nothing is sealed."""
        return None if self._seals is None else self._seals.fingerprints

    def handout(self, handout: Handout | None) -> Handout:
        """Return a copy of the hand-out, as a client would receive it; it fixes the contract.

        Raises:
            ValueError: more metrics than a header has room for.
            SealedTensorError: tensors in the memory of the global model.
        """
        with guard.phase("handout"):
            assert handout is not None, "one process is the server too"
            require_handout(handout)
            raw = to_json(describe_handout(handout, self._chunk))
            received, _ = allocate_handout(json.loads(raw))
            received.tensors.flat[:] = handout.tensors.flat
            self.contract = received.contract
            self._exchange = handout.exchange
            if self._exchange is not None:
                self._chunk = self._exchange.chunk(self._chunk)
            self._ledger.num_chunks = num_chunks(self.contract.up.num_values, self._chunk)
            self._ledger.add_headers("handout", "handout", messages=1, crossed=0)
            self._ledger.add_bytes(
                "handout", "handout", "(meta)", size=len(raw), messages=1, crossed=0
            )
            self._ledger.add_tensors(
                "handout", "handout", received.tensors.schema, messages=1, crossed=0
            )
            if self._exchange is not None:
                self._ledger.add_tensors(
                    "handout", "reference", received.contract.down, messages=1, crossed=0
                )
            return replace(received, exchange=self._exchange)

    def broadcast(self, down: RoundBroadcast | None, evaluated_by: int = 0) -> RoundBroadcast:
        """Return a copy of the broadcast.

        Args:
            down: as in `Wire.broadcast`.
            evaluated_by: as in `Wire.broadcast`.

        Raises:
            ValueError: the tensors are not those of the contract.
            SealedTensorError: tensors in the memory of the global model.
        """
        assert down is not None, "one process is the server too"
        with guard.phase("broadcast", round=down.round):
            header = broadcast_header(down, self._sealed_contract(), self._exchange)
            if down.tensors is None or down.stop:
                return down
            if evaluated_by:
                self._ledger.add_broadcasts(
                    self._sealed_contract(), messages=evaluated_by, crossed=0, phase="evaluation"
                )
            tensors = down.tensors
            if not header.num_values:
                return RoundBroadcast(down.round, tensors=no_numbers(tensors.schema))
            if self._exchange is not None:
                for part in chunk_slices(tensors.flat.size, self._chunk):
                    self._exchange.encode_broadcast(
                        tensors.flat[part], part, is_start=not evaluated_by
                    )
                tensors = NamedTensors(tensors.schema, self._exchange.reference)
            return RoundBroadcast(down.round, tensors=tensors.copy())

    def call(self, client: int, values: np.ndarray) -> np.ndarray:
        """Return the server's response to a client's fp32 values [num_values].

        After `serve`. Returns fp32 values [any number].

        Raises:
            SealedTensorError: the response is in the memory of the global model.
        """
        assert self._sealed_contract().servers, "the contract says whether clients may call"
        assert self._answer is not None, "the server serves before clients call"
        if self._seals is not None:
            sealed = self._seals.seal_request(client, values)
            values = self._seals.open_request(client, self.topology.rank, sealed=sealed)
        response = self._answer(values)
        seal.check_array(response)
        stats = self._calls.get(client, NO_CALLS)
        is_sealed = self._seals is not None
        self._calls[client] = stats.add_call(values.size, response.size, is_sealed=is_sealed)
        return response

    def serve(self, answer: Answer) -> None:
        """Let `answer` compute the responses to calls of clients that hold no model."""
        self._answer = answer

    def gather(
        self,
        round: int,
        results: Sequence[Update | Failure],
        expected: Expected | None = None,
    ) -> Updates:
        """Return the results of all clients, inspected as `Wire` does.

        Args:
            round: number of the round.
            results: results of the clients.
            expected: the clients that take part; without it nothing is known about who is missing.

        Raises:
            ValueError: a result differs from the contract.
            SealedTensorError: tensors in the memory of the global model.
        """
        with guard.phase("gather", round=round):
            contract = self._sealed_contract()
            results = checked_results(results, contract, round)
            calls = self._calls
            self._calls = {}
            return self._receive_updates(round, contract, results, calls=calls, expected=expected)

    def meet_as_server(self, num_ranks: int) -> None:
        """Do nothing: this process is all of the server; see `Wire.meet_as_server`."""

    def finish(self) -> None:
        """Drop the keys: there is no rank to wait for."""
        if self._seals is not None:
            self._seals.close()

    @property
    def manifest(self) -> list[JsonObject]:
        """Everything that would have travelled so far: `ledger.Entry` as dicts."""
        return self._ledger.manifest()

    def round_bytes(self) -> dict[str, dict[int, int]]:
        """Return logical bytes of the last round: {"down": {client: bytes}, "up": ...}."""
        return self._ledger.round_bytes()

    def evaluation_bytes(self) -> int:
        """Return logical bytes of the last broadcast that was evaluated: once for each client."""
        return self._ledger.evaluation_bytes

    def _receive_updates(
        self,
        round: int,
        contract: Contract,
        results: Sequence[Update | Failure],
        *,
        calls: Mapping[int, CallStats],
        expected: Expected | None,
    ) -> Updates:
        # Packed and unpacked, so that a failure's text is truncated here as it is on the wire.
        packed = pack_results(
            [Header.of(result, round, calls.get(result.client, NO_CALLS)) for result in results],
            contract.metrics,
        )
        if self._seals is not None:
            packed = self._through_seals(packed, contract, round=round, expected=expected)
        headers = read_headers(packed, 0, contract, round=round, expected=expected)
        updates = [result for result in results if isinstance(result, Update)]
        failures = collect_failures(headers, contract, round=round, expected=expected)
        reports = accepted_reports(headers, {failure.client for failure in failures})
        self._ledger.add_round(
            contract,
            [update.client for update in updates],
            reason_bytes(headers),
            calls=calls,
            crossed=False,
        )
        accepted = {report.client for report in reports}
        payloads = {
            update.client: payload(update, self._exchange)
            for update in updates
            if update.client in accepted
        }
        source = self._columns(payloads, contract.up.num_values, round)
        return Updates(reports, failures, contract.up, source=source)

    def _through_seals(
        self, packed: bytes, contract: Contract, *, round: int, expected: Expected | None
    ) -> bytes:
        """Seal the headers of all clients, and return them as the server opens them."""
        assert self._seals is not None
        headers = unpack_results(packed, "this process", contract.metrics)
        message = b"".join(
            self._seals.seal_result(header.client, pack_results([header], contract.metrics), round)
            for header in headers
        )
        return self._seals.open_results(message, 0, round=round, expected=expected)

    def _columns(
        self, payloads: Mapping[int, np.ndarray], num_values: int, round: int
    ) -> Iterator[Columns]:
        """Yield the chunks of what updates travel as, [num_values or num_bytes] by client.

        As matrices in memory that is reused.
        """
        num_rows = len(payloads)
        memory = np.empty(num_rows * min(self._chunk, num_values), dtype=np.float32)
        for part in chunk_slices(num_values, self._chunk):
            width = part.stop - part.start
            matrix = memory[: num_rows * width].reshape(num_rows, width)
            for row, (client, vector) in zip(matrix, payloads.items()):
                chunk = vector[part]
                if self._exchange is not None:
                    chunk = self._exchange.cut(vector, part)
                if self._seals is not None:
                    chunk = self._opened(client, chunk, round)
                row[:] = chunk if self._exchange is None else self._exchange.decode(chunk, part)
            yield part, matrix

    def _opened(self, client: int, chunk: np.ndarray, round: int) -> np.ndarray:
        """Seal a chunk, fp32 or uint8 [num_values], and return it as the server opens it."""
        assert self._seals is not None
        sealed = np.empty(chunk.nbytes + SEAL_BYTES, dtype=np.uint8)
        self._seals.seal_values(client, sealed, chunk, round=round)
        opened = np.empty_like(chunk)
        self._seals.open_values(client, opened, sealed, round=round)
        return opened

    def _sealed_contract(self) -> Contract:
        assert self.contract is not None, "the hand-out comes first"
        return self.contract

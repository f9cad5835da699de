"""The wire's interface in one process, which is the server and every client in turn: notebooks,
tests, one machine.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import numpy as np

from fedsp_mpi.tensors import Contract, Failure, Update, seal

from .guard import Refused, guard
from .inspection import Expected, failures_of, read_headers
from .ledger import Ledger
from .messages import (
    CHUNK_BYTES,
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
from .rpc import Answer
from .topology import Topology
from .updates import Columns, Updates
from .waiting import Deadlines


class Solo:
    """Same operations as `Wire`, same checks, same pieces, same logical bytes in the books; nothing
    crosses.

    What is handed out or broadcast is a copy, so that clients cannot write into the server's
    memory. `deadlines` are kept for the sake of the same interface: there is nobody to wait for.
    """

    is_server = True
    is_client = True

    def __init__(self, chunk_bytes: int = CHUNK_BYTES, deadlines: Deadlines | None = None) -> None:
        self.topology = Topology.alone()
        self.deadlines = deadlines or Deadlines()
        self.contract: Contract | None = None
        self._chunk = max(1, chunk_bytes // 4)
        self._ledger = Ledger()
        self._answer: Answer | None = None
        self._asked: dict[int, CallStats] = {}

    def collect(
        self, info: Mapping[str, Any], phase: JsonPhase = "start-up"
    ) -> list[dict[str, Any]]:
        """The list with this process's own dict, as JSON says it."""
        return [json.loads(to_json(info))]

    def agree(self, verdict: Refused | None, phase: str = "start_up", note: Any = None) -> Any:
        """Raise the verdict if there is one; otherwise the note."""
        if verdict is not None:
            raise verdict
        return note

    def handout(self, handout: Handout | None) -> Handout:
        """A copy of the hand-out, as a client would get it. Seals the contract.

        Raises:
            ValueError: more metrics than a header has room for.
            SealedTensorError: tensors in the memory of the global model.
        """
        with guard.phase("handout"):
            assert handout is not None, "one process is the server too"
            require_handout(handout)
            raw = to_json(handout_content(handout, self._chunk))
            given, _ = handout_from(json.loads(raw))
            given.tensors.flat[:] = handout.tensors.flat
            self._ledger.header("handout", "handout", 1, 0)
            self._ledger.raw("handout", "handout", "(meta)", len(raw), 1, 0)
            self._ledger.tensors("handout", "handout", given.tensors.schema, 1, 0)
            self.contract = given.contract
            return given

    def broadcast(self, down: RoundBroadcast | None) -> RoundBroadcast:
        """A copy of the broadcast.

        Raises:
            ValueError: the tensors are not those of the contract.
            SealedTensorError: tensors in the memory of the global model.
        """
        assert down is not None, "one process is the server too"
        with guard.phase("broadcast", round=down.round):
            down_header(down, self._sealed())
            return (
                down
                if down.stop or down.tensors is None
                else RoundBroadcast(down.round, tensors=down.tensors.copy())
            )

    def ask(self, client: int, values: np.ndarray) -> np.ndarray:
        """What the server answers to a client's fp32 values, while `outgoing` of a `gather` is
        read.
        """
        assert self._sealed().servers and self._answer is not None, (
            "the contract says whether clients may ask"
        )
        found = self._answer(values)
        seal.check_array(found)
        self._asked[client] = self._asked.get(client, NO_CALLS).one_more(values.size, found.size)
        return found

    def gather(
        self,
        round: int,
        outgoing: Iterable[Update | Failure],
        answer: Answer | None = None,
        expected: Expected | None = None,
    ) -> Updates:
        """All clients' answers; `outgoing` may do the local work while it is read, and ask for what
        `answer` makes.

        Raises:
            ValueError: an answer is not what the contract says.
            SealedTensorError: tensors in the memory of the global model.
        """
        with guard.phase("gather", round=round):
            contract = self._sealed()
            self._answer, self._asked = answer, {}
            items = sorted(
                (checked(item, contract, round) for item in outgoing), key=lambda item: item.client
            )
            # Through bytes and back, so that what comes of a failure's text here is what comes of
            # it on the wire.
            asked = self._asked
            packed = [Header.of(item, round, asked.get(item.client, NO_CALLS)) for item in items]
            headers = read_headers(
                pack_answers(packed, contract.metrics), 0, contract, round, expected
            )
            failures = failures_of(headers, contract, round, expected)
            reports = reports_of(headers, {failure.client for failure in failures})
            sent = [item.client for item in items if isinstance(item, Update)]
            told = {
                header.client: header.num_values
                for header in headers
                if header.kind is Kind.FAILURE
            }
            self._ledger.answers(contract, sent, told, False, asked)
            accepted = {report.client for report in reports}
            flats = [
                item.tensors.flat
                for item in items
                if isinstance(item, Update) and item.client in accepted
            ]
            return Updates(
                reports, failures, contract.up, self._columns(flats, contract.up.num_values)
            )

    def finish(self) -> None:
        """Nothing to wait for."""

    @property
    def manifest(self) -> list[dict[str, Any]]:
        """Everything that would have travelled so far: the entries of `ledger.Entry`, JSON-able."""
        return self._ledger.manifest()

    def round_bytes(self) -> dict[str, dict[int, int]]:
        """Logical bytes of the last round by client, {"down": {client: bytes}, "up": {client:
        bytes}}.
        """
        return self._ledger.round_bytes()

    def _sealed(self) -> Contract:
        assert self.contract is not None, "the hand-out comes first"
        return self.contract

    def _columns(self, flats: list[np.ndarray], num_values: int) -> Iterator[Columns]:
        room = np.empty(len(flats) * min(self._chunk, num_values), dtype=np.float32)
        for part in slices(num_values, self._chunk):
            width = part.stop - part.start
            matrix = room[: len(flats) * width].reshape(len(flats), width)
            for row, flat in zip(matrix, flats):
                row[:] = flat[part]
            yield part, matrix

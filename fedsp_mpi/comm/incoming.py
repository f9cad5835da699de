"""Updates on their way to the server: a piece of each at a time, inspected before anybody sees it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence

import numpy as np

from .inspection import ProtocolError, describe, impossible_rows
from .messages import slices
from .updates import Columns, reorder

Receive = Callable[[Mapping[int, np.ndarray]], dict[int, int]]


class Incoming:
    """The updates of a round on their way: a piece of each at a time, in memory that is reused.

    Args:
        receive: fills each rank's memory with its next piece, and returns the number of bytes that
            a rank sent where that is another one.
        senders: the clients whose updates a rank sends, in the order of sending, by rank.
        num_values: of an update.
        chunk: values in a piece.
        round: for messages.
    """

    def __init__(
        self,
        receive: Receive,
        senders: Sequence[Sequence[int]],
        num_values: int,
        chunk: int,
        round: int,
    ) -> None:
        self._receive_pieces = receive
        self._senders = senders
        self._round = round
        self._parts = list(slices(num_values, chunk))
        # Ranks land in the order of their first clients, so that often no row has to move.
        ranks = [rank for rank, clients in enumerate(senders) if clients]
        self._ranks = sorted(ranks, key=lambda rank: senders[rank][0])
        self._landed = [client for rank in self._ranks for client in senders[rank]]
        self._order = [int(row) for row in np.argsort(self._landed)]
        self._clients = sorted(self._landed)
        self._room = np.empty(len(self._landed) * min(chunk, num_values), dtype=np.float32)
        self._first: np.ndarray | None = None

    def first(self) -> dict[int, str]:
        """Receive the first piece of every update. Why updates cannot be averaged, by client."""
        if not self._parts:
            return {}
        self._first, reasons = self._receive(self._parts[0])
        return reasons

    def columns(self, accepted: set[int]) -> Iterator[Columns]:
        """Yield the pieces of the accepted updates, and let the others arrive.

        Raises ProtocolError if a later piece of an accepted update cannot be averaged: those before
        it already are.
        """
        rows = [row for row, client in enumerate(self._clients) if client in accepted]
        for part in self._parts:
            if self._first is not None:
                matrix, self._first = self._first, None
            else:
                matrix, reasons = self._receive(part)
                for client in sorted(accepted & reasons.keys()):
                    raise ProtocolError(
                        f"update of client {client} from rank {self._rank_of(client)} in round "
                        f"{self._round}: values "
                        f"{part.start} to {part.stop}: {reasons[client]}; those before them were "
                        "averaged already"
                    )
            yield part, matrix if len(rows) == len(matrix) else matrix[rows]

    def _receive(self, part: slice) -> tuple[np.ndarray, dict[int, str]]:
        """The matrix [updates, values of the piece], in the order of client ids, and why rows
        cannot be averaged.
        """
        width = part.stop - part.start
        matrix = self._room[: len(self._landed) * width].reshape(len(self._landed), width)
        targets: dict[int, np.ndarray] = {}
        start = 0
        for rank in self._ranks:
            end = start + len(self._senders[rank])
            targets[rank] = matrix[start:end]
            start = end
        reasons: dict[int, str] = {}
        for rank, size in self._receive_pieces(targets).items():
            clients = self._senders[rank]
            why = (
                f"rank {rank} sent {size} bytes for {describe(clients)}, expected "
                f"{targets[rank].nbytes}"
            )
            targets[rank][...] = 0  # what was there before is nobody's
            reasons |= dict.fromkeys(clients, why)
        reorder(matrix, self._order)
        for row, reason in impossible_rows(matrix).items():
            reasons.setdefault(self._clients[row], reason)
        return matrix, reasons

    def _rank_of(self, client: int) -> int:
        return next(rank for rank, clients in enumerate(self._senders) if client in clients)

"""Updates on their way to the server: received and inspected one chunk of each at a time."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from .envelope import SEAL_BYTES
from .exchange import Exchange
from .inspection import ProtocolError, describe_clients, invalid_rows
from .messages import chunk_slices
from .updates import Columns, reorder

if TYPE_CHECKING:
    from .keys import Seals

ReceiveChunks = Callable[[Mapping[int, np.ndarray]], dict[int, int]]


class IncomingUpdates:
    """The updates of a round on their way: one chunk of each at a time, in memory that is reused.

    Args:
        receive_chunks: fills each rank's memory (fp32 [num_clients, num_values of the chunk], or
            uint8 [num_clients, num_bytes] of what is compressed or sealed) with its next chunk;
            returns the number of bytes that a rank sent where it differs.
        senders: by rank, the ids of the clients whose updates it sends, in the order of sending.
        num_values: number of values of an update.
        chunk: number of values of a chunk.
        round: number of the round, for messages.
        exchange: decodes the chunks of a compressed exchange; None: they are fp32 values.
        seals: open the chunks; None: they are not sealed.
    """

    def __init__(
        self,
        receive_chunks: ReceiveChunks,
        senders: Sequence[Sequence[int]],
        num_values: int,
        *,
        chunk: int,
        round: int,
        exchange: Exchange | None = None,
        seals: Seals | None = None,
    ) -> None:
        self._exchange = exchange
        self._seals = seals
        self._scratch: dict[str, np.ndarray] = {}  # bytes as they travel, reused
        self._receive_chunks = receive_chunks
        self._senders = senders
        self._round = round
        self._parts = list(chunk_slices(num_values, chunk))
        # Chunks land in the order of their ranks' first clients, so that often no row has to move.
        ranks = [rank for rank, clients in enumerate(senders) if clients]
        self._ranks = sorted(ranks, key=lambda rank: senders[rank][0])
        self._landing_order = [client for rank in self._ranks for client in senders[rank]]
        self._row_order = [int(row) for row in np.argsort(self._landing_order)]
        self._clients = sorted(self._landing_order)
        self._memory = np.empty(len(self._clients) * min(chunk, num_values), dtype=np.float32)
        self._first_chunk: np.ndarray | None = None

    def receive_first(self) -> dict[int, str]:
        """Receive the first chunk of every update.

        Returns:
            Why updates cannot be averaged, by client id.
        """
        if not self._parts:
            return {}
        self._first_chunk, reasons = self._receive(self._parts[0])
        return reasons

    def columns(self, accepted: Collection[int]) -> Iterator[Columns]:
        """Yield the chunks of the accepted clients' updates; receive and drop those of the others.

        Raises:
            ProtocolError: a later chunk of an accepted update cannot be averaged, when those before
                it already are.
        """
        accepted_rows = [row for row, client in enumerate(self._clients) if client in accepted]
        for part in self._parts:
            if self._first_chunk is not None:
                matrix = self._first_chunk
                self._first_chunk = None
            else:
                matrix, reasons = self._receive(part)
                self._require_valid(part, accepted, reasons)
            # Indexing copies: where all updates are accepted, no copy is made.
            yield part, matrix if len(accepted_rows) == len(matrix) else matrix[accepted_rows]

    def _receive(self, part: slice) -> tuple[np.ndarray, dict[int, str]]:
        """Receive a chunk of every update.

        Returns:
            fp32 matrix [num_updates, num_values of the chunk] by client id, and why rows cannot be
            averaged, by client id.
        """
        width = part.stop - part.start
        num_rows = len(self._clients)
        matrix = self._memory[: num_rows * width].reshape(num_rows, width)
        plain = matrix
        if self._exchange is not None:
            plain = self._bytes("packed", num_rows, self._exchange.num_bytes(part))
        arrived = plain
        if self._seals is not None:
            num_bytes = plain.shape[1] * plain.itemsize + SEAL_BYTES
            arrived = self._bytes("sealed", num_rows, num_bytes)
        rows_of_rank: dict[int, np.ndarray] = {}
        begin = 0
        for rank in self._ranks:
            end = begin + len(self._senders[rank])
            rows_of_rank[rank] = arrived[begin:end]
            begin = end

        reasons: dict[int, str] = {}
        for rank, num_bytes in self._receive_chunks(rows_of_rank).items():
            clients = self._senders[rank]
            rows = rows_of_rank[rank]
            rows[...] = 0  # they still hold an earlier chunk, or nothing yet
            reason = (
                f"rank {rank} sent {num_bytes} bytes for {describe_clients(clients)}, "
                f"expected {rows.nbytes}"
            )
            reasons |= dict.fromkeys(clients, reason)
        if self._seals is not None:
            self._open(plain, arrived, reasons)
        if self._exchange is not None:
            for client, packed, values in zip(self._landing_order, plain, matrix):
                try:
                    values[:] = self._exchange.decode(packed, part)
                except ValueError as error:
                    values[:] = 0
                    reasons.setdefault(client, f"the update cannot be decoded: {error}")
        reorder(matrix, self._row_order)
        for row, reason in invalid_rows(matrix).items():
            reasons.setdefault(self._clients[row], reason)
        return matrix, reasons

    def _open(self, plain: np.ndarray, sealed: np.ndarray, reasons: dict[int, str]) -> None:
        """Open the chunk of each update into its row, which is 0 if that is refused.

        Args:
            plain: fp32 [num_updates, num_values] or uint8 [num_updates, num_bytes].
            sealed: uint8 [num_updates, num_bytes + SEAL_BYTES].
            reasons: why rows cannot be averaged, by client id; gets those that cannot be opened.
        """
        assert self._seals is not None
        for client, row, message in zip(self._landing_order, plain, sealed):
            if client in reasons:
                row[:] = 0
                self._seals.skip_values(client)
                continue
            try:
                self._seals.open_values(client, row, message, round=self._round)
            except ValueError as error:
                reasons[client] = f"the update cannot be opened: {error}"

    def _bytes(self, name: str, num_rows: int, num_bytes: int) -> np.ndarray:
        """Return uint8 [num_rows, num_bytes] in memory that is reused, one for each name."""
        size = num_rows * num_bytes
        if name not in self._scratch or self._scratch[name].size < size:
            self._scratch[name] = np.empty(size, dtype=np.uint8)
        return self._scratch[name][:size].reshape(num_rows, num_bytes)

    def _require_valid(
        self, part: slice, accepted: Collection[int], reasons: Mapping[int, str]
    ) -> None:
        """Raise ProtocolError, naming the first client, if an accepted update is invalid."""
        for client in self._clients:
            if client in accepted and client in reasons:
                raise ProtocolError(
                    f"update of client {client} from rank {self._rank_of(client)} in round "
                    f"{self._round}: values {part.start} to {part.stop}: {reasons[client]}; those "
                    "before them were averaged already"
                )

    def _rank_of(self, client: int) -> int:
        return next(rank for rank, clients in enumerate(self._senders) if client in clients)

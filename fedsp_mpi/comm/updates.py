"""The updates of one round as the server reads them: by client id, a few columns at a time."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from fedsp_mpi.tensors import Failure, Schema

from .messages import Report

# A slice of the vector, and those values of every accepted update: fp32 [num_updates, num_values].
Columns = tuple[slice, np.ndarray]


class Updates:
    """Results of one round.

    The tensors are still on their way when the server gets this object: a rule that reads
    `columns()` once needs memory for one chunk of every update, not for all of them.

    Args:
        reports: client, weight and metrics of every accepted update, by client id.
        failures: failures of the other clients, by client id.
        schema: names and shapes of one update.
        source: yields the columns; rows as in `reports`.

    Attributes:
        reports: as above.
        failures: as above.
        schema: as above.
        rejected: why the aggregation rule left out an update, by client id.
    """

    def __init__(
        self,
        reports: Sequence[Report],
        failures: Sequence[Failure],
        schema: Schema,
        *,
        source: Iterator[Columns],
    ) -> None:
        self.reports = list(reports)
        self.failures = list(failures)
        self.schema = schema
        self.rejected: dict[int, str] = {}
        self._source = source
        self._is_read = False

    def columns(self) -> Iterator[Columns]:
        """Yield (slice of the vector, fp32 matrix [num_updates, num_values of the slice]).

        Rows as in `reports`. Can be read once. The matrix is reused: it is valid until the next one
        is read, and may be overwritten.
        """
        assert not self._is_read, "the columns of a round can be read once"
        self._is_read = True
        # Not `yield from`: leaving the loop early would close the source, and clients still send
        # the remaining chunks.
        for columns in self._source:  # noqa: UP028
            yield columns

    def rows(self) -> np.ndarray:
        """Return all updates as fp32 matrix [num_updates, num_values], for rules that need them.

        Needs memory for every update of the round at once.
        """
        matrix = np.empty((len(self.reports), self.schema.num_values), dtype=np.float32)
        for part, columns in self.columns():
            matrix[:, part] = columns
        return matrix

    def reject(self, client: int, reason: str) -> None:
        """Note, for the record, that a rule leaves this client's update out."""
        self.rejected[client] = reason

    def drain(self) -> None:
        """Receive the remaining chunks and drop them."""
        self._is_read = True
        for _ in self._source:
            pass


def reorder(rows: np.ndarray, order: Sequence[int]) -> None:
    """Move row `order[i]` of [num_rows, length] to place i, in place, with memory for one row.

    `order` is a permutation; each of its cycles is followed once.
    """
    is_placed = [False] * len(order)
    for start in range(len(order)):
        if is_placed[start] or order[start] == start:
            continue
        first_row = rows[start].copy()
        place = start
        while order[place] != start:
            rows[place] = rows[order[place]]
            is_placed[place] = True
            place = order[place]
        rows[place] = first_row
        is_placed[place] = True

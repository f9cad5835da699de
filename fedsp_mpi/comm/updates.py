"""The updates of one round as the server sees them: in the order of client ids, a few columns at a
time.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from fedsp_mpi.tensors import Failure, Schema

from .messages import Report

Columns = tuple[slice, np.ndarray]


class Updates:
    """What came up in one round.

    The tensors are still on their way when the loop gets this: a rule that reads `columns()` once
    needs memory for one piece of every update, not for all of them.

    Attributes:
        reports: client, weight and metrics of every accepted update, in the order of client ids.
        failures: the clients that failed, in the order of client ids.
        rejected: why the rule left out an update, by client.
        schema: names and shapes of one update.
    """

    def __init__(
        self,
        reports: Sequence[Report],
        failures: Sequence[Failure],
        schema: Schema,
        source: Iterator[Columns],
    ) -> None:
        self.reports, self.failures, self.schema = list(reports), list(failures), schema
        self.rejected: dict[int, str] = {}
        self._source = source
        self._begun = False

    def columns(self) -> Iterator[Columns]:
        """Yield (slice of the vector, fp32 matrix [number of accepted updates, columns]); rows as
        in `reports`.

        Can be read once. The matrix is reused: it is valid until the next one is asked for, and may
        be overwritten.
        """
        assert not self._begun, "the columns of a round can be read once"
        self._begun = True
        # Not `yield from`: leaving the loop early would close the source, and others still send
        # what is left.
        for piece in self._source:  # noqa: UP028
            yield piece

    def rows(self) -> np.ndarray:
        """All updates as one fp32 matrix [number of accepted updates, number of values], for rules
        that need all.

        Memory: every update of the round at once.
        """
        matrix = np.empty((len(self.reports), self.schema.num_values), dtype=np.float32)
        for part, piece in self.columns():
            matrix[:, part] = piece
        return matrix

    def reject(self, client: int, reason: str) -> None:
        """Note that a rule leaves this client's update out; the record says so."""
        self.rejected[client] = reason

    def drain(self) -> None:
        """Let the rest arrive and throw it away."""
        self._begun = True
        for _ in self._source:
            pass


def reorder(rows: np.ndarray, order: Sequence[int]) -> None:
    """Put row `order[i]` in place i, in place, with memory for one row."""
    placed = [False] * len(order)
    for start in range(len(order)):
        if placed[start] or order[start] == start:
            continue
        spare, here = rows[start].copy(), start
        while order[here] != start:
            rows[here] = rows[order[here]]
            placed[here] = True
            here = order[here]
        rows[here] = spare
        placed[here] = True

"""Rules of aggregation over those updates that count: clients without any label have none."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import numpy as np

from fedsp_mpi.aggregation.fedavg import Updates, fold
from fedsp_mpi.tensors import NamedTensors, Report, Schema

Rule = Callable[[Updates], NamedTensors]


class Contributors:
    """Those updates of a round that weigh more than nothing; see `fedavg.Updates`.

    Args:
        updates: of the round.
    """

    def __init__(self, updates: Updates) -> None:
        self._updates = updates
        self._places = [place for place, report in enumerate(updates.reports) if report.weight > 0]

    @property
    def schema(self) -> Schema:
        """Names and shapes of one update."""
        return self._updates.schema

    @property
    def reports(self) -> Sequence[Report]:
        """Client, weight and metrics of each."""
        return [self._updates.reports[place] for place in self._places]

    def columns(self) -> Iterator[tuple[slice, np.ndarray]]:
        """Yield a range of values, and that range of every update, fp32 [updates, range]."""
        for part, rows in self._updates.columns():
            yield part, rows[self._places]

    def rows(self) -> np.ndarray:
        """Return all updates at once, fp32 [updates, values]."""
        return self._updates.rows()[self._places]

    def reject(self, client: int, reason: str) -> None:
        """Record that a client's update was not used."""
        self._updates.reject(client, reason)


def among_contributors(rule: Rule) -> Rule:
    """Return a rule that sees those updates alone that weigh more than nothing.

    Where none does, all clients have sent back what came down, and it stays.

    Args:
        rule: makes one update of many.
    """

    def rule_among_contributors(updates: Updates) -> NamedTensors:
        weights = [report.weight for report in updates.reports]
        if all(weight > 0 for weight in weights):
            return rule(updates)
        if any(weight > 0 for weight in weights):
            return rule(Contributors(updates))
        shares = np.full(len(weights), 1 / len(weights))
        mean = np.empty(updates.schema.num_values, dtype=np.float32)
        for part, rows in updates.columns():
            mean[part] = fold(shares, rows)
        return NamedTensors(updates.schema, mean)

    return rule_among_contributors

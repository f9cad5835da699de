"""Weighted averaging (FedAvg, McMahan et al., 2017, algorithm 1)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Protocol

import numpy as np

from fedsp_mpi.tensors import NamedTensors, Report, Schema


class Updates(Protocol):
    """The updates of one round, in the order of client ids."""

    @property
    def schema(self) -> Schema: ...

    @property
    def reports(self) -> Sequence[Report]: ...

    def columns(self) -> Iterator[tuple[slice, np.ndarray]]:
        """Yield a range of values, and that range of every update, fp32 [updates, range]."""
        ...

    def rows(self) -> np.ndarray:
        """Return all updates at once, fp32 [updates, values]."""
        ...

    def reject(self, client: int, reason: str) -> None:
        """Record that a client's update was not used."""
        ...


def weighted_mean(updates: Updates) -> NamedTensors:
    """Return sum_k (n_k / sum n) P_k over the clients k, in the order of their ids.

    Every range of values is summed client by client in fp64 and rounded to fp32 once, so the result
    depends neither on the placement of the clients nor on the length of the ranges.

    Returns:
        Tensors of the updates' names, fp32, each of the same shape as theirs.

    Raises:
        ValueError: no weight is above zero.
    """
    shares = shares_of([report.weight for report in updates.reports])
    mean = np.empty(updates.schema.num_values, dtype=np.float32)
    for where, rows in updates.columns():
        mean[where] = fold(shares, rows)
    return NamedTensors(updates.schema, mean)


def shares_of(weights: Sequence[float]) -> np.ndarray:
    """Divide each weight by their sum, fp64 [updates].

    Raises:
        ValueError: no weight is above zero.
    """
    values = np.array(weights, dtype=np.float64)
    total = values.sum()
    if not total > 0:
        raise ValueError(
            f"found {len(values)} updates of total weight {total}, expected a weight above 0"
        )
    return values / total


def fold(shares: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """Return the sum of shares times rows, row by row in fp64.

    Args:
        shares: fp64 [updates].
        rows: [updates, values].

    Returns:
        fp64 [values].
    """
    total = np.zeros(rows.shape[1], dtype=np.float64)
    for share, row in zip(shares, rows):
        total += share * row
    return total

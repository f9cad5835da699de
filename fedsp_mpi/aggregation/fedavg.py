"""Weighted averaging (FedAvg, McMahan et al., 2017, algorithm 1)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Protocol

import numpy as np

from fedsp_mpi.tensors import NamedTensors, Schema


class Report(Protocol):
    """Who sent an update, its weight, and the numbers that it says."""

    @property
    def client(self) -> int: ...

    @property
    def weight(self) -> float: ...

    @property
    def metrics(self) -> Mapping[str, float]: ...


class Updates(Protocol):
    """The updates of one round, read a stretch of values at a time, or all at once."""

    @property
    def schema(self) -> Schema: ...

    @property
    def reports(self) -> Sequence[Report]: ...

    def columns(self) -> Iterator[tuple[slice, np.ndarray]]: ...

    def rows(self) -> np.ndarray: ...

    def reject(self, client: int, reason: str) -> None: ...


def weighted_mean(updates: Updates) -> NamedTensors:
    """sum_k (n_k / sum n) P_k over the clients k, in the order of their ids.

    Every stretch of values is summed client by client in fp64 and rounded to fp32 once, so the
    result depends neither on the placement of the clients nor on the length of the stretches.

    Raises ValueError if no weight is above zero.
    """
    shares = shares_of([report.weight for report in updates.reports])
    flat = np.empty(updates.schema.num_values, dtype=np.float32)
    for where, rows in updates.columns():
        flat[where] = fold(shares, rows)
    return NamedTensors(updates.schema, flat)


def shares_of(weights: Sequence[float]) -> np.ndarray:
    """Each weight's part of their sum, fp64 [updates].

    Raises ValueError if no weight is above zero.
    """
    found = np.array(weights, dtype=np.float64)
    if not found.sum() > 0:
        raise ValueError(
            f"found {len(found)} updates of total weight {found.sum()}, expected a weight above 0"
        )
    return found / found.sum()


def fold(shares: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """The sum of shares [updates] times rows [updates, values], row by row in fp64; fp64 [values]."""
    total = np.zeros(rows.shape[1], dtype=np.float64)
    for share, row in zip(shares, rows):
        total += share * row
    return total

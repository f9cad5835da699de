"""The step size of a server that takes its clients' means for samples of its own (FedBPT, Sun et al., 2023)."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np


def corrected(losses: Sequence[float], spreads: Sequence[float], population: int) -> float:
    """The step size with which the clients' means would be samples of the server's distribution (FedBPT, Eq. 6).

    sigma' = 2 sqrt( sum_{k in best half} sum_j sigma_kj^2 / (|S| lambda) ), because a mean moves in an iteration by a
    variance of sigma_kj^2 / (lambda / 2). Of an odd number of clients the half is rounded down, and |S| is twice that.

    Args:
        losses: of each client's mean; low is good, equal ones count in their order.
        spreads: sqrt(sum_j sigma_kj^2) of each client, over its iterations.
        population: lambda, points of a client's iteration.
    """
    best = np.argsort(losses, kind="stable")[: max(1, len(losses) // 2)]
    return math.sqrt(2 * float(np.mean(np.square(spreads)[best])) / population)

"""The step size of a server that takes its clients' means for samples of its own (FedBPT, Sun et
al., 2023).
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np


def corrected(
    losses: Sequence[float], spreads: Sequence[float], *, points: float, parents: int
) -> float:
    """Return the step size by which the clients' means are samples of the server's distribution.

    Source: FedBPT, Eq. 6. sigma'^2 is the mean over the best clients of sum_j sigma_kj^2 / points,
    because a mean moves in an iteration by a variance of sigma_kj^2 / points.

    Args:
        losses: of each client's mean; the lowest are the best, equal ones count in their order.
        spreads: sqrt(sum_j sigma_kj^2) of each client, over its iterations j.
        points: number of points that a client's mean is made of, if they had equal weights. The
            equation has half of lambda, the points of an iteration; see `effective`.
        parents: number of best clients, at least 1. The equation has half of all.
    """
    best = np.argsort(losses, kind="stable")[:parents]
    return math.sqrt(float(np.mean(np.square(spreads)[best])) / points)


def effective(population: int) -> float:
    """Return how many points of equal weights the better half counts for with CMA-ES's weights.

    This is mu_eff (Hansen, 2016, Eq. 8).

    Args:
        population: number of points of an iteration, at least 2.
    """
    weights = math.log((population + 1) / 2) - np.log(np.arange(1, population // 2 + 1))
    return float(weights.sum() ** 2 / (weights**2).sum())

"""The step size of a server that takes its clients' means for samples of its own (FedBPT, Sun et
al., 2023).
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np


def corrected(
    losses: Sequence[float], spreads: Sequence[float], points: float, parents: int
) -> float:
    """The step size with which the clients' means would be samples of the server's distribution
    (FedBPT, Eq. 6).

    sigma'^2 is the mean over the best clients of sum_j sigma_kj^2 / points, because a mean moves in
    an iteration by a variance of sigma_kj^2 / points.

    Args:
        losses: of each client's mean; low is good, equal ones count in their order.
        spreads: sqrt(sum_j sigma_kj^2) of each client, over its iterations.
        points: those that a client's mean is made of, as if they had equal weights. The equation
            has half of lambda, the points of an iteration; see `effective`.
        parents: how many clients are the best ones, at least 1. The equation has half of them.
    """
    best = np.argsort(losses, kind="stable")[:parents]
    return math.sqrt(float(np.mean(np.square(spreads)[best])) / points)


def effective(population: int) -> float:
    """How many points of equal weights the better half is worth with those of CMA-ES (mu_eff;
    Hansen, 2016, Eq. 8).

    `population` is the number of points of an iteration, at least 2.
    """
    weights = math.log((population + 1) / 2) - np.log(np.arange(1, population // 2 + 1))
    return float(weights.sum() ** 2 / (weights**2).sum())

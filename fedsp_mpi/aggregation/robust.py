"""Rules that a minority of poisoned updates cannot steer: the coordinate-wise median, and the
rejection of outliers.
"""

from __future__ import annotations

import numpy as np

from fedsp_mpi.aggregation.fedavg import Updates, fold, shares_of
from fedsp_mpi.tensors import NamedTensors

# Relative tolerance of the limit, so that the last bits of a distance, which differ between
# processors, decide nothing.
_SLACK = 1e-6
# Ratio of standard deviation to median absolute deviation, for normally distributed values.
_TO_DEVIATION = 1.4826
# Values of an update that are in memory as fp64 at once.
_STRETCH = 1 << 20


def coordinate_median(updates: Updates) -> NamedTensors:
    """Return the median of every value over the clients.

    Source: Yin et al., 2018, arXiv 1803.01498, algorithm 1, option I. Every update counts once,
    whatever its weight; of an even number, the median is the mean of the middle two. Computed in
    fp64 and rounded to fp32 once, a range of values at a time.

    Returns:
        Tensors of the updates' names, fp32, each of the same shape as theirs.

    Raises:
        ValueError: there is no update.
    """
    _require_updates(updates)
    median = np.empty(updates.schema.num_values, dtype=np.float32)
    for where, rows in updates.columns():
        median[where] = np.median(rows.astype(np.float64), axis=0)
    return NamedTensors(updates.schema, median)


def without_outliers(updates: Updates, deviations: float) -> NamedTensors:
    """Return the weighted mean of the updates near the median, and reject all others.

    The defence that FedPrompt (arXiv 2208.12268) names for future work is to reject outliers by
    mean and standard deviation. Taken literally it rejects nobody: no one of n numbers is more than
    (n - 1) / sqrt(n) sample standard deviations above their mean, 2.85 of ten. So the robust forms
    of both are used here. An update's distance is the Euclidean one to the coordinate-wise median;
    it is an outlier beyond median + `deviations` x 1.4826 x median absolute deviation of all
    distances. At least half of the updates always stay, and with one or two updates all do.

    Holds all updates of the round in memory, [updates, values].

    Args:
        updates: of one round.
        deviations: number of standard deviations, estimated in this way, that an update's distance
            may be above the median distance.

    Returns:
        Tensors of the updates' names, fp32, each of the same shape as theirs.

    Raises:
        ValueError: there is no update, or those that stay have no weight above zero.
    """
    _require_updates(updates)
    rows = updates.rows()
    from_median = distances(rows)
    middle = float(np.median(from_median))
    median_deviation = float(np.median(np.abs(from_median - middle)))
    limit = middle + deviations * _TO_DEVIATION * median_deviation
    stays = from_median <= limit * (1 + _SLACK)
    weights = []
    for report, distance, is_in in zip(updates.reports, from_median, stays):
        if is_in:
            weights.append(report.weight)
        else:
            updates.reject(
                report.client,
                f"{distance:.4g} away from the median prompt, the limit is {limit:.4g}",
            )
    mean = fold(shares_of(weights), rows[stays])
    return NamedTensors(updates.schema, mean.astype(np.float32))


def distances(rows: np.ndarray) -> np.ndarray:
    """Return the Euclidean distance of each row of [updates, values] from their median.

    Returns:
        fp64 [updates].
    """
    parts = np.array_split(rows, 1 + rows.shape[1] // _STRETCH, axis=1)
    median = np.concatenate([np.median(part.astype(np.float64), axis=0) for part in parts])
    return np.array([np.sqrt(np.square(row - median).sum()) for row in rows])


def _require_updates(updates: Updates) -> None:
    if not updates.reports:
        raise ValueError("found no updates, expected at least one")

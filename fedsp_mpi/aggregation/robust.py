"""Rules that a minority of poisoned updates cannot steer: the coordinate-wise median, and the
rejection of outliers.
"""

from __future__ import annotations

import numpy as np

from fedsp_mpi.aggregation.fedavg import Updates, fold, shares_of
from fedsp_mpi.tensors import NamedTensors

# of the limit: the last bits of a distance, which differ between processors, decide nothing
_SLACK = 1e-6
_TO_DEVIATION = (
    1.4826  # median absolute deviation -> standard deviation, of normally distributed values
)
_STRETCH = 1 << 20  # values of an update that are held in fp64 at once


def coordinate_median(updates: Updates) -> NamedTensors:
    """The median of every value over the clients (Yin et al., 2018, arXiv 1803.01498, algorithm 1,
    option I).

    Every update counts once, whatever its weight; of an even number, it is the mean of the middle
    two. Computed in fp64 and rounded to fp32 once, a stretch of values at a time.

    Raises ValueError if there is no update.
    """
    _require_some(updates)
    flat = np.empty(updates.schema.num_values, dtype=np.float32)
    for where, rows in updates.columns():
        flat[where] = np.median(rows.astype(np.float64), axis=0)
    return NamedTensors(updates.schema, flat)


def without_outliers(updates: Updates, deviations: float) -> NamedTensors:
    """The weighted mean of the updates that do not lie far from the others; those that do are
    rejected by name.

    The defence that FedPrompt (arXiv 2208.12268) names for future work is to reject outliers by
    mean and standard deviation. Taken literally it rejects nobody: no one of n numbers is more than
    (n - 1) / sqrt(n) sample standard deviations above their mean, 2.85 of ten. So the robust forms
    of both are used here: a distance is the Euclidean one to the coordinate-wise median, and too
    far is more than median + `deviations` x 1.4826 x median absolute deviation of all distances. At
    least half of the updates always stay, and with one or two updates all do.

    Holds all updates of the round in memory, as `Updates.rows` does.

    Args:
        deviations: how many standard deviations, estimated like that, an update may be further away
            than the middle.

    Raises ValueError if there is no update, or if those that stay have no weight above zero.
    """
    _require_some(updates)
    rows = updates.rows()
    apart = distances(rows)
    middle = float(np.median(apart))
    limit = middle + deviations * _TO_DEVIATION * float(np.median(np.abs(apart - middle)))
    stays = apart <= limit * (1 + _SLACK)
    for report, distance, is_in in zip(updates.reports, apart, stays):
        if not is_in:
            updates.reject(
                report.client,
                f"{distance:.4g} away from the median prompt, the limit is {limit:.4g}",
            )
    shares = shares_of([report.weight for report, is_in in zip(updates.reports, stays) if is_in])
    return NamedTensors(updates.schema, fold(shares, rows[stays]).astype(np.float32))


def distances(rows: np.ndarray) -> np.ndarray:
    """How far each row of [updates, values] is from the median of all, Euclidean, fp64 [updates]."""
    parts = np.array_split(rows, 1 + rows.shape[1] // _STRETCH, axis=1)
    centre = np.concatenate([np.median(part.astype(np.float64), axis=0) for part in parts])
    return np.array([np.sqrt(np.square(row - centre).sum()) for row in rows])


def _require_some(updates: Updates) -> None:
    if not updates.reports:
        raise ValueError("found no updates, expected at least one")

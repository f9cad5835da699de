"""What a number of questions, or of seeds, can show: intervals and differences at 95 %.

Records keep how many questions were right, not which, so that two scores on the same questions are
compared as if their questions were different ones. This is cautious: a paired test would find
smaller differences.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence

import numpy as np

from fedsp_mpi.report.facts import PERPLEXITY, better_by, main_measure

Z = statistics.NormalDist().inv_cdf(0.975)
# Of Student's t distribution with 1, 2, ... degrees of freedom, the 0.975 quantile.
_T = (12.7062, 4.3027, 3.1824, 2.7764, 2.5706, 2.4469, 2.3646, 2.3060, 2.2622, 2.2281)
_SAME = 1e-9  # gains of several seeds that differ by less are the same: they show no spread
Interval = tuple[float, float]
UNKNOWN: Interval = (math.nan, math.nan)


def wilson(share: float, n: int) -> Interval:
    """Return the 95 % interval of a share of right answers (Wilson, 1927).

    Args:
        share: of n questions, from 0 to 1.
        n: independent questions.

    Returns:
        Its ends, from 0 to 1; nan without questions or share.
    """
    if n < 1 or not 0 <= share <= 1:
        return UNKNOWN
    centre = (share + Z**2 / (2 * n)) / (1 + Z**2 / n)
    half = Z / (1 + Z**2 / n) * math.sqrt(share * (1 - share) / n + Z**2 / (4 * n**2))
    return max(0.0, centre - half), min(1.0, centre + half)


def difference(share: float, n: int, *, other: float, n_other: int) -> Interval:
    """Return the 95 % interval of the difference of two shares, unpaired.

    Newcombe's method 10 (1998), of the two Wilson intervals: it also holds at shares of 0 and 1.

    Args:
        share: of n questions that one answered rightly.
        n: its questions.
        other: the share that is taken away.
        n_other: its questions.

    Returns:
        Its ends, from -1 to 1; nan if one of the shares is not known.
    """
    low, high = wilson(share, n)
    low_other, high_other = wilson(other, n_other)
    gap = share - other
    return (
        gap - math.hypot(share - low, high_other - other),
        gap + math.hypot(high - share, other - low_other),
    )


def result_interval(result: np.void) -> Interval:
    """Return the 95 % interval of a result's main measure, fractions; nan of a perplexity."""
    measure, value = main_measure(result)
    return UNKNOWN if measure == PERPLEXITY else wilson(value, int(result["n"]))


def result_difference(result: np.void, control: np.void) -> Interval:
    """Return the 95 % interval of what a result has over a control's, by its main measure.

    Fractions; nan of perplexities, of which a record holds no spread.
    """
    measure, value = main_measure(result)
    if measure == PERPLEXITY:
        return UNKNOWN
    return difference(
        value, int(result["n"]), other=float(control[measure]), n_other=int(control["n"])
    )


def mean_interval(values: Sequence[float]) -> Interval:
    """Return the 95 % interval of the mean of two or more values, by Student's t distribution."""
    mean = statistics.fmean(values)
    if not all(map(math.isfinite, values)):
        return UNKNOWN
    half = t_quantile(len(values) - 1) * statistics.stdev(values) / math.sqrt(len(values))
    return mean - half, mean + half


def t_quantile(degrees: int) -> float:
    """Return the 0.975 quantile of Student's t distribution, to 0.001.

    Beyond the table by the expansion of Cornish and Fisher.
    """
    if degrees <= len(_T):
        return _T[degrees - 1]
    first = (Z**3 + Z) / (4 * degrees)
    second = (5 * Z**5 + 16 * Z**3 + 3 * Z) / (96 * degrees**2)
    third = (3 * Z**7 + 19 * Z**5 + 17 * Z**3 - 15 * Z) / (384 * degrees**3)
    return Z + first + second + third


def includes_zero(interval: Interval) -> bool:
    """Return whether an interval of a difference leaves open which of two is better."""
    low, high = interval
    return low <= 0 <= high


def gain_interval(results: Sequence[np.void], controls: Sequence[np.void]) -> Interval:
    """Return the 95 % interval of the mean gain over a control, fractions or perplexities.

    With one seed it is what the number of questions leaves open; with more, what the spread of the
    gains over seeds does, unless there is none.

    Args:
        results: of a method, a seed each.
        controls: of the same seeds, in the same order.
    """
    if not results:
        return UNKNOWN
    gains = [better_by(result, control) for result, control in zip(results, controls, strict=True)]
    if max(gains) - min(gains) < _SAME:
        return result_difference(results[0], controls[0])
    return mean_interval(gains)

"""Aggregation rules for poisoned updates, against numpy and against loops; and in a run."""

from __future__ import annotations

from statistics import median

import numpy as np
import pytest

from fedsp_mpi.aggregation.fedavg import weighted_mean
from fedsp_mpi.aggregation.robust import coordinate_median, distances, without_outliers
from fedsp_mpi.comm.messages import Report
from fedsp_mpi.comm.updates import Updates
from fedsp_mpi.config import FederationConfig
from fedsp_mpi.config.runtime import CheckpointConfig
from fedsp_mpi.federate import ClientFailedError, Schedule, require_quorum
from fedsp_mpi.tensors import Schema


def updates(rows: np.ndarray, weights: list[float] | None = None, width: int = 3) -> Updates:
    """Rows as updates that come a few columns at a time; client ids with a gap."""
    cuts = [
        slice(start, min(start + width, rows.shape[1])) for start in range(0, rows.shape[1], width)
    ]
    reports = [Report(2 * i, weight, {}) for i, weight in enumerate(weights or [1.0] * len(rows))]
    source = ((cut, rows[:, cut].copy()) for cut in cuts)
    return Updates(reports, [], Schema.of([("prompt", (rows.shape[1],))]), source=source)


def noise(num: int, size: int = 11, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((num, size)).astype(np.float32)


@pytest.mark.parametrize("num", [1, 2, 3, 4, 7])
def test_the_median_is_that_of_every_value_whatever_the_weights(num):
    rows = noise(num)
    aggregate = coordinate_median(updates(rows, [1.0 + 5 * i for i in range(num)]))
    assert aggregate.flat.tolist() == [
        np.float32(median(column)) for column in rows.astype(float).T
    ]


@pytest.mark.parametrize("far", [10.0, 1e4, 1e30])
def test_one_client_cannot_move_the_median_beyond_the_others(far):
    rows = noise(5)
    rows[3] = far
    aggregate = coordinate_median(updates(rows)).flat
    honest = np.delete(rows, 3, axis=0)
    assert (aggregate >= honest.min(axis=0)).all() and (aggregate <= honest.max(axis=0)).all()


def test_distances_are_euclidean_to_the_median():
    rows = noise(5)
    centre = [median(column) for column in rows.astype(float).T]
    by_hand = [sum((x - c) ** 2 for x, c in zip(row.tolist(), centre)) ** 0.5 for row in rows]
    assert distances(rows) == pytest.approx(by_hand, rel=1e-12)


@pytest.mark.parametrize("deviations", [0.0, 1.0, 3.0, 20.0])
def test_who_is_rejected_follows_from_the_definition(deviations):
    rows, weights = noise(9, seed=2), [float(i + 1) for i in range(9)]
    rows[4] *= 3
    from_median = distances(rows).tolist()
    middle = median(from_median)
    limit = middle + deviations * 1.4826 * median(
        abs(distance - middle) for distance in from_median
    )
    out = [i for i, distance in enumerate(from_median) if distance > limit]
    received = updates(rows, weights)
    aggregate = without_outliers(received, deviations)
    assert sorted(received.rejected) == [2 * i for i in out] and len(out) <= 4
    staying = [i for i in range(9) if i not in out]
    mean = np.average(rows[staying].astype(float), axis=0, weights=[weights[i] for i in staying])
    assert aggregate.flat == pytest.approx(mean, rel=1e-6)
    assert deviations != 3.0 or out == [4]


def test_distances_that_differ_by_rounding_alone_reject_nobody():
    """Else the last bit, which is the processor's, would decide who is left out."""
    common = noise(1, size=1000)[0]
    rows = np.array([common + 0.1 * (np.arange(1000) == i) for i in range(6)], dtype=np.float32)
    from_median = distances(rows)
    assert len(set(from_median)) > 1 and np.ptp(from_median) < 1e-6 * from_median.max()
    received = updates(rows)
    without_outliers(received, 3.0)
    without_outliers(updates(rows), 0.0)
    assert received.rejected == {}


def test_without_an_outlier_it_is_the_weighted_mean_to_the_bit():
    rows, weights = noise(4), [3.0, 1.0, 2.0, 7.0]
    received = updates(rows, weights)
    assert np.array_equal(
        without_outliers(received, 50.0).flat, weighted_mean(updates(rows, weights)).flat
    )
    assert received.rejected == {}


def test_who_is_rejected_does_not_count_for_the_quorum():
    rows = noise(9, seed=2)
    rows[4] *= 3
    received = updates(rows)
    without_outliers(received, 3.0)
    require_quorum(received, Schedule(FederationConfig(min_clients=8), CheckpointConfig()))
    with pytest.raises(
        ClientFailedError, match=r"found 8 updates, expected .*min_clients=9: client 8 rejected: "
    ):
        require_quorum(received, Schedule(FederationConfig(min_clients=9), CheckpointConfig()))


@pytest.mark.parametrize("num", [1, 2])
def test_of_one_or_two_nobody_is_rejected(num):
    received = updates(noise(num))
    without_outliers(received, 0.0)
    assert received.rejected == {}


def test_mean_and_standard_deviation_taken_literally_reject_nobody():
    """Why the robust forms are used: of ten distances, one as large as can be is not three
    deviations from the mean.
    """
    from_median = np.array([1.0] * 9 + [1e9])
    assert (from_median[-1] - from_median.mean()) / from_median.std(ddof=1) == pytest.approx(
        9 / 10**0.5
    )


@pytest.mark.parametrize(
    "rule",
    [coordinate_median, lambda received: without_outliers(received, 3.0)],
    ids=["median", "reject"],
)
def test_no_update_is_an_error(rule):
    with pytest.raises(ValueError, match="found no updates, expected at least one"):
        rule(updates(noise(0)))

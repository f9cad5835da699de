"""Rules see those updates alone that weigh something; where none does, the broadcast stays."""

from __future__ import annotations

import numpy as np
import pytest

from fedsp_mpi.aggregation.contributors import among_contributors
from fedsp_mpi.aggregation.fedavg import weighted_mean
from fedsp_mpi.aggregation.robust import coordinate_median, without_outliers
from fedsp_mpi.comm.messages import Report
from fedsp_mpi.comm.updates import Updates
from fedsp_mpi.tensors import NamedTensors, Schema

ROWS = np.random.default_rng(0).standard_normal((6, 11)).astype(np.float32)
WEIGHTS = [0.0, 3.0, 0.0, 5.0, 1.0, 2.0]


def updates(rows: np.ndarray, weights: list[float]) -> Updates:
    """Return updates of clients 0, 2, 4, ... that come a few columns at a time."""
    reports = [Report(2 * index, weight, {}) for index, weight in enumerate(weights)]
    cuts = [slice(0, 4), slice(4, 8), slice(8, 11)]
    source = ((cut, rows[:, cut].copy()) for cut in cuts)
    return Updates(reports, [], Schema.of([("prompt", (11,))]), source=source)


@pytest.mark.parametrize("rule", [weighted_mean, coordinate_median])
def test_a_rule_does_not_see_who_has_no_label(rule):
    heavy = [index for index, weight in enumerate(WEIGHTS) if weight]
    expected = rule(updates(ROWS[heavy], [WEIGHTS[index] for index in heavy]))
    result = among_contributors(rule)(updates(ROWS, WEIGHTS))
    assert result.flat.tobytes() == expected.flat.tobytes()
    everybody = [weight + 1 for weight in WEIGHTS]
    assert (
        among_contributors(rule)(updates(ROWS, everybody)).flat.tobytes()
        == rule(updates(ROWS, everybody)).flat.tobytes()
    )


def test_an_outlier_is_rejected_by_its_own_name():
    def rule(sent) -> NamedTensors:
        return without_outliers(sent, 1.0)

    rows = ROWS.copy()
    rows[4] += 100
    received = updates(rows, WEIGHTS)
    among_contributors(rule)(received)
    assert list(received.rejected) == [8]


@pytest.mark.parametrize("num", [1, 3, 7])
def test_what_came_down_stays_to_the_bit_where_nobody_has_a_label(num):
    rows = np.tile(ROWS[0], (num, 1))
    result = among_contributors(weighted_mean)(updates(rows, [0.0] * num))
    assert result.flat.tobytes() == ROWS[0].tobytes()

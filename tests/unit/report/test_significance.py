"""What questions and seeds can show, against published and independently computed values."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest

from fedsp_mpi.record import ResultRow, Run
from fedsp_mpi.record.tables import CHANCE, LABELS, MAJORITY
from fedsp_mpi.report import (
    comparison_table,
    gain_table,
    markdown,
    read_all,
    significance,
    summarize,
)
from fedsp_mpi.report.comparison import compare
from helpers.record_samples import make


@pytest.mark.parametrize(
    ("right", "n", "low", "high"),
    [
        # scipy.stats.binomtest(right, n).proportion_ci(method="wilson")
        (0, 10, 0.0, 0.27753279),
        (10, 10, 0.72246721, 1.0),
        (81, 263, 0.25528852, 0.36620958),
        (1, 1, 0.20654931, 1.0),
    ],
)
def test_wilson(right, n, low, high):
    assert significance.wilson(right / n, n) == pytest.approx((low, high), abs=1e-7)


@pytest.mark.parametrize(
    ("first", "second", "low", "high"),
    [
        # Newcombe 1998, Statistics in Medicine 17, 873-890, table II, method 10
        ((56, 70), (48, 80), 0.0524, 0.3339),
        ((9, 10), (3, 10), 0.1705, 0.8090),
        ((0, 10), (0, 20), -0.1611, 0.2775),
        ((10, 10), (0, 10), 0.6075, 1.0),
    ],
)
def test_difference(first, second, low, high):
    right, n = first
    other, n_other = second
    found = significance.difference(right / n, n, other=other / n_other, n_other=n_other)
    assert found == pytest.approx((low, high), abs=6e-5)


@pytest.mark.parametrize(
    ("degrees", "quantile"), [(1, 12.7062), (2, 4.3027), (10, 2.2281), (11, 2.2010), (29, 2.0452)]
)
def test_quantiles_of_student(degrees, quantile):
    """Tables of the t distribution; beyond ten degrees of freedom it is an expansion."""
    assert significance.t_quantile(degrees) == pytest.approx(quantile, abs=1e-3)


def result(acc: float, n: int = 100) -> np.void:
    kinds = [("acc", "f8"), ("exact_match", "f8"), ("n", "i8")]
    return np.array([(acc, math.nan, n)], dtype=kinds)[0]


def test_seeds_that_agree_exactly_show_no_more_than_their_questions():
    gains = significance.gain_interval([result(0.61), result(0.61)], [result(0.6), result(0.6)])
    assert significance.includes_zero(gains)
    spread = significance.gain_interval(
        [result(0.66), result(0.72), result(0.65)], [result(0.60), result(0.62), result(0.60)]
    )
    assert spread == pytest.approx(
        (0.07 - 0.0657, 0.07 + 0.0657), abs=1e-4
    )  # 4.3027 * 0.02646 / 3**0.5


def run_with(folder: Path, fedsp: float, majority: float) -> Run:
    """Make a complete run of 100 questions, with rows that need no model."""
    record = make(folder)
    record.write_results(
        [
            ResultRow(method=CHANCE, split=LABELS, n=100, acc=0.5),
            ResultRow(method=MAJORITY, split=LABELS, n=100, acc=majority, stderr=0.05),
        ]
    )
    scores = {"zero-shot": 0.5, "server-only": 0.6, "fedsp": fedsp}
    record.write_results(
        ResultRow(method=method, split="test", n=100, acc=acc, stderr=0.05, round=1)
        for method, acc in scores.items()
    )
    record.finish()
    return record.run


def test_rows_without_a_model_stand_in_every_table_and_are_no_methods(tmp_path):
    run = run_with(tmp_path / "a", fedsp=0.62, majority=0.58)
    comparison = compare(read_all([run.file.parent]))
    assert [row.label for row in comparison.baselines] == ["chance", "majority"]
    assert [row.label for row in comparison.methods] == ["zero-shot", "server-only", "fedsp"]
    table = comparison_table(comparison)
    assert "| chance | 50.00 |" in table and "| majority | 58.00 [48.2, 67.2] |" in table
    assert "| fedsp | 62.00 [52.2, 70.9] ~ |" in table and "~ = no difference" in table
    assert "+2.00 [-11.3, +15.2] ~ |" in str(gain_table(comparison))
    assert "| test labels | 1 | 100 | 58.00 [48.2, 67.2] |" in markdown([run])
    text = summarize(run)
    assert "fedsp (test) is not shown to be better than majority, 58.00 %:" in text
    better = summarize(run_with(tmp_path / "b", fedsp=0.9, majority=0.58))
    assert "not shown" not in better and "majority test labels 100 58.00" in " ".join(
        better.split()
    )

"""Chance and majority, from the answers alone."""

from __future__ import annotations

import math

from fedsp_mpi.data.tasks import Example
from fedsp_mpi.evaluation.baselines import baseline_rows

AB = ("a", "b")


def examples(*gold: int | tuple[int, ...], choices: tuple[str, ...] = AB) -> list[Example]:
    golds = [answer if isinstance(answer, tuple) else (answer,) for answer in gold]
    return [Example("?", " a", choices, answer) for answer in golds]


def scores(*arguments: object) -> dict[str, float]:
    return {row.method: row.acc for row in baseline_rows(*arguments)}


def test_the_scored_answers_have_no_part_in_the_choice_of_the_majority():
    """Most of the server's own are b, most of the test a."""
    test = examples(0, 0, 0, 1)
    rows = baseline_rows(test, examples(1, 1, 0), "multiple_choice")
    assert [(row.method, row.n, row.acc) for row in rows] == [
        ("chance", 4, 0.5),
        ("majority", 4, 0.25),
    ]
    assert rows[1].stderr == math.sqrt(0.25 * 0.75 / 3)
    assert math.isnan(rows[0].stderr)  # an expectation, no sample


def test_in_hindsight_it_is_called_so_and_ties_take_the_first():
    assert scores(examples(0, 1, 1), [], "multiple_choice") == {
        "chance": 0.5,
        "majority (of the test)": 2 / 3,
    }
    assert scores(examples(0, 0, 1), examples(1, 0), "multiple_choice")["majority"] == 2 / 3


def test_choices_of_their_own_leave_chance_alone_and_free_answers_leave_nothing():
    mixed = examples(0, (0, 1)) + examples(2, choices=("x", "y", "z", "w"))
    assert scores(mixed, examples(0), "multiple_choice") == {"chance": (0.5 + 1 + 0.25) / 3}
    assert scores(mixed, examples(0), "exact_match") == {}
    assert scores([], examples(0), "multiple_choice") == {}

"""Few labels and pseudo-labels as pure functions: exact counts, quotas, draws, temperatures."""

from __future__ import annotations

import math
from collections import Counter

import numpy as np
import pytest

from fedsp_mpi.data.few_labels import apportion, label_counts, spread
from fedsp_mpi.data.pseudo_labels import (
    PseudoLabels,
    choose,
    class_shares,
    fit_temperature,
    softmax,
)
from fedsp_mpi.data.tokens import Question
from helpers import tiny

SIZES = [40, 3, 25, 60, 1, 31, 40, 50]
ALL = sum(SIZES)


@pytest.mark.parametrize("gamma", [0.001, 0.01, 1.0, 100.0, 1e6])
@pytest.mark.parametrize("num", [1, 7, 64, ALL - 1, ALL])
def test_exactly_so_many_labels_and_none_beyond_a_clients_text(gamma, num):
    for seed in range(5):
        places = spread(SIZES, num, gamma=gamma, seed=seed)
        assert sum(map(len, places)) == num
        for size, rows in zip(SIZES, places):
            assert len(set(rows.tolist())) == len(rows) <= size
            assert rows.tolist() == sorted(rows.tolist()) and set(rows.tolist()) <= set(range(size))
        again = spread(SIZES, num, gamma=gamma, seed=seed)
        assert all((a == b).all() for a, b in zip(places, again))


def test_small_gamma_gives_them_to_one_client_and_large_gamma_to_all():
    sizes = [1000] * 32
    concentrated = [label_counts(sizes, 64, gamma=0.01, seed=seed) for seed in range(20)]
    assert np.mean([counts.max() for counts in concentrated]) > 45
    assert len({int(counts.argmax()) for counts in concentrated}) > 5, "another one by seed"
    for seed in range(20):
        assert set(label_counts(sizes, 64, gamma=1e6, seed=seed).tolist()) == {2}
        # fewer labels than clients: one each, as in the generator of the paper
        assert sorted(set(label_counts(sizes, 16, gamma=1e6, seed=seed).tolist())) == [0, 1]


def test_which_rows_have_a_label_says_nothing_of_their_class():
    """Every row of a client is as likely as any other."""
    counted = Counter(
        row for seed in range(500) for row in spread([10], 4, gamma=1, seed=seed)[0].tolist()
    )
    deviation = math.sqrt(500 * 0.4 * 0.6)
    assert all(abs(counted[row] - 200) < 5 * deviation for row in range(10))


def test_more_labels_than_text_are_refused():
    with pytest.raises(ValueError, match=f"found {ALL + 1} labels for {ALL} examples of 8 clients"):
        spread(SIZES, ALL + 1, gamma=1, seed=0)


def test_parts_add_up_and_equal_remainders_go_to_the_first():
    assert apportion(7, np.array([0.5, 0.25, 0.25])).tolist() == [3, 2, 2]
    assert apportion(2, np.ones(3)).tolist() == [1, 1, 0]
    assert apportion(5, np.array([0.0, 3.0])).tolist() == [0, 5]


# -- pseudo-labels ---------------------------------------------------------------------------------

# Nine texts of three classes: five of the first, three of the second, one of the third.
CONFIDENCE = [0.9, 0.8, 0.7, 0.6, 0.5, 0.9, 0.6, 0.5, 0.8]
CLASSES = [0, 0, 0, 0, 0, 1, 1, 1, 2]
PROBABILITIES = np.array(
    [
        [sure if other == label else (1 - sure) / 2 for other in range(3)]
        for sure, label in zip(CONFIDENCE, CLASSES)
    ]
)
EVERY = np.ones(9, dtype=bool)


def drawn(quota: str, num: int, labels=(), eligible=EVERY, seed: int = 0) -> list[int]:
    shares = class_shares(
        quota, PROBABILITIES.argmax(axis=1), np.array(labels, dtype=np.int64), num=3
    )
    random = np.random.default_rng(seed)
    rows = choose(PROBABILITIES, eligible, shares, num=num, random=random)
    assert rows.tolist() == sorted(set(rows.tolist()))
    return [CLASSES[row] for row in rows]


def test_quotas_follow_estimated_shares():
    assert Counter(drawn("predictions", 4)) == {0: 2, 1: 1, 2: 1}  # of 20, 12, 4 ninths
    assert Counter(drawn("labels", 4, labels=[1, 1, 0, 2])) == {0: 1, 1: 2, 2: 1}
    assert Counter(drawn("balanced", 3)) == {0: 1, 1: 1, 2: 1}
    assert Counter(drawn("labels", 4)) == Counter(drawn("predictions", 4)), "of no labels"


def test_fewer_texts_than_the_quota_are_all_taken():
    assert drawn("predictions", 100) == CLASSES
    assert Counter(drawn("balanced", 9)) == {0: 3, 1: 3, 2: 1}
    assert Counter(drawn("labels", 9, labels=[2])) == {2: 1}, "the only class that it knows"
    assert drawn("predictions", 0) == drawn("predictions", -5) == []


def test_a_floor_of_confidence():
    eligible = PROBABILITIES.max(axis=1) >= 0.8
    assert drawn("predictions", 9, eligible=eligible) == [0, 0, 1, 2]
    assert drawn("predictions", 9, eligible=np.zeros(9, dtype=bool)) == []


def test_a_model_that_says_one_class_of_everything():
    sure = np.tile([0.98, 0.01, 0.01], (9, 1))
    shares = class_shares("predictions", sure.argmax(axis=1), np.empty(0, dtype=np.int64), num=3)
    assert shares.tolist() == [1, 0, 0]
    random = np.random.default_rng(0)
    assert len(choose(sure, EVERY, shares, num=5, random=random)) == 5


def test_within_a_class_the_chance_is_in_proportion_to_confidence():
    """One of the second class: 0.9 against 0.6 and 0.5."""
    eligible = np.array([label == 1 for label in CLASSES])
    rows = [
        int(
            choose(
                PROBABILITIES,
                eligible,
                np.array([0.0, 1.0, 0.0]),
                num=1,
                random=np.random.default_rng(seed),
            )[0]
        )
        for seed in range(3000)
    ]
    counted = Counter(rows)
    for row, chance in zip((5, 6, 7), (0.45, 0.3, 0.25)):
        deviation = math.sqrt(3000 * chance * (1 - chance))
        assert abs(counted[row] - 3000 * chance) < 5 * deviation


def test_probabilities_are_the_softmax_also_far_below_zero():
    scores = np.array([[-1000.0, -1001.0], [-3.0, -3.0]])
    assert softmax(scores)[0, 0] == pytest.approx(1 / (1 + math.exp(-1)), rel=1e-9)
    assert softmax(scores)[1] == pytest.approx([0.5, 0.5], rel=1e-12)
    assert softmax(scores, 2.0)[0, 0] == pytest.approx(1 / (1 + math.exp(-0.5)), rel=1e-9)


def test_the_temperature_makes_the_labels_likeliest():
    # Three of four right, each by four nats: the best temperature is 4 / log(3).
    scores = np.array([[0.0, -4.0]] * 4)
    temperature = fit_temperature(scores, np.array([0, 0, 0, 1]))
    assert temperature == pytest.approx(4 / math.log(3), rel=0.05)
    assert fit_temperature(scores, np.zeros(4, dtype=np.int64)) == 0.25, "the surest of the grid"
    assert fit_temperature(scores[:0], np.empty(0, dtype=np.int64)) == 1


def test_texts_of_hard_and_soft_labels():
    questions = [Question(tuple(tiny.texts([5, 5, 5], seed=n)), (1, 1, 1), ()) for n in range(9)]
    probabilities = np.array([[0.1, 0.895, 0.005], [0.3, 0.3, 0.4]])
    labels = PseudoLabels(2, np.array([3, 7]), probabilities)
    assert labels.texts(questions, soft=False) == [questions[3].options[1], questions[7].options[2]]
    soft = labels.texts(questions, soft=True)
    assert [text.weight for text in soft] == [0.1, 0.895, 0.3, 0.3, 0.4], "0.5 % is left out"
    assert soft[1].ids is questions[3].options[1].ids
    again = PseudoLabels.of(labels.state())
    assert again.round == 2 and (again.rows == labels.rows).all()
    assert again.probabilities.tobytes() == probabilities.tobytes()

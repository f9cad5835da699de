"""Who takes part in a round: the same for everybody who asks, fair over many rounds, as the rule
says.
"""

from __future__ import annotations

import math
import subprocess
import sys
from collections import Counter

import pytest

from fedsp_mpi.aggregation.sampling import participants
from helpers.paths import ROOT

RULES = ("uniform", "by_size", "round_robin")
SIZES = [10, 20, 30, 40, 50, 60, 70, 80]
ROUNDS = 2000


def drawn(
    rule: str, num: int | None, rounds: int = ROUNDS, sizes: list[int] = SIZES, seed: int = 3
) -> list[list[int]]:
    """The participants of rounds 1, 2, ..."""
    return [
        participants(rule, num, sizes, seed=seed, round=round) for round in range(1, rounds + 1)
    ]


def counts(rounds: list[list[int]], num_clients: int = len(SIZES)) -> list[int]:
    """In how many rounds each client took part."""
    found = Counter(client for chosen in rounds for client in chosen)
    return [found[client] for client in range(num_clients)]


def spread(chance: float, rounds: int = ROUNDS) -> float:
    """Standard deviation of the number of rounds that a client with this chance takes part in."""
    return math.sqrt(rounds * chance * (1 - chance))


@pytest.mark.parametrize("rule", RULES)
def test_everybody_takes_part_where_no_number_is_given(rule):
    for num in (None, len(SIZES), len(SIZES) + 1):
        assert drawn(rule, num, rounds=3) == [list(range(len(SIZES)))] * 3


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("num", [1, 3, 7])
def test_so_many_different_clients_in_ascending_order(rule, num):
    for chosen in drawn(rule, num, rounds=200):
        assert len(chosen) == len(set(chosen)) == num and chosen == sorted(chosen)
        assert all(type(client) is int and 0 <= client < len(SIZES) for client in chosen)


@pytest.mark.parametrize("rule", RULES)
def test_every_call_gives_the_same_answer_whatever_was_asked_before(rule):
    rounds = drawn(rule, 3, rounds=50)
    backwards = [participants(rule, 3, SIZES, seed=3, round=round) for round in range(50, 0, -1)]
    assert backwards[::-1] == rounds == drawn(rule, 3, rounds=50)


@pytest.mark.parametrize("rule", RULES)
def test_seed_and_round_change_the_answer(rule):
    rounds = drawn(rule, 3, rounds=20)
    assert rounds != drawn(rule, 3, rounds=20, seed=4)
    assert len({tuple(chosen) for chosen in rounds}) > 5


@pytest.mark.parametrize("hash_seed", ["0", "1"])
def test_another_process_gets_the_same_answer(hash_seed):
    code = (
        "from fedsp_mpi.aggregation.sampling import participants\n"
        f"print([participants(rule, 3, {SIZES}, seed=3, round=round) for rule in {RULES} for round "
        "in range(1, 11)])"
    )
    env = {"PYTHONHASHSEED": hash_seed, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", code], env=env, capture_output=True, text=True, timeout=60
    )
    assert done.stdout.strip() == str(
        [chosen for rule in RULES for chosen in drawn(rule, 3, rounds=10)]
    ), done.stderr


# -- the rules -------------------------------------------------------------------------------------


def test_uniform_is_fair_whatever_the_sizes():
    chance = 3 / len(SIZES)
    for found in counts(drawn("uniform", 3)):
        assert abs(found - chance * ROUNDS) < 5 * spread(chance)
    assert drawn("uniform", 3, rounds=50) == drawn("uniform", 3, rounds=50, sizes=SIZES[::-1])


def test_uniform_draws_every_pair_alike():
    """A client's chance does not hang on who else takes part."""
    pairs = Counter(tuple(chosen) for chosen in drawn("uniform", 2, sizes=[1] * 5))
    assert len(pairs) == 10
    assert all(abs(found - ROUNDS / 10) < 5 * spread(1 / 10) for found in pairs.values())


def test_by_size_of_one_client_is_in_proportion():
    for size, found in zip(SIZES, counts(drawn("by_size", 1))):
        chance = size / sum(SIZES)
        assert abs(found - chance * ROUNDS) < 5 * spread(chance)


def test_by_size_takes_larger_clients_more_often():
    found = counts(drawn("by_size", 3))
    assert found == sorted(found) and found[0] > 0 and found[-1] > 3 * found[0]


def test_by_size_of_equal_clients_is_fair():
    chance = 3 / 8
    for found in counts(drawn("by_size", 3, sizes=[7] * 8)):
        assert abs(found - chance * ROUNDS) < 5 * spread(chance)


@pytest.mark.parametrize("num", [1, 2, 4])
def test_round_robin_has_everybody_once_in_a_cycle(num):
    length = len(SIZES) // num
    rounds = drawn("round_robin", num, rounds=3 * length)
    cycles = [rounds[start : start + length] for start in range(0, len(rounds), length)]
    assert all(counts(cycle) == [1] * len(SIZES) for cycle in cycles)
    assert cycles[0] == cycles[1] == cycles[2]


@pytest.mark.parametrize("num", [3, 5, 7])
def test_round_robin_leaves_nobody_behind_where_cycles_do_not_end_with_a_round(num):
    rounds = drawn("round_robin", num, rounds=3 * len(SIZES))
    for done in range(1, len(rounds) + 1):
        found = counts(rounds[:done])
        assert max(found) - min(found) <= 1
    assert counts(rounds) == [3 * num] * len(SIZES)


def test_the_order_of_round_robin_is_drawn_once_for_a_run():
    orders = {
        tuple(client for [client] in drawn("round_robin", 1, rounds=8, seed=seed))
        for seed in range(10)
    }
    assert len(orders) == 10 and all(sorted(order) == list(range(8)) for order in orders)

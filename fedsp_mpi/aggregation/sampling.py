"""The clients that take part in a round; every rank computes the same ones."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import numpy as np

from fedsp_mpi import rng

Rule = Literal["uniform", "by_size", "round_robin"]


def participants(
    rule: Rule, num: int | None, sizes: Sequence[int], *, seed: int, round: int
) -> list[int]:
    """Return the ids of a round's clients, ascending, each at most once.

    Args:
        rule: "uniform", each client is as likely as any other (McMahan et al., 2017, algorithm 1);
            "by_size", drawn one after the other with a probability proportional to its shard;
            "round_robin", in an order that is drawn once, `num` after `num`.
        num: clients in a round; None takes all.
        sizes: examples of every client, by id.
        seed: of the run.
        round: from 1.
    """
    num_clients = len(sizes)
    if num is None or num >= num_clients:
        return list(range(num_clients))
    if rule == "round_robin":
        order = rng.generator(seed, "sampling order").permutation(num_clients)
        places = range((round - 1) * num, round * num)
        return sorted(int(order[place % num_clients]) for place in places)
    chances = None
    if rule == "by_size":
        chances = [size / sum(sizes) for size in sizes]
    random = rng.generator(seed, "sampling", round)
    return sorted(random.choice(num_clients, num, replace=False, p=chances).tolist())


def labellers(num: int, candidates: Sequence[int], *, seed: int, round: int) -> list[int]:
    """Return the ids of the clients that label their text in a round, ascending.

    Args:
        num: of them; where there are fewer candidates, these are all.
        candidates: ids of the clients that hold text without labels.
        seed: of the run.
        round: from 1.
    """
    if num >= len(candidates):
        return sorted(candidates)
    random = rng.generator(seed, "labelling", round)
    return sorted(random.choice(np.array(candidates), num, replace=False).tolist())

"""Which clients take part in a round; the same for everybody who asks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from fedsp_mpi import rng

Rule = Literal["uniform", "by_size", "round_robin"]


def participants(
    rule: Rule, num: int | None, sizes: Sequence[int], seed: int, round: int
) -> list[int]:
    """The ids of a round's clients, ascending, each at most once.

    Args:
        rule: "uniform", each client is as likely as any other (McMahan et al., 2017, algorithm 1);
            "by_size", drawn one after the other with a chance that is proportional to its shard;
            "round_robin", in an order that is drawn once, `num` after `num`.
        num: clients in a round; None takes all.
        sizes: examples of every client, by id.
        seed: of the run.
        round: from 1.
    """
    if num is None or num >= len(sizes):
        return list(range(len(sizes)))
    if rule == "round_robin":
        order = rng.generator(seed, "sampling order").permutation(len(sizes))
        return sorted(int(order[i % len(sizes)]) for i in range((round - 1) * num, round * num))
    chances = None if rule == "uniform" else [size / sum(sizes) for size in sizes]
    return sorted(
        rng.generator(seed, "sampling", round)
        .choice(len(sizes), num, replace=False, p=chances)
        .tolist()
    )

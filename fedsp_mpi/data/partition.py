"""Who gets which examples: pure functions from counts or labels and a seed to index arrays.

A partition is a list of `num_shards` int64 arrays; shard 0 is the server's, shard k + 1 is client
k's. Every index occurs exactly once, no client's shard is empty, and each stays in shuffled order.
The same arguments give the same arrays on every machine, whoever asks.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from fedsp_mpi.rng import generator


def divide(
    labels: Sequence[object],
    num_clients: int,
    seed: int,
    kind: str = "iid",
    alpha: float = 0.5,
    share: float | None = None,
) -> list[np.ndarray]:
    """The server's shard, then each client's.

    Args:
        labels: one label per example, [num_examples]; only "labels" looks at them.
        kind: "iid", "labels" or "quantity": see `iid`, `dirichlet_labels`, `quantity`.
        alpha: of the skew.
        share: the server's: None for a shard like a client's; otherwise it is drawn first, without
            skew: so many examples, or, below 1, that fraction of all, at least one; 0 leaves it
            without any.

    Raises:
        ValueError: fewer examples than owners, or an alpha that is not a positive number.
    """
    kinds: dict[str, Callable[[Sequence[object], int], list[np.ndarray]]] = {
        "iid": lambda some, shards: iid(len(some), shards, seed),
        "labels": lambda some, shards: dirichlet_labels(some, shards, alpha, seed),
        "quantity": lambda some, shards: quantity(len(some), shards, alpha, seed),
    }
    if share is None:
        return kinds[kind](labels, num_clients + 1)
    mine = int(share) if share >= 1 else max(1, round(share * len(labels))) if share else 0
    if len(labels) < mine + num_clients:
        raise ValueError(
            f"found {len(labels)} examples for a server's share of {mine} and {num_clients} "
            "clients, expected at least "
            f"{mine + num_clients}; lower data.server_share, or take fewer clients or more data"
        )
    order = generator(seed, "iid partition").permutation(len(labels)).astype(np.int64)
    rest = order[mine:]
    return [
        order[:mine],
        *(rest[chosen] for chosen in kinds[kind]([labels[i] for i in rest], num_clients)),
    ]


def iid(num_examples: int, num_shards: int, seed: int) -> list[np.ndarray]:
    """Shuffle once and cut into nearly equal shards; sizes differ by one at most, the first shards
    are the larger ones.

    Source: FedSP's reference code, which cuts the training set into num_clients + 1 shards, the
    first for the server.

    Raises:
        ValueError: fewer examples than shards, or no shard.
    """
    _require_enough(num_examples, num_shards)
    order = generator(seed, "iid partition").permutation(num_examples).astype(np.int64)
    return list(np.array_split(order, num_shards))


def dirichlet_labels(
    labels: Sequence[object], num_shards: int, alpha: float, seed: int
) -> list[np.ndarray]:
    """Label skew: each label's examples are dealt to the shards by proportions drawn from
    Dirichlet(alpha).

    A small `alpha` gives each shard few labels; a large one comes close to `iid`. A shard that got
    nothing takes one example from the shard that is the largest at that moment.

    Args:
        labels: one label per example (numbers or strings), [num_examples].

    Source: Hsu, Qi, Brown 2019, "Measuring the Effects of Non-Identical Data Distribution for
    Federated Visual Classification", turned round: they draw the labels of a shard, here the shards
    of a label, so that all is used.

    Raises:
        ValueError: fewer examples than shards, no shard, or an alpha that is not a positive number.
    """
    _require_enough(len(labels), num_shards)
    _require_alpha(alpha)
    rng = generator(seed, "label partition")
    dealt: list[list[np.ndarray]] = [[] for _ in range(num_shards)]
    for members in _by_label(labels).values():
        pieces = np.split(rng.permutation(members), _cuts(rng, alpha, num_shards, len(members)))
        for shard, piece in zip(dealt, pieces):
            shard.append(piece)
    return _fill_empty([rng.permutation(np.concatenate(pieces)) for pieces in dealt])


def quantity(num_examples: int, num_shards: int, alpha: float, seed: int) -> list[np.ndarray]:
    """Quantity skew: each shard gets one example, and the rest in proportions drawn from
    Dirichlet(alpha).

    Source: Li, Diao, Chen, He 2022, "Federated Learning on Non-IID Data Silos", with the one
    example each added here.

    Raises:
        ValueError: fewer examples than shards, no shard, or an alpha that is not a positive number.
    """
    _require_enough(num_examples, num_shards)
    _require_alpha(alpha)
    rng = generator(seed, "quantity partition")
    order = rng.permutation(num_examples).astype(np.int64)
    cuts = _cuts(rng, alpha, num_shards, num_examples - num_shards)
    return np.split(order, cuts + np.arange(1, num_shards))


def few_shot(labels: Sequence[object], shots: int, seed: int) -> np.ndarray:
    """`shots` examples of each label, without repetition, shuffled: int64 indices, [num_labels *
    shots].

    Raises:
        ValueError: `shots` below 1, no labels, or a label with fewer than `shots` examples.
    """
    if shots < 1 or not len(labels):
        raise ValueError(
            f"found {shots} shots of {len(labels)} examples, expected at least 1 of "
            "each; raise them"
        )
    rng = generator(seed, "few shots")
    chosen = []
    for label, members in _by_label(labels).items():
        if len(members) < shots:
            raise ValueError(
                f"found {len(members)} examples with label {label!r}, expected at least "
                f"{shots}; ask for fewer shots"
            )
        chosen.append(rng.choice(members, size=shots, replace=False))
    return rng.permutation(np.concatenate(chosen))


def _by_label(labels: Sequence[object]) -> dict[object, np.ndarray]:
    """Label -> its example indices, int64, ascending; the labels in sorted order, so that the draws
    have one order.
    """
    names, which = np.unique(np.asarray(labels), return_inverse=True)
    return {
        name: np.flatnonzero(which == k).astype(np.int64) for k, name in enumerate(names.tolist())
    }


def _cuts(rng: np.random.Generator, alpha: float, num_shards: int, num_examples: int) -> np.ndarray:
    """Where to cut `num_examples` into pieces of Dirichlet(alpha) proportions: int64, ascending,
    [num_shards - 1].
    """
    ends = np.cumsum(rng.dirichlet(np.full(num_shards, alpha)))[:-1]
    return np.minimum(np.rint(ends * num_examples), num_examples).astype(np.int64)


def _fill_empty(shards: list[np.ndarray]) -> list[np.ndarray]:
    """Give each empty shard the last example of the shard that is the largest at that moment."""
    for k in range(len(shards)):
        if not len(shards[k]):
            largest = max(range(len(shards)), key=lambda j: len(shards[j]))
            shards[largest], shards[k] = shards[largest][:-1], shards[largest][-1:]
    return shards


def _require_enough(num_examples: int, num_shards: int) -> None:
    if num_shards < 1:
        raise ValueError(
            f"found {num_shards} shards, expected at least 1; the server and each client need one"
        )
    if num_examples < num_shards:
        raise ValueError(
            f"found {num_examples} examples for {num_shards} shards (the server's and one "
            "per client), "
            f"expected at least {num_shards} examples; take fewer clients or more data"
        )


def _require_alpha(alpha: float) -> None:
    if not (np.isfinite(alpha) and alpha > 0):
        raise ValueError(
            f"found alpha {alpha}, expected a positive number; 0.1 is strong skew, 100 hardly any"
        )

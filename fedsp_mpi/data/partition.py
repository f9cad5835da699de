"""Divide examples among server and clients: from counts or labels and a seed to index arrays.

A partition is a list of `num_shards` int64 arrays; shard 0 is the server's, shard k + 1 is client
k's. Every index occurs exactly once (`by_column` leaves out what has no value), no client's shard
is empty, and each stays in shuffled order.
The same arguments give the same arrays on every rank and machine.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from fedsp_mpi.config.limits import MOST_SILOS
from fedsp_mpi.rng import generator

ColumnValue = bool | int | float | str


def divide(
    labels: Sequence[object],
    num_clients: int,
    seed: int,
    *,
    kind: str = "iid",
    alpha: float = 0.5,
    share: float | None = None,
) -> list[np.ndarray]:
    """Return the server's shard, then each client's, int64 [size of the shard].

    Args:
        labels: one label per example, [num_examples]; only "labels" looks at them.
        num_clients: number of clients; with 0 and a share, nobody owns what the server leaves.
        seed: of the run.
        kind: "iid", "labels" or "quantity": see `iid`, `dirichlet_labels`, `quantity`.
        alpha: of the skew.
        share: None for a server's shard like a client's. Otherwise the server's is drawn first,
            without skew: from 1 a number of examples, below 1 a fraction of all, at least one; 0
            leaves the server without any.

    Raises:
        ValueError: fewer examples than owners, or an alpha that is not a positive number.
    """
    if share is None:
        return _shards(labels, num_clients + 1, seed, kind=kind, alpha=alpha)
    num_server = _server_share(share, len(labels))
    if len(labels) < num_server + num_clients:
        raise ValueError(
            f"found {len(labels)} examples for a server's share of {num_server} and {num_clients} "
            f"clients, expected at least {num_server + num_clients}; lower data.server_share, or "
            "take fewer clients or more data"
        )
    order = generator(seed, "iid partition").permutation(len(labels)).astype(np.int64)
    if num_clients == 0:
        return [order[:num_server]]
    remaining = order[num_server:]
    remaining_labels = [labels[index] for index in remaining]
    shards = _shards(remaining_labels, num_clients, seed, kind=kind, alpha=alpha)
    return [order[:num_server], *(remaining[shard] for shard in shards)]


@dataclass(frozen=True)
class ColumnShards:
    """Shards of which each client's holds one value of a column.

    Attributes:
        shards: the server's, then each client's, int64 [size of the shard].
        values: of the clients, ascending.
        num_left_out: number of examples without a value, which nobody owns.
    """

    shards: list[np.ndarray]
    values: list[ColumnValue]
    num_left_out: int


def by_column(values: Sequence[ColumnValue | None], seed: int, share: float = 0) -> ColumnShards:
    """Make each value of a column a client, which owns all examples with it.

    Args:
        values: one value per example, all of one type, [num_examples]; None where there is none.
        seed: of the run.
        share: the server's, which is drawn first, from the examples with a value: see `divide`.

    Raises:
        ValueError: there is no value, or there are too many, or the server's share leaves nothing
            of one.
    """
    with_value = np.flatnonzero([value is not None for value in values])
    clients = sorted({value for value in values if value is not None})
    if not 1 <= len(clients) <= MOST_SILOS:
        raise ValueError(
            f"found {len(clients)} different values in {len(values)} examples, expected from 1 to "
            f"{MOST_SILOS}, each of which is a client; name another column"
        )
    order = with_value[generator(seed, "iid partition").permutation(len(with_value))].astype(
        np.int64
    )
    num_server = _server_share(share, len(with_value))
    members: dict[ColumnValue, list[int]] = {client: [] for client in clients}
    for index in order[num_server:].tolist():
        value = values[index]
        assert value is not None
        members[value].append(index)
    num_empty = sum(not indices for indices in members.values())
    if num_empty:
        raise ValueError(
            f"found no example of {num_empty} of the {len(clients)} values after the server's "
            f"share of {num_server} of {len(with_value)}, expected at least 1 each; lower "
            "data.server_share"
        )
    shards = [np.array(indices, dtype=np.int64) for indices in members.values()]
    return ColumnShards([order[:num_server], *shards], clients, len(values) - len(with_value))


def _server_share(share: float, num_examples: int) -> int:
    """Return the number of examples that a share means."""
    if share == 0:
        return 0
    if share >= 1:
        return int(share)
    return max(1, round(share * num_examples))


def _shards(
    labels: Sequence[object], num_shards: int, seed: int, *, kind: str, alpha: float
) -> list[np.ndarray]:
    if kind == "labels":
        return dirichlet_labels(labels, num_shards, alpha=alpha, seed=seed)
    if kind == "quantity":
        return quantity(len(labels), num_shards, alpha=alpha, seed=seed)
    assert kind == "iid", kind
    return iid(len(labels), num_shards, seed)


def iid(num_examples: int, num_shards: int, seed: int) -> list[np.ndarray]:
    """Shuffle once and cut into nearly equal shards, int64 [size of the shard].

    Sizes differ by one at most; the first shards are the larger ones.

    Args:
        num_examples: number of examples.
        num_shards: number of shards.
        seed: of the run.

    Source: FedSP's reference code, which cuts the training set into num_clients + 1 shards, the
    first for the server.

    Raises:
        ValueError: fewer examples than shards, or no shard.
    """
    _require_enough(num_examples, num_shards)
    order = generator(seed, "iid partition").permutation(num_examples).astype(np.int64)
    return list(np.array_split(order, num_shards))


def dirichlet_labels(
    labels: Sequence[object], num_shards: int, *, alpha: float, seed: int
) -> list[np.ndarray]:
    """Deal each label's examples to the shards in proportions drawn from Dirichlet(alpha).

    This is label skew: a small `alpha` gives each shard few labels; a large one comes close to
    `iid`. A shard that got nothing takes one example from the shard that is the largest at that
    moment.

    Args:
        labels: one label per example (numbers or strings), [num_examples].
        num_shards: number of shards.
        alpha: of the Dirichlet distribution.
        seed: of the run.

    Source: Hsu, Qi, Brown 2019, "Measuring the Effects of Non-Identical Data Distribution for
    Federated Visual Classification", turned round: they draw the labels of a shard, here the shards
    of a label, so that all examples are used.

    Returns:
        The shards, int64 [size of the shard].

    Raises:
        ValueError: fewer examples than shards, no shard, or an alpha that is not a positive number.
    """
    _require_enough(len(labels), num_shards)
    _require_alpha(alpha)
    rng = generator(seed, "label partition")
    dealt: list[list[np.ndarray]] = [[] for _ in range(num_shards)]
    for members in _by_label(labels).values():
        # The order of these two draws is part of what a seed means.
        order = rng.permutation(members)
        cuts = _cuts(rng, alpha, num_shards=num_shards, num_examples=len(members))
        pieces = np.split(order, cuts)
        for shard, piece in zip(dealt, pieces):
            shard.append(piece)
    return _fill_empty([rng.permutation(np.concatenate(pieces)) for pieces in dealt])


def quantity(num_examples: int, num_shards: int, *, alpha: float, seed: int) -> list[np.ndarray]:
    """Give each shard one example, and the others in proportions drawn from Dirichlet(alpha).

    This is quantity skew.

    Args:
        num_examples: number of examples.
        num_shards: number of shards.
        alpha: of the Dirichlet distribution.
        seed: of the run.

    Source: Li, Diao, Chen, He 2022, "Federated Learning on Non-IID Data Silos", with the one
    example each added here.

    Returns:
        The shards, int64 [size of the shard].

    Raises:
        ValueError: fewer examples than shards, no shard, or an alpha that is not a positive number.
    """
    _require_enough(num_examples, num_shards)
    _require_alpha(alpha)
    rng = generator(seed, "quantity partition")
    order = rng.permutation(num_examples).astype(np.int64)
    num_free = num_examples - num_shards
    cuts = _cuts(rng, alpha, num_shards=num_shards, num_examples=num_free)
    return np.split(order, cuts + np.arange(1, num_shards))


def few_shot(labels: Sequence[object], shots: int, seed: int) -> np.ndarray:
    """Draw `shots` examples of each label, without repetition, shuffled.

    Args:
        labels: one label per example, [num_examples].
        shots: number of examples of each label.
        seed: of the run.

    Returns:
        int64 [num_labels * shots], indices of the examples.

    Raises:
        ValueError: `shots` below 1, no labels, or a label with fewer than `shots` examples.
    """
    if shots < 1 or not len(labels):
        raise ValueError(
            f"found {shots} shots of {len(labels)} examples, expected at least 1 of each; raise "
            "them"
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
    """Return the indices of each label's examples, int64 [number of them], ascending.

    The labels are sorted, so that what is drawn label by label is drawn in one order.
    """
    names, label_ids = np.unique(np.asarray(labels), return_inverse=True)
    return {
        name: np.flatnonzero(label_ids == label_id).astype(np.int64)
        for label_id, name in enumerate(names.tolist())
    }


def _cuts(
    rng: np.random.Generator, alpha: float, *, num_shards: int, num_examples: int
) -> np.ndarray:
    """Draw where to cut `num_examples` into pieces of Dirichlet(alpha) proportions.

    Returns:
        int64 [num_shards - 1], ascending.
    """
    ends = np.cumsum(rng.dirichlet(np.full(num_shards, alpha)))[:-1]
    return np.minimum(np.rint(ends * num_examples), num_examples).astype(np.int64)


def _fill_empty(shards: list[np.ndarray]) -> list[np.ndarray]:
    """Give each empty shard the last example of the shard that is the largest at that moment."""
    for index in range(len(shards)):
        if len(shards[index]) > 0:
            continue
        largest = max(range(len(shards)), key=lambda other: len(shards[other]))
        shards[index] = shards[largest][-1:]
        shards[largest] = shards[largest][:-1]
    return shards


def _require_enough(num_examples: int, num_shards: int) -> None:
    if num_shards < 1:
        raise ValueError(
            f"found {num_shards} shards, expected at least 1; the server and each client need one"
        )
    if num_examples < num_shards:
        raise ValueError(
            f"found {num_examples} examples for {num_shards} shards (the server's and one per "
            f"client), expected at least {num_shards} examples; take fewer clients or more data"
        )


def _require_alpha(alpha: float) -> None:
    if not (np.isfinite(alpha) and alpha > 0):
        raise ValueError(
            f"found alpha {alpha}, expected a positive number; 0.1 is strong skew, 100 hardly any"
        )

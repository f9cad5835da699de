"""Who gets which examples: every index once, no empty shard, the same everywhere, skew where skew
was asked for.
"""

from collections import Counter

import numpy as np
import pytest

from fedsp_mpi.data import partition

# Rows of the training sets after their validation was taken out, where it had to be.
REAL_COUNTS = {
    "arc_challenge": 1119,
    "arc_easy": 2251,
    "web_questions": 3401,
    "hellaswag": 35915,
    "sst2": 67349,
}
KNOWN = {
    "iid": [[6, 7, 1], [0, 2, 4], [3, 5]],
    "quantity": [[1], [5, 2, 3, 7, 0, 6], [4]],
    "labels": [[6], [1, 0, 7], [5, 3, 4, 2]],
    "few": [0, 2, 3, 7],
}


def labels_of(num_examples: int, num_labels: int) -> np.ndarray:
    return np.random.default_rng(5).integers(0, num_labels, num_examples)


def require_partition(shards: list[np.ndarray], num_examples: int, num_shards: int) -> None:
    assert len(shards) == num_shards
    assert all(shard.dtype == np.int64 and shard.ndim == 1 and len(shard) for shard in shards)
    assert np.array_equal(np.sort(np.concatenate(shards)), np.arange(num_examples))


def make(
    kind: str, num_examples: int, num_shards: int, seed: int, alpha: float = 0.5
) -> list[np.ndarray]:
    if kind == "iid":
        return partition.iid(num_examples, num_shards, seed)
    if kind == "quantity":
        return partition.quantity(num_examples, num_shards, alpha=alpha, seed=seed)
    return partition.dirichlet_labels(
        labels_of(num_examples, 4), num_shards, alpha=alpha, seed=seed
    )


@pytest.mark.parametrize("kind", ["iid", "quantity", "labels"])
@pytest.mark.parametrize("num_examples", [*REAL_COUNTS.values(), 11, 12])
@pytest.mark.parametrize("num_shards", [1, 3, 11])
def test_every_index_is_in_exactly_one_shard(kind, num_examples, num_shards):
    require_partition(make(kind, num_examples, num_shards, seed=0), num_examples, num_shards)


@pytest.mark.parametrize("kind", ["quantity", "labels"])
@pytest.mark.parametrize("alpha", [1e-3, 0.1, 1.0, 1e3])
def test_no_shard_is_empty_however_strong_the_skew(kind, alpha):
    for seed in range(20):
        require_partition(make(kind, 120, 101, seed, alpha), 120, 101)


@pytest.mark.parametrize("kind", ["iid", "quantity", "labels"])
def test_depends_on_the_seed_and_on_nothing_else(kind):
    first, again, other = (make(kind, 2251, 11, seed) for seed in (12345, 12345, 12346))
    assert all(np.array_equal(a, b) for a, b in zip(first, again))
    assert any(not np.array_equal(a, b) for a, b in zip(first, other))
    assert all(not np.array_equal(shard, np.sort(shard)) for shard in first if len(shard) > 20)


def test_known_draw():
    """A record is reproduced from its seed, so the draw of a seed stays what it is."""
    assert [shard.tolist() for shard in partition.iid(8, 3, 12345)] == KNOWN["iid"]
    assert [shard.tolist() for shard in partition.quantity(8, 3, alpha=0.5, seed=12345)] == KNOWN[
        "quantity"
    ]
    assert [
        s.tolist() for s in partition.dirichlet_labels(list("aabbabba"), 3, alpha=0.5, seed=12345)
    ] == KNOWN["labels"]
    assert partition.few_shot(list("aabbabba"), 2, 12345).tolist() == KNOWN["few"]


def test_iid_is_nearly_equal():
    sizes = [len(shard) for shard in partition.iid(2251, 11, 0)]
    assert sizes == [205] * 7 + [204] * 4


def test_iid_holds_each_label_as_often_as_the_whole():
    labels = labels_of(67349, 2)
    shares = [labels[shard].mean() for shard in partition.iid(67349, 11, 0)]
    assert max(abs(share - labels.mean()) for share in shares) < 0.03


def test_label_skew_grows_as_alpha_falls():
    labels = labels_of(10001, 4)

    def largest_share(alpha: float) -> float:
        shards = partition.dirichlet_labels(labels, 11, alpha=alpha, seed=0)
        return float(np.mean([max(Counter(labels[s].tolist()).values()) / len(s) for s in shards]))

    strong, middle, weak = largest_share(0.05), largest_share(1.0), largest_share(1e4)
    assert strong > 0.75 > middle > weak > 0.25
    assert weak < 0.28


def test_quantity_skew_grows_as_alpha_falls_and_keeps_the_labels():
    spread = {
        alpha: np.std([len(s) for s in partition.quantity(10001, 11, alpha=alpha, seed=0)])
        for alpha in (0.1, 1.0, 1e4)
    }
    assert spread[0.1] > spread[1.0] > 10 * spread[1e4]
    labels = labels_of(10001, 4)
    big = max(partition.quantity(10001, 11, alpha=0.5, seed=0), key=len)
    assert abs((labels[big] == 0).mean() - 0.25) < 0.03


def test_labels_may_be_words():
    words = np.array(["yes", "no", "maybe"])[labels_of(300, 3)]
    require_partition(partition.dirichlet_labels(words.tolist(), 5, alpha=0.3, seed=1), 300, 5)


def test_few_shot_takes_the_same_number_of_each_label():
    labels = labels_of(10001, 4)
    chosen = partition.few_shot(labels, 16, 3)
    assert chosen.dtype == np.int64 and len(set(chosen.tolist())) == 64
    assert Counter(labels[chosen].tolist()) == dict.fromkeys(range(4), 16)
    assert np.array_equal(chosen, partition.few_shot(labels, 16, 3))
    assert not np.array_equal(chosen, partition.few_shot(labels, 16, 4))


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: partition.iid(10, 11, 0), ["found 10 examples", "at least 11", "fewer clients"]),
        (lambda: partition.iid(10, 0, 0), ["found 0 shards", "at least 1"]),
        (lambda: partition.quantity(3, 4, alpha=1.0, seed=0), ["found 3 examples", "at least 4"]),
        (lambda: partition.quantity(9, 4, alpha=0.0, seed=0), ["found alpha 0.0", "positive"]),
        (
            lambda: partition.dirichlet_labels([0, 1], 3, alpha=1.0, seed=0),
            ["found 2 examples", "at least 3"],
        ),
        (
            lambda: partition.dirichlet_labels([0, 1], 2, alpha=float("nan"), seed=0),
            ["found alpha nan", "positive"],
        ),
        (
            lambda: partition.few_shot([0, 0, 1], 2, 0),
            ["found 1 examples with label 1", "at least 2"],
        ),
        (lambda: partition.few_shot([0, 1], 0, 0), ["found 0 shots", "at least 1"]),
        (lambda: partition.few_shot([], 1, 0), ["0 examples", "at least 1"]),
    ],
)
def test_mistakes_are_told_in_one_line(call, words):
    with pytest.raises(ValueError) as told:
        call()
    assert "\n" not in str(told.value)
    assert all(word in str(told.value) for word in words), str(told.value)


@pytest.mark.parametrize("kind", ["iid", "labels", "quantity"])
@pytest.mark.parametrize(
    ("share", "mine"), [(None, None), (0, 0), (1, 1), (16, 16), (0.01, 2), (0.5, 100)]
)
def test_the_servers_share_and_the_clients_shards_are_everything(kind, share, mine):
    labels = labels_of(200, 4).tolist()
    shards = partition.divide(labels, 7, 3, kind=kind, alpha=0.3, share=share)
    assert np.array_equal(np.sort(np.concatenate(shards)), np.arange(200)) and all(
        map(len, shards[1:])
    )
    assert mine is None or len(shards[0]) == mine
    if share is not None:  # whatever the clients' skew, the server's is the same sample
        assert (
            shards[0].tolist()
            == partition.divide(labels, 7, 3, kind="iid", alpha=0.3, share=share)[0].tolist()
        )


@pytest.mark.parametrize("kind", ["iid", "labels", "quantity"])
def test_without_clients_nobody_owns_what_the_server_leaves(kind):
    labels = labels_of(200, 4).tolist()
    [mine] = partition.divide(labels, 0, 3, kind=kind, share=0.1)
    assert mine.tolist() == partition.divide(labels, 7, 3, share=0.1)[0].tolist()


def test_without_a_share_the_server_is_one_owner_like_the_others():
    found = partition.divide([0] * 40, 3, 5)
    assert [shard.tolist() for shard in found] == [
        shard.tolist() for shard in partition.iid(40, 4, 5)
    ]


def test_a_column_gives_each_value_all_its_examples():
    values = ["b", None, "a", "c", "a", None, "b", "a", "c", "b"] * 7
    found = partition.by_column(values, 3)
    assert found.values == ["a", "b", "c"] and found.num_left_out == 14
    assert len(found.shards[0]) == 0
    for value, shard in zip(found.values, found.shards[1:]):
        assert shard.dtype == np.int64 and shard.tolist() != sorted(shard.tolist())
        assert sorted(shard) == [index for index, other in enumerate(values) if other == value]


def test_the_server_draws_first_from_what_has_a_value():
    values = [None if index % 5 == 0 else index % 3 for index in range(100)]
    alone = partition.by_column(values, 3)
    for share, num_server in ((16, 16), (0.25, 20), (0.001, 1)):
        found = partition.by_column(values, 3, share)
        assert len(found.shards[0]) == num_server and found.num_left_out == 20
        together = np.concatenate(found.shards)
        assert sorted(together) == [index for index in range(100) if index % 5]
        for all_of_value, shard in zip(alone.shards[1:], found.shards[1:]):
            taken = set(found.shards[0].tolist())
            # The others stay as they were.
            assert shard.tolist() == [i for i in all_of_value.tolist() if i not in taken]


@pytest.mark.parametrize(
    ("values", "share", "words"),
    [
        ([None, None], 0, ["found 0 different values in 2 examples", "name another column"]),
        (list(range(5001)), 0, ["found 5001 different values", "to 5000"]),
        ([1, 1, 2], 2, ["no example of 1 of the 2 values", "lower data.server_share"]),
    ],
)
def test_a_column_that_makes_no_clients_is_told_in_one_line(values, share, words):
    with pytest.raises(ValueError) as told:
        partition.by_column(values, 0, share)
    assert "\n" not in str(told.value)
    assert all(word in str(told.value) for word in words), str(told.value)

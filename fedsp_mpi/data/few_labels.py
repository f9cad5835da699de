"""Few labels among much text: who has how many, which rows they are of, and what a client holds."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from fedsp_mpi.data.tokens import Question, Text
from fedsp_mpi.rng import generator


@dataclass(frozen=True)
class ClientText:
    """What one client holds where labels are few.

    Attributes:
        labelled: texts with their right answers.
        questions: the same with all choices.
        unlabelled: texts with all choices, of which no right one is named (`gold` is empty).
        reworded: the same in a second template's words; empty without one.
    """

    labelled: Sequence[Text]
    questions: Sequence[Question]
    unlabelled: Sequence[Question]
    reworded: Sequence[Question] = ()

    def __post_init__(self) -> None:
        assert not any(question.gold for question in (*self.unlabelled, *self.reworded))
        assert len(self.reworded) in (0, len(self.unlabelled))

    @property
    def labels(self) -> np.ndarray:
        """The classes of the labelled texts, int64 [labelled]."""
        return np.array([question.gold[0] for question in self.questions], dtype=np.int64)


def spread(sizes: Sequence[int], num_labels: int, *, gamma: float, seed: int) -> list[np.ndarray]:
    """Choose the labelled rows of each client, `num_labels` in all.

    How many a client has follows proportions drawn from Dirichlet(gamma); what does not fit into
    its text goes to the others in the same way. Which of its rows they are is drawn without regard
    to their classes.

    Args:
        sizes: number of examples of each client.
        num_labels: of all clients together.
        gamma: of the Dirichlet distribution.
        seed: of the run.

    Source: the data generator of AUG-FedPrompt (arXiv 2212.00192).

    Returns:
        Places in each client's shard, int64 [labels of the client], ascending.

    Raises:
        ValueError: there are fewer examples than labels.
    """
    counts = label_counts(sizes, num_labels, gamma=gamma, seed=seed)
    places: list[np.ndarray] = []
    for client, (size, count) in enumerate(zip(sizes, counts)):
        random = generator(seed, "labelled rows", client)
        chosen = random.choice(size, size=count, replace=False)
        places.append(np.sort(chosen).astype(np.int64))
    return places


def label_counts(sizes: Sequence[int], num_labels: int, *, gamma: float, seed: int) -> np.ndarray:
    """Return how many labels each client has, int64 [clients], which is at most its size.

    Args:
        sizes: as in `spread`.
        num_labels: as in `spread`.
        gamma: as in `spread`.
        seed: as in `spread`.

    Raises:
        ValueError: there are fewer examples than labels.
    """
    room = np.array(sizes, dtype=np.int64)
    if num_labels > room.sum():
        raise ValueError(
            f"found {num_labels} labels for {room.sum()} examples of {len(sizes)} clients, "
            "expected at most one each; lower data.labels, or take more data"
        )
    random = generator(seed, "label spread")
    proportions = random.dirichlet(np.full(len(sizes), gamma))
    counts = np.zeros(len(sizes), dtype=np.int64)
    while counts.sum() < num_labels:
        shares = np.where(counts < room, proportions, 0.0)
        if not shares.sum() > 0:  # who has a share is full
            shares = (room - counts).astype(np.float64)
        added = apportion(num_labels - int(counts.sum()), shares)
        counts = np.minimum(counts + added, room)
    return counts


def apportion(total: int, shares: np.ndarray) -> np.ndarray:
    """Divide a number by shares [parts] into whole numbers that add up to it, int64 [parts].

    By largest remainders, of equal ones the first.

    Args:
        total: to divide.
        shares: from 0, at least one of them above; they need not add up to 1.
    """
    exact = total * shares / shares.sum()
    parts = np.floor(exact).astype(np.int64)
    order = np.argsort(-(exact - parts), kind="stable")
    parts[order[: total - int(parts.sum())]] += 1
    return parts

"""Which unlabelled texts get a label, and which: pure functions of what a model says of them.

AUG-FedPrompt (arXiv 2212.00192): a quota for each class, in proportion to its share of the text;
within a class texts are drawn without replacement, with a probability in proportion to how sure the
model is. Shares are estimated: the classes of the unlabelled texts themselves are not known here.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from fedsp_mpi.data.few_labels import apportion
from fedsp_mpi.data.tokens import Question, Text
from fedsp_mpi.tensors import State

# Temperatures that are tried: a grid, from four times as sure to four times as unsure.
_TEMPERATURES = np.geomspace(0.25, 4.0, 65)
_LEAST_WEIGHT = 0.01  # of a class in a soft label; less is left out


@dataclass(frozen=True)
class PseudoLabels:
    """The pseudo-labels of one client.

    Attributes:
        round: in which they were made.
        rows: places among the client's unlabelled texts, int64 [labels], ascending.
        probabilities: of the classes, fp64 [labels, classes].
    """

    round: int
    rows: np.ndarray
    probabilities: np.ndarray

    @property
    def classes(self) -> np.ndarray:
        """The likeliest class of each, int64 [labels]."""
        return self.probabilities.argmax(axis=1)

    def texts(self, unlabelled: Sequence[Question], *, soft: bool) -> list[Text]:
        """Return the texts to train on: with the likeliest class as answer, or with all classes.

        Args:
            unlabelled: all unlabelled texts of the client.
            soft: whether a text stands once for each class, with its probability as weight.
        """
        texts: list[Text] = []
        for row, probabilities in zip(self.rows.tolist(), self.probabilities):
            options = unlabelled[row].options
            if not soft:
                texts.append(options[int(probabilities.argmax())])
                continue
            texts += [
                replace(option, weight=float(weight))
                for option, weight in zip(options, probabilities)
                if weight >= _LEAST_WEIGHT
            ]
        return texts

    def state(self) -> State:
        """Return this as a checkpoint stores it."""
        return {
            "round": np.array(self.round),
            "rows": self.rows,
            "probabilities": self.probabilities,
        }

    @classmethod
    def of(cls, state: State) -> PseudoLabels:
        """Read what `state()` returned, whose arrays belong to the labels from now on."""
        return cls(int(state["round"]), state["rows"], state["probabilities"])


def softmax(log_likelihoods: np.ndarray, temperature: float = 1.0) -> np.ndarray:
    """Return the probabilities of the classes, fp64 [texts, classes].

    Args:
        log_likelihoods: [texts, classes], in nats.
        temperature: that they are divided by.
    """
    scaled = log_likelihoods / temperature
    return np.exp(scaled - np.logaddexp.reduce(scaled, axis=1, keepdims=True))


def fit_temperature(log_likelihoods: np.ndarray, labels: np.ndarray) -> float:
    """Return the temperature under which labels are likeliest (Guo et al., 2017); 1 without any.

    Args:
        log_likelihoods: of labelled texts, [texts, classes], in nats.
        labels: of the same texts, int64 [texts].
    """
    if not len(labels):
        return 1.0
    losses = [
        -float(np.log(softmax(log_likelihoods, temperature)[np.arange(len(labels)), labels]).mean())
        for temperature in _TEMPERATURES
    ]
    return float(_TEMPERATURES[int(np.argmin(losses))])


def class_shares(quota: str, predicted: np.ndarray, labels: np.ndarray, *, num: int) -> np.ndarray:
    """Estimate the shares of the classes in the unlabelled text, fp64 [classes].

    Args:
        quota: "predictions", "labels" or "balanced"; see `augment.quota`.
        predicted: class that the model says of each unlabelled text, int64 [texts].
        labels: of the client's labelled texts, int64 [labelled].
        num: of classes.
    """
    if quota == "balanced":
        return np.full(num, 1 / num)
    counted = labels if quota == "labels" and len(labels) else predicted
    counts = np.bincount(counted, minlength=num)
    return counts / max(counts.sum(), 1)


def choose(
    probabilities: np.ndarray,
    eligible: np.ndarray,
    shares: np.ndarray,
    *,
    num: int,
    random: np.random.Generator,
) -> np.ndarray:
    """Choose the texts that get a label, int64 [at most num], ascending.

    Args:
        probabilities: of the classes, fp64 [texts, classes].
        eligible: whether a text may get a label, bool [texts].
        shares: of the classes, fp64 [classes]; each has that part of `num`, or as many eligible
            texts as there are of it.
        num: of texts that are wanted.
        random: draws them.
    """
    predicted = probabilities.argmax(axis=1)
    confidence = probabilities.max(axis=1)
    chosen = [np.empty(0, dtype=np.int64)]
    if num > 0 and shares.sum() > 0:
        for label, quota in enumerate(apportion(num, shares).tolist()):
            members = np.flatnonzero(eligible & (predicted == label))
            size = min(quota, len(members))
            if size:
                weights = confidence[members]
                drawn = random.choice(members, size, replace=False, p=weights / weights.sum())
                chosen.append(drawn.astype(np.int64))
    return np.sort(np.concatenate(chosen))

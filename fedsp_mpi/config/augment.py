"""The section `augment`: clients label their own unlabelled text, and train on it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from fedsp_mpi.config.options import option


@dataclass(frozen=True)
class AugmentConfig:
    """Pseudo-labels (AUG-FedPrompt, arXiv 2212.00192): where labels are few (`data.labels`, or
    silos with unlabelled rows), some clients of each round label their other text with the model
    that the last round has left, and train on both. See configs/aug_fedprompt/README.md.
    """

    clients: int = option(
        0,
        "that label in a round, at most, drawn anew in each; they take part in it, before others. "
        "A client's pseudo-labels count until it labels again. 0: nobody labels, and text without "
        "labels is not used",
        "clients",
    )
    per_client: int = option(
        100,
        "that a client trains on at most, its own labelled ones among them: pseudo-labels are made "
        "for those that are missing",
        "examples",
    )
    growth: int = option(0, "added to `per_client` in each round after `start_round`", "examples")
    start_round: int = option(1, "the first in which clients label", "round")
    confidence: float = option(
        0.0, "the least probability of the likeliest class that a pseudo-label is made of"
    )
    quota: Literal["predictions", "labels", "balanced"] = option(
        "predictions",
        "pseudo-labels of a class, in proportion to how often the model predicts it "
        "(`predictions`) or to the client's own `labels` (to the predictions, where it has none); "
        "`balanced`: as many of each class. Classes with too little text have fewer",
    )
    targets: Literal["hard", "soft"] = option(
        "hard", "train on the likeliest class, or on all classes by their probabilities (`soft`)"
    )
    second_template: str | None = option(
        None,
        "other words around the text, as `data.template`: texts of which the model says another "
        "class in them are not labelled; `null`: no such test, which takes as many forward passes "
        "again",
    )
    calibrate: bool = option(
        False,
        "divide log-likelihoods by a temperature that is fitted to the client's own labels, if it "
        "has any",
    )

    @property
    def is_on(self) -> bool:
        """Whether clients label text."""
        return self.clients > 0

    def num_examples(self, round: int) -> int:
        """Return the most examples that a client trains on from a round in which it labels."""
        return self.per_client + self.growth * (round - self.start_round)

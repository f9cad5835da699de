"""AUG-FedPrompt (arXiv 2212.00192): clients with few labels make more of them for their own text.

In some rounds a client labels its unlabelled text with the model and the prompt that came down, and
trains on its own labels and those. It wraps the clients of any method that trains on examples, so
prompts, adapters, all weights and FedSP's auxiliary model label alike, with the one model that the
clients of a process share.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

import numpy as np

from fedsp_mpi import rng
from fedsp_mpi.algorithms.base import ShardError, TextClient, WrappedClient
from fedsp_mpi.config import AugmentConfig
from fedsp_mpi.data import pseudo_labels
from fedsp_mpi.data.few_labels import ClientText
from fedsp_mpi.data.pseudo_labels import PseudoLabels
from fedsp_mpi.data.tokens import Question
from fedsp_mpi.record.client_cache import StateHolder
from fedsp_mpi.tensors import ClientError, NamedTensors, State, Update, join_states, part_of_state
from fedsp_mpi.training.device import oom_as_client_error

METRICS = ("pseudo_labels", "texts_scored", "seconds_labels")

# Returns the log-likelihoods of questions' choices under what a client holds: fp64
# [questions, choices], in nats.
Score = Callable[[Sequence[Question]], np.ndarray]


class AugmentedClient(WrappedClient):
    """Clients of a method that trains on examples, which label text of their own.

    An update counts for the client's labels, its own and pseudo-labels together. A client without
    any sends back what came down, and counts for nothing.

    Args:
        client: trains.
        texts: what each client holds, or why it cannot be used.
        settings: of the labels.
        seed: of the run.
        labels_in: returns whether a client labels in a round.
        score: what a client's model says of questions, once `client.hold` has loaded it.
        disclose: returns a number of examples as the client may say it; None: not at all.
    """

    def __init__(
        self,
        client: TextClient,
        texts: Mapping[int, ClientText | ShardError],
        *,
        settings: AugmentConfig,
        seed: int,
        labels_in: Callable[[int, int], bool],
        score: Score,
        disclose: Callable[[int], int | None] = lambda number: number,
    ) -> None:
        super().__init__(client)
        self._trainer = client
        self._texts = texts
        self._settings = settings
        self._seed = seed
        self._labels_in = labels_in
        self._score = score
        self._disclose = disclose
        self._states = LabelStates(client.states)

    @property
    def states(self) -> StateHolder:
        """What clients keep between rounds, pseudo-labels included."""
        return self._states

    def pseudo_labels(self, client: int) -> PseudoLabels | None:
        """Return the pseudo-labels that a client trains on; None if it has not made any yet."""
        return self._states.labels.get(client)

    def local_update(self, client: int, round: int, broadcast: NamedTensors) -> Update:
        """Label text if it is the client's turn, and train one client; see `Client.local_update`.

        Pseudo-labels stay where training fails.

        Raises:
            ClientError: as the client alone; OutOfMemoryError while labelling, ShardError.
        """
        text = self._texts[client]
        if isinstance(text, ShardError):
            raise text
        start = time.perf_counter()
        num_scored = 0
        if self._labels_in(client, round) and text.unlabelled:
            with oom_as_client_error():
                self._trainer.hold(client, broadcast)
                labels, num_scored = self._label(client, round, text)
            self._states.labels[client] = labels
        seconds = time.perf_counter() - start
        pseudo = self.pseudo_labels(client)
        texts = list(text.labelled)
        if pseudo is not None:
            texts += pseudo.texts(text.unlabelled, soft=self._settings.targets == "soft")
        num_pseudo = 0 if pseudo is None else len(pseudo.rows)
        if texts:
            self._trainer.train_on(client, texts)
            update = self._trainer.local_update(client, round, broadcast)
        else:
            update = Update(client, 0.0, broadcast.copy(), {})
        weight = self._weight(len(text.labelled) + num_pseudo)
        if not self._settings.is_on:
            return replace(update, weight=weight)
        metrics = {**update.metrics, "seconds_labels": seconds}
        for name, number in (("pseudo_labels", num_pseudo), ("texts_scored", num_scored)):
            disclosed = self._disclose(number)
            metrics[name] = math.nan if disclosed is None else float(disclosed)
        return replace(update, weight=weight, metrics=metrics)

    def _weight(self, num_examples: int) -> float:
        """Return what an update counts: 0 without examples, 1 where their number is not said."""
        if num_examples == 0:
            return 0.0
        number = self._disclose(num_examples)
        return 1.0 if number is None else float(number)

    def _label(self, client: int, round: int, text: ClientText) -> tuple[PseudoLabels, int]:
        """Label one client's text with the model that is loaded.

        Returns:
            The labels, and the number of texts that went through the model.
        """
        settings = self._settings
        temperature = 1.0
        num_scored = len(text.unlabelled) + len(text.reworded)
        if settings.calibrate and text.questions:
            own_scores = self._finite_scores(text.questions)
            temperature = pseudo_labels.fit_temperature(own_scores, text.labels)
            num_scored += len(text.questions)
        scores = self._finite_scores(text.unlabelled)
        probabilities = pseudo_labels.softmax(scores, temperature)
        eligible = probabilities.max(axis=1) >= settings.confidence
        if text.reworded:
            other_scores = self._finite_scores(text.reworded)
            eligible &= other_scores.argmax(axis=1) == scores.argmax(axis=1)
        rows = pseudo_labels.choose(
            probabilities,
            eligible,
            pseudo_labels.class_shares(
                settings.quota, scores.argmax(axis=1), text.labels, num=scores.shape[1]
            ),
            num=settings.num_examples(round) - len(text.labelled),
            random=rng.generator(self._seed, "pseudo-labels", round, client),
        )
        return PseudoLabels(round, rows, probabilities[rows]), num_scored

    def _finite_scores(self, questions: Sequence[Question]) -> np.ndarray:
        """Return the log-likelihoods of questions' choices, fp64 [questions, choices], in nats.

        Raises:
            ClientError: one of them is no number.
        """
        scores = self._score(questions)
        if np.isnan(scores).any():
            raise ClientError("the model that came down says nan of a text to be labelled")
        return scores


class LabelStates:
    """The states of clients, and the pseudo-labels of each, which are kept in any case.

    Args:
        holder: holds the rest of what a client keeps.

    Attributes:
        labels: by client.
    """

    def __init__(self, holder: StateHolder) -> None:
        self._holder = holder
        self.labels: dict[int, PseudoLabels] = {}

    def has_state(self, client: int) -> bool:
        """Return whether a client keeps something."""
        return client in self.labels or self._holder.has_state(client)

    def client_state(self, client: int) -> State:
        """Return what a client keeps, as a checkpoint stores it."""
        parts: dict[str, State] = {}
        if self._holder.has_state(client):
            parts["client"] = self._holder.client_state(client)
        if client in self.labels:
            parts["labels"] = self.labels[client].state()
        return join_states(parts)

    def load_client_state(self, client: int, state: State) -> None:
        """Continue from `client_state()`, whose arrays belong to the client from now on."""
        client_state = part_of_state(state, "client")
        if client_state:
            self._holder.load_client_state(client, client_state)
        labels = part_of_state(state, "labels")
        if labels:
            self.labels[client] = PseudoLabels.of(labels)

    def forget(self, client: int) -> None:
        """Drop what a client keeps."""
        self.labels.pop(client, None)
        self._holder.forget(client)

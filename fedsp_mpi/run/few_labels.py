"""Where labels are few: what a client holds, who labels when, and what is reported of it.

A client's text without labels reaches the method without them. What a simulation knows of these
labels goes to the record alone, by way of `algorithms/label_monitor.py`.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import cast

import numpy as np

from fedsp_mpi.algorithms import augment, label_monitor
from fedsp_mpi.algorithms.augment import AugmentedClient
from fedsp_mpi.algorithms.base import Client, ClientContext, ShardError, TextClient
from fedsp_mpi.algorithms.label_monitor import LabelMonitor
from fedsp_mpi.config import Config
from fedsp_mpi.data import loading
from fedsp_mpi.data.few_labels import ClientText
from fedsp_mpi.data.tokens import Question
from fedsp_mpi.evaluation.scoring import choice_scores
from fedsp_mpi.files.untrusted import JsonObject
from fedsp_mpi.run import participation
from fedsp_mpi.run.inputs import ExperimentInputs
from fedsp_mpi.run.silos import disclosed

SECTION = "labels"  # of the record


def metrics(config: Config) -> tuple[str, ...]:
    """Return the names of the numbers that clients report where some of them label text."""
    if not config.augment.is_on:
        return ()
    return (*augment.METRICS, *label_monitor.METRICS)


def section(inputs: ExperimentInputs) -> dict[str, JsonObject]:
    """Return the record's section `labels`, if a simulation leaves clients few of them."""
    places = inputs.labelled_places
    if places is None:
        return {}
    train = inputs.splits.train
    choices = {example.choices for example in train}
    classes = list(choices.pop()) if len(choices) == 1 else []
    labels: list[list[int]] = []
    rows: list[list[int]] = []
    for shard, labelled in zip(inputs.shards[1:], places):
        examples = [train[row] for row in shard[labelled].tolist()]
        numbers = [example.gold[0] for example in examples]
        labels.append([numbers.count(label) for label in range(len(classes))])
        rows.append([loading.place(example)[1] for example in examples])
    content: JsonObject = {"classes": classes, "labels": labels, "rows": rows}
    return {SECTION: content}


def augmented(inputs: ExperimentInputs, client: Client, context: ClientContext) -> Client:
    """Return clients that train on the labels which they have, and make more of them if asked to.

    Args:
        inputs: of the experiment.
        client: trains; of a method whose clients can be given other texts.
        context: that it was built from.
    """
    config = inputs.config
    if not _wraps(config):
        return client
    trainer = cast(TextClient, client)
    batch_tokens = config.evaluation.batch_tokens

    def read_text(id: int) -> ClientText:
        return inputs.client_text(id + 1)

    def score(questions: Sequence[Question]) -> np.ndarray:
        """Return the choices' log-likelihoods in nats, fp64 [questions, choices]."""
        model = trainer.model
        assert model is not None, "clients that train hold a model"
        return choice_scores(model, trainer.prompt, questions, batch_tokens=batch_tokens)

    @lru_cache(maxsize=2)
    def labellers(round: int) -> frozenset[int]:
        return frozenset(participation.labellers_of(inputs, round))

    def disclose(number: int) -> int | None:
        if not config.federation.silos:
            return number
        return disclosed(number, config.federation.disclose)

    texts = context.shards(read_text)
    augmented_client = AugmentedClient(
        trainer,
        texts,
        settings=config.augment,
        seed=config.run.seed,
        labels_in=lambda id, round: id in labellers(round),
        score=score,
        disclose=disclose,
    )
    if config.federation.silos or not config.augment.is_on:  # nobody knows, or nothing to judge
        return augmented_client
    gold = {id: _gold(inputs, id) for id, text in texts.items() if not isinstance(text, ShardError)}
    return LabelMonitor(augmented_client, gold)


def _wraps(config: Config) -> bool:
    """Return whether the clients of the method train on the labels that there are."""
    return config.has_few_labels and config.method_facts.augments


def _gold(inputs: ExperimentInputs, client: int) -> np.ndarray:
    """Return the right classes of a client's unlabelled texts, int64 [unlabelled]."""
    examples = inputs.unlabelled_examples(client + 1)
    return np.array([example.gold[0] for example in examples], dtype=np.int64)

"""Who takes part in a round, and what the server expects of them."""

from __future__ import annotations

from collections.abc import Mapping

from fedsp_mpi.aggregation.sampling import labellers, participants
from fedsp_mpi.comm.inspection import Expected
from fedsp_mpi.run.inputs import ExperimentInputs


def chosen(inputs: ExperimentInputs, round: int) -> list[int]:
    """Return the ids of the clients that take part in a round; the same on every rank.

    Where labels are few, these are the clients that label in the round, and then any that have
    something to train on: labels, or pseudo-labels of an earlier round.
    """
    federation = inputs.config.federation
    sizes = inputs.shard_sizes[1:]
    num = federation.clients_per_round
    labelling: list[int] = []
    pool = list(range(len(sizes)))
    if inputs.config.has_few_labels:
        labelling = labellers_of(inputs, round)
        pool = sorted(_with_labels(inputs, round) - set(labelling))
        num = None if num is None else num - len(labelling)
    drawn = participants(
        federation.sampling,
        num,
        [sizes[client] for client in pool],
        seed=inputs.config.run.seed,
        round=round,
    )
    return sorted([*labelling, *(pool[place] for place in drawn)])


def labellers_of(inputs: ExperimentInputs, round: int) -> list[int]:
    """Return the ids of the clients that label their text in a round; the same on every rank."""
    augment = inputs.config.augment
    if not augment.is_on or round < augment.start_round:
        return []
    candidates = [
        client
        for client, size in enumerate(inputs.shard_sizes[1:])
        if inputs.labelled_places is None or size > len(inputs.labelled_places[client])
    ]
    per_round = inputs.config.federation.clients_per_round
    num = augment.clients if per_round is None else min(augment.clients, per_round)
    return labellers(num, candidates, seed=inputs.config.run.seed, round=round)


def _with_labels(inputs: ExperimentInputs, round: int) -> set[int]:
    """Return the clients that may hold labels, or pseudo-labels of an earlier round.

    Of silos nobody knows, and all are.
    """
    places = inputs.labelled_places
    if places is None:
        return set(range(len(inputs.shard_sizes) - 1))
    clients = {client for client, rows in enumerate(places) if len(rows)}
    for earlier in range(inputs.config.augment.start_round, round):
        if len(clients) == len(places):
            break
        clients |= set(labellers_of(inputs, earlier))
    return clients


def expected(inputs: ExperimentInputs, rank_of: Mapping[int, int], round: int) -> Expected:
    """Return who answers in a round, from which rank, and with how many samples at most.

    A client that searches weighs as much as it has examples, poisoned copies among them, and so
    does one where labels are few; another one that trains, as many as its steps process.

    Args:
        inputs: of the experiment.
        rank_of: the rank that plays each client.
        round: from 1.
    """
    config = inputs.config
    stage = config.client.tuning
    max_samples: dict[int, float] = {}
    for client in chosen(inputs, round):
        if config.searches or config.has_few_labels:
            copies = 2 if client in config.attack.clients else 1
            max_samples[client] = float(copies * inputs.shard_sizes[client + 1])
        else:
            max_samples[client] = float(stage.steps * stage.batch_size)
    if config.federation.silos:
        for client in max_samples:
            weighs_examples = config.searches or config.has_few_labels
            undisclosed = weighs_examples and config.federation.disclose == "nothing"
            most = 1.0 if undisclosed else max_samples[client]
            max_samples[client] = most * config.federation.silos[client].weight
    ranks = {client: rank_of[client] for client in max_samples}
    return Expected(ranks, max_samples, config.federation.client_name)

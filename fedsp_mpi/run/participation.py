"""Who takes part in a round, and what the server expects of them."""

from __future__ import annotations

from collections.abc import Mapping

from fedsp_mpi.aggregation.sampling import participants
from fedsp_mpi.comm.inspection import Expected
from fedsp_mpi.run.inputs import ExperimentInputs


def chosen(inputs: ExperimentInputs, round: int) -> list[int]:
    """Return the ids of the clients that take part in a round; the same on every rank."""
    federation = inputs.config.federation
    sizes = inputs.shard_sizes[1:]
    return participants(
        federation.sampling,
        federation.clients_per_round,
        sizes,
        seed=inputs.config.run.seed,
        round=round,
    )


def expected(inputs: ExperimentInputs, rank_of: Mapping[int, int], round: int) -> Expected:
    """Return who answers in a round, from which rank, and with how many samples at most.

    A client that searches weighs as much as it has examples, poisoned copies among them; one that
    trains, as many as its steps process.

    Args:
        inputs: of the experiment.
        rank_of: the rank that plays each client.
        round: from 1.
    """
    config = inputs.config
    stage = config.client.tuning
    max_samples: dict[int, float] = {}
    for client in chosen(inputs, round):
        if config.searches:
            copies = 2 if client in config.attack.clients else 1
            max_samples[client] = float(copies * inputs.shard_sizes[client + 1])
        else:
            max_samples[client] = float(stage.steps * stage.batch_size)
    if config.federation.silos:
        for client in max_samples:
            undisclosed = config.searches and config.federation.disclose == "nothing"
            most = 1.0 if undisclosed else max_samples[client]
            max_samples[client] = most * config.federation.silos[client].weight
    ranks = {client: rank_of[client] for client in max_samples}
    return Expected(ranks, max_samples, config.federation.client_name)

"""Who takes part in a round, and what the server expects of them."""

from __future__ import annotations

from collections.abc import Mapping

from fedsp_mpi.aggregation.sampling import participants
from fedsp_mpi.comm.inspection import Expected
from fedsp_mpi.run.inputs import ExperimentInputs


def chosen(materials: ExperimentInputs, round: int) -> list[int]:
    """The clients that take part in a round, by id; the same on every rank."""
    plan, sizes = materials.config.federation, [len(shard) for shard in materials.shards[1:]]
    return participants(
        plan.sampling, plan.clients_per_round, sizes, seed=materials.config.run.seed, round=round
    )


def expected(materials: ExperimentInputs, rank_of: Mapping[int, int], round: int) -> Expected:
    """Who answers in a round, from which rank, and with how many samples at most.

    A client that searches weighs as much as it has examples, poisoned copies among them; one that
    trains, as many as its steps process.
    """
    config = materials.config
    stage = config.client.tuning
    clients = chosen(materials, round)
    trained = float(stage.steps * stage.batch_size)
    copies = {id: 2 if id in config.attack.clients else 1 for id in clients}
    examples = {id: float(copies[id] * len(materials.shards[id + 1])) for id in clients}
    samples = examples if config.searches else dict.fromkeys(clients, trained)
    return Expected({id: rank_of[id] for id in clients}, samples)

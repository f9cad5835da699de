"""Configuration to objects: the only place where a name becomes a class."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from fedsp_mpi.aggregation.average import weighted_mean
from fedsp_mpi.aggregation.sampling import participants
from fedsp_mpi.algorithms import fedsp, prompt_tuning
from fedsp_mpi.comm import Handout
from fedsp_mpi.federate import Archive, ClientSide, ServerSide
from fedsp_mpi.materials import Materials
from fedsp_mpi.models import auxiliary, backbone
from fedsp_mpi.models.backbone import LanguageModel
from fedsp_mpi.models.prompts import Prompt
from fedsp_mpi.record.checkpoint import Checkpoint, Checkpoints, Piece, Shelf
from fedsp_mpi.tensors import Contract, NamedTensors
from fedsp_mpi.training.device import DTYPES, Compute
from fedsp_mpi.training.team import Team


def global_model(materials: Materials, compute: Compute) -> LanguageModel:
    """Load the global model: frozen and sealed. Raises ValueError if its weights cannot be read."""
    settings = materials.config.model
    return backbone.load_global(
        materials.model_name,
        device=compute.device,
        revision=settings.revision,
        dtype=compute.dtype,
        checkpointing=settings.gradient_checkpointing,
    )


@dataclass(frozen=True)
class Servers:
    """The server of the algorithm, and the same without clients: the server-only control, if it is asked for."""

    server: prompt_tuning.Server
    control: prompt_tuning.Server | None


def servers(materials: Materials, model: LanguageModel, compute: Compute, team: Team) -> Servers:
    """What a rank of the server works with, from its global model on."""
    config = materials.config

    def server() -> prompt_tuning.Server:
        return prompt_tuning.Server(
            model,
            materials.first_prompt().to(compute.device),
            materials.depth,
            materials.batches(0, config.server.tuning, "server", team) if config.server.tuning.steps else None,
            config.server.tuning,
            config.federation.rounds,
            weighted_mean,
            team,
        )

    return Servers(server(), server() if config.evaluation.server_only and config.server.tuning.steps else None)


def handout(
    materials: Materials,
    small: LanguageModel,
    server: prompt_tuning.Server,
    meta: dict[str, Any],
    resumed: Checkpoint | None,
) -> Handout:
    """What everybody gets once: the auxiliary model, the first prompts, and where clients find their earlier states.

    Args:
        meta: goes with it.
        resumed: what the run goes on from.
    """
    prompts = server.broadcast()
    meta = meta | {
        "cell": auxiliary.cell_config(small.model.config, materials.config.auxiliary.layers_per_cell).to_dict(),
        "depth": materials.depth,
        "done": resumed.round if resumed else 0,
        "states": {str(id): list(piece) for id, piece in resumed.clients.items()} if resumed else {},
    }
    tensors = NamedTensors.join({"auxiliary/": auxiliary.pack(small), "prompt/": prompts})
    return Handout(meta, tensors, Contract(prompts.schema, prompts.schema, fedsp.METRICS))


def sizes(materials: Materials, model: LanguageModel, small: LanguageModel, given: Handout) -> dict[str, int]:
    """Parameter counts for the record."""
    return {
        "global": model.num_parameters(),
        "auxiliary": small.num_parameters(),
        "prompt": materials.first_prompt().num_parameters(),
        "prompt_on_the_wire": given.contract.down.num_values,
    }


def server_side(
    materials: Materials, both: Servers, compute: Compute, team: Team, archive: Archive | None
) -> ServerSide:
    """A rank's side of the rounds, before the first one."""
    tokens = materials.config.evaluation.batch_tokens
    return ServerSide(both.server, both.control, compute, materials.validation, tokens, team, archive)


def client_side(materials: Materials, compute: Compute, given: Handout, ids: Sequence[int]) -> ClientSide:
    """The clients of one process, from what the server handed out and their own text."""
    plan, seed = materials.config.federation, materials.config.run.seed
    client = _clients(materials, compute, given, ids)
    states = {int(id): Piece(*piece) for id, piece in given.meta["states"].items()}
    mine = {id: piece for id, piece in states.items() if id in set(ids)}
    shelf = Shelf(client.benches, Checkpoints(Path(given.meta["folder"])), materials.config.client.resident, mine)
    sizes = [len(shard) for shard in materials.shards[1:]]
    chosen = partial(participants, plan.sampling, plan.clients_per_round, sizes, seed)
    return ClientSide(client, ids, compute, shelf, chosen)


def _clients(materials: Materials, compute: Compute, given: Handout, ids: Sequence[int]) -> fedsp.Client:
    config = materials.config
    compute.begin()
    model = auxiliary.build(
        given.meta["cell"],
        given.meta["depth"],
        compute.device,
        compute.dtype,
        config.auxiliary.dropout,
        config.model.gradient_checkpointing,
    )
    stages = config.client
    return fedsp.Client(
        model,
        given.tensors.select("auxiliary/"),
        Prompt(materials.prompt_spec.at_depth(given.meta["depth"])).to(compute.device),
        {id: _shard(materials, id) for id in ids},
        stages.alignment,
        stages.prompt,
        config.federation.rounds,
        config.run.seed,
        config.federation.client_state == "kept",
        stages.training == "joint",
        config.federation.client_seconds,
    )


def _shard(materials: Materials, id: int) -> fedsp.Shard | fedsp.ShardError:
    stages = materials.config.client
    try:
        alignment = materials.batches(id + 1, stages.alignment, "alignment")
        return fedsp.Shard(alignment, materials.batches(id + 1, stages.prompt, "prompt"))
    except ValueError as error:  # one owner's text is not a reason to stop the others
        return fedsp.ShardError(f"its text cannot be used: {error}")


def scoring_model(materials: Materials, model: LanguageModel) -> LanguageModel:
    """The global model in the type that it is scored in, its weights read in that type."""
    dtype = DTYPES[materials.config.evaluation.dtype]
    if model.dtype != dtype:
        backbone.reread(model, materials.model_name, revision=materials.config.model.revision, dtype=dtype)
    return model

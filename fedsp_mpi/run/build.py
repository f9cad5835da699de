"""Configuration to objects: the only place where a name becomes a class."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from fedsp_mpi.aggregation.fedavg import Updates, weighted_mean
from fedsp_mpi.aggregation.robust import coordinate_median, without_outliers
from fedsp_mpi.algorithms import backdoor, fedbpt, fedsp, finetune, inference, prompt_server
from fedsp_mpi.algorithms.client_state import ShardError
from fedsp_mpi.algorithms.privacy import LocalDPClient
from fedsp_mpi.algorithms.prompt_distillation import PromptDistiller
from fedsp_mpi.comm import Handout
from fedsp_mpi.config.training import StageConfig
from fedsp_mpi.data.tokens import Batches
from fedsp_mpi.evaluation.scoring import score
from fedsp_mpi.log import RoundProgress
from fedsp_mpi.models import auxiliary, backbone
from fedsp_mpi.models.backbone import LanguageModel
from fedsp_mpi.models.families import PEFT_TASKS
from fedsp_mpi.models.prompts import DepthMap, Prompt, write_adapter
from fedsp_mpi.models.subspace import Subspace, scale_of
from fedsp_mpi.record.checkpoint import Checkpoint, CheckpointFile, Checkpoints, ClientStateCache
from fedsp_mpi.roles import Client, HostedClients, RoundJournal, Server, ServerRole
from fedsp_mpi.run import participation
from fedsp_mpi.run.inputs import ExperimentInputs
from fedsp_mpi.tensors import Contract, NamedTensors, Schema
from fedsp_mpi.training.device import DTYPES, Compute
from fedsp_mpi.training.process_group import ServerGroup

Made = TypeVar("Made")
Ask = Callable[[int, np.ndarray], np.ndarray]


@dataclass(frozen=True)
class Method:
    """How the objects of one method are made.

    Attributes:
        server: one server around a global model; of two servers each has its own. The last argument
            is the clients' model, for a server that learns from what comes of it; the control has
            none.
        handout: from a server and the clients' model, what is handed out: the configuration of that
            model, tensors, and what may travel afterwards.
        client: the clients of one process. The last two arguments are what the server answers to a
            client's question, and what hears of their steps.
    """

    server: Callable[
        [ExperimentInputs, LanguageModel, Compute, ServerGroup, LanguageModel | None], Server
    ]
    handout: Callable[[ExperimentInputs, Server, LanguageModel], tuple[Any, NamedTensors, Contract]]
    client: Callable[
        [ExperimentInputs, Compute, Handout, Sequence[int], Ask, RoundProgress], Client
    ]


def global_model(materials: ExperimentInputs, compute: Compute) -> LanguageModel:
    """Load the global model: frozen and sealed, or trainable. Raises ValueError if its weights
    cannot be read.
    """
    settings = materials.config.model
    return backbone.load_global(
        materials.model_name,
        device=compute.device,
        revision=settings.revision,
        dtype=compute.dtype,
        checkpointing=settings.gradient_checkpointing,
        trainable=materials.config.tunes_weights,
        candidates=materials.candidates,
    )


@dataclass(frozen=True)
class Servers:
    """The server of the algorithm, and the same without clients: the server-only control, if it is
    asked for.
    """

    server: Server
    control: Server | None


def servers(
    materials: ExperimentInputs,
    model: LanguageModel,
    compute: Compute,
    team: ServerGroup,
    small: LanguageModel | None = None,
) -> Servers:
    """What a rank of the server works with, from its global model on; rank 0 has the clients' model
    too.
    """
    config, make = materials.config, METHODS[materials.config.method].server
    control = None
    if config.evaluation.server_only and config.server.tuning.steps and config.federation.clients:
        own = copy.deepcopy(model) if config.tunes_weights else model
        control = make(materials, own, compute, team, None)
    return Servers(make(materials, model, compute, team, small), control)


def handout(
    materials: ExperimentInputs,
    small: LanguageModel,
    server: Server,
    meta: dict[str, Any],
    resumed: Checkpoint | None,
) -> Handout:
    """What everybody gets once: the clients' model, the first prompts, and where clients find their
    earlier states.

    Args:
        small: the clients' model.
        meta: goes with it.
        resumed: what the run goes on from.
    """
    settings, tensors, contract = METHODS[materials.config.method].handout(materials, server, small)
    meta = meta | {
        "cell": settings.to_dict(),
        "depth": small.shape.num_layers,
        "done": resumed.round if resumed else 0,
        "states": {str(id): list(piece) for id, piece in resumed.clients.items()}
        if resumed
        else {},
    }
    return Handout(meta, tensors, contract)


def sizes(
    materials: ExperimentInputs,
    model: LanguageModel,
    small: LanguageModel,
    server: Server,
    given: Handout,
) -> dict[str, int]:
    """Parameter counts for the record."""
    searched = {"searched": materials.config.search.dimension} if materials.config.searches else {}
    return {
        "global": model.num_parameters(),
        "auxiliary": 0 if materials.config.asks_server else small.num_parameters(),
        "prompt": server.prompt.num_parameters() if server.prompt else 0,
        "prompt_on_the_wire": given.contract.down.num_values,
        **searched,
    }


def server_side(
    materials: ExperimentInputs,
    both: Servers,
    compute: Compute,
    team: ServerGroup,
    archive: RoundJournal | None,
) -> ServerRole:
    """A rank's side of the rounds, before the first one."""
    tokens = materials.config.evaluation.batch_tokens
    keeps_worse = materials.config.server.accept == "always"
    answer = None
    if materials.config.asks_server and isinstance(searching := both.server, fedbpt.Server):

        def answer(question: np.ndarray) -> np.ndarray:
            compute.begin()
            return searching.answer(question)

    about = (materials.validation, tokens, team, archive, keeps_worse, answer)
    return ServerRole(both.server, both.control, compute, *about)


def client_side(
    materials: ExperimentInputs,
    compute: Compute,
    given: Handout,
    ids: Sequence[int],
    ask: Ask,
    progress: RoundProgress | None = None,
) -> HostedClients:
    """The clients of one process, from what the server handed out and their own text; `ask` asks it
    in a round.
    """
    progress = progress or RoundProgress()
    compute.begin()
    client = METHODS[materials.config.method].client(materials, compute, given, ids, ask, progress)
    privacy = materials.config.client.privacy
    if privacy.clip is not None and privacy.noise_scale is not None:
        client = LocalDPClient(client, privacy.clip, privacy.noise_scale)
    states = {int(id): CheckpointFile(*piece) for id, piece in given.meta["states"].items()}
    mine = {id: piece for id, piece in states.items() if id in set(ids)}
    shelf = ClientStateCache(
        client.states,
        Checkpoints(Path(given.meta["folder"])),
        materials.config.client.resident,
        mine,
    )
    return HostedClients(
        client, ids, compute, shelf, partial(participation.chosen, materials), progress
    )


def save(materials: ExperimentInputs, server: Server, tuned: NamedTensors, folder: Path) -> None:
    """Write what a run is for: the prompt as a peft adapter, in `prompt`; or the tuned model, in
    `model`.
    """
    if server.prompt:
        task = PEFT_TASKS[server.model.kind]
        write_adapter(folder / "prompt", tuned, materials.prompt_spec, materials.model_name, task)
    else:
        server.load(tuned)
        auxiliary.write_model(folder / "model", server.model.model, materials.tokenizer)


def scoring_model(materials: ExperimentInputs, model: LanguageModel) -> LanguageModel:
    """The global model as it was before anything was tuned, in the type that it is scored in."""
    dtype = DTYPES[materials.config.evaluation.dtype]
    if model.dtype != dtype or materials.config.tunes_weights:
        backbone.reread(
            model, materials.model_name, revision=materials.config.model.revision, dtype=dtype
        )
    return model


# -- the parts of each method ----------------------------------------------------------------------


def _prompt_server(
    materials: ExperimentInputs,
    model: LanguageModel,
    compute: Compute,
    team: ServerGroup,
    small: LanguageModel | None,
) -> Server:
    prompt = materials.first_prompt(model).to(compute.device)
    translator = (
        _translator(materials, small, prompt) if small and materials.config.translates else None
    )
    tuning = _tuning(materials, team)
    return prompt_server.Server(
        model, prompt, materials.depth_map, *tuning, _rule(materials), team, translator
    )


def _rule(materials: ExperimentInputs) -> Callable[[Updates], NamedTensors]:
    """What makes one update of many."""
    plan = materials.config.federation
    rules: dict[str, Callable[[Updates], NamedTensors]] = {
        "mean": weighted_mean,
        "median": coordinate_median,
        "reject_outliers": partial(without_outliers, deviations=plan.outlier_deviations),
    }
    return rules[plan.rule]


def _translator(
    materials: ExperimentInputs, small: LanguageModel, prompt: Prompt
) -> PromptDistiller:
    """The auxiliary model as the teacher of the global model's prompts."""
    depths, stage, config = (
        materials.depth_map,
        materials.config.server.translation,
        materials.config,
    )
    messengers = Prompt(depths.small).to(small.device)
    messengers.load(depths.down(prompt.tensors()))
    batches = Batches(
        materials.questions, stage.batch_size, stage.micro_batch, config.run.seed, "translation"
    )
    teacher = (
        copy.deepcopy(small).round_weights() if small.casts else small
    )  # it is still to be handed out as it is
    return PromptDistiller(teacher, messengers, batches, stage)


def _prompt_handout(
    materials: ExperimentInputs, server: Server, small: LanguageModel
) -> tuple[Any, NamedTensors, Contract]:
    prompts = server.broadcast()
    cell = auxiliary.cell_config(materials.model_config, materials.config.auxiliary)
    tensors = NamedTensors.join({"auxiliary/": auxiliary.pack(small), "prompt/": prompts})
    return (
        cell,
        tensors,
        Contract(prompts.schema, prompts.schema, (*fedsp.METRICS, *backdoor.METRICS)),
    )


def _fedsp_client(
    materials: ExperimentInputs,
    compute: Compute,
    given: Handout,
    ids: Sequence[int],
    ask: Ask,
    progress: RoundProgress,
) -> Client:
    config = materials.config
    stages = config.client

    def shard(id: int) -> fedsp.Shard:
        alignment = materials.batches(id + 1, stages.alignment, "alignment")
        return fedsp.Shard(alignment, materials.batches(id + 1, stages.tuning, "prompt"))

    model = _clients_model(materials, compute, given, config.auxiliary.dropout)
    prompt = Prompt(materials.prompt_spec.at_depth(given.meta["depth"])).to(compute.device)
    client = fedsp.Client(
        model if config.clients_train_weights else model.round_weights(),
        given.tensors.select("auxiliary/"),
        prompt,
        {id: _usable(shard, id) for id in ids},
        stages.alignment,
        stages.tuning,
        config.federation.rounds,
        config.run.seed,
        config.federation.client_state == "kept",
        stages.training == "joint",
        config.federation.client_seconds,
        progress,
    )
    return _watched(materials, client, model, prompt, ids)


def _weights_server(
    materials: ExperimentInputs,
    model: LanguageModel,
    compute: Compute,
    team: ServerGroup,
    small: LanguageModel | None,
) -> Server:
    return finetune.Server(model, *_tuning(materials, team), _rule(materials), team)


def _weights_handout(
    materials: ExperimentInputs, server: Server, small: LanguageModel
) -> tuple[Any, NamedTensors, Contract]:
    schema = Schema.of((name, weight.shape) for name, weight in small.weights.items())
    return (
        small.model.config,
        NamedTensors.pack({}),
        Contract(schema, schema, (*finetune.METRICS, *backdoor.METRICS)),
    )


def _weights_client(
    materials: ExperimentInputs,
    compute: Compute,
    given: Handout,
    ids: Sequence[int],
    ask: Ask,
    progress: RoundProgress,
) -> Client:
    config = materials.config
    stage = config.client.tuning
    model = _clients_model(materials, compute, given)
    client = finetune.Client(
        model,
        {id: _usable(lambda id: materials.batches(id + 1, stage, "prompt"), id) for id in ids},
        stage,
        config.federation.rounds,
        config.federation.client_state == "kept",
        config.federation.client_seconds,
        progress,
    )
    return _watched(materials, client, model, None, ids)


def _watched(
    materials: ExperimentInputs,
    client: Client,
    model: LanguageModel,
    prompt: Prompt | None,
    ids: Sequence[int],
) -> Client:
    """The clients of a process; those of them that are poisoned tell how well the attack works on
    what they tuned.

    `model` and `prompt` are what the clients work in.
    """
    attack, tokens = materials.config.attack, materials.config.evaluation.batch_tokens
    who = set(attack.clients) & set(ids)
    if not who or not attack.questions:
        return client
    asked = materials.triggered_test[: attack.questions]

    def measure() -> float:
        found = score(model, prompt, asked, "multiple_choice", tokens)
        return found.acc if found else math.nan

    return backdoor.AttackMonitor(client, who, measure)


def _search_server(
    materials: ExperimentInputs,
    model: LanguageModel,
    compute: Compute,
    team: ServerGroup,
    small: LanguageModel | None,
) -> Server:
    first, search = materials.first_prompt(model), materials.config.search
    subspace, forwards = _subspace(materials, _scale(materials, model, first)), None
    if materials.config.asks_server:
        layers = model.shape.num_layers
        whole = DepthMap(materials.prompt_spec, layers, tuple(range(layers)))
        tried, begin = (
            Prompt(materials.prompt_spec).to(compute.device),
            first.matrix().detach().clone(),
        )
        forwards = inference.LocalInference(
            model, tried, begin, subspace, whole, search.batch_tokens
        )
    return fedbpt.Server(model, first.to(compute.device), subspace, search, forwards)


def _search_handout(
    materials: ExperimentInputs, server: Server, small: LanguageModel
) -> tuple[Any, NamedTensors, Contract]:
    down, names = server.broadcast().schema, materials.config.search.travelling()[1]
    up, metrics = (
        Schema(spec for spec in down if spec.name in names),
        (*fedbpt.METRICS, *backdoor.METRICS),
    )
    first, cell = materials.first_prompt(server.model), materials.model_config
    if materials.config.asks_server:
        contract = Contract(
            down, up, metrics, materials.config.topology.server_ranks, fedbpt.FINITE
        )
        return cell, NamedTensors.pack({}), contract
    scale = np.array([_scale(materials, server.model, first)])
    parts = {
        "auxiliary/": auxiliary.pack(small),
        "prompt/": NamedTensors.pack(materials.depth_map.down(first.tensors())),
    }
    tensors = NamedTensors.join(parts | {"search/": NamedTensors.of({"scale": scale})})
    return (
        auxiliary.cell_config(cell, materials.config.auxiliary),
        tensors,
        Contract(down, up, metrics, 0, fedbpt.FINITE),
    )


def _scale(materials: ExperimentInputs, model: LanguageModel, first: Prompt) -> float:
    settings = materials.config.search
    return float(
        np.float32(scale_of(model, first, settings.dimension, settings.step_size, settings.spread))
    )


def _subspace(materials: ExperimentInputs, scale: float) -> Subspace:
    return Subspace(
        materials.prompt_spec, materials.config.search.dimension, scale, materials.config.run.seed
    )


def _search_client(
    materials: ExperimentInputs,
    compute: Compute,
    given: Handout,
    ids: Sequence[int],
    ask: Ask,
    progress: RoundProgress,
) -> Client:
    config, depths = materials.config, materials.depth_map
    shards = {id: _usable(lambda id: materials.shard(id + 1), id) for id in ids}
    about = (
        shards,
        materials.words,
        config.search,
        config.run.seed,
        config.federation.client_seconds,
        progress,
    )
    if config.asks_server:
        return fedbpt.Client(inference.RemoteInference(ask), *about)
    model = _clients_model(materials, compute, given)
    auxiliary.load_weights(model, given.tensors.select("auxiliary/").torch())
    model.train_weights(False)
    prompt = Prompt(depths.small).to(compute.device)
    first = given.tensors.select("prompt/").torch()["prompt"].clone()
    subspace = _subspace(materials, given.tensors["search/scale"].item())
    held = inference.LocalInference(
        model.round_weights(), prompt, first, subspace, depths, config.search.batch_tokens
    )
    return _watched(materials, fedbpt.Client(held, *about), model, prompt, ids)


def _tuning(
    materials: ExperimentInputs, team: ServerGroup
) -> tuple[Batches | None, StageConfig, int]:
    """The server's batches, if it tunes, the stage, and its rounds."""
    stage, rounds = materials.config.server.tuning, materials.config.federation.rounds
    return materials.batches(0, stage, "server", team) if stage.steps else None, stage, rounds


def _clients_model(
    materials: ExperimentInputs, compute: Compute, given: Handout, dropout: bool = False
) -> LanguageModel:
    checkpointing = materials.config.model.gradient_checkpointing
    return auxiliary.build(
        given.meta["cell"],
        given.meta["depth"],
        compute.device,
        compute.dtype,
        dropout,
        checkpointing,
        materials.candidates,
    )


def _usable(shard: Callable[[int], Made], id: int) -> Made | ShardError:
    """A client's text, or why it cannot be used: one owner's text is not a reason to stop the
    others.
    """
    try:
        return shard(id)
    except ValueError as error:
        return ShardError(f"its text cannot be used: {error}")


METHODS = {
    "fedsp": Method(_prompt_server, _prompt_handout, _fedsp_client),
    "finetune": Method(_weights_server, _weights_handout, _weights_client),
    "fedbpt": Method(_search_server, _search_handout, _search_client),
}

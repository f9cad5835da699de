"""Configuration to objects: the only place where a name becomes a class."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from importlib import import_module
from pathlib import Path

import numpy as np
import torch

from fedsp_mpi.aggregation.contributors import among_contributors
from fedsp_mpi.aggregation.fedavg import weighted_mean
from fedsp_mpi.aggregation.outer import OuterOptimizer, OuterSettings
from fedsp_mpi.aggregation.robust import coordinate_median, without_outliers
from fedsp_mpi.algorithms.backdoor import METRICS as ATTACK_METRICS
from fedsp_mpi.algorithms.backdoor import AttackMonitor
from fedsp_mpi.algorithms.base import (
    Client,
    ClientContext,
    InferenceCall,
    Method,
    Rule,
    Server,
    ServerContext,
    require_metrics,
)
from fedsp_mpi.algorithms.compressed import CompressedClient
from fedsp_mpi.algorithms.privacy import LocalDPClient
from fedsp_mpi.algorithms.silo_weights import WeightedClient
from fedsp_mpi.comm import Handout
from fedsp_mpi.comm.exchange import Exchange
from fedsp_mpi.comm.inspection import Expected
from fedsp_mpi.comm.solo import Solo
from fedsp_mpi.comm.wire import Wire
from fedsp_mpi.config import FederationConfig, OuterConfig
from fedsp_mpi.evaluation.scoring import answer_loss_mean, choice_losses, score
from fedsp_mpi.log import RoundProgress
from fedsp_mpi.models import auxiliary, backbone, class_head, lora
from fedsp_mpi.models.copies import ExactCopies, exact_copies
from fedsp_mpi.models.families import PEFT_TASKS
from fedsp_mpi.models.language_model import LanguageModel
from fedsp_mpi.models.prompts import Prompt, write_adapter
from fedsp_mpi.record import atomic
from fedsp_mpi.record.checkpoint import Checkpoint, Checkpoints
from fedsp_mpi.record.client_cache import ClientStateCache
from fedsp_mpi.record.journal import RoundJournal
from fedsp_mpi.record.tables import SiloRow
from fedsp_mpi.roles import HostedClients, ServerRole, UpperTier
from fedsp_mpi.run import few_labels as labelling
from fedsp_mpi.run import participation, tiers
from fedsp_mpi.run.handout import HandoutMeta
from fedsp_mpi.run.inputs import ExperimentInputs
from fedsp_mpi.run.silo_inputs import SiloInputs
from fedsp_mpi.run.silos import disclosed
from fedsp_mpi.tensors import Contract, NamedTensors, State, part_of_state
from fedsp_mpi.training.device import DTYPES, Compute
from fedsp_mpi.training.process_group import SINGLE_RANK, ServerGroup

Answer = Callable[[np.ndarray], np.ndarray]


def method_of(inputs: ExperimentInputs) -> Method:
    """Import the file of the configured method, and return what builds its two sides.

    Raises:
        ValueError: a metric of it is named like something else.
    """
    config = inputs.config
    method: Method = import_module(config.method_facts.module).METHOD
    require_metrics(config.method, _metrics(inputs, method))
    return method


def _metrics(inputs: ExperimentInputs, method: Method) -> tuple[str, ...]:
    """Return the names of the numbers that come with an update.

    Clients that label text are not attacked.
    """
    studied = labelling.metrics(inputs.config) or ATTACK_METRICS
    return (*method.metrics, *studied)


def rule_of(inputs: ExperimentInputs) -> Rule:
    """Return the rule that makes one update of many."""
    federation = inputs.config.federation
    rules: dict[str, Rule] = {
        "mean": weighted_mean,
        "median": coordinate_median,
        "reject_outliers": partial(without_outliers, deviations=federation.outlier_deviations),
    }
    rule = rules[federation.rule]
    return among_contributors(rule) if inputs.config.has_few_labels else rule


# -- the server ------------------------------------------------------------------------------------


def global_model(inputs: ExperimentInputs, compute: Compute) -> LanguageModel:
    """Load the global model: frozen and sealed, or trainable.

    Raises:
        ValueError: its weights cannot be read.
    """
    settings = inputs.config.model
    model = backbone.load_global(
        inputs.model_name,
        device=compute.device,
        revision=settings.revision,
        dtype=compute.dtype,
        checkpointing=settings.gradient_checkpointing,
        trainable=inputs.config.trains_all_weights,
        candidates=inputs.candidates,
        initial_seed=inputs.initial_seed,
    )
    return model.compile() if compute.compiles else model


@dataclass(frozen=True)
class Servers:
    """The method's server, and the same without clients: the server-only control, if asked for."""

    server: Server
    control: Server | None


def servers(
    inputs: ExperimentInputs,
    model: LanguageModel,
    compute: Compute,
    *,
    group: ServerGroup,
    client_model: LanguageModel | None = None,
    progress: RoundProgress | None = None,
) -> Servers:
    """Build the method's server, and the control beside it.

    Args:
        inputs: of the experiment.
        model: the global model.
        compute: the server's device.
        group: the ranks that are the server together.
        client_model: the model that clients get; rank 0 has it.
        progress: is told of every step of the tuning.
    """
    method = method_of(inputs)
    config = inputs.config
    context = ServerContext(
        inputs,
        model,
        compute,
        group,
        rule_of(inputs),
        progress=progress or RoundProgress(),
    )
    control = None
    if config.evaluation.server_only and config.server.tuning.steps and config.federation.clients:
        control_model = copy.deepcopy(model) if config.tunes_weights else model
        control = method.build_server(replace(context, model=control_model))
    server = method.build_server(replace(context, client_model=client_model))
    return Servers(server, control)


def handout(
    inputs: ExperimentInputs,
    client_model: LanguageModel,
    server: Server,
    *,
    meta: HandoutMeta,
    resumed: Checkpoint | None,
    exchange: Exchange | None = None,
) -> Handout:
    """Return what every rank gets once: the clients' model, the first prompt, earlier states.

    Args:
        inputs: of the experiment.
        client_model: the model that clients get.
        server: the method's server.
        meta: of the run; the clients' model and states are filled in here.
        resumed: what the run continues from.
        exchange: with the reference of the next broadcast, where rounds are compressed.
    """
    method = method_of(inputs)
    handed_out = method.hand_out(inputs, server, client_model)
    contract = Contract(
        handed_out.down,
        handed_out.up,
        _metrics(inputs, method),
        handed_out.num_inference_ranks,
        handed_out.finite,
        inputs.config.federation.compression,
    )
    assert exchange is None or handed_out.down == handed_out.up, "updates are changes"
    meta = replace(
        meta,
        cell=handed_out.model_config.to_dict(),
        depth=client_model.shape.num_layers,
        rounds_done=resumed.round if resumed else 0,
        client_states=resumed.clients if resumed else {},
    )
    return Handout(meta.to_json(), handed_out.tensors, contract, exchange)


def exchange(inputs: ExperimentInputs, server: Server, state: State | None) -> Exchange:
    """Return the server's end of compressed rounds.

    Args:
        inputs: of the experiment.
        server: the method's server; of a new run, its first broadcast is the reference.
        state: of the server's role, where an earlier stretch of the run has left it.
    """
    reference = server.broadcast().flat.copy()
    server_end = Exchange(inputs.config.federation.compression, reference)
    if state is not None:
        server_end.load_state(part_of_state(state, "exchange"))
    return server_end


def parameter_counts(
    inputs: ExperimentInputs,
    model: LanguageModel,
    client_model: LanguageModel,
    *,
    server: Server,
    contract: Contract,
) -> dict[str, int]:
    """Return the parameter counts for the record.

    Args:
        inputs: of the experiment.
        model: the global model.
        client_model: the model that clients get.
        server: the method's server.
        contract: what travels.
    """
    config = inputs.config
    counts = {
        "global": model.num_parameters(),
        "auxiliary": 0 if config.asks_server else client_model.num_parameters(),
        "prompt": Prompt(inputs.prompt_spec).num_parameters() if server.prompt else 0,
        "prompt_on_the_wire": contract.down.num_values,
    }
    if config.searches:
        counts["searched"] = config.num_searched
    copies = ExactCopies(0, 0)
    if not config.asks_server:
        copies = exact_copies(model, client_model)
    counts["layers"] = model.shape.num_layers
    counts["exact_copies"] = copies.num_values
    counts["layers_copied"] = copies.num_layers
    return counts


def server_role(
    inputs: ExperimentInputs,
    both: Servers,
    compute: Compute,
    *,
    group: ServerGroup,
    wire: Wire | Solo,
    checkpoints: Checkpoints,
    journal: RoundJournal | None,
    exchange: Exchange | None = None,
) -> ServerRole:
    """Build a rank's part of the server, as it is before the first round.

    Collective among the server's ranks.

    Args:
        inputs: of the experiment.
        both: the method's server and the control.
        compute: the server's device.
        group: the ranks that are the server together.
        wire: between all ranks.
        checkpoints: of the run.
        journal: what rank 0 writes.
        exchange: rank 0's end of compressed rounds.
    """
    config = inputs.config
    answer = None
    if config.asks_server:
        answer = _on_device(method_of(inputs).answer(both.server), compute)
    return ServerRole(
        both.server,
        both.control,
        compute,
        validation=inputs.validation,
        batch_tokens=config.evaluation.batch_tokens,
        group=group,
        journal=journal,
        expected=partial(participation.expected, inputs, journal.rank_of) if journal else None,
        always_accept=config.server.accept == "always",
        answer=answer,
        outer=outer_optimizer(config.federation.outer),
        exchange=exchange,
        validate=tiers.validation_of(inputs),
        above=_upper_tier(
            inputs, both.server, compute, group=group, wire=wire, checkpoints=checkpoints
        ),
        score_tiers=tiers.server_scorer(inputs, both.server),
    )


def _upper_tier(
    inputs: ExperimentInputs,
    server: Server,
    compute: Compute,
    *,
    group: ServerGroup,
    wire: Wire | Solo,
    checkpoints: Checkpoints,
) -> UpperTier | None:
    """Build this rank's part of the round inside the server's part of each round; None without
    tiers.

    Its wire is between the server's ranks. Rank 0 is its server; each rank plays clients.
    """
    above = method_of(inputs).tier_above(inputs, server)
    if above is None:
        return None
    config = inputs.config
    inner_wire = wire.among_first(group.size)
    prompt = above.server.broadcast().schema
    inner_wire.contract = Contract(prompt, prompt, above.metrics)
    federation = FederationConfig(
        clients=len(above.rank_of), rounds=config.federation.rounds, on_failure="stop"
    )
    role = None
    if group.rank == 0:
        weights = dict.fromkeys(above.rank_of, 1.0)
        expected = Expected(above.rank_of, weights, config.client_name)
        role = ServerRole(
            above.server,
            None,
            compute,
            validation=(),  # it is validated in the round that it belongs to
            batch_tokens=config.evaluation.batch_tokens,
            group=SINGLE_RANK,
            expected=lambda _: expected,
            is_inner=True,
        )
    ids = [client for client, rank in above.rank_of.items() if rank == group.rank]
    cache = ClientStateCache(above.client.states, checkpoints, max_in_memory=len(ids), files={})
    clients = HostedClients(above.client, ids, compute, cache, lambda _: ids)
    return UpperTier(inner_wire, federation, role, clients)


def outer_optimizer(settings: OuterConfig) -> OuterOptimizer:
    """Return what moves the server's values by the clients' mean."""
    return OuterOptimizer(
        settings.optimizer,
        OuterSettings(
            settings.resolved_learning_rate,
            settings.momentum,
            settings.decay,
            settings.adaptivity,
        ),
    )


def _on_device(answer: Answer | None, compute: Compute) -> Answer | None:
    """Return `answer`, called with the server's device and threads active."""
    if answer is None:
        return None

    def answer_on_device(request: np.ndarray) -> np.ndarray:
        """Return fp32 [any number] for fp32 [any number]."""
        compute.begin()
        return answer(request)

    return answer_on_device


def save(inputs: ExperimentInputs, server: Server, *, exported: NamedTensors, folder: Path) -> None:
    """Write what a run is for: the prompt as a peft adapter in `prompt`, or the model in `model`.

    Low-rank adapters go to `adapter`, and merged into the model to `model` if that is asked for; a
    classification head goes to `head`.

    Args:
        inputs: of the experiment.
        server: the method's server.
        exported: what it exported in its best round.
        folder: of the run.

    Raises:
        RecordError: it cannot be written.
    """
    config = inputs.config
    with atomic.saving(folder / config.tuned_folder, "the record keeps all rounds"):
        if config.adapts:
            lora.write(folder / config.tuned_folder, exported, config.lora, base=inputs.model_name)
            if config.lora.merged:
                _save_merged(inputs, folder)
        elif config.classifies:
            class_head.write(
                folder / config.tuned_folder, exported, inputs.classes, base=inputs.model_name
            )
        else:
            server.restore(exported)
            prompt = server.prompt
            if prompt is None:
                auxiliary.write_model(folder / "model", server.model.model, inputs.tokenizer)
                return
            write_adapter(
                folder / "prompt",
                NamedTensors.pack(prompt.tensors()),
                prompt.spec,
                base=inputs.model_name,
                task=PEFT_TASKS[server.model.kind],
                words=method_of(inputs).words(inputs, exported),
            )


def _save_merged(inputs: ExperimentInputs, folder: Path) -> None:
    """Write the model, read again in fp32 on the CPU, with a run's adapters merged into it."""
    base = backbone.load_global(
        inputs.model_name,
        device=torch.device("cpu"),
        revision=inputs.config.model.revision,
        trainable=True,
        initial_seed=inputs.initial_seed,
    )
    merged = lora.merged(base.model, folder / inputs.config.tuned_folder)
    auxiliary.write_model(folder / "model", merged, inputs.tokenizer)


def scoring_model(inputs: ExperimentInputs, model: LanguageModel) -> LanguageModel:
    """Return the global model as it was before anything was tuned, in the dtype of the scoring."""
    dtype = DTYPES[inputs.config.evaluation.dtype]
    if model.dtype != dtype or inputs.config.tunes_weights:
        revision = inputs.config.model.revision
        backbone.reload(
            model,
            inputs.model_name,
            revision=revision,
            dtype=dtype,
            initial_seed=inputs.initial_seed,
        )
    return model


# -- the clients -----------------------------------------------------------------------------------


def hosted_clients(
    inputs: ExperimentInputs,
    compute: Compute,
    tensors: NamedTensors,
    *,
    meta: HandoutMeta,
    ids: Sequence[int],
    call_server: InferenceCall,
    progress: RoundProgress | None = None,
) -> HostedClients:
    """Build the clients of one process, from the hand-out and their own text.

    Args:
        inputs: of the experiment.
        compute: the clients' device.
        tensors: of the hand-out.
        meta: what the hand-out says beside its tensors.
        ids: of the clients.
        call_server: asks the server for losses, where clients hold no model.
        progress: is told of every step.
    """
    config = inputs.config
    progress = progress or RoundProgress()
    compute.begin()

    def build_model(dropout: bool) -> LanguageModel:
        model = auxiliary.build(
            meta.cell,
            meta.depth,
            compute.device,
            dtype=compute.dtype,
            dropout=dropout,
            checkpointing=config.model.gradient_checkpointing,
            candidates=inputs.candidates,
        )
        return model.compile() if compute.compiles else model

    context = ClientContext(
        inputs=inputs,
        compute=compute,
        ids=ids,
        tensors=tensors,
        depth=meta.depth,
        build_model=build_model,
        call_server=call_server,
        choice_losses=choice_losses,
        progress=progress,
    )
    client = labelling.augmented(inputs, method_of(inputs).build_client(context), context)
    client = _monitored(inputs, client, ids)
    privacy = config.client.privacy
    if privacy.clip is not None and privacy.noise_scale is not None:
        client = LocalDPClient(client, privacy.clip, privacy.noise_scale)
    if config.federation.compression.is_on:
        keep = config.federation.client_state == "kept"
        client = CompressedClient(client, config.federation.compression, keep=keep)
    cache = ClientStateCache(
        client.states,
        Checkpoints(Path(meta.folder)),
        max_in_memory=config.client.resident,
        files={id: file for id, file in meta.client_states.items() if id in set(ids)},
    )
    participants = partial(participation.chosen, inputs)
    return HostedClients(
        weighted(inputs, client, ids),
        ids,
        compute,
        cache,
        participants,
        progress,
        score_silo=_silo_scorer(inputs, client),
        score_tiers_of=tiers.user_scorer(inputs, client),
    )


def weighted(inputs: ExperimentInputs, client: Client, ids: Sequence[int]) -> Client:
    """Return clients whose updates weigh as their silos' configuration says.

    Args:
        inputs: of silos; otherwise the clients stay as they are.
        client: plays the clients.
        ids: of the clients.
    """
    if not isinstance(inputs, SiloInputs):
        return client
    weights = {id: inputs.weight_of(id) for id in ids}
    samples = inputs.disclosed_samples(ids)
    if not samples and set(weights.values()) == {1.0}:
        return client
    return WeightedClient(client, weights, samples)


def _silo_scorer(
    inputs: ExperimentInputs, client: Client
) -> Callable[[int, int, NamedTensors], SiloRow | None] | None:
    """Return what scores a silo's held-out text; None where the server alone judges."""
    if not isinstance(inputs, SiloInputs) or inputs.config.evaluation.at == "server":
        return None
    batch_tokens = inputs.config.evaluation.batch_tokens

    def score_silo(id: int, round: int, tensors: NamedTensors) -> SiloRow | None:
        if id not in inputs.opened:
            return None
        text = inputs.opened[id]
        client.hold(id, tensors)
        model = client.model
        assert model is not None, "clients without a model do not judge"
        accuracy = math.nan
        if text.held_out_questions:
            result = score(
                model,
                client.prompt,
                text.held_out_questions,
                metric="multiple_choice",
                batch_tokens=batch_tokens,
            )
            accuracy = result.acc if result else math.nan
        loss = answer_loss_mean(model, client.prompt, text.held_out, batch_tokens=batch_tokens)
        disclose = inputs.config.federation.disclose
        num_held_out = disclosed(len(text.held_out), disclose) or 0
        return SiloRow(round=round, silo=id, n=num_held_out, loss=loss, acc=accuracy)

    return score_silo


def _monitored(inputs: ExperimentInputs, client: Client, ids: Sequence[int]) -> Client:
    """Return clients of which the poisoned ones report how well the attack works, if asked to."""
    attack = inputs.config.attack
    poisoned_ids = set(attack.clients) & set(ids)
    model = client.model
    if model is None or not poisoned_ids or not attack.questions:
        return client
    questions = inputs.triggered_test[: attack.questions]
    batch_tokens = inputs.config.evaluation.batch_tokens

    def attack_success() -> float:
        result = score(
            model, client.prompt, questions, metric="multiple_choice", batch_tokens=batch_tokens
        )
        return result.acc if result else math.nan

    return AttackMonitor(client, poisoned_ids, attack_success)

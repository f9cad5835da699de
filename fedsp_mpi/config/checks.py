"""Checks across sections: values that each could work, but not together."""

from __future__ import annotations

from typing import TYPE_CHECKING

from fedsp_mpi.config.methods import METHODS
from fedsp_mpi.config.parsing import ConfigError
from fedsp_mpi.config.silos import server_owns_text

if TYPE_CHECKING:
    from fedsp_mpi.config.experiment import Config
    from fedsp_mpi.config.federation import FederationConfig


def require_consistent(config: Config) -> None:
    """Raise ConfigError on the first values of different keys that contradict each other."""
    if config.searches:
        _require_search(config)
    else:
        _require_method_keys(config)
    _require_text(config)
    _require_labels(config)
    _require_adapters(config)
    _require_federation(config)
    _require_prompt(config)
    _require_shares(config)
    _require_server_ranks(config)


def _require_search(config: Config) -> None:
    """Check what a search without gradients needs, and which keys it leaves no choice."""
    if config.federation.clients == 0:
        raise ConfigError(
            f"federation.clients: found 0 with method={config.method}, expected at least 1: "
            "clients search"
        )
    _require_method_keys(config)
    if config.in_words:
        config.instructions.check("instructions")
    prompt = config.prompt
    if prompt.kind == "prefix" and prompt.init == "random" and not prompt.init_std:
        raise ConfigError(
            "prompt.init_std: found 0 with method=fedbpt, expected a number above 0, which the "
            "search's scale follows from; or set prompt.init=text"
        )


def _require_method_keys(config: Config) -> None:
    """Check the keys that a method leaves no choice."""
    for key, (required, reason) in config.method_facts.required.items():
        value = config.value(key)
        if value != required:
            expected = "null" if required is None else required
            raise ConfigError(
                f"{key}: found {value} with method={config.method}, expected {expected}: {reason}"
            )


def _require_text(config: Config) -> None:
    """Check that a method that reads documents has some, and no other method; and the weights."""
    is_plain = config.data.task == "plain_text"
    if is_plain != config.method_facts.reads_plain_text:
        expected = (
            "another task, with questions and answers; or set method=pretrain"
            if is_plain
            else "plain_text, documents in a column text"
        )
        raise ConfigError(
            f"data.task: found {config.data.task} with method={config.method}, expected {expected}"
        )
    if is_plain and config.data.template is not None:
        raise ConfigError(
            "data.template: found one with plain_text, whose documents are read as they are, "
            "expected null"
        )
    if config.model.weights == "random" and config.model.after is not None:
        raise ConfigError(
            "model.weights: found random with model.after, whose weights an earlier run has "
            "trained, expected pretrained; or set model.after=null"
        )
    keeps_weights = config.classifies or not config.tunes_weights
    if config.model.weights == "random" and keeps_weights:
        raise ConfigError(
            f"model.weights: found random with method={config.method}, which leaves the weights as "
            "they are, expected pretrained; or set method=pretrain"
        )


def _require_labels(config: Config) -> None:
    """Check what few labels, and text without any, need."""
    data = config.data
    augment = config.augment
    has_silos = bool(config.federation.silos)
    if data.labels is not None and has_silos:
        raise ConfigError(
            f"data.labels: found {data.labels} with federation.silos, expected null: silos have "
            "labels of their own; leave those that they lack empty in their rows"
        )
    if data.labels is not None and not config.federation.clients:
        raise ConfigError(
            f"data.labels: found {data.labels} with federation.clients=0, expected null: labels "
            "are spread over clients; set data.limit.train or data.shots"
        )
    if data.labels is not None and config.method_facts.reads_plain_text:
        raise ConfigError(
            f"data.labels: found {data.labels} with method={config.method}, whose texts have no "
            "labels, expected null"
        )
    if data.shots is not None and config.method_facts.reads_plain_text:
        raise ConfigError(
            f"data.shots: found {data.shots} with method={config.method}, whose texts have no "
            "classes, expected null; set data.limit.train instead"
        )
    if not augment.is_on:
        return
    if not config.method_facts.augments:
        names = [name for name, facts in METHODS.items() if facts.augments]
        raise ConfigError(
            f"augment.clients: found {augment.clients} with method={config.method}, expected 0, or "
            f"a method that trains on labelled examples by gradients: {', '.join(names)}"
        )
    if data.labels is None and not has_silos:
        raise ConfigError(
            f"augment.clients: found {augment.clients} without data.labels, expected 0: all text "
            "is labelled; set data.labels, or name silos with unlabelled rows"
        )
    is_drawn = config.federation.clients_per_round is not None
    if config.federation.sampling == "round_robin" and is_drawn:
        raise ConfigError(
            "federation.sampling: found round_robin with augment.clients, expected uniform or "
            "by_size: who can take part changes from round to round"
        )
    if config.attack.target is not None:
        raise ConfigError(
            f"attack.target: found {config.attack.target} with augment.clients, expected null: "
            "how poisoned clients label is not defined"
        )


def _require_adapters(config: Config) -> None:
    """Check what merges low-rank adapters by their products."""
    if not config.adapts or config.lora.merge == "factors":
        return
    if config.federation.rule != "mean":
        raise ConfigError(
            f"federation.rule: found {config.federation.rule} with lora.merge=products, expected "
            "mean: what is merged is the mean of products; or set lora.merge=factors"
        )


def _require_federation(config: Config) -> None:
    federation = config.federation
    if federation.clients == 0:
        _require_centralised(config)
        return
    if not any(silo.is_pattern for silo in federation.silos):  # else they are still to be found
        _require_participants(federation)
    if (federation.stragglers == "drop") != (federation.client_seconds is not None):
        raise ConfigError(
            f"federation.stragglers: found {federation.stragglers} with client_seconds "
            f"{federation.client_seconds}, expected drop with a number of seconds, or wait "
            "without one"
        )


def _require_participants(federation: FederationConfig) -> None:
    """Raise ConfigError if a round is to have more clients than there are."""
    per_round = federation.clients_per_round
    if per_round is not None and per_round > federation.clients:
        raise ConfigError(
            f"federation.clients_per_round: found {per_round}, expected at most the "
            f"{federation.clients} of federation.clients"
        )
    participants = per_round or federation.clients
    if federation.min_clients > participants:
        name = "clients_per_round" if per_round else "clients"
        raise ConfigError(
            f"federation.min_clients: found {federation.min_clients}, expected at most the "
            f"{participants} of federation.{name}"
        )


def _require_centralised(config: Config) -> None:
    if not config.server.tuning.steps:
        raise ConfigError(
            "server.tuning.steps: found 0 with federation.clients=0, expected at least 1: the "
            "server tunes alone"
        )
    if config.federation.clients_per_round is not None:
        raise ConfigError(
            "federation.clients_per_round: found with federation.clients=0, expected null"
        )


def _require_prompt(config: Config) -> None:
    prompt = config.prompt
    if prompt.projection is not None and prompt.kind == "input":
        raise ConfigError(
            "prompt.projection: found with prompt.kind=input, expected prompt.kind=prefix"
        )
    if prompt.projection is not None and prompt.init == "text":
        raise ConfigError("prompt.init: found text with prompt.projection, expected random")
    if prompt.encoder is not None and prompt.kind != "input":
        raise ConfigError(
            "prompt.encoder: found with prompt.kind=prefix, expected prompt.kind=input"
        )
    if prompt.encoder is not None and prompt.init == "text":
        raise ConfigError("prompt.init: found text with prompt.encoder, expected random")
    if not prompt.init_text.strip():
        raise ConfigError(
            "prompt.init_text: found no words, expected at least one; or set prompt.init=random"
        )
    if (
        prompt.mapping == "same_layers"
        and config.auxiliary.shares_layers
        and not config.tunes_weights
    ):
        raise ConfigError(
            "prompt.mapping: found same_layers with an auxiliary model that runs its layers more "
            f"than once (auxiliary.layers_per_cell={config.auxiliary.layers_per_cell}), expected "
            "repeat; or set auxiliary.layers_per_cell=null"
        )
    trains_prefix = prompt.kind == "prefix" and not config.tunes_weights
    if config.model.gradient_checkpointing and trains_prefix:
        raise ConfigError(
            "model.gradient_checkpointing: found true with prompt.kind=prefix, which trains "
            "silently wrong (checkpointed layers drop the prefix), expected false; or set "
            "prompt.kind=input"
        )
    if config.model.gradient_checkpointing and config.auxiliary.dropout:
        raise ConfigError(
            "auxiliary.dropout: found true with model.gradient_checkpointing=true, expected one "
            "of them false"
        )


def _require_shares(config: Config) -> None:
    """Check what a server without examples cannot do, and a server of several ranks."""
    has_no_examples = config.data.resolved_server_share == 0
    why = "data.server_share=0"
    if config.federation.silos:
        has_no_examples = not server_owns_text(config)
        why = "federation.silos, and no server.data.source"
    has_no_text = config.distillation.text is None
    if has_no_examples and config.server.tuning.steps:
        raise ConfigError(
            f"server.tuning.steps: found {config.server.tuning.steps} with {why}, "
            "expected 0: a server without examples only averages"
        )
    if has_no_examples and has_no_text and config.distils:
        raise ConfigError(
            f"distillation.text: found none with {why}, expected a file of plain "
            "text; or set distillation.stage.steps=0 and auxiliary.first_layers=null"
        )
    if config.translates and config.topology.server_ranks > 1:
        raise ConfigError(
            f"server.translation.steps: found {config.server.translation.steps} with "
            f"topology.server_ranks={config.topology.server_ranks}, expected one rank of the "
            "server; or set server.translation.steps=0"
        )
    if has_no_examples and has_no_text and config.translates:
        raise ConfigError(
            f"distillation.text: found none with {why}, expected a file of plain "
            "text to ask about; or set server.translation.steps=0"
        )


def _require_server_ranks(config: Config) -> None:
    """Check that work of the server can be shared among its ranks: batches, or experts."""
    num_ranks = config.topology.server_ranks
    if config.method_facts.has_tiers:
        num_experts = len(config.tiers.experts)
        if num_ranks > max(1, num_experts):
            raise ConfigError(
                f"topology.server_ranks: found {num_ranks} with {num_experts} experts "
                f"(tiers.experts), expected at most {num_experts}: a rank of the server plays one "
                "at least"
            )
        return
    stages = {
        "distillation.stage": config.distillation.stage,
        "server.tuning": config.server.tuning,
    }
    for key, stage in stages.items():
        if stage.batch_size % num_ranks:
            raise ConfigError(
                f"{key}.batch_size: found {stage.batch_size}, expected a multiple of "
                f"topology.server_ranks={num_ranks}, so that each of them "
                "gets an equal part"
            )

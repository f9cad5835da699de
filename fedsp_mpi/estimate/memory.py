"""Estimate the memory and disk of a run from the configuration and the model's sizes alone.

Weights and optimizer states are counted, activations are estimated; a run may need a third more, or
less. All results are bytes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch

from fedsp_mpi.config import Config, StageConfig
from fedsp_mpi.files.untrusted import JsonMapping
from fedsp_mpi.models import auxiliary, class_head, lora
from fedsp_mpi.models.language_model import LanguageModel
from fedsp_mpi.models.prompts import Prompt, PromptSpec
from fedsp_mpi.training.device import DTYPES

if TYPE_CHECKING:
    from fedsp_mpi.models.families import PreTrainedConfig
    from fedsp_mpi.run.inputs import ExperimentInputs

# Host memory of each process for torch, transformers and datasets, in bytes; measured on a CPU.
LIBRARIES = 640 << 20
# Values that the backward pass keeps per layer, token and unit of width, at least. Measured: 13
# (OPT) to 33 (GPT-2, Qwen2), where layers are not wider inside than four times the states.
_ACTIVATIONS = 32
# The same where they are wider, by what keeps them: states and norms, each unit of the queries'
# width, each unit of the feed-forward width. Fitted to tiny Gemma 3 and Qwen3, which keep 31 to 38.
_STATE_VALUES = 10
_QUERY_VALUES = 5
_INNER_VALUES = 4
# Copies of the logits of every token that a distillation to logits holds.
_LOGITS_COPIES = 6
_FP32_BYTES = 4
_FP64_BYTES = 8
# Matrices as large as a covariance that a search holds at a time, with a population of 5.
_SEARCH_MATRICES = 16
# Bytes of a parameter in training: itself, its gradient, AdamW's two moments.
_TRAINED_BYTES = 4 * _FP32_BYTES
# Bytes of a parameter of a client that waits for its turn: the same without the gradient.
_STATE_BYTES = 3 * _FP32_BYTES


@dataclass(frozen=True)
class ModelSizes:
    """The numbers that memory and disk depend on.

    Where the global model's own weights are tuned and travel, they count as the prompt, and there
    is no auxiliary model.

    Attributes:
        global_model: its parameters, shared ones counted once.
        auxiliary: parameters of the clients' model, shared ones counted once.
        prompt: values of the prompt at the global model's depth.
        wire: values of the prompt that travels.
        num_layers: layers that the global model runs.
        depth: layers that the auxiliary model runs.
        width: of a hidden state.
        length: tokens of the longest text, prompts included.
        activations: values that a backward pass keeps per layer, token and unit of width.
        vocabulary: number of tokens that a model knows.
    """

    global_model: int
    auxiliary: int
    prompt: int
    wire: int
    num_layers: int
    depth: int
    width: int
    length: int
    activations: int = _ACTIVATIONS
    vocabulary: int = 0

    @classmethod
    def of(cls, inputs: ExperimentInputs, length: int) -> ModelSizes:
        """Compute the sizes of a run from its model's configuration; no weight is loaded.

        Args:
            inputs: of the run.
            length: tokens of the longest text, without prompts.
        """
        config = inputs.model_config
        large = meta_model(config, inputs.shape.num_layers)
        if inputs.config.adapts:
            adapted = meta_model(config, inputs.shape.num_layers)
            num_adapters = lora.num_parameters(adapted, inputs.config.lora)
            return cls.with_adapters(large, num_adapters, length)
        if inputs.config.classifies:
            num_values = class_head.num_parameters(large, len(inputs.classes))
            return cls.with_adapters(large, num_values, length)
        if inputs.config.tunes_weights:
            return cls.all_weights(large, length)
        cell_config = auxiliary.cell_config(config, inputs.config.auxiliary)
        small = meta_model(cell_config, inputs.depth)
        sizes = cls.between(large, small, spec=inputs.prompt_spec, length=length)
        return sizes.held_by(inputs.config)

    @classmethod
    def between(
        cls, large: LanguageModel, small: LanguageModel, *, spec: PromptSpec, length: int
    ) -> ModelSizes:
        """Compute the sizes of a global and an auxiliary model.

        Args:
            large: the global model, on the meta device.
            small: the auxiliary model, on the meta device.
            spec: of the prompt; it travels at the auxiliary model's depth.
            length: tokens of the longest text, without prompts.
        """
        num_layers = large.shape.num_layers
        depth = small.shape.num_layers
        with torch.device("meta"):
            prompt = Prompt(spec.at_depth(num_layers)).num_parameters()
            wire = Prompt(spec.at_depth(depth)).num_parameters()
        return cls(
            global_model=large.num_parameters(),
            auxiliary=small.num_parameters(),
            prompt=prompt,
            wire=wire,
            num_layers=num_layers,
            depth=depth,
            width=large.model.config.hidden_size,
            length=length + spec.num_tokens,
            activations=_activations_per_unit(large),
            vocabulary=large.model.config.vocab_size,
        )

    @classmethod
    def all_weights(cls, model: LanguageModel, length: int) -> ModelSizes:
        """Compute the sizes where the global model itself is tuned and travels.

        Args:
            model: on the meta device.
            length: tokens of the longest text.
        """
        num_parameters = model.num_parameters()
        num_layers = model.shape.num_layers
        return cls(
            global_model=num_parameters,
            auxiliary=0,
            prompt=num_parameters,
            wire=num_parameters,
            num_layers=num_layers,
            depth=num_layers,
            width=model.model.config.hidden_size,
            length=length,
            activations=_activations_per_unit(model),
            vocabulary=model.model.config.vocab_size,
        )

    @classmethod
    def with_adapters(cls, model: LanguageModel, num_values: int, length: int) -> ModelSizes:
        """Compute the sizes where clients hold the global model, and adapters or a head travel.

        Args:
            model: on the meta device.
            num_values: of the adapters, or of the head.
            length: tokens of the longest text.
        """
        sizes = cls.all_weights(model, length)
        return replace(sizes, auxiliary=sizes.global_model, prompt=num_values, wire=num_values)

    def held_by(self, config: Config) -> ModelSizes:
        """Return the sizes without the clients' model, if they hold none."""
        return replace(self, auxiliary=0) if config.asks_server else self


def _activations_per_unit(model: LanguageModel) -> int:
    """Estimate the values that a backward pass keeps per layer, token and unit of width."""
    config = model.model.config
    width = config.hidden_size
    inner = getattr(config, "intermediate_size", None) or 0
    queries = config.num_attention_heads * model.shape.head_dim
    values = _STATE_VALUES + (_QUERY_VALUES * queries + _INNER_VALUES * inner) / width
    return max(_ACTIVATIONS, round(values))


def meta_model(config: PreTrainedConfig, depth: int) -> LanguageModel:
    """Build a model on the meta device, that is, without memory for its weights.

    Args:
        config: transformers' configuration.
        depth: layers that the model runs; those of `config` are repeated until it is so deep.
    """
    with torch.device("meta"):
        return auxiliary.build(config.to_dict(), depth, torch.device("meta"), dtype=torch.float32)


@dataclass(frozen=True)
class MemoryNeed:
    """Bytes that a role needs; LIBRARIES come on top, once per process.

    Attributes:
        device: on the device of the role.
        host: in the memory of its host, whatever the device.
    """

    device: int
    host: int


@dataclass(frozen=True)
class MemoryBudget:
    """Bytes that all ranks of a host or GPU need together, and that are free there."""

    place: str
    needed: int
    free: int


def plan(
    config: Config,
    sizes: ModelSizes,
    ranks: Sequence[JsonMapping],
    *,
    assignment: Sequence[Sequence[int]] | None = None,
) -> list[MemoryBudget]:
    """Estimate what the ranks of each host and GPU need together.

    Args:
        config: checked.
        sizes: of the run.
        ranks: of each rank its "host", "memory" (free bytes there), and "devices": by role,
            "server" or "client", with "uuid" and "free" if it is a GPU.
        assignment: the clients of each rank; None: about as many on each.
    """
    num_client_ranks = sum("client" in rank["devices"] for rank in ranks)
    clients_per_rank = -(-config.federation.clients // max(1, num_client_ranks))
    needed: dict[str, int] = {}
    free: dict[str, int] = {}
    for number, rank in enumerate(ranks):
        num_clients = len(assignment[number]) if assignment else clients_per_rank
        estimates = {
            "server": server(config, sizes),
            "client": client(config, sizes, num_clients),
        }
        host = f"host {rank['host']}"
        needed[host] = needed.get(host, 0) + LIBRARIES
        free[host] = min(free.get(host, rank["memory"]), rank["memory"])
        for role, device in rank["devices"].items():
            place = f"GPU {device['uuid']}" if "uuid" in device else host
            needed[host] += estimates[role].host
            needed[place] = needed.get(place, 0) + estimates[role].device
            device_free = device.get("free", rank["memory"])
            free[place] = min(free.get(place, device_free), device_free)
    return [MemoryBudget(place, needed[place], free[place]) for place in needed]


def server(config: Config, sizes: ModelSizes) -> MemoryNeed:
    """Estimate a server rank: the global model, and the largest of what it does one after another.

    That is distilling the auxiliary model, tuning the prompt, scoring, and answering clients that
    hold no model.
    """
    dtype_bytes = DTYPES[config.server.compute.dtype].itemsize
    scoring_bytes = max(DTYPES[config.evaluation.dtype].itemsize, dtype_bytes)
    if config.distillation.stage.steps:
        distillation = _TRAINED_BYTES * sizes.auxiliary + _activations(
            config,
            sizes,
            config.distillation.stage,
            depth=sizes.depth,
            dtype_bytes=_FP32_BYTES,
        )
        if config.distillation.logits_weight:
            num_tokens = _num_tokens(config.distillation.stage, sizes)
            distillation += _LOGITS_COPIES * _FP32_BYTES * num_tokens * sizes.vocabulary
    else:
        distillation = 2 * _FP32_BYTES * sizes.auxiliary
    # The prompt twice: the federation's, and that of the server-only control.
    tuning = _TRAINED_BYTES * 2 * sizes.prompt + _activations(
        config,
        sizes,
        config.server.tuning,
        depth=sizes.num_layers,
        dtype_bytes=dtype_bytes,
    )
    scoring = (scoring_bytes - dtype_bytes) * sizes.global_model
    answering = _forward_passes(sizes, config.search.batch_tokens) if config.asks_server else 0
    device = dtype_bytes * sizes.global_model + max(distillation, tuning, scoring, answering)
    if config.translates:  # the auxiliary model stays
        device += dtype_bytes * sizes.auxiliary
    return MemoryNeed(device, host=2 * _reference(config, sizes))


def client(config: Config, sizes: ModelSizes, num_clients: int) -> MemoryNeed:
    """Estimate a client rank.

    On the device one auxiliary model in training; on the host the hand-out, and the states of the
    clients that wait for their turn.

    Args:
        config: checked.
        sizes: of the run.
        num_clients: that the rank plays.
    """
    if config.searches:
        return _search(config, sizes)
    if config.clients_train_weights:
        weight_bytes = _TRAINED_BYTES
    else:
        weight_bytes = DTYPES[config.client.compute.dtype].itemsize
    activations = [
        _activations(config, sizes, stage, depth=sizes.depth, dtype_bytes=_FP32_BYTES)
        for stage in (config.client.alignment, config.client.tuning)
    ]
    if config.evaluation.at != "server":
        activations.append(_forward_passes(sizes, config.evaluation.batch_tokens))
    device = weight_bytes * sizes.auxiliary + _TRAINED_BYTES * sizes.wire + max(activations)
    states = min(num_clients, config.client.resident) * state(config, sizes)
    host = _FP32_BYTES * sizes.auxiliary + states + _reference(config, sizes)
    return MemoryNeed(device, host)


def _reference(config: Config, sizes: ModelSizes) -> int:
    """Return the bytes of a reference, or of a residual, of compressed rounds."""
    return _FP32_BYTES * sizes.wire if config.federation.compression.is_on else 0


def _search(config: Config, sizes: ModelSizes) -> MemoryNeed:
    """Estimate a client rank that searches without gradients.

    On the device forward passes, which hold one layer's activations at a time; on the host the
    search's matrices and prompts.
    """
    matrices = 0
    num_prompts = config.instructions.candidates
    batch_tokens = config.instructions.batch_tokens
    if not config.in_words:
        matrices = _SEARCH_MATRICES * _FP64_BYTES * config.search.dimension**2
        num_prompts = config.search.population
        batch_tokens = config.search.batch_tokens
    if config.asks_server:
        return MemoryNeed(device=0, host=matrices)
    dtype_bytes = DTYPES[config.client.compute.dtype].itemsize
    prompts = (num_prompts + 1) * _FP32_BYTES * sizes.prompt
    return MemoryNeed(
        device=dtype_bytes * sizes.auxiliary + _forward_passes(sizes, batch_tokens),
        host=_FP32_BYTES * sizes.auxiliary + matrices + prompts,
    )


def _forward_passes(sizes: ModelSizes, batch_tokens: int) -> int:
    """Estimate the bytes of forward passes without gradients, and without the model.

    Args:
        sizes: of the run.
        batch_tokens: positions of a pass, more only where one text is longer.
    """
    num_tokens = max(batch_tokens, sizes.length)
    return _FP32_BYTES * (sizes.wire + num_tokens * sizes.width * sizes.activations)


def state(config: Config, sizes: ModelSizes) -> int:
    """Estimate the bytes that one client keeps between rounds."""
    if config.searches or config.federation.client_state != "kept":
        return 0
    num_values = sizes.wire
    if config.clients_train_weights:
        num_values += sizes.auxiliary
    has_feedback = config.federation.compression.error_feedback
    residual = _reference(config, sizes) if has_feedback else 0
    return _STATE_BYTES * num_values + residual


def disk(config: Config, sizes: ModelSizes) -> int:
    """Estimate the bytes of a whole run folder: checkpoints, the auxiliary model, the record."""
    checkpoint = config.federation.clients * state(config, sizes) + 2 * _STATE_BYTES * sizes.prompt
    checkpoint += 2 * _reference(config, sizes)
    # Besides those that are kept, the best one and the one that is being written.
    num_checkpoints = config.checkpoint.keep + 2 if config.checkpoint.every else 1
    prompts = 0
    if config.record.prompts:
        prompts = config.federation.rounds * _FP32_BYTES * sizes.prompt
    # A record is replaced whole: for a moment there are two.
    return num_checkpoints * checkpoint + _FP32_BYTES * sizes.auxiliary + 2 * prompts


def _activations(
    config: Config, sizes: ModelSizes, stage: StageConfig, *, depth: int, dtype_bytes: int
) -> int:
    """Estimate the bytes of activations that a stage's backward pass keeps.

    Args:
        config: checked.
        sizes: of the run.
        stage: the training.
        depth: layers of the model in training.
        dtype_bytes: of an activation.
    """
    if not stage.steps:
        return 0
    if config.classifies:  # no gradient goes into the model
        return _forward_passes(sizes, _num_tokens(stage, sizes))
    if config.model.gradient_checkpointing:
        # One layer's activations, and the hidden states between the layers.
        values_per_unit = sizes.activations + depth
    else:
        values_per_unit = sizes.activations * depth
    return _num_tokens(stage, sizes) * sizes.width * values_per_unit * dtype_bytes


def _num_tokens(stage: StageConfig, sizes: ModelSizes) -> int:
    """Return how many tokens one backward pass of a stage has at most."""
    return (stage.micro_batch or stage.batch_size) * sizes.length

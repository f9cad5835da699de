"""What a run needs in memory and on disk: rough figures, from the configuration and the model's
sizes alone.

Weights and optimizers are counted, activations are estimated; a run may need a third more, or less.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch

from fedsp_mpi.config import Config, StageConfig
from fedsp_mpi.models import auxiliary
from fedsp_mpi.models.language_model import LanguageModel
from fedsp_mpi.models.prompts import Prompt, PromptSpec
from fedsp_mpi.training.device import DTYPES

if TYPE_CHECKING:
    from fedsp_mpi.run.inputs import ExperimentInputs

LIBRARIES = (
    640 << 20
)  # of host memory in each process, for torch, transformers and datasets; measured on a CPU
# Values that the backward pass keeps per layer, token and unit of width: 13 (OPT) to 33 (GPT-2,
# Qwen2), measured.
_ACTIVATIONS = 32
_FP32, _FP64 = 4, 8
_MATRICES = 16  # as large as a covariance, that a search has at a time with a population of 5
_TRAINED = 4 * _FP32  # bytes of a trained parameter: itself, its gradient, AdamW's two moments
_KEPT = 3 * _FP32  # bytes of one that rests: without its gradient


@dataclass(frozen=True)
class Sizes:
    """What needs are reckoned from.

    Attributes:
        global_model, auxiliary: parameters, shared ones counted once. prompt, wire: values of the
            prompts, and of what of them travels. Where the global model's weights are what is
            tuned and travels, they are meant, and there is no auxiliary model.
        num_layers, depth: layers that the global and the auxiliary model run.
        width: of a hidden state.
        length: tokens of the longest text, prompts included.
    """

    global_model: int
    auxiliary: int
    prompt: int
    wire: int
    num_layers: int
    depth: int
    width: int
    length: int

    @classmethod
    def of(cls, materials: ExperimentInputs, length: int) -> Sizes:
        """From the model's configuration; no weight is loaded. `length`: of the longest text,
        without prompts.
        """
        config, shape = materials.model_config, materials.shape
        if materials.config.tunes_weights:
            return cls.all_weights(outline(config, shape.num_layers), length)
        cell = auxiliary.cell_config(config, materials.config.auxiliary)
        models = outline(config, shape.num_layers), outline(cell, materials.depth)
        return cls.between(*models, materials.prompt_spec, length).held_by(materials.config)

    @classmethod
    def between(
        cls, large: LanguageModel, small: LanguageModel, spec: PromptSpec, length: int
    ) -> Sizes:
        """From the outlines of a global and an auxiliary model; prompts of `spec` travel at the
        latter's depth.

        `length`: of the longest text in tokens, without prompts.
        """
        layers = large.shape.num_layers, small.shape.num_layers
        with torch.device("meta"):
            prompts = [Prompt(spec.at_depth(depth)).num_parameters() for depth in layers]
        ours, theirs, width = (
            large.num_parameters(),
            small.num_parameters(),
            large.model.config.hidden_size,
        )
        return cls(ours, theirs, prompts[0], prompts[1], *layers, width, length + spec.num_tokens)

    def held_by(self, config: Config) -> Sizes:
        """Without the clients' model, if they hold none."""
        return replace(self, auxiliary=0) if config.asks_server else self

    @classmethod
    def all_weights(cls, model: LanguageModel, length: int) -> Sizes:
        """Where the global model itself is tuned and travels."""
        num, layers = model.num_parameters(), model.shape.num_layers
        return cls(num, 0, num, num, layers, layers, model.model.config.hidden_size, length)


def outline(config: Any, depth: int) -> LanguageModel:
    """A model without memory for its weights: the layers of `config`, run over and over until it is
    `depth` deep.
    """
    with torch.device("meta"):
        return auxiliary.build(config.to_dict(), depth, torch.device("meta"), dtype=torch.float32)


@dataclass(frozen=True)
class MemoryNeed:
    """Bytes that a role needs on its device, and in its host's memory whatever the device;
    LIBRARIES come on top.
    """

    device: int
    host: int


def plan(
    config: Config, sizes: Sizes, ranks: Sequence[Mapping[str, Any]]
) -> list[tuple[str, int, int]]:
    """What the ranks of each host and GPU need together: (which, bytes needed, bytes free).

    Args:
        ranks: of each rank its "host", "memory" (free bytes there), and "devices": by role,
            "server" or "client", with "uuid" and "free" if it is a GPU.
    """
    num_ranks = sum("client" in rank["devices"] for rank in ranks)
    num_clients = -(-config.federation.clients // max(1, num_ranks))
    needs = {"server": server(config, sizes), "client": client(config, sizes, num_clients)}
    needed: dict[str, int] = {}
    free: dict[str, int] = {}
    for rank in ranks:
        host = f"host {rank['host']}"
        needed[host] = needed.get(host, 0) + LIBRARIES
        free[host] = min(free.get(host, rank["memory"]), rank["memory"])
        for role, device in rank["devices"].items():
            where = f"GPU {device['uuid']}" if "uuid" in device else host
            needed[host] += needs[role].host
            needed[where] = needed.get(where, 0) + needs[role].device
            left = device.get("free", rank["memory"])
            free[where] = min(free.get(where, left), left)
    return [(where, needed[where], free[where]) for where in needed]


def server(config: Config, sizes: Sizes) -> MemoryNeed:
    """The global model, and the largest of: distilling the auxiliary model, tuning the prompts,
    scoring.
    """
    held = DTYPES[config.server.compute.dtype].itemsize
    scored = max(DTYPES[config.evaluation.dtype].itemsize, held)
    distil = _TRAINED * sizes.auxiliary + _activations(
        config, sizes, sizes.depth, config.distillation.stage, _FP32
    )
    tune = _TRAINED * 2 * sizes.prompt + _activations(
        config, sizes, sizes.num_layers, config.server.tuning, held
    )
    if not config.distillation.stage.steps:
        distil = 2 * _FP32 * sizes.auxiliary
    score = (scored - held) * sizes.global_model
    kept = held * sizes.auxiliary if config.translates else 0
    asked = _passes(config, sizes) if config.asks_server else 0
    return MemoryNeed(held * sizes.global_model + kept + max(distil, tune, score, asked), 0)


def client(config: Config, sizes: Sizes, num_clients: int) -> MemoryNeed:
    """One auxiliary model in training on the device; the hand-out, and the clients that rest, on
    the host.
    """
    if config.searches:
        return _searching(config, sizes)
    stages = (config.client.alignment, config.client.tuning)
    weight = (
        _TRAINED if config.clients_train_weights else DTYPES[config.client.compute.dtype].itemsize
    )
    work = weight * sizes.auxiliary + _TRAINED * sizes.wire
    work += max(_activations(config, sizes, sizes.depth, stage, _FP32) for stage in stages)
    resting = min(num_clients, config.client.resident) * state(config, sizes)
    return MemoryNeed(work, _FP32 * sizes.auxiliary + resting)


def _searching(config: Config, sizes: Sizes) -> MemoryNeed:
    """Forward passes alone: one layer's activations on the device; the search's matrices and
    prompts on the host.
    """
    matrices = _MATRICES * _FP64 * config.search.dimension**2
    if config.asks_server:
        return MemoryNeed(0, matrices)
    work = DTYPES[config.client.compute.dtype].itemsize * sizes.auxiliary + _passes(config, sizes)
    return MemoryNeed(
        work,
        _FP32 * sizes.auxiliary + matrices + _FP32 * (config.search.population + 1) * sizes.prompt,
    )


def _passes(config: Config, sizes: Sizes) -> int:
    """Bytes of a search's forward passes, without the model."""
    tokens = max(config.search.batch_tokens, sizes.length)
    return _FP32 * (sizes.wire + tokens * sizes.width * _ACTIVATIONS)


def state(config: Config, sizes: Sizes) -> int:
    """Bytes that one client keeps between rounds."""
    if config.searches:
        return 0
    kept = sizes.wire + (sizes.auxiliary if config.clients_train_weights else 0)
    return _KEPT * kept if config.federation.client_state == "kept" else 0


def disk(config: Config, sizes: Sizes) -> int:
    """Bytes of a whole run folder: the checkpoints that are kept, the best and the next one,
    models, prompts.
    """
    checkpoint = config.federation.clients * state(config, sizes) + 2 * _KEPT * sizes.prompt
    kept = config.checkpoint.keep + 2 if config.checkpoint.every else 1
    prompts = config.federation.rounds * _FP32 * sizes.prompt if config.record.prompts else 0
    # A record is replaced whole: for a moment there are two.
    return kept * checkpoint + _FP32 * sizes.auxiliary + 2 * prompts


def _activations(
    config: Config, sizes: Sizes, depth: int, stage: StageConfig, itemsize: int
) -> int:
    if not stage.steps:
        return 0
    tokens = (stage.micro_batch or stage.batch_size) * sizes.length
    layers = _ACTIVATIONS + depth if config.model.gradient_checkpointing else _ACTIVATIONS * depth
    return tokens * sizes.width * layers * itemsize

"""The auxiliary model: a cell of the global model's layers, stored once and run as often as the
model is deep.

Or it is both ends of the global model, its first layers and its last ones, as in offsite-tuning
(Xiao et al., 2023, arXiv 2302.04870). Between them is a linear layer, the bridge, which turns the
states that leave the first layers into those that enter the last ones in the global model.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import safetensors.torch
import torch
import transformers
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.initialization import no_init_weights

from fedsp_mpi.config import AuxiliaryConfig, PromptConfig
from fedsp_mpi.config.parsing import ConfigError
from fedsp_mpi.files import fingerprint, ownership, untrusted
from fedsp_mpi.files.untrusted import JsonMapping, JsonObject
from fedsp_mpi.models.families import (
    layers_of,
    layers_path,
    model_class,
    position_kinds,
    set_layers,
    settle_origins,
    with_layers,
    without_dropout,
)
from fedsp_mpi.models.language_model import LanguageModel
from fedsp_mpi.models.remote_code import NO_CODE, NO_PICKLES, require_no_code
from fedsp_mpi.tensors import NamedTensors, Schema

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

RECIPE = "distillation.json"
_MAX_RECIPE_BYTES = 1 << 24


# --- which layers, and how deep ---


def depth(settings: AuxiliaryConfig, num_layers: int) -> int:
    """Return the depth of the auxiliary model of a global model of `num_layers` layers.

    Shared layers count as often as they run.
    """
    if settings.depth is None:
        return num_layers
    if settings.depth >= 1:
        return int(settings.depth)
    min_depth = 1 if settings.first_layers is None else settings.first_layers + 1
    return max(min_depth, round(settings.depth * num_layers))


def cell_size(settings: AuxiliaryConfig, num_layers: int) -> int:
    """Return how many layers are stored, of a global model of `num_layers` layers."""
    return settings.layers_per_cell or depth(settings, num_layers)


def layers(settings: AuxiliaryConfig, num_layers: int) -> tuple[int, ...]:
    """Return the layers that are stored, of a global model of `num_layers` layers, in order."""
    size = cell_size(settings, num_layers)
    start = settings.start_layer
    num_first = size if settings.first_layers is None else settings.first_layers
    num_last = size - num_first
    return (*range(start, start + num_first), *range(num_layers - num_last, num_layers))


def require_cell(settings: AuxiliaryConfig, num_layers: int, name: str) -> None:
    """Raise ConfigError unless a model has enough layers for the cell, and the cell fits the depth.

    Args:
        settings: of the auxiliary model.
        num_layers: of the global model.
        name: of the global model, for the message.
    """
    size = cell_size(settings, num_layers)
    aux_depth = depth(settings, num_layers)
    if settings.first_layers is not None and settings.first_layers >= size:
        raise ConfigError(
            f"auxiliary.first_layers: found {settings.first_layers} where the auxiliary model has "
            f"{size} layers in all, expected fewer, and last ones behind them; or set "
            "auxiliary.first_layers=null"
        )
    if settings.start_layer + size > num_layers:
        raise ConfigError(
            f"auxiliary: found start_layer {settings.start_layer} and layers_per_cell {size}, "
            f"expected both together at most the {num_layers} layers of {name}"
        )
    if aux_depth < size:
        raise ConfigError(
            f"auxiliary.depth: found {aux_depth}, expected at least layers_per_cell={size}"
        )


def require_positions_kept(
    settings: AuxiliaryConfig, prompt: PromptConfig, config: PreTrainedConfig, *, name: str
) -> None:
    """Raise ConfigError if a layer stands for one that reads positions in another way.

    So it may be where a cell is shared, or where prefixes are repeated and averaged between models
    of different depth, in a model some of whose layers read no positions. A prefix that was tuned
    for the one is of no use to the other.

    Args:
        settings: of the auxiliary model.
        prompt: settings of the prompts, which say how they go between the models.
        config: of the global model.
        name: of the global model, for the message.
    """
    kinds = position_kinds(config)
    if kinds is None:
        return
    stored = layers(settings, len(kinds))
    num_layers = depth(settings, len(kinds))
    is_shared = num_layers > len(stored)
    if not is_shared and (prompt.kind == "input" or prompt.mapping == "same_layers"):
        return
    deepest = max(num_layers, len(kinds))
    # The kind of each auxiliary layer, and of the global one that it stands for.
    pairs = [
        (
            kinds[stored[place * num_layers // deepest % len(stored)]],
            kinds[place * len(kinds) // deepest],
        )
        for place in range(deepest)
    ]
    if all(small == large for small, large in pairs):
        return
    period = next(
        size
        for size in range(1, len(kinds) + 1)
        if all(kind == kinds[place % size] for place, kind in enumerate(kinds))
    )
    raise ConfigError(
        f"auxiliary: found {len(stored)} stored layers at depth {num_layers}, and in {name} layers "
        "that read positions differently, expected each in the place of one of its kind; set "
        f"auxiliary.depth=null, start_layer=0 and layers_per_cell={period}, or take FedPrompt"
    )


# --- the model ---


def cut(backbone: LanguageModel, settings: AuxiliaryConfig) -> nn.Module:
    """Return a model of the cell's layers, with weights copied from the global model's (`layers`).

    Embeddings, final norm and head are copied too; a bridge begins as the identity. The weights are
    fp32, on the global model's device. Source: the reference's `share_client_layer_param`; FedSP,
    cross-layer sharing.
    """
    source = backbone.model
    model = _from_config(cell_config(source.config, settings))
    path = layers_path(source)
    source_layers = layers(settings, source.config.num_hidden_layers)
    source_state = source.state_dict()
    for name, value in model.state_dict().items():
        if not _is_of_bridge(name):
            value.copy_(source_state[_source_name(name, path, source_layers)])
    return model.to(backbone.device)


def cell_config(config: PreTrainedConfig, settings: AuxiliaryConfig) -> PreTrainedConfig:
    """Return the configuration of the stored model.

    Args:
        config: of the global model; what differs by layer goes with the layer.
        settings: of the auxiliary model.
    """
    cell = with_layers(copy.deepcopy(config), layers(settings, config.num_hidden_layers))
    cell.bridge_at = settings.first_layers
    return cell


def unroll(model: PreTrainedModel, num_layers: int) -> PreTrainedModel:
    """Make a model `num_layers` layers deep by running its layers several times, and return it.

    Virtual layer i is layer i mod layers_per_cell. Each is a module of its own, with its own place
    in the key/value cache, over the same parameters; else it computes as its layer does in the
    global model.
    """
    cell = list(layers_of(model))
    virtual = [_alias(cell[index % len(cell)], index) for index in range(num_layers)]
    set_layers(model, virtual)
    with_layers(model.config, [index % len(cell) for index in range(num_layers)])
    return model


def build(
    config: JsonMapping,
    num_layers: int,
    device: torch.device,
    *,
    dtype: torch.dtype,
    dropout: bool = False,
    checkpointing: bool = False,
    candidates: Tensor | None = None,
) -> LanguageModel:
    """Build an auxiliary model whose fp32 weights are still to be loaded.

    Args:
        config: of its cell, as a mapping.
        num_layers: depth, shared layers counted as often as they run.
        device: that the weights are on.
        dtype: of the forward pass.
        dropout: whether the model's dropout acts while its weights are trained.
        checkpointing: recompute activations in the backward pass; turns the model's dropout off.
        candidates: sorted ids of the tokens that an answer's token is chosen from, int64
            [candidates]; None: the whole vocabulary.
    """
    settings = dict(config)
    family = settings.pop("model_type")
    cell = transformers.AutoConfig.for_model(family, **settings)
    model = _from_config(without_dropout(cell) if checkpointing else cell)
    return LanguageModel(
        unroll(model, num_layers).to(device),
        dtype,
        dropout=dropout,
        checkpointing=checkpointing,
        candidates=candidates,
    )


def bridge_of(model: LanguageModel) -> nn.Linear:
    """Return the bridge of an auxiliary model that has one."""
    return layers_of(model.model)[model.model.config.bridge_at].bridge  # type: ignore[return-value]


def pack(model: LanguageModel) -> NamedTensors:
    """Copy the weights into the tensors that travel, fp32; each shared one is there once.

    Their shapes are the model's own, such as [vocabulary, hidden] of the embedding.
    """
    return NamedTensors.pack(model.weights)


def pack_whole(model: LanguageModel) -> NamedTensors:
    """Copy the weights [*shape] of a global model that clients hold whole, fp32.

    Where this is called, the method gives the model away, and says so.
    """
    schema = Schema.of((name, weight.shape) for name, weight in model.weights.items())
    packed = NamedTensors(schema, np.empty(schema.num_values, dtype=np.float32))
    for name, tensor in packed.torch().items():
        tensor.copy_(model.weights[name].detach())
    return packed


def load_weights(model: LanguageModel, tensors: Mapping[str, Tensor]) -> None:
    """Copy weights [*shape] of any float dtype into a model, by the names and shapes of `pack`."""
    for name, tensor in tensors.items():
        model.weights[name].data.copy_(tensor)


# --- folders ---


def save(
    folder: Path,
    model: LanguageModel,
    layers_per_cell: int,
    *,
    tokenizer: PreTrainedTokenizerBase,
    recipe: JsonObject,
) -> None:
    """Write the cell as a Hugging Face folder, with the recipe that it was made by.

    `from_pretrained(folder)` of the family's class gives the model of `layers_per_cell` layers
    without its bridge. `load(folder)` runs them over the full depth, and has the bridge. It also
    knows which layers of the global model they were, which matters where a layer scales its
    attention by its place (`layer_origins` in config.json).

    Args:
        folder: is there completely or not at all.
        model: the auxiliary model, at its full depth.
        layers_per_cell: layers that are stored.
        tokenizer: of the global model.
        recipe: JSON values, among them "depth"; written to `RECIPE`.
    """
    config = with_layers(copy.deepcopy(model.model.config), range(layers_per_cell))
    cell = _from_config(config)
    for name, parameter in cell.named_parameters():
        parameter.data.copy_(model.weights[name])
    write_model(folder, cell, tokenizer, notes={RECIPE: json.dumps(recipe, indent=2) + "\n"})


def write_model(
    folder: Path,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    *,
    notes: Mapping[str, str] | None = None,
) -> None:
    """Write a transformers model and its tokenizer as a Hugging Face folder.

    The files and the list of their digests are written beside it and renamed, so that the folder is
    there completely or not at all.

    Args:
        folder: to be written.
        model: a transformers model.
        tokenizer: of the model.
        notes: further texts, by file name.
    """
    part = ownership.begin_model(folder)
    model.save_pretrained(part)
    tokenizer.save_pretrained(part)
    for name, text in (notes or {}).items():
        (part / name).write_text(text, encoding="utf-8")
    fingerprint.list_folder(part)
    ownership.place_model(part, folder)


def load(folder: Path, dtype: torch.dtype = torch.float32, dropout: bool = False) -> LanguageModel:
    """Read an auxiliary model that `save` wrote, at its full depth.

    Args:
        folder: of the model.
        dtype: of the forward pass; the weights are fp32.
        dropout: whether the model's dropout acts while its weights are trained.

    Raises:
        ValueError: the folder holds no auxiliary model.
    """
    num_layers = read_recipe(folder)["depth"]
    require_no_code(folder, "auxiliary", str(folder))
    try:
        config = transformers.AutoConfig.from_pretrained(folder, **NO_CODE)
        model = model_class(config).from_pretrained(folder, dtype=torch.float32, **NO_PICKLES)
        settle_origins(model)
        _add_bridge(model)
        _load_bridge(model, folder)
    except (OSError, RuntimeError, KeyError, AttributeError, safetensors.SafetensorError) as error:
        raise ValueError(
            f"{folder}: found no readable model ({error}), expected the one that was distilled"
        ) from None
    return LanguageModel(unroll(model, num_layers), dtype, dropout=dropout)


def _load_bridge(model: PreTrainedModel, folder: Path) -> None:
    """Copy the bridge's weights in, which transformers does not know of."""
    for file in folder.glob("*.safetensors"):
        with safetensors.safe_open(file, "pt") as tensors:
            for name in filter(_is_of_bridge, tensors.keys()):
                model.get_parameter(name).data.copy_(tensors.get_tensor(name))


def read_recipe(folder: Path) -> JsonObject:
    """Read the recipe beside an auxiliary model.

    Raises:
        ValueError: there is none, or it lacks a depth.
    """
    try:
        recipe = untrusted.parse_json(untrusted.read_bytes(folder / RECIPE, _MAX_RECIPE_BYTES))
    except (OSError, ValueError) as error:
        raise ValueError(
            f"{folder}: found no auxiliary model ({error}), expected a readable {RECIPE}"
        ) from None
    if not isinstance(recipe, dict) or not isinstance(recipe.get("depth"), int):
        raise ValueError(
            f"{folder}: found {RECIPE} without a depth, expected the one written beside the weights"
        )
    if not isinstance(recipe.get("distillation", {}), dict):
        raise ValueError(
            f"{folder}: found {RECIPE} without an account of the distillation, expected a mapping"
        )
    return recipe


# --- parts of the model ---


def _from_config(config: PreTrainedConfig) -> PreTrainedModel:
    """Build a transformers model with its head and bridge, in fp32, without initial weights."""
    with no_init_weights():
        model = model_class(config).from_config(config, dtype=torch.float32, **NO_CODE)
    model.tie_weights()
    settle_origins(model)
    _add_bridge(model)
    return model


def _add_bridge(model: PreTrainedModel) -> None:
    """Add the bridge that the configuration asks for, as the identity, to the layer it leads to."""
    layer_index = getattr(model.config, "bridge_at", None)
    if layer_index is None:
        return
    width = model.config.hidden_size
    layer = layers_of(model)[layer_index]
    layer.bridge = nn.Linear(width, width)
    nn.init.eye_(layer.bridge.weight)
    nn.init.zeros_(layer.bridge.bias)
    layer.register_forward_pre_hook(_apply_bridge)


def _apply_bridge(layer: Any, arguments: tuple[object, ...]) -> tuple[object, ...]:
    """Lead the states that enter a layer over its bridge.

    In all families they are the layer's first argument.
    """
    return layer.bridge(arguments[0]), *arguments[1:]


def _is_of_bridge(name: str) -> bool:
    return name.endswith(("bridge.weight", "bridge.bias"))


def _source_name(name: str, path: str, source_layers: Sequence[int]) -> str:
    """Return the global model's name of a weight of the cell, whose layers are at `path`."""
    if not name.startswith(path + "."):
        return name
    index, _, name_in_layer = name[len(path) + 1 :].partition(".")
    return f"{path}.{source_layers[int(index)]}.{name_in_layer}"


def _alias(layer: nn.Module, index: int) -> nn.Module:
    """Copy a layer's modules over the same parameters and buffers, for another place in the model.

    Only `layer_idx`, its place in the key/value cache, differs.
    """
    shared = [*layer.parameters(), *layer.buffers()]
    # Deepcopy takes what is in its memo for copied already.
    alias = copy.deepcopy(layer, {id(tensor): tensor for tensor in shared})
    for module in alias.modules():
        if hasattr(module, "layer_idx"):
            setattr(module, "layer_idx", index)  # noqa: B010
    return alias

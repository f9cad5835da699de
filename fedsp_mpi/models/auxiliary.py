"""The auxiliary model: a cell of the global model's layers, stored once and run as often as the model is deep."""

from __future__ import annotations

import copy
import hashlib
import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers.initialization import no_init_weights

from fedsp_mpi.config import AuxiliaryConfig
from fedsp_mpi.models.backbone import FAMILIES, LanguageModel, layers_of, without_dropout
from fedsp_mpi.plain import ConfigError
from fedsp_mpi.tensors import NamedTensors

RECIPE = "distillation.json"


def cut(backbone: LanguageModel, start_layer: int, layers_per_cell: int) -> nn.Module:
    """A model of `layers_per_cell` layers, with copies of the global model's layers from `start_layer` on.

    Embeddings, final norm and head are kept (copied). fp32, on the global model's device. Source: the reference's
    `share_client_layer_param`; FedSP, cross-layer sharing.
    """
    source = backbone.model
    model = _from_config(cell_config(source.config, layers_per_cell))
    path = FAMILIES[source.config.model_type]
    wanted = model.state_dict()
    state = source.state_dict()
    chosen = {name: state[_in_source(name, path, start_layer)] for name in wanted}
    model.load_state_dict(chosen)
    return model.to(backbone.device)


def cell_size(settings: AuxiliaryConfig, num_layers: int) -> int:
    """How many layers are stored, for a global model of `num_layers`."""
    return settings.layers_per_cell or settings.depth or num_layers


def cell_config(config: Any, layers_per_cell: int) -> Any:
    """The configuration of the stored model: as many layers as a cell has."""
    return _with_depth(copy.deepcopy(config), layers_per_cell)


def unroll(model: Any, depth: int) -> Any:
    """Run the layers of `model` as often as it takes to be `depth` layers deep; the weights stay shared.

    Virtual layer i is layer i mod layers_per_cell. Each is a module of its own, with its own place in the key/value
    cache, over the same parameters.
    """
    cell = list(layers_of(model))
    virtual = [_alias(cell[i % len(cell)], i) for i in range(depth)]
    parent, _, name = FAMILIES[model.config.model_type].rpartition(".")
    setattr(model.get_submodule(parent), name, nn.ModuleList(virtual))
    _with_depth(model.config, depth)
    return model


def require_cell(settings: AuxiliaryConfig, num_layers: int, name: str) -> None:
    """Raise ConfigError if a model of `num_layers` layers, called `name`, has no such cell, or it is too large."""
    size = cell_size(settings, num_layers)
    if settings.start_layer + size > num_layers:
        raise ConfigError(
            f"auxiliary: found start_layer {settings.start_layer} and layers_per_cell {size}, "
            f"expected both together at most the {num_layers} layers of {name}"
        )
    if (settings.depth or num_layers) < size:
        raise ConfigError(
            f"auxiliary.depth: found {settings.depth or num_layers}, expected at least layers_per_cell={size}"
        )


def pack(model: LanguageModel) -> NamedTensors:
    """The weights as they travel: each shared one once."""
    return NamedTensors.pack(model.weights)


def build(
    config: Mapping[str, Any],
    depth: int,
    device: torch.device,
    dtype: torch.dtype,
    dropout: bool = False,
    checkpointing: bool = False,
) -> LanguageModel:
    """An auxiliary model without its weights, from the configuration of its cell; fp32, computing in `dtype`."""
    settings = dict(config)
    kind = settings.pop("model_type")
    cell = transformers.AutoConfig.for_model(kind, **settings)
    model = _from_config(without_dropout(cell) if checkpointing else cell)
    return LanguageModel(unroll(model, depth).to(device), dtype, dropout, checkpointing)


def load_weights(model: LanguageModel, tensors: Mapping[str, Tensor]) -> None:
    """Copy weights in, by the names of `pack`."""
    for name, tensor in tensors.items():
        model.weights[name].data.copy_(tensor)


def save(folder: Path, model: LanguageModel, layers_per_cell: int, tokenizer: Any, recipe: dict[str, Any]) -> None:
    """Write the cell as a Hugging Face folder of its own, with the recipe that made it.

    `AutoModelForCausalLM.from_pretrained(folder)` gives the model of `layers_per_cell` layers; `load(folder)` runs them
    over the whole depth.
    """
    cell = _from_config(cell_config(model.model.config, layers_per_cell))
    for name, parameter in cell.named_parameters():
        parameter.data.copy_(model.weights[name])
    write_model(folder, cell, tokenizer, {RECIPE: json.dumps(recipe, indent=2) + "\n"})


def write_model(folder: Path, model: Any, tokenizer: Any, notes: Mapping[str, str] | None = None) -> None:
    """Write a transformers model as a Hugging Face folder, with its tokenizer and with `notes`, texts by file name.

    Written beside and renamed, so that the folder is whole or not there.
    """
    part = folder.with_name(f"{folder.name}.part{os.getpid()}")
    shutil.rmtree(part, ignore_errors=True)
    model.save_pretrained(part)
    tokenizer.save_pretrained(part)
    for name, text in (notes or {}).items():
        (part / name).write_text(text, encoding="utf-8")
    shutil.rmtree(folder, ignore_errors=True)
    part.rename(folder)


def load(folder: Path, dtype: torch.dtype = torch.float32, dropout: bool = False) -> LanguageModel:
    """Read an auxiliary model written by `save`, at its full depth. Raises ValueError if the folder holds none."""
    depth = read_recipe(folder)["depth"]
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    return LanguageModel(unroll(model, depth), dtype, dropout)


def read_recipe(folder: Path) -> dict[str, Any]:
    """The recipe beside an auxiliary model. Raises ValueError if there is none."""
    try:
        recipe = json.loads((folder / RECIPE).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{folder}: found no auxiliary model ({error}), expected a readable {RECIPE}") from None
    if not isinstance(recipe, dict) or "depth" not in recipe:
        raise ValueError(f"{folder}: found {RECIPE} without a depth, expected the one written beside the weights")
    return recipe


def fingerprint(model: LanguageModel) -> str:
    """A short digest of all weights, equal for equal models wherever they lie."""
    digest = hashlib.sha256()
    for name, parameter in model.weights.items():
        digest.update(f"{name}{tuple(parameter.shape)}{parameter.dtype}".encode())
        digest.update(parameter.detach().cpu().contiguous().view(torch.uint8).numpy().data)
    return digest.hexdigest()[:16]


def _from_config(config: Any) -> Any:
    with no_init_weights():
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model.tie_weights()
    return model


def _with_depth(config: Any, depth: int) -> Any:
    kinds = getattr(config, "layer_types", None)
    if kinds:
        config.layer_types = [kinds[i % len(kinds)] for i in range(depth)]
    config.num_hidden_layers = depth
    return config


def _in_source(name: str, path: str, start_layer: int) -> str:
    if not name.startswith(path + "."):
        return name
    index, _, rest = name[len(path) + 1 :].partition(".")
    return f"{path}.{int(index) + start_layer}.{rest}"


def _alias(layer: nn.Module, index: int) -> nn.Module:
    """A copy of the module tree over the very same parameters and buffers, at another place in the depth."""
    shared = [*layer.parameters(), *layer.buffers()]
    alias = copy.deepcopy(layer, {id(tensor): tensor for tensor in shared})
    for module in alias.modules():
        if hasattr(module, "layer_idx"):
            setattr(module, "layer_idx", index)  # noqa: B010
    return alias

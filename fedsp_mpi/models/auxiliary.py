"""The auxiliary model: a cell of the global model's layers, stored once and run as often as the
model is deep.

Or it is both ends of the global model, its first layers and its last ones, as in offsite-tuning
(Xiao et al., 2023, arXiv 2302.04870). A linear layer, the bridge, leads from the first to the last:
it turns the states that the first layers end with into those that enter the last ones in the global
model.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
import transformers
from torch import Tensor, nn
from transformers.initialization import no_init_weights

from fedsp_mpi.config import AuxiliaryConfig
from fedsp_mpi.config.parsing import ConfigError
from fedsp_mpi.files import fingerprint, ownership, untrusted
from fedsp_mpi.models.backbone import LanguageModel
from fedsp_mpi.models.families import (
    FAMILIES,
    layers_of,
    model_class,
    settle_origins,
    with_layers,
    without_dropout,
)
from fedsp_mpi.models.remote_code import NO_CODE, NO_PICKLES, require_no_code
from fedsp_mpi.tensors import NamedTensors

RECIPE = "distillation.json"
_LONGEST_RECIPE = 1 << 24  # bytes


def cut(backbone: LanguageModel, settings: AuxiliaryConfig) -> nn.Module:
    """A model of as many layers as a cell has, with copies of those of the global model's
    (`layers`).

    Embeddings, final norm and head are kept (copied), a bridge begins as the identity. fp32, on the
    global model's device. Source: the reference's `share_client_layer_param`; FedSP, cross-layer
    sharing.
    """
    source = backbone.model
    model = _from_config(cell_config(source.config, settings))
    path, taken = (
        FAMILIES[source.config.model_type],
        layers(settings, source.config.num_hidden_layers),
    )
    state = source.state_dict()
    for name, value in model.state_dict().items():
        if not _is_of_bridge(name):
            value.copy_(state[_in_source(name, path, taken)])
    return model.to(backbone.device)


def depth(settings: AuxiliaryConfig, num_layers: int) -> int:
    """How deep it is, shared layers counted as often as they run, for a global model of
    `num_layers`.
    """
    if settings.depth is None:
        return num_layers
    if settings.depth >= 1:
        return int(settings.depth)
    least = 1 if settings.first_layers is None else settings.first_layers + 1
    return max(least, round(settings.depth * num_layers))


def cell_size(settings: AuxiliaryConfig, num_layers: int) -> int:
    """How many layers are stored, for a global model of `num_layers`."""
    return settings.layers_per_cell or depth(settings, num_layers)


def layers(settings: AuxiliaryConfig, num_layers: int) -> tuple[int, ...]:
    """Which layers of a global model of `num_layers` are stored, in their order."""
    size, start = cell_size(settings, num_layers), settings.start_layer
    num_first = size if settings.first_layers is None else settings.first_layers
    return (*range(start, start + num_first), *range(num_layers - (size - num_first), num_layers))


def bridge_of(model: LanguageModel) -> nn.Linear:
    """The bridge of an auxiliary model that has one."""
    return layers_of(model.model)[model.model.config.bridge_at].bridge  # type: ignore[return-value]


def cell_config(config: Any, settings: AuxiliaryConfig) -> Any:
    """The configuration of the stored model, from that of the global one; what differs by layer
    goes with the layer.
    """
    cell = with_layers(copy.deepcopy(config), layers(settings, config.num_hidden_layers))
    cell.bridge_at = settings.first_layers
    return cell


def unroll(model: Any, depth: int) -> Any:
    """Run the layers of `model` as often as it takes to be `depth` layers deep; the weights stay
    shared.

    Virtual layer i is layer i mod layers_per_cell. Each is a module of its own, with its own place
    in the key/value cache, over the same parameters; else it computes as its layer does in the
    global model.
    """
    cell = list(layers_of(model))
    virtual = [_alias(cell[i % len(cell)], i) for i in range(depth)]
    parent, _, name = FAMILIES[model.config.model_type].rpartition(".")
    setattr(model.get_submodule(parent), name, nn.ModuleList(virtual))
    with_layers(model.config, [i % len(cell) for i in range(depth)])
    return model


def require_cell(settings: AuxiliaryConfig, num_layers: int, name: str) -> None:
    """Raise ConfigError if a model of `num_layers` layers, called `name`, has no such cell, or it
    is too large.
    """
    size, deep = cell_size(settings, num_layers), depth(settings, num_layers)
    if settings.first_layers is not None and settings.first_layers >= size:
        raise ConfigError(
            f"auxiliary.first_layers: found {settings.first_layers} where the auxiliary "
            f"model has {size} layers in "
            "all, expected fewer, and last ones behind them; or set auxiliary.first_layers=null"
        )
    if settings.start_layer + size > num_layers:
        raise ConfigError(
            f"auxiliary: found start_layer {settings.start_layer} and layers_per_cell {size}, "
            f"expected both together at most the {num_layers} layers of {name}"
        )
    if deep < size:
        raise ConfigError(
            f"auxiliary.depth: found {deep}, expected at least layers_per_cell={size}"
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
    candidates: Tensor | None = None,
) -> LanguageModel:
    """An auxiliary model without its weights, from the configuration of its cell; fp32, computing
    in `dtype`.
    """
    settings = dict(config)
    kind = settings.pop("model_type")
    cell = transformers.AutoConfig.for_model(kind, **settings)
    model = _from_config(without_dropout(cell) if checkpointing else cell)
    return LanguageModel(unroll(model, depth).to(device), dtype, dropout, checkpointing, candidates)


def load_weights(model: LanguageModel, tensors: Mapping[str, Tensor]) -> None:
    """Copy weights in, by the names of `pack`."""
    for name, tensor in tensors.items():
        model.weights[name].data.copy_(tensor)


def save(
    folder: Path, model: LanguageModel, layers_per_cell: int, tokenizer: Any, recipe: dict[str, Any]
) -> None:
    """Write the cell as a Hugging Face folder of its own, with the recipe that made it.

    `from_pretrained(folder)` of the family's class gives the model of `layers_per_cell` layers
    without its bridge; `load(folder)` runs them over the whole depth, and has the bridge; it also
    knows which layers of the global model they were, which matters where a layer scales its
    attention by its place (`layer_origins` in config.json).
    """
    cell = _from_config(with_layers(copy.deepcopy(model.model.config), range(layers_per_cell)))
    for name, parameter in cell.named_parameters():
        parameter.data.copy_(model.weights[name])
    write_model(folder, cell, tokenizer, {RECIPE: json.dumps(recipe, indent=2) + "\n"})


def write_model(
    folder: Path, model: Any, tokenizer: Any, notes: Mapping[str, str] | None = None
) -> None:
    """Write a transformers model as a Hugging Face folder, with its tokenizer and with `notes`,
    texts by file name.

    Written beside and renamed, so that the folder is whole or not there, with the list of its
    files' digests.
    """
    part = ownership.begin_model(folder)
    model.save_pretrained(part)
    tokenizer.save_pretrained(part)
    for name, text in (notes or {}).items():
        (part / name).write_text(text, encoding="utf-8")
    fingerprint.list_folder(part)
    ownership.place_model(part, folder)


def load(folder: Path, dtype: torch.dtype = torch.float32, dropout: bool = False) -> LanguageModel:
    """Read an auxiliary model written by `save`, at its full depth.

    Raises ValueError if the folder holds none.
    """
    deep = read_recipe(folder)["depth"]
    require_no_code(folder, "auxiliary", str(folder))
    try:
        kind = model_class(transformers.AutoConfig.from_pretrained(folder, **NO_CODE))
        model = kind.from_pretrained(folder, dtype=torch.float32, **NO_PICKLES)
        settle_origins(model)
        _add_bridge(model)
        for file in folder.glob("*.safetensors"):
            with safetensors.safe_open(file, "pt") as tensors:
                for name in filter(_is_of_bridge, tensors.keys()):
                    model.get_parameter(name).data.copy_(tensors.get_tensor(name))
    except (OSError, RuntimeError, KeyError, AttributeError, safetensors.SafetensorError) as error:
        raise ValueError(
            f"{folder}: found no readable model ({error}), expected the one that was distilled"
        ) from None
    return LanguageModel(unroll(model, deep), dtype, dropout)


def read_recipe(folder: Path) -> dict[str, Any]:
    """The recipe beside an auxiliary model. Raises ValueError if there is none."""
    try:
        recipe = untrusted.parse_json(untrusted.read_bytes(folder / RECIPE, _LONGEST_RECIPE))
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


def _from_config(config: Any) -> Any:
    with no_init_weights():
        model = model_class(config).from_config(config, dtype=torch.float32, **NO_CODE)
    model.tie_weights()
    settle_origins(model)
    _add_bridge(model)
    return model


def _add_bridge(model: Any) -> None:
    """Give a model the bridge that its configuration asks for, as the identity: part of the layer
    that it leads to.
    """
    at = getattr(model.config, "bridge_at", None)
    if at is not None:
        width = model.config.hidden_size
        layer: Any = layers_of(model)[at]
        layer.bridge = nn.Linear(width, width)
        nn.init.eye_(layer.bridge.weight)
        nn.init.zeros_(layer.bridge.bias)
        layer.register_forward_pre_hook(_cross)


def _cross(layer: Any, arguments: tuple[Any, ...]) -> tuple[Any, ...]:
    """Lead the states that enter a layer over its bridge first; all families give them as the first
    argument.
    """
    return layer.bridge(arguments[0]), *arguments[1:]


def _is_of_bridge(name: str) -> bool:
    return name.endswith(("bridge.weight", "bridge.bias"))


def _in_source(name: str, path: str, taken: Sequence[int]) -> str:
    if not name.startswith(path + "."):
        return name
    index, _, rest = name[len(path) + 1 :].partition(".")
    return f"{path}.{taken[int(index)]}.{rest}"


def _alias(layer: nn.Module, index: int) -> nn.Module:
    """A copy of the module tree over the very same parameters and buffers, at another place in the
    depth.
    """
    shared = [*layer.parameters(), *layer.buffers()]
    alias = copy.deepcopy(layer, {id(tensor): tensor for tensor in shared})
    for module in alias.modules():
        if hasattr(module, "layer_idx"):
            setattr(module, "layer_idx", index)  # noqa: B010
    return alias

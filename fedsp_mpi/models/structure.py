"""The generic path: which causal models of transformers are built so that they can be used although
nobody listed their family.

Such a model keeps its layers in one list, and each layer keeps its keys and values in a cache. What
the layers do is theirs, and so is the head. This is found out from the configuration, without
weights; what only weights can tell is tried once they are loaded.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence

import torch
import transformers
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

from fedsp_mpi.models.families import (
    SIZES,
    is_listed,
    layers_of,
    layers_path,
    model_class,
    shape_of,
    with_layers,
)

# Tokens of the texts that a model is tried with.
_LENGTH = 6
# The largest distance between two ways to the same states, relative to them; bf16 is 0.02 apart.
_TOLERANCE = 0.1


class UnusableError(Exception):
    """Says, as a clause that follows "found a model ...", why a model cannot be used."""


# --- by the configuration ---


def require_known(name: str, config: PreTrainedConfig) -> None:
    """Raise ValueError if the configuration of a model says that it is of no kind that is used.

    Args:
        name: of the model, for the message.
        config: its configuration.
    """
    if is_listed(config):
        return
    try:
        _require_causal_text(config)
        _require_dense(config)
        _require_one_size(config)
    except UnusableError as error:
        raise _refusal(name, config, str(error)) from None


def _require_causal_text(config: PreTrainedConfig) -> None:
    """Raise UnusableError unless a configuration is that of a causal model of text alone."""
    if config.get_text_config() is not config:
        raise UnusableError(
            "which reads more than text; save its language model alone, as of Gemma 3"
        )
    if config.is_encoder_decoder or type(config) not in transformers.MODEL_FOR_CAUSAL_LM_MAPPING:
        raise UnusableError("which does not continue a text")


def _require_dense(config: PreTrainedConfig) -> None:
    """Raise UnusableError if layers have experts.

    The router between them needs a loss of its own when it is trained, which neither distillation
    nor clients' training has, and all experts of a layer would travel.
    """
    for key, value in vars(config).items():
        if "expert" in key and "per_tok" not in key and isinstance(value, int) and value > 1:
            raise UnusableError(
                f"whose layers have experts ({key} {value}) and a router, which needs a loss that "
                "is not trained here; take a dense model"
            )


def _require_one_size(config: PreTrainedConfig) -> None:
    """Raise UnusableError if sizes are missing that all layers and texts have in common."""
    try:
        for size in SIZES:
            getattr(config, size, None)
    except Exception:  # transformers has errors of its own for sizes that differ by layer
        raise UnusableError("whose layers have no common sizes") from None
    if getattr(config, "max_position_embeddings", None) is None:
        raise UnusableError("without max_position_embeddings in its config.json")


def _refusal(name: str, config: PreTrainedConfig, problem: str) -> ValueError:
    """Return the error that says why a model cannot be used."""
    return ValueError(
        f"model.name: found {name!r} of the family {config.model_type!r}, {problem}; "
        "expected a family as in configs/families.md"
    )


# --- by the modules, without weights ---


def require_usable(name: str, config: PreTrainedConfig) -> None:
    """Raise ValueError unless a model of a family that is not listed can be cut and prompted.

    The model is built without memory for its weights. Its layers must be one list, take hidden
    states as their first argument, keep keys and values of one shape each, and be the same wherever
    they stand in a part of the model.

    Args:
        name: of the model, for the message.
        config: its configuration, with plausible sizes.
    """
    if is_listed(config):
        return
    try:
        model = _build(config)
        _require_cache(model)
        _require_movable_layers(model)
    except Exception as error:
        reason = str(error) if isinstance(error, UnusableError) else type(error).__name__
        raise _refusal(name, config, f"which cannot be cut or prompted ({reason})") from None


def _build(config: PreTrainedConfig) -> PreTrainedModel:
    """Build a model on the meta device, in evaluation mode."""
    with torch.device("meta"):
        # The fused implementation looks at the values of a mask, and here there are none.
        model = model_class(config).from_config(
            copy.deepcopy(config), dtype=torch.float32, attn_implementation="eager"
        )
    return model.eval()


def _require_cache(model: PreTrainedModel) -> None:
    """Raise UnusableError unless each layer gets the states and fills its place in a cache."""
    shape = shape_of(model.config)
    if model.base_model is model or not layers_path(model).startswith(model.base_model_prefix):
        raise UnusableError("its layers are not in its base model")
    embedded = torch.empty(1, _LENGTH, shape.hidden_size, device="meta")
    arguments: list[tuple[object, ...]] = []
    for layer in layers_of(model):
        layer.register_forward_pre_hook(lambda _, given: arguments.append(given))
    cache = transformers.DynamicCache()
    with torch.no_grad():
        output = model.base_model(
            inputs_embeds=embedded,
            attention_mask=torch.ones(1, _LENGTH, dtype=torch.int64, device="meta"),
            past_key_values=cache,
            use_cache=True,
        )
    if output.last_hidden_state.shape[:2] != embedded.shape[:2]:
        raise UnusableError("its states are not those of its tokens")
    if len(arguments) != shape.num_layers or not all(map(_begins_with_states, arguments)):
        raise UnusableError("its layers do not lead states from one to the next")
    expected = (1, shape.num_kv_heads, _LENGTH, shape.head_dim)
    stored = [getattr(layer, part).shape for layer in cache.layers for part in ("keys", "values")]
    if stored != [expected] * 2 * shape.num_layers:
        raise UnusableError("its layers do not keep keys and values of one shape")


def _begins_with_states(arguments: Sequence[object]) -> bool:
    return bool(arguments) and isinstance(arguments[0], Tensor) and arguments[0].dim() == 3


def _require_movable_layers(model: PreTrainedModel) -> None:
    """Raise UnusableError if a layer is another one where it stands in a part of the model."""
    last = model.config.num_hidden_layers - 1
    places = [last, 0]
    part = _build(with_layers(copy.deepcopy(model.config), places))
    all_layers = layers_of(model)
    for moved, place in zip(layers_of(part), places, strict=True):
        if _plain_settings(moved) != _plain_settings(all_layers[place]):
            raise UnusableError("its layers depend on their place")


def _plain_settings(layer: nn.Module) -> dict[str, object]:
    """Return what a layer consists of: shapes of its weights, numbers and words of its modules."""
    settings: dict[str, object] = {name: weight.shape for name, weight in layer.named_parameters()}
    for path, module in layer.named_modules():
        for name, value in vars(module).items():
            is_plain = isinstance(value, (int, float, str, tuple, type(None)))
            if is_plain and not name.startswith("_") and name not in ("layer_idx", "training"):
                settings[f"{path}.{name}"] = value
    return settings


# --- by the weights ---


def require_causal(name: str, model: PreTrainedModel) -> None:
    """Raise ValueError unless a loaded model of a family that is not listed reads as it should.

    Words and their embeddings must give the same states, and so must a text in one piece and in
    two, the first of which is read from a cache. That is not so if tokens see those behind them.

    Args:
        name: of the model, for the message.
        model: of transformers, with its weights, in evaluation mode.
    """
    if is_listed(model.config):
        return
    base = model.base_model
    ids = torch.arange(1, 1 + _LENGTH, device=model.device)[None] % model.config.vocab_size
    half = _LENGTH // 2
    cache = transformers.DynamicCache()
    with torch.no_grad():
        at_once = base(input_ids=ids, use_cache=False).last_hidden_state[:, half:]
        base(input_ids=ids[:, :half], past_key_values=cache, use_cache=True)
        embedded = model.get_input_embeddings()(ids[:, half:])
        in_two = base(
            inputs_embeds=embedded,
            attention_mask=torch.ones_like(ids),
            past_key_values=cache,
            use_cache=True,
        ).last_hidden_state
    distance = (at_once - in_two).float().norm() / at_once.float().norm()
    if not distance < _TOLERANCE:
        raise _refusal(
            name,
            model.config,
            "whose tokens see those behind them, or whose cache gives other states "
            f"({float(distance):.0%} apart)",
        )

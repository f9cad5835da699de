"""The differences between families of models: where they keep layers and head, how they read, and
their sizes.

A family is listed in `FAMILIES`, or it is any other causal one of transformers that
`structure.require_usable` finds to be built in the same way.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import transformers
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.activations import NewGELUActivation
from transformers.modeling_outputs import BaseModelOutputWithPast

Kind = Literal["causal", "masked", "encoder_decoder"]

# Where each family keeps its list of layers, as a path from the model with its head; for an encoder
# and a decoder, the list of the encoder.
FAMILIES = {
    "gpt2": "transformer.h",
    "opt": "model.decoder.layers",
    "llama": "model.layers",
    "qwen2": "model.layers",
    "qwen3": "model.layers",
    "mistral": "model.layers",
    "phi3": "model.layers",
    "phi": "model.layers",
    "gemma2": "model.layers",
    "gemma3_text": "model.layers",
    "smollm3": "model.layers",
    "olmo2": "model.layers",
    "gpt_neox": "gpt_neox.layers",
    "bert": "bert.encoder.layer",
    "roberta": "roberta.encoder.layer",
    "t5": "encoder.block",
}
# Where the families that fill in a mask keep their complete head.
_MASKED = {"bert": "cls", "roberta": "lm_head"}
_ENCODER_DECODER = ("t5",)
# Listed causal families that do more to their hidden states than multiply them by the head.
_CAPPED = ("gemma2", "gemma3_text")
# The length that T5 was trained with; its relative positions have no end.
_T5_POSITIONS = 512
SIZES = (
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "hidden_size",
    "word_embed_proj_dim",
    "max_position_embeddings",
    "vocab_size",
)
DROPOUTS = (
    "resid_pdrop",
    "embd_pdrop",
    "attn_pdrop",
    "dropout",
    "attention_dropout",
    "activation_dropout",
    "layerdrop",
    "hidden_dropout",
    "hidden_dropout_prob",
    "attention_probs_dropout_prob",
    "dropout_rate",
)
# peft's names for models of each kind. It has no name for a masked one with its head, but treats it
# as it should.
PEFT_TASKS: dict[Kind, str] = {
    "causal": "CAUSAL_LM",
    "masked": "FEATURE_EXTRACTION",
    "encoder_decoder": "SEQ_2_SEQ_LM",
}


@dataclass(frozen=True)
class Shape:
    """The sizes of a model that a prompt must fit.

    Attributes:
        num_layers: depth, shared layers counted as often as they are run.
        num_kv_heads: heads of the keys and values of one layer.
        head_dim: width of one head.
        hidden_size: width of an input embedding.
        num_positions: longest sequence in tokens, prompt included.
    """

    num_layers: int
    num_kv_heads: int
    head_dim: int
    hidden_size: int
    num_positions: int


def shape_of(config: PreTrainedConfig) -> Shape:
    """Read the sizes from a transformers configuration."""
    num_heads = config.num_attention_heads
    return Shape(
        num_layers=config.num_hidden_layers,
        num_kv_heads=getattr(config, "num_key_value_heads", None) or num_heads,
        head_dim=getattr(config, "head_dim", None) or config.hidden_size // num_heads,
        hidden_size=getattr(config, "word_embed_proj_dim", None) or config.hidden_size,
        num_positions=_num_positions(config),
    )


def _num_positions(config: PreTrainedConfig) -> int:
    if config.model_type in _ENCODER_DECODER:
        return getattr(config, "n_positions", None) or _T5_POSITIONS
    num_positions: int = config.max_position_embeddings
    if config.model_type == "roberta":
        # Its positions start after the one of padding.
        num_positions -= (config.pad_token_id or 0) + 1
    return num_positions


def kind_of(config: PreTrainedConfig) -> Kind:
    """Return how a model answers.

    Returns:
        "causal": from left to right; "masked": at a mask token in the text; "encoder_decoder": by a
        decoder that is told which gap of the text to fill.
    """
    if config.model_type in _MASKED:
        return "masked"
    return "encoder_decoder" if config.model_type in _ENCODER_DECODER else "causal"


def model_class(config: PreTrainedConfig) -> Any:
    """Return the transformers class that makes a model with its head from a configuration."""
    classes = {
        "causal": transformers.AutoModelForCausalLM,
        "masked": transformers.AutoModelForMaskedLM,
        "encoder_decoder": transformers.AutoModelForSeq2SeqLM,
    }
    return classes[kind_of(config)]


def is_listed(config: PreTrainedConfig) -> bool:
    """Return whether a model's family is one of `FAMILIES`."""
    return config.model_type in FAMILIES


def layers_path(model: PreTrainedModel) -> str:
    """Return where a model with a language-model head keeps its list of layers, as a path.

    In a family that is not listed it is the outermost list as long as the model is deep.

    Raises:
        ValueError: there is no such list, or there are several.
    """
    config = model.config
    if is_listed(config):
        return FAMILIES[config.model_type]
    paths = [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList) and len(module) == config.num_hidden_layers
    ]
    outermost = min((path.count(".") for path in paths), default=0)
    candidates = [path for path in paths if path.count(".") == outermost]
    if len(candidates) != 1:
        raise ValueError(
            f"model.name: found {len(candidates)} lists of {config.num_hidden_layers} layers in a "
            f"{config.model_type}, expected one; take another model"
        )
    return candidates[0]


def layers_of(model: PreTrainedModel) -> nn.ModuleList:
    """Return the list of layers of a model with a language-model head."""
    return model.get_submodule(layers_path(model))  # type: ignore[return-value]


def position_wise_parts(model: PreTrainedModel) -> list[nn.Module]:
    """Return what works on each position alone in a model's layers: norms, feed-forward parts."""
    return [
        part
        for layer in layers_of(model)
        for group in layer.children()
        for part in (group if isinstance(group, nn.ModuleList) else [group])
        if "Attention" not in type(part).__name__ and not isinstance(part, nn.Linear)
    ]


def set_layers(model: PreTrainedModel, layers: Sequence[nn.Module]) -> None:
    """Replace the list of layers of a model with a language-model head."""
    parent, _, name = layers_path(model).rpartition(".")
    setattr(model.get_submodule(parent), name, nn.ModuleList(layers))


def logits_of(model: PreTrainedModel, hidden: Tensor) -> Tensor:
    """Apply a model's complete head.

    Args:
        model: a transformers model with its head.
        hidden: its last hidden states [..., hidden].

    Returns:
        Logits [..., vocabulary].
    """
    family = model.config.model_type
    if family in _MASKED:
        return model.get_submodule(_MASKED[family])(hidden)
    if family in _CAPPED or not is_listed(model.config):
        return _logits_by_forward(model, hidden)
    if getattr(model.config, "scale_decoder_outputs", False):
        hidden = hidden * model.config.d_model**-0.5
    return model.get_output_embeddings()(hidden)


class _GivenStates(nn.Module):
    """Stand for a base model, and return as its last hidden states what it gets as embeddings."""

    def forward(self, *_: object, inputs_embeds: Tensor, **__: object) -> BaseModelOutputWithPast:
        """Return [batch, length, hidden] as they are."""
        return BaseModelOutputWithPast(last_hidden_state=inputs_embeds)  # type: ignore[arg-type]


def _logits_by_forward(model: PreTrainedModel, hidden: Tensor) -> Tensor:
    """Apply the head by the model's own forward pass, whatever that does to states and logits.

    It may scale them, or bound them by a tanh. A shallow copy of the model runs, without its base.
    """
    head = copy.copy(model)
    modules = {**model._modules, model.base_model_prefix: _GivenStates()}
    head.__dict__["_modules"] = modules
    states = hidden.reshape(1, -1, hidden.shape[-1])
    return head(inputs_embeds=states).logits.reshape(*hidden.shape[:-1], -1)


def fuse_gelu(model: nn.Module) -> None:
    """Have GPT-2's activation computed by one kernel, in place.

    `gelu_new` is GELU's approximation by a tanh. transformers writes it out in eight operations,
    each of which keeps what its backward pass needs.
    """
    for module in list(model.modules()):
        for name, child in module.named_children():
            if isinstance(child, NewGELUActivation):
                setattr(module, name, nn.GELU(approximate="tanh"))


class _NoDropout(nn.Identity):
    """Stand for dropout that never acts; attention asks it for its rate."""

    p = 0.0


def leave_out_dropout(model: nn.Module) -> None:
    """Replace dropout that never acts, in place: calling it costs a small model a fortieth of a
    step.
    """
    for module in list(model.modules()):
        for name, child in module.named_children():
            if type(child) is nn.Dropout:
                setattr(module, name, _NoDropout())


def origins(config: PreTrainedConfig) -> tuple[int, ...] | None:
    """Return each layer's place in the model that it comes from; None if places do not matter.

    They matter where a layer scales its attention by its place. The configuration of a part of a
    model has them as `layer_origins`; in a complete model each layer is at its own place.
    """
    if not getattr(config, "scale_attn_by_inverse_layer_idx", False):
        return None
    places = getattr(config, "layer_origins", None) or range(config.num_hidden_layers)
    return tuple(places)


def _by_layer(config: PreTrainedConfig) -> dict[str, list[object]]:
    """Return, by name, the lists of a configuration that have an entry for each layer."""
    num_layers = config.num_hidden_layers
    return {
        name: list(values[:num_layers])
        for name, values in vars(config).items()
        if "layer" in name
        and name != "layer_origins"
        and isinstance(values, (list, tuple))
        and len(values) >= num_layers
    }


def differs_by_layer(config: PreTrainedConfig) -> bool:
    """Return whether layers compute differently by their place or by their kind of attention."""
    lists = _by_layer(config).values()
    return origins(config) is not None or any(len(set(map(str, kinds))) > 1 for kinds in lists)


def position_kinds(config: PreTrainedConfig) -> tuple[object, ...] | None:
    """Return for each layer how it reads positions, as values to compare; None if all do alike.

    Some layers of SmolLM3 read none. Of a family that is not listed it is not known whether layers
    of several kinds of attention read positions alike, so they count as different.
    """
    lists = _by_layer(config)
    kinds = lists.get("no_rope_layers")
    if kinds is None and not is_listed(config):
        kinds = lists.get("layer_types")
    return tuple(kinds) if kinds and len(set(kinds)) > 1 else None


def with_layers(config: PreTrainedConfig, layers: Sequence[int]) -> PreTrainedConfig:
    """Change a configuration, in place, to one of the given layers of its model, and return it.

    What differs by layer goes with the layer. Indices beyond the last layer wrap around.
    """
    places = origins(config)
    for name, kinds in _by_layer(config).items():
        setattr(config, name, [kinds[layer % len(kinds)] for layer in layers])
    if places:
        config.layer_origins = [places[layer % len(places)] for layer in layers]
    config.num_hidden_layers = len(layers)
    return config


def settle_origins(model: PreTrainedModel) -> None:
    """Make the layers of a part of a GPT-2 scale attention as at their places in the full model.

    When it builds a layer, transformers divides by the layer's place in the part.
    """
    places = origins(model.config) or ()
    for layer, place in zip(layers_of(model), places):
        attention: Any = layer.attn
        unscaled = attention.head_dim**-0.5 if attention.scale_attn_weights else 1.0
        attention.scaling = unscaled / float(place + 1)


def without_dropout(config: PreTrainedConfig) -> PreTrainedConfig:
    """Set every dropout rate of a configuration to 0, in place, and return it."""
    rates = [name for name in DROPOUTS if hasattr(config, name)]
    if not is_listed(config):
        rates += [name for name, rate in vars(config).items() if _is_dropout(name, rate)]
    for name in rates:
        setattr(config, name, 0.0)
    return config


def _is_dropout(name: str, value: object) -> bool:
    return "drop" in name and isinstance(value, (int, float)) and not isinstance(value, bool)

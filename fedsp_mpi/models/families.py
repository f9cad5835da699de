"""The differences between families of models: where they keep layers and head, how they read, and
their sizes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import transformers
from torch import Tensor, nn
from transformers import PreTrainedConfig

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
    "olmo2": "model.layers",
    "gpt_neox": "gpt_neox.layers",
    "bert": "bert.encoder.layer",
    "roberta": "roberta.encoder.layer",
    "t5": "encoder.block",
}
# Where the families that fill in a mask keep their complete head.
_MASKED = {"bert": "cls", "roberta": "lm_head"}
_ENCODER_DECODER = ("t5",)
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


def layers_of(model: nn.Module) -> nn.ModuleList:
    """Return the list of layers of a model with a language-model head."""
    return model.get_submodule(FAMILIES[model.config.model_type])  # type: ignore[union-attr,return-value,index]


def logits_of(model: Any, hidden: Tensor) -> Tensor:
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
    if getattr(model.config, "scale_decoder_outputs", False):
        hidden = hidden * model.config.d_model**-0.5
    return model.get_output_embeddings()(hidden)


def origins(config: PreTrainedConfig) -> tuple[int, ...] | None:
    """Return each layer's place in the model that it comes from; None if places do not matter.

    They matter where a layer scales its attention by its place. The configuration of a part of a
    model has them as `layer_origins`; in a complete model each layer is at its own place.
    """
    if not getattr(config, "scale_attn_by_inverse_layer_idx", False):
        return None
    places = getattr(config, "layer_origins", None) or range(config.num_hidden_layers)
    return tuple(places)


def differs_by_layer(config: PreTrainedConfig) -> bool:
    """Return whether layers compute differently by their place or by their kind of attention."""
    kinds = set(getattr(config, "layer_types", None) or ())
    return origins(config) is not None or len(kinds) > 1


def with_layers(config: PreTrainedConfig, layers: Sequence[int]) -> PreTrainedConfig:
    """Change a configuration, in place, to one of the given layers of its model, and return it.

    What differs by layer goes with the layer. Indices beyond the last layer wrap around.
    """
    kinds = getattr(config, "layer_types", None)
    places = origins(config)
    if kinds:
        config.layer_types = [kinds[layer % len(kinds)] for layer in layers]
    if places:
        config.layer_origins = [places[layer % len(places)] for layer in layers]
    config.num_hidden_layers = len(layers)
    return config


def settle_origins(model: Any) -> None:
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
    for name in DROPOUTS:
        if hasattr(config, name):
            setattr(config, name, 0.0)
    return config

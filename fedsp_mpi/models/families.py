"""What sets the families of models apart: where they keep layers and head, how they read, and their
sizes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import transformers
from torch import Tensor, nn

Kind = Literal["causal", "masked", "encoder_decoder"]

# Where each family keeps its list of layers, as a path from the model with its head; of an encoder
# and a decoder, the former's.
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
_MASKED = {
    "bert": "cls",
    "roberta": "lm_head",
}  # where those that fill in a mask keep their whole head
_ENCODER_DECODER = ("t5",)
_T5_POSITIONS = 512  # that it was trained with; its relative positions have no end
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
# What peft calls models of each kind. It has no name for a masked one with its head, but treats it
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
        num_kv_heads, head_dim: of the keys and values of one layer.
        hidden_size: width of an input embedding.
        num_positions: longest sequence, prompt included.
    """

    num_layers: int
    num_kv_heads: int
    head_dim: int
    hidden_size: int
    num_positions: int


def shape_of(config: Any) -> Shape:
    """Read the sizes from a transformers configuration."""
    heads = config.num_attention_heads
    return Shape(
        num_layers=config.num_hidden_layers,
        num_kv_heads=getattr(config, "num_key_value_heads", None) or heads,
        head_dim=getattr(config, "head_dim", None) or config.hidden_size // heads,
        hidden_size=getattr(config, "word_embed_proj_dim", None) or config.hidden_size,
        num_positions=_num_positions(config),
    )


def _num_positions(config: Any) -> int:
    if config.model_type in _ENCODER_DECODER:
        return getattr(config, "n_positions", None) or _T5_POSITIONS
    found: int = config.max_position_embeddings
    if config.model_type == "roberta":  # whose positions begin behind that of padding
        return found - (config.pad_token_id or 0) - 1
    return found


def kind_of(config: Any) -> Kind:
    """How a model answers: "causal", from left to right; "masked", at a mask token in the text;
    "encoder_decoder", by a decoder that is told which gap of the text to fill."""
    if config.model_type in _MASKED:
        return "masked"
    return "encoder_decoder" if config.model_type in _ENCODER_DECODER else "causal"


def model_class(config: Any) -> Any:
    """The class of transformers that makes a model with its head from a configuration."""
    return {
        "causal": transformers.AutoModelForCausalLM,
        "masked": transformers.AutoModelForMaskedLM,
        "encoder_decoder": transformers.AutoModelForSeq2SeqLM,
    }[kind_of(config)]


def layers_of(model: nn.Module) -> nn.ModuleList:
    """The list of layers of a model with a language-model head."""
    return model.get_submodule(FAMILIES[model.config.model_type])  # type: ignore[union-attr,return-value,index]


def logits_of(model: Any, hidden: Tensor) -> Tensor:
    """Logits [..., vocabulary] of the last hidden states [..., hidden] of a model, by its whole
    head.
    """
    family = model.config.model_type
    if family in _MASKED:
        return model.get_submodule(_MASKED[family])(hidden)
    if getattr(model.config, "scale_decoder_outputs", False):
        hidden = hidden * model.config.d_model**-0.5
    return model.get_output_embeddings()(hidden)


def origins(config: Any) -> tuple[int, ...] | None:
    """Return of each layer its place in the model that it comes from, where a layer computes by its
    place, else None.

    `layer_origins` says so in the configuration of a part of a model; in one of a whole model each
    place is its own.
    """
    if not getattr(config, "scale_attn_by_inverse_layer_idx", False):
        return None
    places = getattr(config, "layer_origins", None) or range(config.num_hidden_layers)
    return tuple(places)


def differs_by_layer(config: Any) -> bool:
    """Return whether a model's layers compute differently by their place, or have different kinds
    of attention.
    """
    return origins(config) is not None or len(set(getattr(config, "layer_types", None) or ())) > 1


def with_layers(config: Any, taken: Sequence[int]) -> Any:
    """Set a configuration, in place, to be of the layers `taken` of its model: what differs by
    layer goes with them.

    Places beyond the last layer begin again with the first.
    """
    kinds, places = getattr(config, "layer_types", None), origins(config)
    if kinds:
        config.layer_types = [kinds[place % len(kinds)] for place in taken]
    if places:
        config.layer_origins = [places[place % len(places)] for place in taken]
    config.num_hidden_layers = len(taken)
    return config


def settle_origins(model: Any) -> None:
    """Let the layers of a part of a GPT-2 scale their attention by the places that they have in the
    whole model.

    transformers divides by the layer's own place when it makes one, which is another one in a part
    of the model.
    """
    places = origins(model.config)
    for layer, place in zip(layers_of(model), places or ()):
        attention: Any = layer.attn
        usual = attention.head_dim**-0.5 if attention.scale_attn_weights else 1.0
        attention.scaling = usual / float(place + 1)


def without_dropout(config: Any) -> Any:
    """Set every dropout rate of a configuration to 0, in place."""
    for name in DROPOUTS:
        if hasattr(config, name):
            setattr(config, name, 0.0)
    return config

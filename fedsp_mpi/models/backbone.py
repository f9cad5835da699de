"""Causal language models as the rest of the package sees them, and the frozen global model among them."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import huggingface_hub
import safetensors
import torch
import transformers
from torch import Tensor, nn

from fedsp_mpi.models.prompts import Prompt
from fedsp_mpi.tensors import Batch, seal

# Where each family keeps its list of layers, as a path from the model with its head.
FAMILIES = {
    "gpt2": "transformer.h",
    "opt": "model.decoder.layers",
    "llama": "model.layers",
    "qwen2": "model.layers",
}
HUB_SECONDS = 5.0
DROPOUTS = (
    "resid_pdrop",
    "embd_pdrop",
    "attn_pdrop",
    "dropout",
    "attention_dropout",
    "activation_dropout",
    "layerdrop",
)


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
        num_positions=config.max_position_embeddings,
    )


def read_config(name: str, revision: str | None = None) -> Any:
    """The configuration of a model, from a folder or the hub, without its weights.

    Raises ValueError if there is no such model, or if its family is not one of `FAMILIES`.
    """
    try:
        config = _pretrained(transformers.AutoConfig, name, revision)
    except (OSError, ValueError, KeyError) as error:
        raise ValueError(
            f"model.name: found {name!r}, which could not be read ({_first_line(error)}); expected a folder with a "
            "config.json, or a name that the hub or its local cache knows"
        ) from None
    if config.model_type not in FAMILIES:
        raise ValueError(
            f"model.name: found {name!r} of the family {config.model_type!r}, expected one of {', '.join(FAMILIES)}"
        )
    return config


def read_tokenizer(name: str, revision: str | None = None) -> Any:
    """The tokenizer of a model, from a folder or the hub. Raises ValueError if there is none."""
    try:
        tokenizer = _pretrained(transformers.AutoTokenizer, name, revision)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"model.tokenizer: found {name!r}, which has no readable tokenizer ({_first_line(error)}); "
            "expected a folder with a tokenizer.json, or a hub name"
        ) from None
    if not tokenizer("a b", add_special_tokens=False)["input_ids"]:  # what transformers makes up where there is none
        raise ValueError(
            f"model.tokenizer: found {name!r}, whose tokenizer turns a text into nothing; expected a folder with the "
            "tokenizer.json that belongs to the model"
        )
    return tokenizer


def _pretrained(kind: Any, name: str, revision: str | None, **options: Any) -> Any:
    """`kind.from_pretrained` from a folder, else from the local cache, else from the hub, which is asked once.

    (transformers itself asks an unreachable hub for half a minute.) Raises OSError or ValueError saying why not.
    """
    folder = Path(name).expanduser()
    if folder.is_dir():
        return kind.from_pretrained(folder, **options)
    if name.startswith((".", "/", "~")) or name.count("/") > 1:
        raise ValueError(f"there is no folder {name}")
    try:
        return kind.from_pretrained(name, revision=revision, local_files_only=True, **options)
    except OSError:
        try:
            huggingface_hub.HfApi().model_info(name, revision=revision, timeout=HUB_SECONDS)
        except Exception as error:  # whatever the network throws: it is not reachable
            why = _first_line(error) or type(error).__name__
            raise ValueError(f"no folder here, not in the local cache, and the hub did not give it: {why}") from None
        return kind.from_pretrained(name, revision=revision, **options)


def _first_line(error: Exception) -> str:
    return str(error).strip().split("\n")[0][:200]


def layers_of(model: nn.Module) -> nn.ModuleList:
    """The list of layers of a model with a language-model head."""
    return model.get_submodule(FAMILIES[model.config.model_type])  # type: ignore[union-attr,return-value,index]


class LanguageModel:
    """A causal language model that takes a soft prompt and gives logits where an answer is due.

    Args:
        model: a transformers model with its language-model head.
        dtype: type of the forward pass; where the weights have another one, autocast is used.
        dropout: whether the model's own dropout acts while its weights are trained.
        checkpointing: recompute activations in the backward pass. transformers does so in training mode only, where
            dropout acts too, so the model must have been made `without_dropout`.
    """

    def __init__(
        self, model: Any, dtype: torch.dtype = torch.float32, dropout: bool = False, checkpointing: bool = False
    ) -> None:
        self.model, self.dtype, self.dropout = model, dtype, dropout
        self.shape = shape_of(model.config)
        self.device = next(model.parameters()).device
        self._autocast = next(model.parameters()).dtype != dtype
        self._checkpointing = checkpointing
        if checkpointing:
            model.gradient_checkpointing_enable()
        model.train(checkpointing)

    def train_weights(self, on: bool) -> None:
        """Make every weight trainable, or none. Dropout acts only in the first case, and only if it was asked for."""
        self.model.requires_grad_(on)
        self.model.train((on and self.dropout) or self._checkpointing)

    def freeze_untied_head(self) -> None:
        """Keep the head out of training where it is not the input embedding as well."""
        head, embedding = self.model.get_output_embeddings(), self.model.get_input_embeddings()
        if head.weight is not embedding.weight:
            head.requires_grad_(False)

    def hidden(self, batch: Batch, prompt: Prompt | None = None) -> Tensor:
        """Hidden states after the final norm at the text's positions, [batch, length, hidden].

        The prompt takes the first positions and the text those behind it, as in stock peft.
        """
        with self.computing():
            inputs, before = self._inputs(batch, prompt)
            return self.model.base_model(**inputs).last_hidden_state[:, before:]

    def _inputs(self, batch: Batch, prompt: Prompt | None) -> tuple[dict[str, Any], int]:
        """Arguments of the forward pass, and the positions that come back before the text's."""
        mask = batch.attention_mask
        if prompt is None:
            return {"input_ids": batch.input_ids, "attention_mask": mask, "use_cache": False}, 0
        mask = torch.cat([mask.new_ones(len(mask), prompt.spec.num_tokens), mask], dim=1)
        if prompt.spec.kind == "prefix":
            cache = self.cache(prompt, len(mask))
            return {"input_ids": batch.input_ids, "attention_mask": mask, "past_key_values": cache}, 0
        embedded = self.model.get_input_embeddings()(batch.input_ids)
        soft = prompt.matrix().to(embedded.dtype).expand(len(mask), -1, -1)
        together = torch.cat([soft, embedded], dim=1)
        return {"inputs_embeds": together, "attention_mask": mask, "use_cache": False}, prompt.spec.num_tokens

    def cache(self, prompt: Prompt, batch_size: int) -> Any:
        """The prefix as a transformers cache, its keys and values repeated for every row of a batch."""
        layers = prompt.key_values().to(self.dtype)
        return transformers.DynamicCache(
            [(key.expand(batch_size, -1, -1, -1), value.expand(batch_size, -1, -1, -1)) for key, value in layers]
        )

    def head(self, hidden: Tensor) -> Tensor:
        """Logits [..., vocabulary] of hidden states [..., hidden]."""
        with self.computing():
            return self.model.get_output_embeddings()(hidden)

    def answer_logits(self, batch: Batch, prompt: Prompt | None = None) -> tuple[Tensor, Tensor]:
        """Logits [answers, vocabulary] and targets [answers] at the positions that have a target, and only there."""
        where = batch.targets != -100
        return self.head(self.hidden(batch, prompt)[where]), batch.targets[where]

    def continue_from(
        self, ids: Tensor, prompt: Prompt | None, rows: Tensor, endings: Batch | None
    ) -> tuple[Tensor, Tensor | None]:
        """Run contexts once, then several continuations of each.

        Args:
            ids: contexts of one length, [contexts, length].
            prompt: at this model's depth, or None.
            rows: the context of each continuation, [continuations].
            endings: right-padded continuations but for their last token, or None if all are one token long.

        Returns:
            Logits of the continuations' first token [continuations, vocabulary], and of the further ones
            [continuations, longest - 1, vocabulary] or None.
        """
        batch = Batch(ids, torch.ones_like(ids), ids)
        with self.computing():
            inputs, _ = self._inputs(batch, prompt)
            output = self.model.base_model(**{**inputs, "use_cache": True})
            first = self.head(output.last_hidden_state[:, -1])[rows]
            if endings is None:
                return first, None
            cache = output.past_key_values
            cache.batch_select_indices(rows)
            seen = inputs["attention_mask"][rows]
            mask = torch.cat([seen, endings.attention_mask], dim=1)
            more = self.model.base_model(input_ids=endings.input_ids, attention_mask=mask, past_key_values=cache)
            return first, self.head(more.last_hidden_state)

    @contextmanager
    def computing(self) -> Iterator[None]:
        """Inside, matrix products are made in the model's computing type."""
        with torch.autocast(self.device.type, self.dtype, enabled=self._autocast):
            yield

    def num_parameters(self) -> int:
        """Weights held, shared ones counted once."""
        return sum(p.numel() for p in self.model.parameters())


def without_dropout(config: Any) -> Any:
    """Set every dropout rate of a configuration to 0, in place."""
    for name in DROPOUTS:
        if hasattr(config, name):
            setattr(config, name, 0.0)
    return config


def load_global(
    name: str,
    *,
    device: torch.device,
    revision: str | None = None,
    dtype: torch.dtype = torch.float32,
    checkpointing: bool = False,
) -> LanguageModel:
    """Load the global model: frozen, in evaluation mode, and sealed, so that none of its memory can be sent.

    Raises ValueError if the weights cannot be read.
    """
    config = read_config(name, revision)
    try:
        settled = without_dropout(config) if checkpointing else config
        model, info = _pretrained(
            transformers.AutoModelForCausalLM, name, revision, dtype=dtype, config=settled, output_loading_info=True
        )
    except (OSError, ValueError, KeyError, RuntimeError, safetensors.SafetensorError) as error:
        raise ValueError(
            f"model.name: found {name!r}, whose weights could not be read ({_first_line(error)}); expected a whole "
            "model.safetensors; copy the folder again"
        ) from None
    if missing := sorted(info["missing_keys"]):  # which transformers fills with noise
        raise ValueError(
            f"model.name: found {name!r} without {len(missing)} of its weights ({missing[0]}, ...), expected "
            "all that its config.json asks for"
        )
    model.to(device)
    found = LanguageModel(model, dtype, checkpointing=checkpointing)
    found.train_weights(False)
    seal.add(model.named_parameters())
    return found


def cast(model: LanguageModel, dtype: torch.dtype) -> None:
    """Turn the frozen global model's weights into another type in place, for scoring; sealed again."""
    seal.clear()  # which would keep the old weights in memory
    model.model.to(dtype)
    model.dtype, model._autocast = dtype, False
    seal.add(model.model.named_parameters())


def quiet() -> None:
    """No progress bars, no advice, no telemetry from the libraries underneath."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("DS_ACCELERATOR", "cuda" if torch.cuda.is_available() else "cpu")  # or it warns of its choice
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()

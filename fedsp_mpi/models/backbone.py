"""Language models as the rest of the package sees them, and the frozen global model among them."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from typing import Any

import torch
import transformers
from torch import Tensor, nn

from fedsp_mpi.models.families import (
    FAMILIES,
    Shape,
    kind_of,
    layers_of,
    logits_of,
    model_class,
    shape_of,
    without_dropout,
)
from fedsp_mpi.models.hub import locate
from fedsp_mpi.models.prompts import Prompt, PromptBatch, key_values
from fedsp_mpi.models.reading import read_config, read_tokenizer, refusing
from fedsp_mpi.models.remote_code import NO_PICKLES
from fedsp_mpi.tensors import Batch, seal

__all__ = [
    "FAMILIES",
    "LanguageModel",
    "Shape",
    "layers_of",
    "read_config",
    "read_tokenizer",
    "shape_of",
    "without_dropout",
]

_WORTHWHILE = {"cuda": 1024}  # positions; on other devices any


class _ArrivedError(Exception):
    """A forward pass has come as far as it had to."""


class LanguageModel:
    """A language model that takes a soft prompt and gives logits where an answer is due.

    Causal ones read from left to right; masked ones (BERT, RoBERTa) read all of a text and answer
    where the mask token stands in it; an encoder and a decoder (T5) answer what belongs into the
    gap that a token marks.

    Args:
        model: a transformers model with its language-model head.
        dtype: type of the forward pass; where the weights have another one, autocast is used.
        dropout: whether the model's own dropout acts while its weights are trained.
        checkpointing: recompute activations in the backward pass. transformers does so in training
            mode only, where dropout acts too, so the model must have been made `without_dropout`.
        candidates: sorted ids of the tokens that an answer's token is chosen from; None: the whole
            vocabulary.

    Attributes:
        casts: whether the weights have another type than the forward pass.
        kind: "causal", "masked" or "encoder_decoder".
    """

    def __init__(
        self,
        model: Any,
        dtype: torch.dtype = torch.float32,
        dropout: bool = False,
        checkpointing: bool = False,
        candidates: Tensor | None = None,
    ) -> None:
        self.dropout, self.checkpointing, self.candidates = dropout, checkpointing, candidates
        self.hold(model, dtype)

    def hold(self, model: Any, dtype: torch.dtype) -> None:
        """Be this transformers model from now on."""
        self.model, self.dtype = model, dtype
        self.weights = dict(model.named_parameters())
        self.shape, self.kind = shape_of(model.config), kind_of(model.config)
        self.device = next(model.parameters()).device
        if self.candidates is not None:
            self.candidates = self.candidates.to(self.device)
        self.casts = next(model.parameters()).dtype != dtype
        if self.device.type == "cpu" and dtype is torch.bfloat16:
            model.set_attn_implementation(
                "eager"
            )  # the fused one's backward pass is slower on short texts
        if self.checkpointing:
            model.gradient_checkpointing_enable()
        model.train(self.checkpointing)

    def beside(self, other: LanguageModel) -> LanguageModel:
        """The same weights, moved to the device of another model, choosing answers from the same
        candidates.
        """
        moved = self.model.to(other.device)
        return LanguageModel(moved, self.dtype, self.dropout, self.checkpointing, other.candidates)

    def round_weights(self) -> LanguageModel:
        """Keep the weights, which nobody trains, in the type of the forward pass, so that no pass
        has to cast them.
        """
        for weight in self.weights.values():
            weight.data = weight.data.to(self.dtype)
        self.casts = False
        return self

    def train_weights(self, on: bool) -> None:
        """Make every weight trainable, or none.

        Dropout acts only in the first case, and only if it was asked for.
        """
        for weight in self.weights.values():
            weight.requires_grad = on
        mode = (on and self.dropout) or self.checkpointing
        if self.model.training is not mode:
            self.model.train(mode)

    def freeze_untied_head(self) -> None:
        """Keep the head out of training where it is not the input embedding as well."""
        head, embedding = self.model.get_output_embeddings(), self.model.get_input_embeddings()
        if head.weight is not embedding.weight:
            head.requires_grad_(False)

    def hidden(self, batch: Batch, prompt: Prompt | PromptBatch | None = None) -> Tensor:
        """Hidden states after the final norm at the text's positions, [batch, length, hidden].

        The prompt takes the first positions and the text those behind it, as in stock peft.
        """
        with self.computing():
            inputs, before = self.inputs(batch, prompt)
            return self.model.base_model(**inputs).last_hidden_state[:, before:]

    def entering(self, part: nn.Module, batch: Batch, prompt: Prompt | None = None) -> Tensor:
        """Hidden states that enter a part of the model at the text's positions, [batch, length,
        hidden].

        No text runs through what is behind it.
        """
        found: list[Tensor] = []

        def arrive(_: nn.Module, arguments: tuple[Any, ...]) -> None:
            found.append(arguments[0])
            raise _ArrivedError

        with self.computing():
            inputs, before = self.inputs(batch, prompt)
            hook = part.register_forward_pre_hook(arrive, prepend=True)
            try:
                with suppress(_ArrivedError):
                    self.model.base_model(**inputs)
            finally:
                hook.remove()
        return found[0][:, before:]

    def inputs(
        self, batch: Batch, prompt: Prompt | PromptBatch | None
    ) -> tuple[dict[str, Any], int]:
        """Arguments of the forward pass, and the positions that come back before the text's."""
        mask = batch.attention_mask
        if prompt is None:
            return {"input_ids": batch.input_ids, "attention_mask": mask, "use_cache": False}, 0
        mask = torch.cat([mask.new_ones(len(mask), prompt.spec.num_tokens), mask], dim=1)
        if prompt.spec.kind == "prefix" or self._reads_first(prompt, len(mask)):
            cache = self.cache(prompt, len(mask))
            return {
                "input_ids": batch.input_ids,
                "attention_mask": mask,
                "past_key_values": cache,
            }, 0
        embedded = self.model.get_input_embeddings()(batch.input_ids)
        soft = prompt.of_texts(prompt.matrices().to(embedded.dtype), len(mask))
        together = torch.cat([soft, embedded], dim=1)
        return {
            "inputs_embeds": together,
            "attention_mask": mask,
            "use_cache": False,
        }, prompt.spec.num_tokens

    def cache(self, prompt: Prompt | PromptBatch, batch_size: int) -> Any:
        """The prompt as a transformers cache: of each layer keys and values [batch, heads, tokens,
        head_dim].
        """
        layers = prompt.read or self._read(prompt)
        return transformers.DynamicCache(
            [
                (prompt.of_texts(key, batch_size), prompt.of_texts(value, batch_size))
                for key, value in layers
            ]
        )

    def remember(self, prompts: PromptBatch) -> PromptBatch:
        """The same prompts, read once for all passes to come, where a prompt can be read before its
        texts.
        """
        can = prompts.spec.kind == "prefix" or (self.kind == "causal" and not self.model.training)
        with self.computing():
            return replace(prompts, read=self._read(prompts)) if can else prompts

    def _read(self, prompt: Prompt | PromptBatch) -> list[tuple[Tensor, Tensor]]:
        """Of each layer the prompts' keys and values, [num, heads, tokens, head_dim]."""
        if prompt.spec.kind == "prefix":
            return [(key, value) for key, value in key_values(prompt).to(self.dtype)]
        soft = prompt.matrices().to(self.model.get_input_embeddings().weight.dtype)
        cache = self.model.base_model(inputs_embeds=soft, **_keeping_all()).past_key_values
        return [(layer.keys, layer.values) for layer in cache.layers]

    def _reads_first(self, prompt: Prompt | PromptBatch, batch_size: int) -> bool:
        """Whether an input prompt is read once for all of its texts: where it stands before them,
        it does not see them.

        A pass has a price of its own on a GPU: there, where it saves many positions. In training
        mode rows differ in their dropout, and checkpointing keeps no cache.
        """
        saved = (batch_size - prompt.num) * prompt.spec.num_tokens
        pays = prompt.read is not None or saved >= _WORTHWHILE.get(self.device.type, 1)
        return self.kind == "causal" and not self.model.training and pays

    def head(self, hidden: Tensor) -> Tensor:
        """Logits [..., vocabulary] of hidden states [..., hidden]."""
        with self.computing():
            return logits_of(self.model, hidden)

    def answer_logits(
        self, batch: Batch, prompt: Prompt | PromptBatch | None = None
    ) -> tuple[Tensor, Tensor]:
        """Logits [answers, vocabulary] and targets [answers] at the positions that have a target,
        and only there.

        With candidates, the logits are [answers, candidates], and the targets are places among
        them.
        """
        logits, targets = (
            self.head(self.answer_states(batch, prompt)),
            batch.targets[batch.targets != -100],
        )
        if self.candidates is None:
            return logits, targets
        return logits[:, self.candidates], torch.searchsorted(self.candidates, targets)

    def answer_states(self, batch: Batch, prompt: Prompt | PromptBatch | None = None) -> Tensor:
        """Last hidden states [answers, hidden] where the batch has a target, row by row."""
        where = batch.targets != -100
        if self.kind == "encoder_decoder":
            return self._decoded(batch, prompt, where)
        return self.hidden(batch, prompt)[where]

    def _decoded(self, batch: Batch, prompt: Prompt | PromptBatch | None, where: Tensor) -> Tensor:
        """The decoder's states behind the gap's token, one a row: there it says what belongs into
        the gap.
        """
        with self.computing():
            inputs, _ = self.inputs(batch, prompt)
            encoded = self.model.encoder(**inputs).last_hidden_state
            gap = batch.input_ids[where][:, None]
            begun = torch.cat(
                [torch.full_like(gap, self.model.config.decoder_start_token_id), gap], dim=1
            )
            seen = {
                "encoder_hidden_states": encoded,
                "encoder_attention_mask": inputs["attention_mask"],
            }
            return self.model.decoder(input_ids=begun, use_cache=False, **seen).last_hidden_state[
                :, -1
            ]

    def keys_and_values(self, ids: Tensor) -> Tensor:
        """What every layer makes of the tokens `ids` [tokens] alone, in the layout of
        `Prompt.key_values`, fp32.
        """
        with torch.no_grad(), self.computing(), self.evaluating():
            cache = self.model.base_model(
                input_ids=ids[None].to(self.device), **_keeping_all()
            ).past_key_values
        return torch.stack(
            [torch.stack([layer.keys[0], layer.values[0]]) for layer in cache.layers]
        ).float()

    def continue_from(
        self, ids: Tensor, prompt: Prompt | None, rows: Tensor, endings: Batch | None
    ) -> tuple[Tensor, Tensor | None]:
        """Run contexts once, then several continuations of each.

        Args:
            ids: contexts of one length, [contexts, length].
            prompt: at this model's depth, or None.
            rows: the context of each continuation, [continuations].
            endings: right-padded continuations but for their last token, or None if all are one
                token long.

        Returns:
            Logits of the continuations' first token [continuations, vocabulary], and of the further
            ones [continuations, longest - 1, vocabulary] or None.
        """
        batch = Batch(ids, torch.ones_like(ids), ids)
        with self.computing():
            inputs, _ = self.inputs(batch, prompt)
            output = self.model.base_model(**{**inputs, "use_cache": True})
            first = self.head(output.last_hidden_state[:, -1])[rows]
            if endings is None:
                return first, None
            cache = output.past_key_values
            cache.batch_select_indices(rows)
            seen = inputs["attention_mask"][rows]
            mask = torch.cat([seen, endings.attention_mask], dim=1)
            more = self.model.base_model(
                input_ids=endings.input_ids, attention_mask=mask, past_key_values=cache
            )
            return first, self.head(more.last_hidden_state)

    @contextmanager
    def computing(self) -> Iterator[None]:
        """Inside, matrix products are made in the model's computing type."""
        with torch.autocast(self.device.type, self.dtype, enabled=self.casts):
            yield

    @contextmanager
    def evaluating(self) -> Iterator[None]:
        """Inside, the model is in evaluation mode, without which it keeps no cache where it
        checkpoints.
        """
        before = self.model.training
        self.model.eval()
        try:
            yield
        finally:
            self.model.train(before)

    def num_parameters(self) -> int:
        """Weights held, shared ones counted once."""
        return sum(weight.numel() for weight in self.weights.values())


def _keeping_all() -> dict[str, Any]:
    """Arguments of a pass whose keys and values are all kept, where a layer's sliding window would
    drop the first.
    """
    return {"use_cache": True, "past_key_values": transformers.DynamicCache()}


def load_global(
    name: str,
    *,
    device: torch.device,
    revision: str | None = None,
    dtype: torch.dtype = torch.float32,
    checkpointing: bool = False,
    trainable: bool = False,
    candidates: Tensor | None = None,
) -> LanguageModel:
    """Load the global model: frozen, in evaluation mode, and sealed, so that none of its memory can
    be sent.

    `trainable` is the opposite: fp32 weights that are trained and sent, computing in `dtype`.

    Raises ValueError if the weights cannot be read.
    """
    held = torch.float32 if trainable else dtype
    model = _weights(name, revision, device, held, checkpointing)
    found = LanguageModel(model, dtype, checkpointing=checkpointing, candidates=candidates)
    found.train_weights(trainable)
    if not trainable:
        seal.add(found.weights.items())
    return found


def reread(
    model: LanguageModel, name: str, *, revision: str | None = None, dtype: torch.dtype
) -> None:
    """Read the global model's weights again, in another type and in place; frozen and sealed as
    before.

    Weights that were rounded do not become exact by being widened. The old ones are let go first.

    Raises ValueError if the weights cannot be read; the model is then of no use.
    """
    seal.clear()
    del model.model, model.weights
    model.hold(_weights(name, revision, model.device, dtype, model.checkpointing), dtype)
    model.train_weights(False)
    seal.add(model.weights.items())


def _weights(
    name: str, revision: str | None, device: torch.device, dtype: torch.dtype, checkpointing: bool
) -> Any:
    config = read_config(name, revision)
    settled = without_dropout(config) if checkpointing else config
    expected = "those of its config.json, whole; copy the folder again"
    with refusing("model.name", name, "whose weights could not be read", expected):
        folder, kind = locate(name, revision, "weights"), model_class(config)
        model, info = kind.from_pretrained(
            folder, dtype=dtype, config=settled, output_loading_info=True, **NO_PICKLES
        )
    if missing := sorted(info["missing_keys"]):  # which transformers fills with noise
        raise ValueError(
            f"model.name: found {name!r} without {len(missing)} of its weights "
            f"({missing[0]}, ...), expected "
            "all that its config.json asks for"
        )
    _require_tied(name, model)
    return model.to(device)


def _require_tied(name: str, model: Any) -> None:
    """Raise ValueError if a head that the configuration ties to the embeddings is another one: T5
    1.1, Flan-T5.

    Copies of such a model would have the one in the place of the other.
    """
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    if model.config.tie_word_embeddings and head.weight is not embedding.weight:
        raise ValueError(
            f"model.name: found {name!r} with an output head of its own under a "
            "configuration that ties it to the "
            "embeddings, expected them to be one, as in T5 1.0; take another model"
        )


def quiet() -> None:
    """No progress bars, no advice, no telemetry from the libraries underneath."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault(
        "DS_ACCELERATOR", "cuda" if torch.cuda.is_available() else "cpu"
    )  # or it warns of its choice
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()

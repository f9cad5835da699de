"""Language models as the rest of the package sees them: a text and a soft prompt in, hidden states
or answer logits out.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace

import torch
import transformers
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.cache_utils import DynamicLayer
from transformers.pytorch_utils import Conv1D

from fedsp_mpi.files.untrusted import JsonObject
from fedsp_mpi.models.families import (
    fuse_gelu,
    is_listed,
    kind_of,
    layers_of,
    leave_out_dropout,
    logits_of,
    position_wise_parts,
    shape_of,
)
from fedsp_mpi.models.last_layer import LastLayer
from fedsp_mpi.models.prompts import Prompt, PromptBatch, key_values
from fedsp_mpi.tensors import Batch

# The fewest prompt positions that must be saved before an input prompt gets a pass of its own. On a
# GPU each pass has a fixed price; on other devices any saving pays.
MIN_SAVED_POSITIONS = {"cuda": 1024}


class _ReachedError(Exception):
    """The forward pass has reached the submodule whose input was asked for."""


class LanguageModel:
    """A language model that takes a soft prompt and gives logits where an answer is due.

    Causal models read from left to right. Masked ones (BERT, RoBERTa) read the full text and answer
    at its mask token. An encoder and a decoder (T5) answer with the text of the gap that a token
    marks.

    Args:
        model: a transformers model with its language-model head.
        dtype: type of the forward pass; autocast is used where the weights have another one.
        dropout: whether the model's own dropout acts while its weights are trained.
        checkpointing: recompute activations in the backward pass. transformers does so in training
            mode only, where dropout acts too, so the model must have been made `without_dropout`.
        candidates: sorted ids of the tokens that an answer's token is chosen from, int64
            [candidates]; None: the whole vocabulary.

    Attributes:
        weights: the parameters by name, each shared one once.
        shape: the sizes that a prompt must fit.
        kind: "causal", "masked" or "encoder_decoder".
        device: of the weights.
        casts: whether the weights have another type than the forward pass.
        classifier: gives logits of classes, in fp32, in the place of the model's own head; None
            where there is none.
        draws: whether a pass draws random numbers in evaluation mode too, for an adapter's dropout.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        dtype: torch.dtype = torch.float32,
        *,
        dropout: bool = False,
        checkpointing: bool = False,
        candidates: Tensor | None = None,
    ) -> None:
        self.dropout = dropout
        self.checkpointing = checkpointing
        self.candidates = candidates
        self.classifier: nn.Linear | None = None
        self.draws = False
        self._compiles = False
        self.set_model(model, dtype)

    def set_model(self, model: PreTrainedModel, dtype: torch.dtype) -> None:
        """Use another transformers model from now on, computing in `dtype`."""
        self.model = model
        self.dtype = dtype
        self.weights = dict(model.named_parameters())
        self.shape = shape_of(model.config)
        self.kind = kind_of(model.config)
        self._is_listed = is_listed(model.config)
        fuse_gelu(model)
        if not self.dropout:
            leave_out_dropout(model)
        first_weight = next(model.parameters())
        self.device = first_weight.device
        self.casts = first_weight.dtype != dtype
        if self.candidates is not None:
            self.candidates = self.candidates.to(self.device)
        if self.device.type == "cpu" and dtype is torch.bfloat16:
            # The backward pass of the fused implementation is slower on short texts.
            model.set_attn_implementation("eager")
        attention = model.config._attn_implementation
        self._adds_mask = attention == "eager" or self.device.type == "cpu"
        self._longest_masked = 0
        if self._is_listed and self.kind == "causal" and attention in ("sdpa", "eager"):
            window = getattr(model.config, "sliding_window", None)
            self._longest_masked = window or self.shape.num_positions
        if self.checkpointing:
            model.activation_checkpointing_enable()
        model.train(self.checkpointing)
        if self._compiles:
            self.compile()

    def compile(self) -> LanguageModel:
        """Compile the parts of each layer that work on each position alone, and return self.

        Attention stays as it is, since its cache holds the layer's own number, for which each layer
        would be compiled by itself. So the time that it takes does not grow with depth. Parts that
        are one operation already, which is all in OPT, are left alone by torch.
        """
        self._compiles = True
        for part in position_wise_parts(self.model):
            part.compile(dynamic=True)
        return self

    def beside(self, other: LanguageModel) -> LanguageModel:
        """Move the weights to the device of `other`, and share its answer candidates.

        Returns:
            A model over the moved weights; this one is not to be used any more.
        """
        return LanguageModel(
            self.model.to(other.device),
            self.dtype,
            dropout=self.dropout,
            checkpointing=self.checkpointing,
            candidates=other.candidates,
        )

    def round_weights(self) -> LanguageModel:
        """Round the weights to the type of the forward pass, so that no pass casts them; return
        self.

        Only for weights that are not trained any more.
        """
        for weight in self.weights.values():
            weight.data = weight.data.to(self.dtype)
        self.casts = False
        return self

    @contextmanager
    def frozen(self) -> Iterator[None]:
        """Run the block, in which no weight is trained, without casting weights in every pass.

        Where autocast would cast a weight of a matrix product each time, it is in the type of the
        forward pass meanwhile; the results have the same bits. A head that is the input embedding
        too stays as it is.
        """
        full_precision: list[tuple[nn.Parameter, Tensor]] = []
        if self.casts:
            for weight in _product_weights(self.model):
                full_precision.append((weight, weight.data))
                weight.data = weight.data.to(self.dtype)
        try:
            yield
        finally:
            for weight, data in full_precision:
                weight.data = data

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
        """Exclude the output head from training unless it is also the input embedding."""
        head = self.model.get_output_embeddings()
        if head.weight is not self.model.get_input_embeddings().weight:
            head.requires_grad_(False)

    def num_parameters(self) -> int:
        """Return the number of values in all weights, shared ones counted once."""
        return sum(weight.numel() for weight in self.weights.values())

    @contextmanager
    def computing(self) -> Iterator[None]:
        """Run the block with matrix products in the type of the forward pass."""
        if not self.casts:
            yield
            return
        with torch.autocast(self.device.type, self.dtype):
            yield

    @contextmanager
    def evaluating(self) -> Iterator[None]:
        """Run the block in evaluation mode; in training mode, a checkpointing model keeps no
        cache.
        """
        mode = self.model.training
        self.model.eval()
        try:
            yield
        finally:
            self.model.train(mode)

    # --- the forward pass ---

    def hidden(self, batch: Batch, prompt: Prompt | PromptBatch | None = None) -> Tensor:
        """Return the last hidden states, after the final norm, at the text's positions.

        The prompt takes the first positions and the text those behind it, as in stock peft.

        Args:
            batch: int64 [batch, length], on the model's device.
            prompt: at this model's depth; goes in front of every text.

        Returns:
            [batch, length, hidden], in the type of the forward pass.
        """
        with self.computing():
            inputs, num_before = self.inputs(batch, prompt)
            return self.model.base_model(**inputs).last_hidden_state[:, num_before:]

    def answer_states(self, batch: Batch, prompt: Prompt | PromptBatch | None = None) -> Tensor:
        """Return the last hidden states [answers, hidden] where the batch has a target, row by row.

        Args:
            batch: int64 [batch, length], on the model's device.
            prompt: at this model's depth; goes in front of every text.
        """
        places = batch.places
        with self.computing():
            inputs, num_before = self.inputs(batch, prompt)
            if self.kind == "encoder_decoder":
                return self._gap_states(inputs, batch.input_ids.flatten()[places.flat])
            self._mask_once(inputs, batch, num_before)
            last_layer = LastLayer(places, num_before, is_causal=self.kind == "causal")
            with last_layer.running(self._repeatable_layer()):
                output = self.model.base_model(**inputs)
            return last_layer.states_of(output.last_hidden_state)

    def _repeatable_layer(self) -> nn.Module | None:
        """Return the last layer if it does the same in two runs, so that it may run where answers
        are due; None where dropout acts, or a family is built in a way that is not known.
        """
        if not self._is_listed or self.model.training or self.draws:
            return None
        return layers_of(self.model)[-1]

    def _mask_once(self, inputs: JsonObject, batch: Batch, num_before: int) -> None:
        """Replace the mask of the tokens by the one that all layers compute with.

        A mask of four dimensions goes through transformers 5 as it is. It asks less of Python than
        the one that transformers makes, and is made of numbers, which on a CPU each layer would
        make of truth values. Where a window is shorter than the text, layers need different ones.

        Args:
            inputs: what `inputs` returned; changed in place.
            batch: int64 [batch, length].
            num_before: prompt positions among those that enter the model.
        """
        mask = inputs["attention_mask"]
        num_keys = mask.shape[1]
        if num_keys > self._longest_masked:
            return
        num_cached = num_keys - batch.input_ids.shape[1] - num_before
        is_shown = mask.bool()[:, None, None]
        if self._adds_mask:
            dtype = self.dtype if self.casts else next(iter(self.weights.values())).dtype
            hidden = torch.finfo(dtype).min
            later = mask.new_full((num_keys - num_cached, num_keys), hidden, dtype=dtype)
            inputs["attention_mask"] = torch.where(is_shown, later.triu(num_cached + 1), hidden)
        else:
            later = mask.new_ones(num_keys - num_cached, num_keys, dtype=torch.bool)
            inputs["attention_mask"] = is_shown & later.tril(num_cached)
        # OPT counts the ones of the mask, and has none to count now.
        inputs["position_ids"] = torch.arange(num_cached, num_keys, device=mask.device)[None]

    def _gap_states(self, inputs: JsonObject, gaps: Tensor) -> Tensor:
        """Return the decoder's states [batch, hidden] after the token that marks each text's gap.

        There the decoder says what belongs into the gap.

        Args:
            inputs: of the encoder.
            gaps: the marking token of each text, int64 [batch].
        """
        encoded = self.model.encoder(**inputs).last_hidden_state
        gap = gaps[:, None]
        start = torch.full_like(gap, self.model.config.decoder_start_token_id)
        decoded = self.model.decoder(
            input_ids=torch.cat([start, gap], dim=1),
            use_cache=False,
            encoder_hidden_states=encoded,
            encoder_attention_mask=inputs["attention_mask"],
        )
        return decoded.last_hidden_state[:, -1]

    def head(self, hidden: Tensor) -> Tensor:
        """Return the logits [..., vocabulary] of last hidden states [..., hidden].

        With a classifier, logits [..., classes].
        """
        if self.classifier is not None:
            logits: Tensor = self.classifier(hidden.float())
            return logits
        with self.computing():
            return logits_of(self.model, hidden)

    def answer_logits(
        self, batch: Batch, prompt: Prompt | PromptBatch | None = None
    ) -> tuple[Tensor, Tensor]:
        """Return logits and targets of the positions that have a target, and only of those.

        Args:
            batch: int64 [batch, length], on the model's device.
            prompt: at this model's depth; goes in front of every text.

        Returns:
            What `logits_and_targets` returns.
        """
        return self.logits_and_targets(self.answer_states(batch, prompt), batch)

    def logits_and_targets(self, states: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
        """Return the logits of `answer_states`, and the targets that belong to them.

        Args:
            states: [answers, hidden].
            batch: int64 [batch, length], whose answer states they are.

        Returns:
            Logits [answers, vocabulary], and token ids, int64 [answers]. With candidates, logits
            [answers, candidates], and indices of candidates.
        """
        logits = self.head(states)
        targets = batch.targets.flatten()[batch.places.flat]
        if self.candidates is None:
            return logits, targets
        return logits[:, self.candidates], torch.searchsorted(self.candidates, targets)

    def input_states_of(
        self, part: nn.Module, batch: Batch, prompt: Prompt | None = None
    ) -> Tensor:
        """Return the hidden states that enter a submodule, at the text's positions.

        The layers behind the submodule are not run.

        Args:
            part: a submodule of the base model.
            batch: int64 [batch, length], on the model's device.
            prompt: at this model's depth; goes in front of every text.

        Returns:
            [batch, length, hidden].
        """
        states: list[Tensor] = []

        def keep_input(_: nn.Module, arguments: tuple[Tensor, ...]) -> None:
            """Keep the states that enter the part, [batch, length, hidden], and end the pass."""
            states.append(arguments[0])
            raise _ReachedError

        with self.computing():
            inputs, num_before = self.inputs(batch, prompt)
            hook = part.register_forward_pre_hook(keep_input, prepend=True)
            try:
                with suppress(_ReachedError):
                    self.model.base_model(**inputs)
            finally:
                hook.remove()
        return states[0][:, num_before:]

    def continue_from(
        self,
        ids: Tensor,
        prompt: Prompt | PromptBatch | None,
        rows: Tensor,
        *,
        endings: Batch | None,
    ) -> tuple[Tensor, Tensor | None]:
        """Run contexts once, then several continuations of each.

        Args:
            ids: contexts of one length, int64 [contexts, length].
            prompt: at this model's depth, or None.
            rows: the context of each continuation, int64 [continuations].
            endings: right-padded continuations without their last token, int64 [continuations,
                longest - 1], or None if all are one token long.

        Returns:
            Logits of the continuations' first token [continuations, vocabulary], and of the further
            ones [continuations, longest - 1, vocabulary] or None.
        """
        batch = Batch(ids, torch.ones_like(ids), ids)
        with self.computing():
            inputs, _ = self.inputs(batch, prompt)
            inputs["use_cache"] = True
            output = self.model.base_model(**inputs)
            first_logits = self.head(output.last_hidden_state[:, -1])[rows]
            if endings is None:
                return first_logits, None
            cache = output.past_key_values
            cache.batch_select_indices(rows)
            context_mask = inputs["attention_mask"][rows]
            output = self.model.base_model(
                input_ids=endings.input_ids,
                attention_mask=torch.cat([context_mask, endings.attention_mask], dim=1),
                past_key_values=cache,
            )
            return first_logits, self.head(output.last_hidden_state)

    # --- the prompt in front of the text ---

    def inputs(self, batch: Batch, prompt: Prompt | PromptBatch | None) -> tuple[JsonObject, int]:
        """Return the arguments of the base model's forward pass.

        Args:
            batch: int64 [batch, length], on the model's device.
            prompt: at this model's depth; goes in front of every text, if it has a token.

        Returns:
            The arguments by name, and the number of prompt positions that the output has in front
            of the text's.
        """
        mask = batch.attention_mask
        if prompt is None or not prompt.spec.num_tokens:
            return {"input_ids": batch.input_ids, "attention_mask": mask, "use_cache": False}, 0
        batch_size = len(mask)
        num_tokens = prompt.spec.num_tokens
        mask = torch.cat([mask.new_ones(batch_size, num_tokens), mask], dim=1)
        if prompt.spec.kind == "prefix" or self._caches_input_prompt(prompt, batch_size):
            cache = self.cache(prompt, batch_size)
            inputs = {
                "input_ids": batch.input_ids,
                "attention_mask": mask,
                "past_key_values": cache,
            }
            return inputs, 0
        text = self.model.get_input_embeddings()(batch.input_ids)
        soft = prompt.expand(prompt.matrices().to(text.dtype), batch_size)
        embeddings = torch.cat([soft, text], dim=1)
        inputs = {"inputs_embeds": embeddings, "attention_mask": mask, "use_cache": False}
        return inputs, num_tokens

    def cache(self, prompt: Prompt | PromptBatch, batch_size: int) -> transformers.DynamicCache:
        """Return the prompt as a transformers cache for a batch of texts.

        Each layer has keys and values [batch, heads, num_tokens, head_dim].
        """
        layers = prompt.cache or self._key_values(prompt)
        cache = transformers.DynamicCache()
        cache.layers = [
            _cache_layer(prompt.expand(keys, batch_size), prompt.expand(values, batch_size))
            for keys, values in layers
        ]
        return cache

    def precompute_cache(self, prompts: PromptBatch) -> PromptBatch:
        """Return the prompts with their keys and values, so that later passes need not compute
        them.

        Input prompts have none in a masked model, whose prompt sees the text behind it, in training
        mode, and without a token; they are returned as they are.
        """
        spec = prompts.spec
        if not spec.num_tokens:
            return prompts
        if spec.kind == "input" and (self.kind != "causal" or self.model.training):
            return prompts
        with self.computing():
            return replace(prompts, cache=self._key_values(prompts))

    def _key_values(self, prompt: Prompt | PromptBatch) -> list[tuple[Tensor, Tensor]]:
        """Compute each layer's keys and values of prompts, [num, heads, num_tokens, head_dim]."""
        if prompt.spec.kind == "prefix":
            parts = key_values(prompt).to(self.dtype).flatten(0, 1).unbind()
            return list(zip(parts[::2], parts[1::2]))
        soft = prompt.matrices().to(self.model.get_input_embeddings().weight.dtype)
        cache = self.model.base_model(inputs_embeds=soft, **_full_cache()).past_key_values
        return [(layer.keys, layer.values) for layer in cache.layers]

    def _caches_input_prompt(self, prompt: Prompt | PromptBatch, batch_size: int) -> bool:
        """Return whether an input prompt runs through the model once for all texts of a batch.

        That is possible in a causal model, where the prompt does not see the texts behind it. In
        training mode rows differ in their dropout, and checkpointing keeps no cache.
        """
        if self.kind != "causal" or self.model.training:
            return False
        num_saved = (batch_size - prompt.num) * prompt.spec.num_tokens
        min_saved = MIN_SAVED_POSITIONS.get(self.device.type, 1)
        return prompt.cache is not None or num_saved >= min_saved

    def embeddings(self, ids: Tensor) -> Tensor:
        """Return tokens as they enter the first layer, where Gemma has scaled them.

        Args:
            ids: int64 [*shape].

        Returns:
            fp32 [*shape, hidden], on the model's device.
        """
        with torch.no_grad():
            rows: Tensor = self.model.get_input_embeddings()(ids.to(self.device))
            return rows.float()

    def continuations(self, ids: Sequence[int], num: int, max_tokens: int) -> list[list[int]]:
        """Return the likeliest continuations of a context by beam search, the best first.

        Args:
            ids: the context; the model is causal.
            num: continuations, and width of the beam.
            max_tokens: of a continuation.

        Returns:
            The ids of each, with those of padding behind a shorter one.
        """
        end = self.model.config.eos_token_id
        settings = transformers.GenerationConfig(
            num_beams=num,
            num_return_sequences=num,
            do_sample=False,
            max_new_tokens=max_tokens,
            eos_token_id=end,
            pad_token_id=(end[0] if isinstance(end, list) else end) or 0,
        )
        context = torch.tensor([list(ids)], device=self.device)
        with torch.no_grad(), self.computing(), self.evaluating():
            rows = self.model.generate(
                context, attention_mask=torch.ones_like(context), generation_config=settings
            )
        return [row[len(ids) :].tolist() for row in rows]

    def greedy_tokens(
        self, ids: Sequence[int], prompt: Prompt | None, max_tokens: int
    ) -> Iterator[tuple[int, float]]:
        """Yield the likeliest next token again and again, each with its probability.

        The context is read once, before the first token; then a pass for each token.

        Args:
            ids: the context; the model is causal.
            prompt: at this model's depth, or None.
            max_tokens: after which to end, if no token that ends a text has come before; that one
                is not yielded.
        """
        end = self.model.config.eos_token_id
        ends = set(end) if isinstance(end, list) else {end}
        context = torch.tensor([list(ids)], device=self.device)
        batch = Batch(context, torch.ones_like(context), context)
        with torch.no_grad(), self.computing(), self.evaluating():
            inputs, _ = self.inputs(batch, prompt)
            mask = inputs["attention_mask"]
            output = self.model.base_model(**{**inputs, "use_cache": True})
            for _ in range(max_tokens):
                probabilities = self.head(output.last_hidden_state[0, -1]).float().softmax(dim=-1)
                probability, token = probabilities.max(dim=-1)
                if int(token) in ends:
                    return
                yield int(token), float(probability)
                mask = torch.cat([mask, mask.new_ones(1, 1)], dim=1)
                output = self.model.base_model(
                    input_ids=token.view(1, 1),
                    attention_mask=mask,
                    past_key_values=output.past_key_values,
                    use_cache=True,
                )

    def keys_and_values(self, ids: Tensor) -> Tensor:
        """Return every layer's keys and values of tokens that stand alone.

        Args:
            ids: int64 [tokens].

        Returns:
            fp32 [num_layers, 2, num_heads, tokens, head_dim].
        """
        with torch.no_grad(), self.computing(), self.evaluating():
            output = self.model.base_model(input_ids=ids[None].to(self.device), **_full_cache())
        layers = output.past_key_values.layers
        return torch.stack(
            [torch.stack([layer.keys[0], layer.values[0]]) for layer in layers]
        ).float()


def _product_weights(model: nn.Module) -> list[nn.Parameter]:
    """Return the weights and biases that only linear layers use, each once."""
    used: dict[bool, dict[int, nn.Parameter]] = {True: {}, False: {}}
    for module in model.modules():
        is_linear = isinstance(module, (nn.Linear, Conv1D))
        for weight in module.parameters(recurse=False):
            used[is_linear][id(weight)] = weight
    return [weight for key, weight in used[True].items() if key not in used[False]]


def _cache_layer(keys: Tensor, values: Tensor) -> DynamicLayer:
    """Return a layer of a cache that begins with keys and values, which may be views.

    Args:
        keys: [batch, heads, num_tokens, head_dim].
        values: likewise.
    """
    layer = DynamicLayer()
    layer.dtype = keys.dtype
    layer.device = keys.device
    layer.keys = keys
    layer.values = values
    layer.is_initialized = True
    return layer


def _full_cache() -> JsonObject:
    """Return the arguments of a pass that keeps all keys and values.

    By default, transformers drops those that have left a layer's sliding window.
    """
    return {"use_cache": True, "past_key_values": transformers.DynamicCache()}

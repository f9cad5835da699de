"""A step's loss written out for GPT-2 and Llama, as one would for speed alone: what `bench local`
compares the package's step with.

The mask is made once, the last layer runs its queries and its MLP at the answers' positions only,
and a prefix enters without a cache.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from fedsp_mpi.models.language_model import LanguageModel
from fedsp_mpi.models.prompts import Prompt, key_values
from fedsp_mpi.tensors import Batch

Loss = Callable[[Prompt, Batch], Tensor]


def loss_by_hand(model: LanguageModel) -> Loss | None:
    """Return what computes the sum of the answers' losses under a prefix, an fp32 scalar in nats.

    None for a family that is not written out.
    """
    losses = {"gpt2": _gpt2_loss, "llama": _llama_loss}
    loss = losses.get(model.model.config.model_type)
    if loss is None:
        return None
    return lambda prompt, batch: loss(model, prompt, batch)


def _answers(batch: Batch) -> tuple[Tensor, Tensor]:
    """Return the row and the position of each answer's token, int64 [answers]."""
    rows, positions = (batch.targets != -100).nonzero(as_tuple=True)
    return rows, positions


def _mask(batch: Batch, num_tokens: int) -> Tensor:
    """Return which keys each query sees, bool [batch, 1, length, num_tokens + length]."""
    is_text = batch.attention_mask.bool()[:, None, None, :]
    length = is_text.shape[-1]
    is_before = torch.ones(length, length, dtype=torch.bool, device=is_text.device).tril()
    return F.pad(is_text & is_before, (num_tokens, 0), value=True)


def _attend(
    queries: Tensor,
    keys: Tensor,
    values: Tensor,
    *,
    mask: Tensor,
    at: tuple[Tensor, Tensor] | None,
) -> Tensor:
    """Return attention's output, all heads side by side.

    Args:
        queries: [batch, heads, length, head_dim]; with `at`, [answers, heads, 1, head_dim].
        keys: [batch, heads, num_tokens + length, head_dim]; values likewise.
        values: of the keys.
        mask: [batch, 1, length, num_tokens + length].
        at: row and position of each query; None: all of them.
    """
    if at is None:
        output = F.scaled_dot_product_attention(queries, keys, values, attn_mask=mask)
        return output.transpose(1, 2).flatten(2)
    rows, positions = at
    output = F.scaled_dot_product_attention(
        queries, keys[rows], values[rows], attn_mask=mask[rows, :, positions][:, :, None]
    )
    return output.flatten(1)


def _sum_of_losses(model: LanguageModel, logits: Tensor, batch: Batch) -> Tensor:
    targets = batch.targets[batch.targets != -100]
    if model.candidates is not None:
        logits = logits[:, model.candidates]
        targets = torch.searchsorted(model.candidates, targets)
    return F.cross_entropy(logits.float(), targets, reduction="sum")


def _gpt2_loss(model: LanguageModel, prompt: Prompt, batch: Batch) -> Tensor:
    """Return the sum of a batch's losses under GPT-2, a scalar; batch is [batch, length]."""
    base = model.model.base_model
    num_heads = model.shape.num_kv_heads
    prefixes = key_values(prompt)
    num_tokens = prompt.spec.num_tokens
    mask = _mask(batch, num_tokens)
    at = _answers(batch)
    size, length = batch.input_ids.shape
    places = torch.arange(num_tokens, num_tokens + length, device=mask.device)
    states = base.wte(batch.input_ids) + base.wpe(places)
    last = len(base.h) - 1
    for index, layer in enumerate(base.h):
        only = at if index == last else None
        projected = layer.attn.c_attn(layer.ln_1(states))
        heads = projected.view(size, length, 3, num_heads, -1).permute(2, 0, 3, 1, 4)
        queries = heads[0]
        if only is not None:
            queries = queries[only[0], :, only[1]][:, :, None]
            states = states[only]
        prefix = prefixes[index].expand(-1, size, -1, -1, -1)
        keys = torch.cat([prefix[0], heads[1]], dim=2)
        values = torch.cat([prefix[1], heads[2]], dim=2)
        states = states + layer.attn.c_proj(_attend(queries, keys, values, mask=mask, at=only))
        inner = F.gelu(layer.mlp.c_fc(layer.ln_2(states)), approximate="tanh")
        states = states + layer.mlp.c_proj(inner)
    return _sum_of_losses(model, model.model.lm_head(base.ln_f(states)), batch)


def _llama_loss(model: LanguageModel, prompt: Prompt, batch: Batch) -> Tensor:
    """Return the sum of a batch's losses under Llama, a scalar; batch is [batch, length]."""
    base = model.model.base_model
    num_heads = base.config.num_attention_heads
    num_groups = num_heads // model.shape.num_kv_heads
    prefixes = key_values(prompt)
    num_tokens = prompt.spec.num_tokens
    mask = _mask(batch, num_tokens)
    at = _answers(batch)
    size, length = batch.input_ids.shape
    states = base.embed_tokens(batch.input_ids)
    places = torch.arange(num_tokens, num_tokens + length, device=mask.device)[None]
    cos, sin = (part[:, None] for part in base.rotary_emb(states, places))
    last = len(base.layers) - 1

    def turned(vectors: Tensor) -> Tensor:
        first, second = vectors.chunk(2, dim=-1)
        return vectors * cos + torch.cat([-second, first], dim=-1) * sin

    for index, layer in enumerate(base.layers):
        only = at if index == last else None
        normed = layer.input_layernorm(states)
        attention = layer.self_attn
        queries, keys, values = (
            projection(normed).view(size, length, -1, model.shape.head_dim).transpose(1, 2)
            for projection in (attention.q_proj, attention.k_proj, attention.v_proj)
        )
        queries = turned(queries)
        if only is not None:
            queries = queries[only[0], :, only[1]][:, :, None]
            states = states[only]
        prefix = prefixes[index].expand(-1, size, -1, -1, -1)
        keys = torch.cat([prefix[0], turned(keys)], dim=2).repeat_interleave(num_groups, dim=1)
        values = torch.cat([prefix[1], values], dim=2).repeat_interleave(num_groups, dim=1)
        states = states + attention.o_proj(_attend(queries, keys, values, mask=mask, at=only))
        states = states + layer.mlp(layer.post_attention_layernorm(states))
    return _sum_of_losses(model, model.model.lm_head(base.norm(states)), batch)


def loss_by_peft(model: LanguageModel, prompt: Prompt) -> Loss:
    """Return the same of stock peft over the same weights, with labels and all logits.

    Its prefix is its own, with the values that the given prompt has now; the losses have its
    gradients.
    """
    import peft

    spec = prompt.spec
    settings = peft.PrefixTuningConfig(
        task_type="CAUSAL_LM",
        num_virtual_tokens=spec.num_tokens,
        token_dim=spec.width,
        num_layers=spec.num_layers,
        num_attention_heads=spec.num_heads,
    )
    stock = peft.get_peft_model(model.model, settings)
    weight = stock.prompt_encoder["default"].embedding.weight
    with torch.no_grad():
        weight.copy_(prompt.matrix())

    def loss(_: Prompt, batch: Batch) -> Tensor:
        labels = F.pad(batch.targets, (1, 0), value=-100)
        output = stock(
            input_ids=F.pad(batch.input_ids, (0, 1)),
            attention_mask=F.pad(batch.attention_mask, (0, 1)),
            labels=labels,
        )
        if model.candidates is not None:  # of which labels know nothing
            return _sum_of_losses(model, output.logits[:, :-1][batch.targets != -100], batch)
        return output.loss * (labels != -100).sum()

    return loss

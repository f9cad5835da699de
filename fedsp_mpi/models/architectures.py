"""Sizes of well-known models, and what models cost by their sizes: neither takes a file, a network
or a weight.
"""

from __future__ import annotations

import difflib
from pathlib import Path
from typing import Any

import transformers
from torch import nn

from fedsp_mpi.models.backbone import LanguageModel, read_config

Sizes = dict[str, Any]


def _gpt2(width: int, layers: int, heads: int) -> tuple[str, Sizes]:
    return "gpt2", {"n_embd": width, "n_layer": layers, "n_head": heads}


def _opt(width: int, layers: int, heads: int, **more: Any) -> tuple[str, Sizes]:
    sizes = {"hidden_size": width, "num_hidden_layers": layers, "num_attention_heads": heads}
    return "opt", sizes | {"ffn_dim": 4 * width, "word_embed_proj_dim": width} | more


def _gated(
    kind: str,
    width: int,
    inner: int,
    layers: int,
    heads: tuple[int, int],
    vocabulary: int,
    positions: int,
    tied: bool,
    **more: Any,
) -> tuple[str, Sizes]:
    """Llama and what came of it; `heads`: of the queries, and of keys and values."""
    sizes = {"hidden_size": width, "intermediate_size": inner, "num_hidden_layers": layers}
    sizes |= {"num_attention_heads": heads[0], "num_key_value_heads": heads[1]}
    sizes |= {
        "vocab_size": vocabulary,
        "max_position_embeddings": positions,
        "tie_word_embeddings": tied,
    }
    return kind, sizes | more


def _pythia(width: int, layers: int, heads: int, vocabulary: int = 50304) -> tuple[str, Sizes]:
    sizes = {"hidden_size": width, "num_hidden_layers": layers, "num_attention_heads": heads}
    return "gpt_neox", sizes | {"intermediate_size": 4 * width, "vocab_size": vocabulary}


# Hub name: family, and the sizes in which the model differs from the defaults of transformers.
KNOWN: dict[str, tuple[str, Sizes]] = {
    "gpt2": _gpt2(768, 12, 12),
    "gpt2-medium": _gpt2(1024, 24, 16),
    "gpt2-large": _gpt2(1280, 36, 20),
    "gpt2-xl": _gpt2(1600, 48, 25),
    "facebook/opt-125m": _opt(768, 12, 12),
    "facebook/opt-350m": _opt(1024, 24, 16, word_embed_proj_dim=512, do_layer_norm_before=False),
    "facebook/opt-1.3b": _opt(2048, 24, 32),
    "facebook/opt-2.7b": _opt(2560, 32, 32),
    "facebook/opt-6.7b": _opt(4096, 32, 32),
    "HuggingFaceTB/SmolLM2-135M": _gated("llama", 576, 1536, 30, (9, 3), 49152, 8192, True),
    "HuggingFaceTB/SmolLM2-360M": _gated("llama", 960, 2560, 32, (15, 5), 49152, 8192, True),
    "HuggingFaceTB/SmolLM2-1.7B": _gated("llama", 2048, 8192, 24, (32, 32), 49152, 8192, True),
    "meta-llama/Llama-3.2-1B": _gated("llama", 2048, 8192, 16, (32, 8), 128256, 131072, True),
    "Qwen/Qwen2.5-0.5B": _gated("qwen2", 896, 4864, 24, (14, 2), 151936, 32768, True),
    "Qwen/Qwen2.5-1.5B": _gated("qwen2", 1536, 8960, 28, (12, 2), 151936, 131072, True),
    "Qwen/Qwen2.5-7B": _gated("qwen2", 3584, 18944, 28, (28, 4), 152064, 131072, False),
    "Qwen/Qwen3-0.6B": _gated("qwen3", 1024, 3072, 28, (16, 8), 151936, 40960, True, head_dim=128),
    "Qwen/Qwen3-1.7B": _gated("qwen3", 2048, 6144, 28, (16, 8), 151936, 40960, True, head_dim=128),
    "Qwen/Qwen3-8B": _gated("qwen3", 4096, 12288, 36, (32, 8), 151936, 40960, False, head_dim=128),
    "mistralai/Mistral-7B-v0.1": _gated("mistral", 4096, 14336, 32, (32, 8), 32000, 32768, False),
    "microsoft/Phi-3-mini-4k-instruct": _gated(
        "phi3", 3072, 8192, 32, (32, 32), 32064, 4096, False
    ),
    "allenai/OLMo-2-0425-1B": _gated("olmo2", 2048, 8192, 16, (16, 16), 100352, 4096, False),
    "EleutherAI/pythia-160m": _pythia(768, 12, 12),
    "EleutherAI/pythia-410m": _pythia(1024, 24, 16),
    "EleutherAI/pythia-1.4b": _pythia(2048, 24, 16),
    "EleutherAI/pythia-6.9b": _pythia(4096, 32, 32, 50432),
}
_ALIKE = ("-Instruct",)  # the same architecture under another name


def known(name: str) -> Any | None:
    """The transformers configuration of a well-known model, or None.

    Enough to count with, not to compute with.
    """
    base = name.removeprefix("openai-community/")
    for ending in _ALIKE:
        base = base.removesuffix(ending)
    if base not in KNOWN:
        return None
    family, sizes = KNOWN[base]
    return transformers.AutoConfig.for_model(family, **sizes)


def config_of(name: str, revision: str | None = None) -> Any:
    """The configuration of a model: that of a folder, of the table above, or of the hub and its
    cache, in this order.

    Raises ValueError if there is none.
    """
    found = None if revision or Path(name).expanduser().is_dir() else known(name)
    if found is not None:
        return found
    try:
        return read_config(name, revision)
    except ValueError as error:
        near = difflib.get_close_matches(name, KNOWN, 1, cutoff=0.7)
        raise ValueError(
            f"{error}" + (f"; of known sizes is {near[0]!r}" if near and near[0] != name else "")
        ) from None


def forward(model: LanguageModel, tokens: float, seen: int, answers: int) -> float:
    """FLOPs of one text through a model, a multiplication and an addition counted as two.

    2 x (weights of the linear layers, as often as they run) x tokens + 4 x tokens x seen x width x
    layers + 2 x head x answers.

    Args:
        tokens: that pass its layers.
        seen: keys that each of them attends to.
        answers: positions whose logits are made.
    """
    base, config = model.model.base_model, model.model.config
    modules = [module for module in base.modules() if not isinstance(module, nn.Embedding)]
    linear = sum(
        w.numel() for module in modules for w in module.parameters(recurse=False) if w.dim() == 2
    )
    width = config.num_attention_heads * model.shape.head_dim
    head = model.model.get_output_embeddings().weight.numel()
    return (
        2.0 * linear * tokens
        + 4.0 * tokens * seen * width * model.shape.num_layers
        + 2.0 * head * answers
    )


def ratios(large: LanguageModel, small: LanguageModel) -> dict[str, float]:
    """How many times fewer parameters `small` has: "as held", and under other ways of counting that
    apply.
    """
    ours, theirs = large.num_parameters(), small.num_parameters()
    found = {"as held": ours / theirs}
    head, words = (
        large.model.get_output_embeddings().weight,
        large.model.get_input_embeddings().weight,
    )
    if head is words:
        found["with an untied head"] = (ours + head.numel()) / theirs
    tables = [
        module.weight
        for module in large.model.base_model.modules()
        if isinstance(module, nn.Embedding)
    ]
    if positions := sum(weight.numel() for weight in tables if weight is not words):
        found["without position embeddings"] = (ours - positions) / (theirs - positions)
    return found

"""Sizes of well-known models, and what a model costs by its sizes: without files, network or
weights.
"""

from __future__ import annotations

import difflib
from pathlib import Path

import transformers
from torch import nn
from transformers import PreTrainedConfig

from fedsp_mpi.models.language_model import LanguageModel
from fedsp_mpi.models.reading import read_config

Sizes = dict[str, int | bool]


def _gpt2(width: int, layers: int, heads: int) -> tuple[str, Sizes]:
    return "gpt2", {"n_embd": width, "n_layer": layers, "n_head": heads}


def _opt(width: int, layers: int, heads: int, **other_sizes: int | bool) -> tuple[str, Sizes]:
    sizes = {
        "hidden_size": width,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "ffn_dim": 4 * width,
        "word_embed_proj_dim": width,
    }
    return "opt", sizes | other_sizes


def _llama_like(
    family: str,
    width: int,
    inner: int,
    *,
    layers: int,
    heads: tuple[int, int],
    vocabulary: int,
    positions: int,
    tied: bool = False,
    **other_sizes: int | bool,
) -> tuple[str, Sizes]:
    """Return the sizes of Llama or of a family that came of it.

    Args:
        family: the name that transformers has for it.
        width: of the hidden states.
        inner: width inside the feed-forward layers.
        layers: depth.
        heads: number of heads of the queries, and of keys and values.
        vocabulary: number of tokens.
        positions: longest sequence in tokens.
        tied: whether the output head is the input embedding.
        other_sizes: what else differs from the defaults.
    """
    sizes = {
        "hidden_size": width,
        "intermediate_size": inner,
        "num_hidden_layers": layers,
        "num_attention_heads": heads[0],
        "num_key_value_heads": heads[1],
        "vocab_size": vocabulary,
        "max_position_embeddings": positions,
        "tie_word_embeddings": tied,
    }
    return family, sizes | other_sizes


def _pythia(width: int, layers: int, heads: int, *, vocabulary: int = 50304) -> tuple[str, Sizes]:
    sizes: Sizes = {
        "hidden_size": width,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "intermediate_size": 4 * width,
        "vocab_size": vocabulary,
    }
    return "gpt_neox", sizes


def _phi(width: int, layers: int) -> tuple[str, Sizes]:
    sizes: Sizes = {
        "hidden_size": width,
        "intermediate_size": 4 * width,
        "num_hidden_layers": layers,
        "num_attention_heads": 32,
    }
    return "phi", sizes


def _gemma(
    family: str,
    width: int,
    inner: int,
    *,
    layers: int,
    heads: tuple[int, int],
    head_dim: int,
    vocabulary: int,
) -> tuple[str, Sizes]:
    """Return the sizes of a Gemma of text alone.

    Args:
        family: "gemma2", or "gemma3_text", which has a window of 512 tokens and 32768 positions.
        width: of the hidden states.
        inner: width inside the feed-forward layers.
        layers: depth.
        heads: number of heads of the queries, and of keys and values.
        head_dim: width of one head.
        vocabulary: number of tokens.
    """
    is_third = family == "gemma3_text"
    return _llama_like(
        family,
        width,
        inner,
        layers=layers,
        heads=heads,
        vocabulary=vocabulary,
        positions=32768 if is_third else 8192,
        tied=True,
        head_dim=head_dim,
        sliding_window=512 if is_third else 4096,
    )


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
    "HuggingFaceTB/SmolLM2-135M": _llama_like(
        "llama", 576, 1536, layers=30, heads=(9, 3), vocabulary=49152, positions=8192, tied=True
    ),
    "HuggingFaceTB/SmolLM2-360M": _llama_like(
        "llama", 960, 2560, layers=32, heads=(15, 5), vocabulary=49152, positions=8192, tied=True
    ),
    "HuggingFaceTB/SmolLM2-1.7B": _llama_like(
        "llama", 2048, 8192, layers=24, heads=(32, 32), vocabulary=49152, positions=8192, tied=True
    ),
    "meta-llama/Llama-3.2-1B": _llama_like(
        "llama",
        2048,
        8192,
        layers=16,
        heads=(32, 8),
        vocabulary=128256,
        positions=131072,
        tied=True,
    ),
    "Qwen/Qwen2.5-0.5B": _llama_like(
        "qwen2", 896, 4864, layers=24, heads=(14, 2), vocabulary=151936, positions=32768, tied=True
    ),
    "Qwen/Qwen2.5-1.5B": _llama_like(
        "qwen2",
        1536,
        8960,
        layers=28,
        heads=(12, 2),
        vocabulary=151936,
        positions=131072,
        tied=True,
    ),
    "Qwen/Qwen2.5-7B": _llama_like(
        "qwen2", 3584, 18944, layers=28, heads=(28, 4), vocabulary=152064, positions=131072
    ),
    "Qwen/Qwen3-0.6B": _llama_like(
        "qwen3",
        1024,
        3072,
        layers=28,
        heads=(16, 8),
        vocabulary=151936,
        positions=40960,
        tied=True,
        head_dim=128,
    ),
    "Qwen/Qwen3-1.7B": _llama_like(
        "qwen3",
        2048,
        6144,
        layers=28,
        heads=(16, 8),
        vocabulary=151936,
        positions=40960,
        tied=True,
        head_dim=128,
    ),
    "Qwen/Qwen3-8B": _llama_like(
        "qwen3",
        4096,
        12288,
        layers=36,
        heads=(32, 8),
        vocabulary=151936,
        positions=40960,
        head_dim=128,
    ),
    "mistralai/Mistral-7B-v0.1": _llama_like(
        "mistral", 4096, 14336, layers=32, heads=(32, 8), vocabulary=32000, positions=32768
    ),
    "microsoft/Phi-3-mini-4k-instruct": _llama_like(
        "phi3", 3072, 8192, layers=32, heads=(32, 32), vocabulary=32064, positions=4096
    ),
    "microsoft/phi-4": _llama_like(
        "phi3", 5120, 17920, layers=40, heads=(40, 10), vocabulary=100352, positions=16384
    ),
    "microsoft/phi-1_5": _phi(2048, 24),
    "microsoft/phi-2": _phi(2560, 32),
    "google/gemma-2-2b": _gemma(
        "gemma2", 2304, 9216, layers=26, heads=(8, 4), head_dim=256, vocabulary=256000
    ),
    "google/gemma-2-9b": _gemma(
        "gemma2", 3584, 14336, layers=42, heads=(16, 8), head_dim=256, vocabulary=256000
    ),
    "google/gemma-3-270m": _gemma(
        "gemma3_text", 640, 2048, layers=18, heads=(4, 1), head_dim=256, vocabulary=262144
    ),
    "google/gemma-3-1b": _gemma(
        "gemma3_text", 1152, 6912, layers=26, heads=(4, 1), head_dim=256, vocabulary=262144
    ),
    "HuggingFaceTB/SmolLM3-3B": _llama_like(
        "smollm3",
        2048,
        11008,
        layers=36,
        heads=(16, 4),
        vocabulary=128256,
        positions=65536,
        tied=True,
    ),
    "allenai/OLMo-2-0425-1B": _llama_like(
        "olmo2", 2048, 8192, layers=16, heads=(16, 16), vocabulary=100352, positions=4096
    ),
    "EleutherAI/pythia-160m": _pythia(768, 12, 12),
    "EleutherAI/pythia-410m": _pythia(1024, 24, 16),
    "EleutherAI/pythia-1.4b": _pythia(2048, 24, 16),
    "EleutherAI/pythia-6.9b": _pythia(4096, 32, 32, vocabulary=50432),
}
# Endings of names under which the same architecture is published.
_SAME_ARCHITECTURE = ("-Instruct", "-it")


def config_of_known(name: str) -> PreTrainedConfig | None:
    """Return the transformers configuration of a well-known model, or None.

    It is enough to count with, not to compute with.
    """
    base = name.removeprefix("openai-community/")
    for ending in _SAME_ARCHITECTURE:
        base = base.removesuffix(ending)
    if base not in KNOWN:
        return None
    family, sizes = KNOWN[base]
    return transformers.AutoConfig.for_model(family, **sizes)


def config_of(name: str, revision: str | None = None) -> PreTrainedConfig:
    """Return a model's configuration: of a folder, of `KNOWN`, or of the hub and its cache.

    Args:
        name: folder or hub name.
        revision: of the hub's files; None is the main one. With a revision, `KNOWN` is not used.

    Raises:
        ValueError: there is none.
    """
    if not revision and not Path(name).expanduser().is_dir():
        config = config_of_known(name)
        if config is not None:
            return config
    try:
        return read_config(name, revision)
    except ValueError as error:
        message = str(error)
        similar = difflib.get_close_matches(name, KNOWN, 1, cutoff=0.7)
        if similar and similar[0] != name:
            message += f"; the sizes of {similar[0]!r} are known"
        raise ValueError(message) from None


def forward(model: LanguageModel, tokens: float, *, seen: int, answers: int) -> float:
    """Return the FLOPs of one text through a model; a multiply-add counts as two.

    2 x (weights of the linear layers, as often as they run) x tokens + 4 x tokens x seen x width x
    layers + 2 x head x answers.

    Args:
        model: whose sizes count; it may be on the meta device.
        tokens: that pass its layers.
        seen: keys that each token attends to.
        answers: positions whose logits are computed.
    """
    base = model.model.base_model
    config = model.model.config
    # Embeddings are looked up, not multiplied.
    modules = [module for module in base.modules() if not isinstance(module, nn.Embedding)]
    linear = sum(
        weight.numel()
        for module in modules
        for weight in module.parameters(recurse=False)
        if weight.dim() == 2
    )
    width = config.num_attention_heads * model.shape.head_dim
    head = model.model.get_output_embeddings().weight.numel()
    return (
        2.0 * linear * tokens
        + 4.0 * tokens * seen * width * model.shape.num_layers
        + 2.0 * head * answers
    )


def ratios(large: LanguageModel, small: LanguageModel) -> dict[str, float]:
    """Return how many times fewer parameters `small` has, by the way of counting.

    Returns:
        "as held", and where they differ, "with an untied head" and "without position embeddings".
    """
    num_large = large.num_parameters()
    num_small = small.num_parameters()
    by_counting = {"as held": num_large / num_small}
    head = large.model.get_output_embeddings().weight
    words = large.model.get_input_embeddings().weight
    if head is words:
        by_counting["with an untied head"] = (num_large + head.numel()) / num_small
    tables = [
        module.weight
        for module in large.model.base_model.modules()
        if isinstance(module, nn.Embedding)
    ]
    positions = sum(weight.numel() for weight in tables if weight is not words)
    if positions:
        by_counting["without position embeddings"] = (num_large - positions) / (
            num_small - positions
        )
    return by_counting

"""Tiny random models of every family, a word-level tokenizer, and a task, all made on the spot."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers
import torch
from transformers import (
    AutoConfig,
    BertConfig,
    GPT2Config,
    OPTConfig,
    PreTrainedTokenizerFast,
    RobertaConfig,
    T5Config,
)

from fedsp_mpi.config import AuxiliaryConfig
from fedsp_mpi.data.tokens import Text, collate
from fedsp_mpi.models import backbone
from fedsp_mpi.models.families import model_class
from fedsp_mpi.models.language_model import LanguageModel
from fedsp_mpi.tensors import Batch

FAMILIES = ("gpt2", "opt", "llama", "qwen2")  # that all tests of families take
CAUSAL_FAMILIES = (
    *FAMILIES,
    "qwen3",
    "mistral",
    "phi3",
    "olmo2",
    "gpt_neox",
    "phi",
    "gemma2",
    "gemma3_text",
    "smollm3",
)  # those of the models' parts too
GAP_FAMILIES = ("bert", "roberta", "t5")  # that fill in a gap
VOCABULARY, POSITIONS, LAYERS, WIDTH = 100, 64, 4, 32
CPU = torch.device("cpu")
_WINDOWS = {
    "sliding_window": 8,
    "layer_types": ["sliding_attention", "full_attention"] * 2,
    "query_pre_attn_scalar": 8,
}
# Settings by which a family differs from its relatives, so strong that they show in tiny models.
_OWN_SETTINGS: dict[str, dict[str, Any]] = {
    "gemma2": _WINDOWS | {"attn_logit_softcapping": 1.0, "final_logit_softcapping": 2.0},
    "gemma3_text": _WINDOWS,
    "smollm3": {"no_rope_layers": [1, 0, 1, 1]},
}


def config(family: str, **changes: Any) -> Any:
    """A configuration of four layers of four heads (llama and later: two key/value heads), 32 wide,
    64 positions.
    """
    special = {"bos_token_id": 1, "eos_token_id": 2, "vocab_size": VOCABULARY}
    if family == "gpt2":
        sizes = {"n_positions": POSITIONS, "n_embd": WIDTH, "n_layer": LAYERS, "n_head": 4}
        return GPT2Config(**special | sizes | changes)
    sizes = {"hidden_size": WIDTH, "num_hidden_layers": LAYERS, "num_attention_heads": 4}
    sizes |= {"max_position_embeddings": POSITIONS}
    if family == "opt":
        return OPTConfig(
            **special | sizes | {"ffn_dim": 64, "word_embed_proj_dim": WIDTH} | changes
        )
    if family in GAP_FAMILIES:
        return _gap_config(family, **changes)
    sizes |= {"intermediate_size": 64, "pad_token_id": None}
    sizes |= {} if family == "gpt_neox" else {"num_key_value_heads": 2, "head_dim": 8}
    own_settings = _OWN_SETTINGS.get(family, {})
    return AutoConfig.for_model(family, **special | sizes | own_settings | changes)


def _gap_config(family: str, **changes: Any) -> Any:
    """The same for a family that fills in gaps; padding is token 3, as in `tokenizer`."""
    special = {"vocab_size": VOCABULARY, "pad_token_id": 3}
    if family == "t5":
        sizes = {
            "d_model": WIDTH,
            "d_kv": 8,
            "d_ff": 64,
            "num_layers": LAYERS,
            "num_heads": 4,
            "n_positions": POSITIONS,
        }
        return T5Config(
            **special | sizes | {"decoder_start_token_id": 3, "eos_token_id": 2} | changes
        )
    sizes = {
        "hidden_size": WIDTH,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": 4,
        "intermediate_size": 64,
    }
    sizes |= {"max_position_embeddings": POSITIONS + (4 if family == "roberta" else 0)}
    return {"bert": BertConfig, "roberta": RobertaConfig}[family](**special | sizes | changes)


def model_folder(folder: Path, family: str, seed: int = 0, **changes: Any) -> str:
    """Save a random model of which no weight, offset or norm is 0 or 1; `folder` as text."""
    torch.manual_seed(seed)
    settings = config(family, **changes)
    model = model_class(settings).from_config(settings)
    for parameter in model.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    model.save_pretrained(folder)
    return str(folder)


def cell(layers: int, start: int = 0, **more: Any) -> AuxiliaryConfig:
    """An auxiliary model that stores so many layers."""
    return AuxiliaryConfig(start_layer=start, layers_per_cell=layers, **more)


def load(folder: str, **options: Any) -> LanguageModel:
    """The global model in a folder, on the CPU."""
    return backbone.load_global(folder, device=CPU, **options)


def words(count: int = VOCABULARY - 4) -> list[str]:
    """w0, w1, ...: what the tokenizer knows beside its four special tokens."""
    return [f"w{number}" for number in range(count)]


def tokenizer() -> PreTrainedTokenizerFast:
    """Words between blanks, one token each; 0 <unk>, 1 <s>, 2 </s>, 3 <pad>."""
    known = {
        token: number for number, token in enumerate(["<unk>", "<s>", "</s>", "<pad>", *words()])
    }
    backend = tokenizers.Tokenizer(tokenizers.models.WordLevel(known, unk_token="<unk>"))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    special = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<pad>"}
    return PreTrainedTokenizerFast(tokenizer_object=backend, **special)


def gap_tokenizer(family: str) -> PreTrainedTokenizerFast:
    """The same words for a family that fills in gaps: the token 4 marks one, in the place of w0.

    Every text of BERT and RoBERTa begins with token 1 and ends with token 2; T5's ends with 2.
    """
    mark = "<extra_id_0>" if family == "t5" else "<mask>"
    known = {
        token: number
        for number, token in enumerate(["<unk>", "<s>", "</s>", "<pad>", mark, *words()[1:]])
    }
    backend = tokenizers.Tokenizer(tokenizers.models.WordLevel(known, unk_token="<unk>"))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    shape, ends = (
        ("$A </s>", [("</s>", 2)]) if family == "t5" else ("<s> $A </s>", [("<s>", 1), ("</s>", 2)])
    )
    backend.post_processor = tokenizers.processors.TemplateProcessing(
        single=shape, special_tokens=ends
    )
    special = {"eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<pad>"}
    if family == "t5":
        return PreTrainedTokenizerFast(
            tokenizer_object=backend, **special, additional_special_tokens=[mark]
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, **special, mask_token=mark, cls_token="<s>"
    )


def gap_task_folder(
    folder: Path, train: int = 48, validation: int = 8, test: int = 12, seed: int = 0
) -> str:
    """A multiple_choice task of two classes, w1 and w2: which of w3 and w4 a text of other words
    holds.
    """
    random = np.random.default_rng(seed)
    folder.mkdir(parents=True, exist_ok=True)
    for split, size in {"train": train, "validation": validation, "test": test}.items():
        rows = []
        for _ in range(size):
            label = int(random.integers(2))
            text = [
                *random.choice(words()[5:], random.integers(2, 7), replace=False),
                f"w{3 + label}",
            ]
            rows.append(
                {
                    "context": " ".join(map(str, random.permutation(text))),
                    "choices": ["w1", "w2"],
                    "label": label,
                }
            )
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(folder)


def data_folder(
    folder: Path, train: int = 48, validation: int = 8, test: int = 8, seed: int = 0
) -> str:
    """A multiple_choice task of three options; the right one repeats the context's first word."""
    random = np.random.default_rng(seed)
    folder.mkdir(parents=True, exist_ok=True)
    for split, size in {"train": train, "validation": validation, "test": test}.items():
        rows = []
        for _ in range(size):
            context, label = (
                random.choice(words(), random.integers(2, 7), replace=False),
                int(random.integers(3)),
            )
            choices = [" ".join(random.choice(words(), random.integers(1, 3))) for _ in range(3)]
            choices[label] = str(context[0])
            rows.append({"context": " ".join(context), "choices": choices, "label": label})
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(folder)


def texts(lengths: Sequence[int], seed: int = 0, answer: int = 2) -> list[Text]:
    """Random texts of these lengths; the answer begins at token `answer`."""
    random = np.random.default_rng(seed)
    return [Text(random.integers(4, VOCABULARY, size, dtype=np.int32), answer) for size in lengths]


def batch(lengths: Sequence[int] = (11, 7, 4), seed: int = 0) -> Batch:
    """Random texts side by side."""
    return collate(texts(lengths, seed))

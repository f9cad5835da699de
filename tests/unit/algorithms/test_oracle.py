"""Two rounds of the package against `oracle.py`, which derives them a second time and shares no
code with it.
"""

import copy
import json
import random
from itertools import pairwise
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import tokenizers
import torch
import transformers
import yaml
from tokenizers.pre_tokenizers import Split
from tokenizers.processors import TemplateProcessing

from fedsp_mpi import config, record
from fedsp_mpi.log import Log
from fedsp_mpi.run import execute
from helpers import oracle

WORDS = [
    "the",
    "cat",
    "dog",
    "sees",
    "eats",
    "a",
    "red",
    "blue",
    "fish",
    "bird",
    "and",
    "?",
    "yes",
    "no",
    "maybe",
]
SIZES: dict[str, Any] = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
}
# One with a tied head; and one with an untied head, and keys and values for half of its attention
# heads.
GPT2 = transformers.GPT2Config(
    **SIZES, vocab_size=40, initializer_range=0.1, bos_token_id=1, eos_token_id=1
)
LLAMA = transformers.LlamaConfig(
    **SIZES,
    num_key_value_heads=2,
    intermediate_size=48,
    vocab_size=40,
    initializer_range=0.1,
    bos_token_id=1,
)


def merged(base: dict, over: dict) -> dict:
    """The mapping `base` with the values of `over`, section by section."""
    return base | {
        k: merged(base.get(k, {}), v) if isinstance(v, dict) else v for k, v in over.items()
    }


def stage(steps: int, batch_size: int, learning_rate: float, clip: float | None) -> dict:
    """A stage as the YAML file has it.

    With so large an epsilon no rounding noise is blown up to a step.
    """
    beta = {"beta1": 0.8, "beta2": 0.99, "epsilon": 1e-2}
    optimizer = {
        "learning_rate": learning_rate,
        "weight_decay": 0.1,
        **beta,
        "warmup": 0.4,
        "clip": clip,
    }
    return {"steps": steps, "batch_size": batch_size, "optimizer": optimizer}


BASE = {
    "recipe": "paper",
    "run": {"name": "run", "seed": 7},
    "data": {"task": "multiple_choice", "max_length": 14},
    "auxiliary": {"depth": 2},
    "prompt": {"num_tokens": 3, "init_std": 0.2, "projection": None},
    "federation": {"clients": 3, "rounds": 2},
    "distillation": {"stage": stage(4, 5, 5e-3, 3.0), "engine": "torch"},
    "client": {
        "alignment": stage(3, 4, 5e-3, 4.0),
        "tuning": stage(2, 3, 5e-2, 0.05),
        "compute": {"device": "cpu"},
    },
    "server": {"tuning": stage(3, 5, 3e-2, None), "compute": {"device": "cpu"}},
    "evaluation": {"zero_shot": False},
}
MICRO = {
    "distillation": {"stage": {"micro_batch": 2}},
    "client": {"alignment": {"micro_batch": 3}, "tuning": {"micro_batch": 1}},
    "server": {"tuning": {"micro_batch": 2}},
}
DEEPSPEED = {"distillation": {"engine": "deepspeed"}}
CASES: dict[str, tuple[Any, dict]] = {
    "gpt2": (GPT2, {}),
    "gpt2, depth 1, projection": (GPT2, {"auxiliary": {"depth": 1}, "prompt": {"projection": 6}}),
    "gpt2, micro-batches": (GPT2, MICRO),
    "gpt2, micro-batches, deepspeed": (GPT2, merged(MICRO, DEEPSPEED)),
    "llama": (LLAMA, {}),
    "llama, deepspeed": (LLAMA, DEEPSPEED),
    "llama, depth 1": (LLAMA, {"auxiliary": {"depth": 1}}),
    "llama, projection": (LLAMA, {"prompt": {"projection": 6}}),
}


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    """What `datasets` prepares goes to a folder of this test."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def write_model(folder: Path, model: transformers.PretrainedConfig) -> None:
    """A random model with large weights, and a tokenizer of words, each with the blank before it.

    Llama's begins each text with a token.
    """
    torch.manual_seed(0)
    transformers.AutoModelForCausalLM.from_config(copy.deepcopy(model)).save_pretrained(folder)
    known = ["<unk>", "<s>", " ", *WORDS, *(f" {word}" for word in WORDS)]
    words = tokenizers.Tokenizer(
        tokenizers.models.WordLevel({w: i for i, w in enumerate(known)}, unk_token="<unk>")
    )
    words.pre_tokenizer = Split(" ", "merged_with_next")
    if model.model_type == "llama":
        words.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    transformers.PreTrainedTokenizerFast(tokenizer_object=words, bos_token="<s>").save_pretrained(
        folder
    )


def write_rows(folder: Path) -> None:
    """22 rows to train on: shards of 6, 6, 5 and 5. Contexts of 3 to 16 words, some with blanks at
    their end.
    """
    folder.mkdir()
    chance = random.Random(5)

    def some(least: int, most: int) -> str:
        return " ".join(chance.choices(WORDS, k=chance.randint(least, most)))

    for split, rows in {"train": 22, "validation": 3, "test": 3}.items():
        with (folder / f"{split}.jsonl").open("w") as file:
            for i in range(rows):
                row = {
                    "context": some(3, 16) + " " * (i % 3),
                    "choices": [some(1, 4), some(1, 4)],
                    "label": i % 2,
                }
                file.write(json.dumps(row) + "\n")


def two_rounds(
    folder: Path, model: transformers.PretrainedConfig, changes: dict
) -> tuple[dict, record.Run]:
    """The settings of a run on a random model and random rows, and its record."""
    write_model(folder / "model", model)
    write_rows(folder / "data")
    here = {"run": {"folder": str(folder)}, "model": {"name": str(folder / "model")}}
    settings = merged(merged(BASE, changes), here | {"data": {"source": str(folder / "data")}})
    (folder / "config.yaml").write_text(yaml.safe_dump(settings))
    made = execute.execute(config.load(folder / "config.yaml"), "oracle", Log())
    assert made is not None
    return settings, record.read(made)


@pytest.mark.parametrize("case", CASES)
def test_two_rounds(case: str, tmp_path: Path):
    model, changes = CASES[case]
    settings, found = two_rounds(tmp_path, model, changes)
    first = {name: values.detach().numpy() for name, values in oracle.first_prompt(settings, model)}
    rounds = [first, *oracle.fedsp(settings)]
    assert len(rounds) == found.committed_rounds + 1 == 3
    apart, moved = {}, {}
    for round, (before, expected) in enumerate(pairwise(rounds), start=1):
        prompts = found.prompts(round)
        assert list(prompts) == list(expected)
        for name, values in expected.items():
            apart[name, round] = np.abs(prompts[name] - values).max()
            moved[name, round] = np.abs(values - before[name]).max()
    assert max(apart.values()) <= 1e-6, apart
    assert min(moved.values()) > 1e-2, moved


@pytest.mark.parametrize("model", [GPT2, LLAMA], ids=["gpt2, tied head", "llama, untied head"])
@pytest.mark.parametrize("clients", [3, 0])
def test_two_rounds_of_fine_tuning(model, clients, tmp_path: Path):
    slow = {"optimizer": {"learning_rate": 2e-3}}
    changes = {"method": "finetune", "federation": {"clients": clients}}
    changes |= {"client": {"tuning": slow}, "server": {"tuning": slow}}
    settings, found = two_rounds(tmp_path, model, changes)
    rounds = list(oracle.finetune(settings))
    best = int(next(row["round"] for row in found.results if row["method"] == "finetune"))
    tuned = transformers.AutoModelForCausalLM.from_pretrained(
        found.file.parent / "model", dtype=torch.float32
    )
    before = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "model", dtype=torch.float32
    )
    assert len(rounds) == found.committed_rounds == 2
    moved = {
        name: (w - before.get_parameter(name)).abs().max().item()
        for name, w in tuned.named_parameters()
    }
    for name, weight in tuned.named_parameters():
        assert np.abs(weight.detach().numpy() - rounds[best - 1][name]).max() <= 1e-6, name
    assert min(moved.values()) > 1e-5 and max(moved.values()) > 1e-3, moved

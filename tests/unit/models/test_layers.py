"""A layer of the auxiliary model computes what it computes in the global model, wherever it stands
now.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from fedsp_mpi.config import AuxiliaryConfig
from fedsp_mpi.models import auxiliary
from fedsp_mpi.models.families import layers_of
from fedsp_mpi.models.language_model import LanguageModel
from fedsp_mpi.models.prompts import Prompt, PromptSpec
from fedsp_mpi.tensors import seal
from helpers import tiny

MIXED = ["full_attention", "sliding_attention", "full_attention", "sliding_attention"]
SLIDING = {"use_sliding_window": True, "sliding_window": 3}
# What a family's layers can differ in by their place, and its relatives that concern all layers
# alike.
SETTINGS: dict[str, tuple[str, dict[str, Any]]] = {
    "gpt2, scaled by place": ("gpt2", {"scale_attn_by_inverse_layer_idx": True}),
    "gpt2, by place alone": (
        "gpt2",
        {"scale_attn_by_inverse_layer_idx": True, "scale_attn_weights": False},
    ),
    "qwen2, window from the third": ("qwen2", {**SLIDING, "max_window_layers": 2}),
    "qwen3, mixed": ("qwen3", {**SLIDING, "layer_types": MIXED}),
    "gemma3_text, two rotary bases": ("gemma3_text", {}),
    "smollm3, the second without positions": ("smollm3", {}),
    "mistral": ("mistral", {"sliding_window": 3}),
    "phi3": ("phi3", {"sliding_window": 3}),
    "olmo2": ("olmo2", {}),
    "gpt_neox": ("gpt_neox", {"rotary_pct": 0.5}),
    "opt": ("opt", {}),
    "llama": ("llama", {}),
}
CELLS = {
    "one of the last": (AuxiliaryConfig(start_layer=3, layers_per_cell=1), [3, 3, 3, 3]),
    "two of the middle": (AuxiliaryConfig(start_layer=1, layers_per_cell=2), [1, 2, 1, 2]),
    "both ends": (AuxiliaryConfig(first_layers=1, layers_per_cell=3, depth=3), [0, 2, 3]),
}


DIFFERENT = list(SETTINGS)[
    :6
]  # by layer; of the others, what layers compute is tested with the models


@pytest.fixture(scope="module", params=SETTINGS)
def folder(request, tmp_path_factory) -> str:
    family, changes = SETTINGS[request.param]
    return tiny.model_folder(tmp_path_factory.mktemp("model"), family, **changes)


@pytest.fixture(autouse=True)
def unsealed():
    yield
    seal.clear()


def rebuilt(folder: str, source_layers: list[int]) -> Any:
    """The logits of the global model's own layers `taken`, one after the other, by transformers
    alone.
    """
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    layers, config = layers_of(model), model.config
    modules = torch.nn.ModuleList(layers[place] for place in source_layers)
    if getattr(config, "layer_types", None):
        config.layer_types = [config.layer_types[place] for place in source_layers]
    config.num_hidden_layers = len(source_layers)
    parent, _, name = {
        "gpt2": "transformer.h",
        "opt": "model.decoder.layers",
        "gpt_neox": "gpt_neox.layers",
    }.get(config.model_type, "model.layers").rpartition(".")
    setattr(model.get_submodule(parent), name, modules)
    return model


@pytest.mark.parametrize("folder", DIFFERENT, indirect=True)
@pytest.mark.parametrize("cell", CELLS)
def test_layers_compute_as_they_do_in_the_global_model(folder, cell, tmp_path):
    """As cut, as handed out to clients, and as saved and loaded again."""
    settings, source_layers = CELLS[cell]
    large, batch = tiny.load(folder), tiny.batch()
    with torch.no_grad():
        expected = rebuilt(folder, source_layers)(
            input_ids=batch.input_ids, attention_mask=batch.attention_mask, use_cache=False
        ).logits
        small = LanguageModel(auxiliary.unroll(auxiliary.cut(large, settings), len(source_layers)))
        built = auxiliary.build(
            auxiliary.cell_config(large.model.config, settings).to_dict(),
            len(source_layers),
            tiny.CPU,
            dtype=torch.float32,
        )
        auxiliary.load_weights(built, auxiliary.pack(small).torch())
        size = auxiliary.cell_size(settings, tiny.LAYERS)
        recipe = {"depth": len(source_layers)}
        auxiliary.save(
            tmp_path / "auxiliary", small, size, tokenizer=tiny.tokenizer(), recipe=recipe
        )
        again = auxiliary.load(tmp_path / "auxiliary")
        for model in (small, built, again):
            logits = model.head(model.hidden(batch))
            assert (expected - logits)[batch.attention_mask.bool()].abs().max() < 1e-5


def test_nothing_else_of_a_layer_depends_on_its_place(folder):
    """Every plain setting of a layer is that of the layer it was copied from, but for its place in
    the cache.
    """
    settings, source_layers = CELLS["both ends"]
    large = tiny.load(folder)
    small = LanguageModel(auxiliary.unroll(auxiliary.cut(large, settings), len(source_layers)))

    def plain(layer: torch.nn.Module) -> dict[str, Any]:
        return {
            f"{name}.{key}": value
            for name, module in layer.named_modules()
            for key, value in vars(module).items()
            if isinstance(value, (int, float, str, bool, tuple, type(None)))
            and not key.startswith("_")
            and key not in ("layer_idx", "training")
            and "bridge" not in name
        }

    for layer, place in zip(layers_of(small.model), source_layers):
        assert plain(layer) == plain(layers_of(large.model)[place]) != {}


@pytest.mark.parametrize("window", [3, 8])
@pytest.mark.parametrize("family", ["qwen2", "qwen3", "mistral", "phi3", "gemma3_text"])
def test_a_prompt_longer_than_a_sliding_window_is_read_whole(family, window, tmp_path):
    """Once before its texts, or together with each of them; and as a prefix begins with it."""
    mixed = (
        {"use_sliding_window": True, "max_window_layers": 2} if family.startswith("qwen") else {}
    )
    model = tiny.load(tiny.model_folder(tmp_path, family, sliding_window=window, **mixed))
    prompt, batch = (
        Prompt(PromptSpec.of(model.shape, "input", 5)).initialise(1, 0.5),
        tiny.batch(),
    )
    with torch.no_grad():
        text = model.model.get_input_embeddings()(batch.input_ids)
        together = torch.cat([prompt.matrix().expand(len(text), -1, -1), text], dim=1)
        mask = torch.cat([batch.attention_mask.new_ones(len(text), 5), batch.attention_mask], dim=1)
        expected = model.model.base_model(
            inputs_embeds=together, attention_mask=mask, use_cache=False
        ).last_hidden_state
        read_first = model.hidden(batch, prompt)
    assert (expected[:, 5:] - read_first)[batch.attention_mask.bool()].abs().max() < 1e-5
    assert model.keys_and_values(torch.arange(4, 11)).shape[3] == 7

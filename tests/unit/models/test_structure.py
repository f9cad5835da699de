"""The generic path: causal models of families that nobody listed are used as transformers and peft
use them, or refused with a reason.
"""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, DynamicCache

from fedsp_mpi import cli
from fedsp_mpi.config import AuxiliaryConfig, PromptConfig
from fedsp_mpi.config.parsing import ConfigError
from fedsp_mpi.models import architectures, auxiliary, backbone, families, structure, subspace
from fedsp_mpi.models.language_model import LanguageModel
from fedsp_mpi.models.losses import answer_loss
from fedsp_mpi.models.prompts import Prompt, PromptSpec, key_values
from fedsp_mpi.tensors import seal
from helpers import runs, tiny
from helpers.stock import apart_from_peft

SLIDING = {"sliding_window": 8, "layer_types": ["sliding_attention", "full_attention"] * 2}
# Families that are not in `FAMILIES`, each with what it does differently, strong enough to be seen.
GENERIC: dict[str, dict[str, Any]] = {
    "gemma": {},  # scaled embeddings
    "granite": {  # scaled everything
        "embedding_multiplier": 3.0,
        "logits_scaling": 2.0,
        "residual_multiplier": 0.5,
        "attention_multiplier": 0.3,
    },
    "cohere2": {**SLIDING, "logit_scale": 0.3},  # no positions in full attention
    "stablelm": {},
    "gptj": {"rotary_dim": 4, "num_key_value_heads": 4},
}
MORE: dict[str, dict[str, Any]] = {  # behind the default line
    "cohere": {"logit_scale": 0.3},
    "starcoder2": {"sliding_window": 8},
    "glm4": {},
    "olmo": {},
    "olmo3": SLIDING,
    "glm": {},
    "seed_oss": {},
    "helium": {},
    "arcee": {},
    "apertus": {},
    "ministral3": {},
    "exaone4": SLIDING,
    "ernie4_5": {},
    "hunyuan_v1_dense": {},
    "nanochat": {},
    "nemotron": {},
    "internlm3": {},
}
TABLE = [*GENERIC, *(pytest.param(family, marks=pytest.mark.slow) for family in MORE)]


@pytest.fixture(scope="module", params=TABLE)
def folder(request, tmp_path_factory) -> str:
    settings = GENERIC.get(request.param) or MORE.get(request.param) or {}
    return tiny.model_folder(tmp_path_factory.mktemp("model"), request.param, **settings)


@pytest.fixture(autouse=True)
def unsealed():
    yield
    seal.clear()


def prompt_for(model: LanguageModel, kind: str) -> Prompt:
    return Prompt(PromptSpec.of(model.shape, kind, 5)).initialise(1, 0.5)


def stock_logits(path: str, prompt: Prompt) -> torch.Tensor:
    """Logits at the text by transformers alone: the prompt is embeddings or a cache."""
    stock = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    batch = tiny.batch()
    rows, length = batch.input_ids.shape
    mask = torch.cat([torch.ones(rows, 5, dtype=torch.int64), batch.attention_mask], dim=1)
    if prompt.spec.kind == "input":
        text = stock.get_input_embeddings()(batch.input_ids)
        embeddings = torch.cat([prompt.matrix().expand(rows, -1, -1), text], dim=1)
        return stock(inputs_embeds=embeddings, attention_mask=mask).logits[:, -length:]
    layers = [
        (keys.expand(rows, -1, -1, -1), values.expand(rows, -1, -1, -1))
        for keys, values in key_values(prompt)
    ]
    cache = DynamicCache(layers)
    return stock(input_ids=batch.input_ids, attention_mask=mask, past_key_values=cache).logits


# -- families that are used ------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["input", "prefix"])
def test_prompts_do_what_they_do_in_transformers_and_in_peft(folder, kind, tmp_path):
    """The logits, the loss of the answers, and the prompt's gradient."""
    model, batch = tiny.load(folder), tiny.batch()
    assert not families.is_listed(model.model.config)
    prompt = prompt_for(model, kind)
    is_text = batch.attention_mask.bool()
    expected = stock_logits(folder, prompt)
    actual = model.head(model.hidden(batch, prompt))
    assert (expected - actual)[is_text].abs().max() < 1e-5
    assert apart_from_peft(folder, model, prompt, tmp_path) < 1e-5
    is_answer = batch.targets != -100
    loss = F.cross_entropy(expected[is_answer], batch.targets[is_answer])
    [gradient] = torch.autograd.grad(loss, list(prompt.parameters()))
    own_loss = F.cross_entropy(*model.answer_logits(batch, prompt))
    [own_gradient] = torch.autograd.grad(own_loss, list(prompt.parameters()))
    assert own_loss.item() == pytest.approx(loss.item(), abs=1e-5)
    assert gradient.any() and torch.allclose(own_gradient, gradient, rtol=1e-3, atol=1e-6)


@torch.no_grad()
def test_the_auxiliary_model_is_the_layers_that_it_was_cut_from(folder, tmp_path):
    """As cut, and as saved and loaded again, against stock layers one after the other."""
    places = [1, 2, 1, 2]
    stock = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    layers = families.layers_of(stock)
    chosen = [layers[place] for place in places]
    families.set_layers(stock, chosen)
    families.with_layers(stock.config, places)
    batch = tiny.batch()
    expected = stock(
        input_ids=batch.input_ids, attention_mask=batch.attention_mask, use_cache=False
    ).logits
    large = tiny.load(folder)
    small = LanguageModel(auxiliary.unroll(auxiliary.cut(large, tiny.cell(2, 1)), 4))
    auxiliary.save(tmp_path / "cell", small, 2, tokenizer=tiny.tokenizer(), recipe={"depth": 4})
    for model in (small, auxiliary.load(tmp_path / "cell")):
        logits = model.head(model.hidden(batch))
        assert (expected - logits)[batch.attention_mask.bool()].abs().max() < 1e-5


def test_a_bridge_every_weight_and_the_prompt_get_a_gradient(folder):
    """Of both ends of the model as they travel to clients."""
    large = tiny.load(folder)
    settings = AuxiliaryConfig(first_layers=1, layers_per_cell=3, depth=3)
    cell = auxiliary.cell_config(large.model.config, settings).to_dict()
    small = auxiliary.build(cell, 3, tiny.CPU, dtype=torch.float32, dropout=True)
    cut = LanguageModel(auxiliary.unroll(auxiliary.cut(large, settings), 3))
    auxiliary.load_weights(small, auxiliary.pack(cut).torch())
    prompt = prompt_for(small, "prefix")
    batch = tiny.batch()
    assert torch.equal(small.hidden(batch, prompt), cut.hidden(batch, prompt))
    small.train_weights(True)
    answer_loss(*small.answer_logits(batch, prompt)).backward()
    assert prompt.prompt.grad is not None and prompt.prompt.grad.any()
    without = {name for name, weight in small.weights.items() if weight.grad is None}
    assert without == set()
    config = small.model.config
    assert not any(
        value for key, value in vars(families.without_dropout(config)).items() if "drop" in key
    )


@torch.no_grad()
@pytest.mark.parametrize("kind", [None, "input", "prefix"])
def test_contexts_are_run_once_for_several_continuations(folder, kind):
    """Against every text on its own, and longer than a window."""
    model = tiny.load(folder)
    prompt = prompt_for(model, kind) if kind else None
    ids = torch.randint(4, tiny.VOCABULARY, (2, 14), generator=torch.Generator().manual_seed(1))
    ones = torch.ones_like(ids)
    expected = model.head(model.hidden(tiny.Batch(ids, ones, ids), prompt))
    endings = tiny.Batch(ids[:, 11:13], ones[:, 11:13], ids[:, 11:13])
    first, others = model.continue_from(ids[:, :11], prompt, torch.tensor([0, 1]), endings=endings)
    assert others is not None
    actual = torch.cat([first[:, None], others], dim=1)
    assert (actual - expected[:, 10:13]).abs().max() < 1e-5


# -- scaled embeddings -----------------------------------------------------------------------------


def test_word_embeddings_are_measured_as_they_enter_the_first_layer(tmp_path):
    """Gemma scales them by the root of its width."""
    model = tiny.load(tiny.model_folder(tmp_path, "gemma2"))
    embedding = model.model.get_input_embeddings()
    spread = subspace.scale_of(
        model, prompt_for(model, "input"), dimension=1, step_size=1.0, spread=1.0
    )
    expected = float(embedding.weight.detach().std(unbiased=False)) * tiny.WIDTH**0.5
    assert spread == pytest.approx(expected, rel=1e-5)


# -- layers without positions ----------------------------------------------------------------------

KEPT = [
    ({}, {}),  # the whole model
    ({"layers_per_cell": 4}, {}),  # the pattern of SmolLM3, again and again
    ({"layers_per_cell": 8}, {}),
    ({"layers_per_cell": 9, "depth": 9}, {"kind": "input"}),
    ({"layers_per_cell": 9, "depth": 9, "first_layers": 4}, {"mapping": "same_layers"}),
]
CHANGED = [
    ({"layers_per_cell": 1}, {}),
    ({"layers_per_cell": 1}, {"kind": "input"}),
    ({"layers_per_cell": 4, "start_layer": 1}, {}),
    ({"layers_per_cell": 3}, {}),
    ({"layers_per_cell": 9, "depth": 9}, {}),  # prefixes of four layers each are averaged
    ({"layers_per_cell": 4, "depth": 0.5}, {}),
]


@pytest.mark.parametrize("is_kept", [True, False])
def test_a_layer_stands_only_for_layers_that_read_positions_alike(is_kept):
    config = architectures.config_of("HuggingFaceTB/SmolLM3-3B")
    for settings, prompt in KEPT if is_kept else CHANGED:
        arguments = (
            AuxiliaryConfig(**{"layers_per_cell": None, **settings}),
            PromptConfig(**prompt),
            config,
        )
        if is_kept:
            auxiliary.require_positions_kept(*arguments, name="SmolLM3")
            continue
        with pytest.raises(ConfigError, match=r"found .* expected .* layers_per_cell=4") as raised:
            auxiliary.require_positions_kept(*arguments, name="SmolLM3")
        assert len(str(raised.value)) <= 300


def test_unlisted_families_with_layers_of_several_kinds_share_none_of_another_kind():
    """Cohere 2 reads no positions in full attention, which only its code says."""
    kinds = {
        family: families.position_kinds(tiny.config(family, **SLIDING))
        for family in ("cohere2", "olmo3")
    }
    assert kinds["cohere2"] == kinds["olmo3"] == tuple(SLIDING["layer_types"])
    for family in ("gemma3_text", "qwen3", "gpt2", "llama"):
        assert families.position_kinds(tiny.config(family)) is None


# -- families that are refused ---------------------------------------------------------------------

REFUSED = {
    "mixtral": r"experts \(num_local_experts 8\) .* take a dense model",
    "qwen3_moe": r"experts .* take a dense model",
    "gpt_oss": r"experts .* take a dense model",
    "gemma3": r"reads more than text; save its language model alone",
    "bart": r"does not continue a text",
    "mamba": r"without max_position_embeddings|cannot be cut",
    "qwen3_5_text": r"cannot be cut or prompted",  # linear attention in some layers
    "diffllama": r"its layers depend on their place",
    "gemma4_text": r"no common sizes|cannot be cut|experts",
    "bloom": r"without max_position_embeddings",
}


@pytest.mark.parametrize("family", REFUSED)
def test_what_is_built_in_another_way_is_refused_by_its_configuration(family, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": family}))
    with pytest.raises(ValueError, match=r"model.name: found .* expected") as raised:
        backbone.read_config(str(tmp_path))
    [message] = str(raised.value).splitlines()
    assert f"family {family!r}" in message
    assert len(message.replace(str(tmp_path), "")) <= 300
    raised.match(REFUSED[family])


@pytest.mark.parametrize("change", ["none", "backward", "cache"])
def test_weights_that_do_not_read_from_left_to_right_are_refused(change, tmp_path, monkeypatch):
    """A Gemma whose tokens see those behind them, and one that forgets what is in its cache."""
    model = tiny.load(tiny.model_folder(tmp_path, "gemma")).model
    if change == "none":
        structure.require_causal("it", model)
        return
    forward = model.base_model.forward

    def changed(*given: Any, **named: Any) -> Any:
        if change == "cache" and "inputs_embeds" in named:
            named = {"inputs_embeds": named["inputs_embeds"]}
        output = forward(*given, **named)
        if change == "backward":
            output.last_hidden_state = output.last_hidden_state.flip(1)
        return output

    monkeypatch.setattr(model.base_model, "forward", changed)
    with pytest.raises(ValueError, match=r"whose tokens see those behind them, or whose cache"):
        structure.require_causal("it", model)


# -- whole runs ------------------------------------------------------------------------------------


BOTH_ENDS = (
    "auxiliary.first_layers=1",
    "auxiliary.layers_per_cell=2",
    "auxiliary.depth=2",
    "prompt.mapping=same_layers",
)


def settings_of(folder: Path, family: str, *more: str) -> list[str]:
    """A run of one round on a tiny model and a task of two words."""
    tiny.model_folder(folder / "model", family, **GENERIC.get(family, {}))
    tiny.tokenizer().save_pretrained(folder / "model")
    tiny.gap_task_folder(folder / "data")
    own = [f"model.name={folder / 'model'}", f"data.source={folder / 'data'}"]
    return [*own, "data.limit.train=48", "prompt.num_tokens=4", "federation.rounds=1", *more]


@pytest.mark.parametrize(
    ("family", "method"),
    [
        ("gemma3_text", "auxiliary.layers_per_cell=2"),
        ("smollm3", "both ends"),
        pytest.param("smollm3", "fedprompt", marks=pytest.mark.slow),
        pytest.param("granite", "auxiliary.layers_per_cell=1", marks=pytest.mark.slow),
        pytest.param("gemma2", "fedprompt", marks=pytest.mark.slow),
        pytest.param("phi", "auxiliary.layers_per_cell=1", marks=pytest.mark.slow),
        pytest.param("cohere2", "fedprompt", marks=pytest.mark.slow),
    ],
)
def test_a_round_of_fedsp_or_of_fedprompt(family, method, tmp_path):
    more = {"fedprompt": runs.WHOLE_MODEL, "both ends": BOTH_ENDS}.get(
        method, (method, "auxiliary.depth=null")
    )
    run = runs.short(tmp_path / "runs", *settings_of(tmp_path, family, *more))
    assert (run.status, run.committed_rounds) == ("complete", 1)
    assert run.methods() >= {"zero-shot", "fedsp"}
    losses = run.results["loss"][run.results["split"] == "test"]
    assert all(np.isfinite(losses)) and len(set(losses)) > 1


def test_a_shared_cell_of_smollm3_is_refused_before_any_weight_is_read(tmp_path, capsys):
    words = settings_of(tmp_path, "smollm3", "auxiliary.layers_per_cell=1")
    (tmp_path / "model" / "model.safetensors").unlink()
    assert cli.main(["check", *(word for key in words for word in ("--set", key))]) != 0
    printed = "".join(capsys.readouterr())
    assert "auxiliary: found 1 stored layers at depth 4" in printed and "Traceback" not in printed

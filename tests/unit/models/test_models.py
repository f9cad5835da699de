"""The auxiliary model shares its layers, and a soft prompt is what stock peft makes of it, in every
family.
"""

import copy
import json
import math
import subprocess
import sys
import weakref
from collections import Counter

import numpy as np
import peft
import pytest
import safetensors.torch
import torch
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import (
    AutoModelForCausalLM,
    DynamicCache,
    GPT2Config,
    OPTConfig,
    PreTrainedTokenizerFast,
)

from fedsp_mpi.files import fingerprint
from fedsp_mpi.models import auxiliary, backbone, families, language_model, prompts
from fedsp_mpi.models.language_model import LanguageModel
from fedsp_mpi.models.losses import answer_loss
from fedsp_mpi.models.prompts import Prompt, PromptBatch, PromptSpec
from fedsp_mpi.tensors import NamedTensors, SealedTensorError, seal
from helpers import tiny
from helpers.paths import ROOT
from helpers.stock import apart_from_peft, as_peft

CELLS = [
    (0, 1, 4),
    (2, 1, 4),
    (1, 2, 4),
    (0, 3, 4),
    (2, 2, 3),
    (3, 1, 1),
    (1, 2, 6),
]  # start, layers, depth
PROMPTS = [("prefix", None), ("prefix", 7), ("input", None)]


@pytest.fixture(scope="module", params=tiny.CAUSAL_FAMILIES)
def folder(request, tmp_path_factory) -> str:
    return tiny.model_folder(tmp_path_factory.mktemp(request.param), request.param)


@pytest.fixture(scope="module")
def gpt2(tmp_path_factory) -> str:
    return tiny.model_folder(tmp_path_factory.mktemp("gpt2"), "gpt2")


@pytest.fixture(autouse=True)
def unsealed():
    yield
    seal.clear()


def unrolled(model: LanguageModel, start: int, layers: int, depth: int) -> LanguageModel:
    return LanguageModel(auxiliary.unroll(auxiliary.cut(model, tiny.cell(layers, start)), depth))


def prompt_for(
    model: LanguageModel, kind: str = "prefix", projection: int | None = None, std: float = 0.5
) -> Prompt:
    return Prompt(PromptSpec.of(model.shape, kind, 5, projection=projection)).initialise(1, std)


def weights(model: LanguageModel) -> dict[str, torch.Tensor]:
    return {name: parameter.detach().clone() for name, parameter in model.model.named_parameters()}


# -- the auxiliary model ---------------------------------------------------------------------------


@pytest.mark.each_once
@pytest.mark.parametrize(("start", "layers", "depth"), CELLS)
def test_virtual_layers_share_the_weights_of_their_cell(folder, start, layers, depth):
    large = tiny.load(folder)
    small = unrolled(large, start, layers, depth)
    virtual, real = families.layers_of(small.model), families.layers_of(large.model)
    assert len(virtual) == small.shape.num_layers == small.model.config.num_hidden_layers == depth
    assert len({id(layer) for layer in virtual}) == depth
    for i, layer in enumerate(virtual):
        source = dict(real[start + i % layers].named_parameters())
        stored = dict(virtual[i % layers].named_parameters())
        for name, parameter in layer.named_parameters():
            assert parameter is stored[name] and torch.equal(parameter, source[name])
            assert parameter.data_ptr() != source[name].data_ptr()
        places = {module.layer_idx for module in layer.modules() if hasattr(module, "layer_idx")}
        assert places == {i}
    layer_size = sum(p.numel() for p in real[0].parameters())
    assert small.num_parameters() == large.num_parameters() - (tiny.LAYERS - layers) * layer_size
    assert small.num_parameters() == sum(
        {p.data_ptr(): p.numel() for p in small.model.parameters()}.values()
    )


@pytest.mark.each_once
@pytest.mark.parametrize(("start", "layers", "depth"), CELLS)
def test_it_computes_what_its_layers_compute_one_after_the_other(folder, start, layers, depth):
    """Against a stock model of full depth, into which the layers are copied."""
    large = tiny.load(folder)
    small = unrolled(large, start, layers, depth)
    virtual = [start + place % layers for place in range(depth)]
    copied = AutoModelForCausalLM.from_config(
        families.with_layers(copy.deepcopy(large.model.config), virtual)
    ).eval()
    state, path = large.model.state_dict(), families.FAMILIES[large.model.config.model_type]
    for name in copied.state_dict():
        place, _, more_logits = name[len(path) + 1 :].partition(".")
        if name.startswith(path):
            state[name] = large.model.state_dict()[
                f"{path}.{start + int(place) % layers}.{more_logits}"
            ]
    copied.load_state_dict({name: state[name] for name in copied.state_dict()})
    batch = tiny.batch()
    with torch.no_grad():
        expected = copied(input_ids=batch.input_ids, attention_mask=batch.attention_mask).logits
        actual = small.head(small.hidden(batch))
    assert (expected - actual)[batch.attention_mask.bool()].abs().max() < 1e-5


def test_a_cell_of_all_layers_is_the_global_model(folder):
    large = tiny.load(folder)
    small, batch, prompt = (
        unrolled(large, 0, tiny.LAYERS, tiny.LAYERS),
        tiny.batch(),
        prompt_for(large),
    )
    assert torch.equal(small.hidden(batch, prompt), large.hidden(batch, prompt))
    assert fingerprint.of_weights(small.weights) == fingerprint.of_weights(large.weights)
    assert fingerprint.of_weights(unrolled(large, 1, 3, 4).weights) != fingerprint.of_weights(
        unrolled(large, 0, 3, 4).weights
    )


@pytest.mark.each_once
@pytest.mark.parametrize(("start", "layers", "depth"), CELLS[:5])
def test_every_weight_and_the_prompt_get_a_gradient(folder, start, layers, depth):
    small = unrolled(tiny.load(folder), start, layers, depth)
    prompt = prompt_for(small)
    small.train_weights(True)
    answer_loss(*small.answer_logits(tiny.batch(), prompt)).backward()
    assert {
        n for n, p in small.model.named_parameters() if p.grad is None or not p.grad.any()
    } == set()
    assert (
        prompt.prompt.grad.reshape(5, depth, -1).abs().sum(dim=(0, 2)).min() > 0
    )  # of every layer
    small.train_weights(False)
    assert not any(p.requires_grad for p in small.model.parameters())


def test_a_shared_weights_gradient_is_the_sum_over_its_layers(gpt2):
    large = tiny.load(gpt2)
    shared, apart = unrolled(large, 1, 1, 3), unrolled(large, 0, 3, 3)
    with torch.no_grad():
        for layer in families.layers_of(apart.model):
            layer.load_state_dict(families.layers_of(large.model)[1].state_dict())
    for model in (shared, apart):
        model.train_weights(True)
        answer_loss(*model.answer_logits(tiny.batch())).backward()
    name = "mlp.c_fc.weight"
    total = sum(
        dict(layer.named_parameters())[name].grad for layer in families.layers_of(apart.model)
    )
    actual = dict(families.layers_of(shared.model)[0].named_parameters())[name].grad
    assert torch.allclose(actual, total, atol=1e-5 * total.abs().max())


@pytest.mark.each_once
@pytest.mark.parametrize(("layers", "depth"), [(1, 4), (2, 4), (3, 4), (4, 4)])
def test_what_travels_makes_the_same_model_elsewhere(folder, layers, depth):
    large = tiny.load(folder)
    small = unrolled(large, 0, layers, depth)
    packed = auxiliary.pack(small)
    assert packed.schema.num_values == small.num_parameters() and len(packed) == len(weights(small))
    cell = auxiliary.cell_config(small.model.config, tiny.cell(layers)).to_dict()
    other = auxiliary.build(cell, depth, tiny.CPU, dtype=torch.float32)
    auxiliary.load_weights(other, packed.torch())
    batch, prompt = tiny.batch(), prompt_for(small)
    assert torch.equal(other.hidden(batch, prompt), small.hidden(batch, prompt))
    assert (
        auxiliary.pack(other).schema == packed.schema
        and (auxiliary.pack(other).flat == packed.flat).all()
    )
    small.model.get_input_embeddings().weight.data.zero_()
    assert not torch.equal(other.hidden(batch), small.hidden(batch))  # a copy, not the same memory


@pytest.mark.each_once
@pytest.mark.parametrize(("layers", "depth"), [(1, 4), (2, 3)])
def test_saved_and_loaded_again_it_is_the_same_and_stock_transformers_reads_it(
    folder, layers, depth, tmp_path
):
    small = unrolled(tiny.load(folder), 1, layers, depth)
    target, notes = tmp_path / "runs" / "auxiliary", {"depth": depth, "note": [1]}
    target.parent.mkdir()
    for _ in range(2):  # the second time over the first
        auxiliary.save(target, small, layers, tokenizer=tiny.tokenizer(), recipe=notes)
    assert [path.name for path in target.parent.iterdir()] == ["auxiliary"]
    again = auxiliary.load(target)
    batch, prompt = tiny.batch(), prompt_for(small)
    assert torch.equal(again.hidden(batch, prompt), small.hidden(batch, prompt))
    assert auxiliary.read_recipe(target) == notes
    stock, raised = AutoModelForCausalLM.from_pretrained(target, output_loading_info=True)
    assert not any(raised.values()) and stock.config.num_hidden_layers == layers
    own_weights = weights(small)
    assert set(dict(stock.named_parameters())) == set(own_weights)
    assert all(
        torch.equal(parameter, own_weights[name]) for name, parameter in stock.named_parameters()
    )
    assert PreTrainedTokenizerFast.from_pretrained(target).encode("w0 w5") == [4, 9]


def test_a_folder_without_an_auxiliary_model(tmp_path):
    with pytest.raises(
        ValueError, match=r"found no auxiliary model .* expected a readable distillation.json"
    ):
        auxiliary.load(tmp_path)
    (tmp_path / "distillation.json").write_text("[]")
    with pytest.raises(ValueError, match=r"found distillation.json without a depth, expected"):
        auxiliary.load(tmp_path)


@pytest.mark.parametrize(
    ("settings", "full", "small"),
    [
        (GPT2Config(n_embd=1600, n_layer=48, n_head=25), 1_557_611_200, 112_793_600),
        (
            OPTConfig(
                hidden_size=2048,
                ffn_dim=8192,
                num_hidden_layers=24,
                num_attention_heads=32,
                word_embed_proj_dim=2048,
            ),
            1_315_758_080,
            157_517_824,
        ),
    ],
    ids=["gpt2-xl", "opt-1.3b"],
)
def test_sizes_of_the_papers_models(settings, full, small):
    """From the architectures alone, on the meta device: nothing is allocated."""
    layers = settings.num_hidden_layers
    with torch.device("meta"):
        large = LanguageModel(AutoModelForCausalLM.from_config(settings))
        cell = auxiliary.cell_config(settings, tiny.cell(1)).to_dict()
        built = auxiliary.build(cell, layers, torch.device("meta"), dtype=torch.float32)
        assert (large.num_parameters(), built.num_parameters()) == (full, small)
        assert (
            auxiliary.unroll(auxiliary.cut(large, tiny.cell(1)), layers).num_parameters() == small
        )
    assert (
        Prompt(PromptSpec.of(large.shape, "prefix", 40)).num_parameters()
        == 40 * layers * 2 * settings.hidden_size
    )


def test_layers_may_have_heads_of_their_own_width_and_a_final_projection(tmp_path):
    """Llama with heads that are wider than their share; an OPT whose embedding is narrower than its
    layers.
    """
    for family, changes in {"llama": {"head_dim": 12}, "opt": {"word_embed_proj_dim": 16}}.items():
        path = tiny.model_folder(tmp_path / family, family, **changes)
        large, batch = tiny.load(path), tiny.batch()
        small = unrolled(large, 0, 4, 4)
        for kind, projection in PROMPTS:
            prompt = prompt_for(large, kind, projection)
            assert torch.equal(small.hidden(batch, prompt), large.hidden(batch, prompt))
            assert (
                apart_from_peft(path, large, prompt, tmp_path / f"{family}{kind}{projection}")
                < 1e-5
            )


# -- the global model ------------------------------------------------------------------------------


def test_the_global_model_is_frozen_and_sealed(folder):
    large = tiny.load(folder)
    assert not large.model.training and not any(p.requires_grad for p in large.model.parameters())
    for name, parameter in large.model.named_parameters():
        with pytest.raises(SealedTensorError):
            NamedTensors.pack({name: parameter})


@pytest.mark.each_once
@pytest.mark.parametrize("checkpointing", [False, True])
def test_weights_are_read_again_in_another_type(folder, checkpointing):
    """In place, frozen and sealed as before, of the files' own precision, and the old ones are let
    go.
    """
    large = tiny.load(folder, dtype=torch.bfloat16, checkpointing=checkpointing)
    before, old = large.hidden(tiny.batch()), weakref.ref(large.model)
    backbone.reload(large, folder, dtype=torch.float32)
    assert old() is None and not any(
        parameter.requires_grad for parameter in large.model.parameters()
    )
    assert large.model.training is checkpointing
    stock = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    for (name, parameter), expected in zip(
        large.model.named_parameters(), stock.parameters(), strict=True
    ):
        assert torch.equal(parameter, expected)
        with pytest.raises(SealedTensorError):
            NamedTensors.pack({name: parameter})
    after = large.hidden(tiny.batch(), prompt_for(large, "input"))
    assert (before.dtype, after.dtype, large.dtype) == (
        torch.bfloat16,
        torch.float32,
        torch.float32,
    )
    backbone.reload(large, folder, dtype=torch.bfloat16)
    assert torch.equal(large.hidden(tiny.batch()), before)


@pytest.mark.each_once
@pytest.mark.parametrize(("kind", "projection"), PROMPTS)
def test_bfloat16_computes_about_the_same_and_trains_fp32_prompts(folder, kind, projection):
    large, half = tiny.load(folder), tiny.load(folder, dtype=torch.bfloat16)
    small = unrolled(half, 0, 4, 4)
    mixed = LanguageModel(small.model, torch.bfloat16)
    batch, prompt = tiny.batch(), prompt_for(large, kind, projection)
    expected, _ = large.answer_logits(batch, prompt)
    for model in (half, mixed):
        prompt.zero_grad()
        actual, targets = model.answer_logits(batch, prompt)
        assert (actual.float() - expected).abs().max() < 0.1 * expected.abs().max()
        answer_loss(actual, targets).backward()
        assert all(p.grad.dtype == torch.float32 and p.grad.any() for p in prompt.parameters())
    assert next(mixed.model.parameters()).dtype == torch.float32


def test_rounded_weights_compute_as_a_model_that_was_loaded_so(folder):
    """Weights alone are rounded; what positions turn by is not a weight."""
    half = tiny.load(folder, dtype=torch.bfloat16)
    rounded = LanguageModel(tiny.load(folder).model, torch.bfloat16)
    assert rounded.casts and not rounded.round_weights().casts
    assert all(weight.dtype == torch.bfloat16 for weight in rounded.weights.values())
    assert all(buffer.dtype != torch.bfloat16 for buffer in rounded.model.buffers())
    batch, prompt = tiny.batch(), prompt_for(half, "prefix")
    for actual, expected in zip(
        rounded.answer_logits(batch, prompt), half.answer_logits(batch, prompt)
    ):
        assert torch.equal(actual, expected)


class Casts(TorchDispatchMode):
    """Count the casts of tensors, by the address of their values."""

    def __init__(self) -> None:
        super().__init__()
        self.places = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.aten._to_copy.default:
            self.places[args[0].data_ptr()] += 1
        return func(*args, **(kwargs or {}))


def test_weights_that_are_not_trained_are_cast_once(folder):
    """Whatever the family, to the same bits, and they come back as they were."""
    model = LanguageModel(tiny.load(folder).model, torch.bfloat16)
    model.train_weights(True)  # as a client's alignment leaves them
    model.train_weights(False)
    batch, prompt = tiny.batch(), prompt_for(model, "prefix")
    weights = {name: weight.detach().clone() for name, weight in model.weights.items()}
    head = model.model.get_output_embeddings().weight
    matrices = [w for w in model.weights.values() if w.ndim == 2 and w is not head]

    def gradient() -> torch.Tensor:
        prompt.zero_grad()
        answer_loss(*model.answer_logits(batch, prompt)).backward()
        return prompt.get_parameter("prompt").grad.clone()

    with Casts() as casts:
        expected = gradient()
    assert sum(casts.places[matrix.data_ptr()] for matrix in matrices) >= 4  # in every pass
    with model.frozen():
        with Casts() as casts:
            actual = gradient()
        assert not any(casts.places[matrix.data_ptr()] for matrix in matrices)
    assert torch.equal(actual, expected)
    for name, weight in model.weights.items():
        assert weight.dtype == torch.float32 and torch.equal(weight, weights[name]), name


def test_gpt2s_activation_is_one_kernel_of_the_same_function(gpt2):
    stock = AutoModelForCausalLM.from_pretrained(gpt2)
    model = tiny.load(gpt2)
    kinds = {type(module).__name__ for module in model.model.modules()}
    assert "NewGELUActivation" not in kinds and "GELU" in kinds
    batch = tiny.batch()
    expected = stock(batch.input_ids, attention_mask=batch.attention_mask).logits
    actual = model.head(model.hidden(batch))
    is_text = batch.attention_mask.bool()
    assert torch.allclose(actual[is_text], expected[is_text], rtol=1e-5, atol=1e-6)


def test_models_that_cannot_be_read(tmp_path):
    with pytest.raises(
        ValueError, match=r"model.name: found .*nowhere.* could not be read .* expected a folder"
    ):
        backbone.read_config(str(tmp_path / "nowhere"))
    with pytest.raises(
        ValueError, match=r"model.name: found .* could not be read .* expected a folder"
    ):
        backbone.read_config(str(tmp_path))
    (tmp_path / "config.json").write_text('{"model_type": "bloom"}')
    with pytest.raises(
        ValueError, match=r"of the family 'bloom', without max_position_embeddings .* expected"
    ):
        backbone.read_config(str(tmp_path))
    tiny.config("gpt2").save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"model.name: found .* whose weights could not be read"):
        backbone.load_global(str(tmp_path), device=tiny.CPU)


@pytest.mark.each_once
@pytest.mark.parametrize("family", tiny.CAUSAL_FAMILIES)
@pytest.mark.parametrize(
    "size", ["num_hidden_layers", "num_attention_heads", "hidden_size", "vocab_size"]
)
def test_sizes_that_are_none(size, family, tmp_path):
    config = tiny.config(family)
    key = config.attribute_map.get(size, size)
    for value in ("three", 2.5, None, [1], 0, -1):
        (tmp_path / "config.json").write_text(json.dumps(config.to_dict() | {key: value}))
        with pytest.raises(
            ValueError, match=rf"model.name: found .*{tmp_path}.* expected"
        ) as raised:
            backbone.read_config(str(tmp_path))
        assert "\n" not in str(raised.value) and len(str(raised.value)) < 500


@pytest.mark.parametrize(
    ("family", "changes"),
    [
        ("llama", {"num_key_value_heads": 0}),
        ("llama", {"num_key_value_heads": 3}),
        ("qwen2", {"num_key_value_heads": 3}),
        ("llama", {"head_dim": 0}),
        ("llama", {"dtype": "float99"}),
        ("llama", {"max_position_embeddings": 0}),
        ("opt", {"word_embed_proj_dim": 0}),
        ("gpt2", {"model_type": [1]}),
        ("gpt2", None),
        ("gpt2", 3),
    ],
)
def test_other_configurations_that_make_no_model(family, changes, tmp_path):
    content = tiny.config(family).to_dict() | changes if isinstance(changes, dict) else changes
    (tmp_path / "config.json").write_text(json.dumps(content))
    with pytest.raises(ValueError, match=r"model.name: found .* expected") as raised:
        backbone.read_config(str(tmp_path))
    assert "\n" not in str(raised.value)


def test_sizes_that_do_not_fit_together(tmp_path):
    for family in tiny.CAUSAL_FAMILIES:
        path = tiny.model_folder(tmp_path / family, family)
        content = json.loads((tmp_path / family / "config.json").read_text())
        for key in ("n_embd", "hidden_size"):
            if key in content:
                (tmp_path / family / "config.json").write_text(json.dumps(content | {key: 3}))
        with pytest.raises(ValueError, match=r"model.name: found .* expected") as raised:
            tiny.load(path)
        assert "\n" not in str(raised.value)


def test_a_folder_without_a_tokenizer_is_refused(folder):
    """transformers itself makes one up for most families, which turns every text into no tokens at
    all.
    """
    with pytest.raises(ValueError, match=r"model.tokenizer: found .*tokenizer.* expected"):
        backbone.read_tokenizer(folder)


def test_a_new_model_has_no_dropout_that_was_not_asked_for(tmp_path):
    """Before anybody said what is trained: made of the global model, of a configuration, or read
    from a folder.
    """
    large = tiny.load(
        tiny.model_folder(tmp_path, "gpt2", resid_pdrop=0.5, embd_pdrop=0.5, attn_pdrop=0.5)
    )
    cut = unrolled(large, 0, 1, 4)
    built = auxiliary.build(
        auxiliary.cell_config(large.model.config, tiny.cell(1)).to_dict(),
        4,
        tiny.CPU,
        dtype=torch.float32,
    )
    auxiliary.load_weights(built, auxiliary.pack(cut).torch())
    for model in (cut, built):
        assert torch.equal(model.hidden(tiny.batch()), model.hidden(tiny.batch()))


@pytest.mark.parametrize("first", ["deepspeed", pytest.param("peft", marks=pytest.mark.slow)])
def test_it_does_not_matter_which_library_was_imported_first(first):
    code = f"""
import {first}
import torch, transformers
from fedsp_mpi.models import auxiliary
sizes = dict(n_embd=8, n_layer=2, n_head=2, vocab_size=9, n_positions=8)
small = transformers.GPT2Config(**sizes).to_dict()
assert auxiliary.build(small, 2, torch.device("cpu"), dtype=torch.float32).num_parameters() > 0
"""
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr


# -- prompts against stock peft --------------------------------------------------------------------


@pytest.mark.parametrize(("kind", "projection"), PROMPTS)
def test_logits_are_those_of_peft(folder, kind, projection, tmp_path):
    large = tiny.load(folder)
    prompt = prompt_for(large, kind, projection)
    assert apart_from_peft(folder, large, prompt, tmp_path) < 1e-5
    batch = tiny.batch()
    without = (large.hidden(batch) - large.hidden(batch, prompt)).abs().max()
    assert without > 0.1  # the prompt matters


@pytest.mark.each_once
@pytest.mark.parametrize(("kind", "projection"), PROMPTS)
def test_greedy_answers_are_those_of_peft(folder, kind, projection, tmp_path):
    large, number = tiny.load(folder), 12
    prompt = prompt_for(large, kind, projection)
    stock = as_peft(folder, prompt, tmp_path)
    ids = torch.from_numpy(np.stack([text.ids for text in tiny.texts([6] * 3)])).long()
    settings = {
        "max_new_tokens": number,
        "do_sample": False,
        "eos_token_id": None,
        "pad_token_id": 0,
    }
    answered = stock.generate(input_ids=ids, attention_mask=torch.ones_like(ids), **settings)[
        :, -number:
    ]
    tokens = ids
    with torch.no_grad():
        for _ in range(number):
            batch = tiny.Batch(tokens, torch.ones_like(tokens), tokens)
            tokens = torch.cat(
                [tokens, large.head(large.hidden(batch, prompt)[:, -1]).argmax(-1, keepdim=True)],
                dim=1,
            )
    assert tokens[:, 6:].tolist() == answered.tolist()
    assert len(set(answered.flatten().tolist())) > 1


@pytest.mark.each_once
@pytest.mark.parametrize(("kind", "projection"), PROMPTS)
def test_padding_does_not_matter(folder, kind, projection):
    large = tiny.load(folder)
    prompt, lengths = prompt_for(large, kind, projection), (11, 7, 4)
    together = large.hidden(tiny.batch(lengths), prompt)
    for row, text in enumerate(tiny.texts(lengths)):
        alone = large.hidden(tiny.collate([text]), prompt)[0]
        assert (together[row, : len(alone)] - alone).abs().max() < 1e-5


@pytest.mark.each_once
@pytest.mark.parametrize(("kind", "projection"), PROMPTS)
def test_a_written_adapter_is_read_back(folder, kind, projection, tmp_path):
    large = tiny.load(folder)
    prompt = prompt_for(large, kind, projection)
    prompts.write_adapter(tmp_path, NamedTensors.pack(prompt.tensors()), prompt.spec, base=folder)
    assert torch.equal(prompts.read_adapter(tmp_path), prompt.matrix())
    assert peft.PeftConfig.from_pretrained(tmp_path).num_virtual_tokens == 5


def test_a_folder_without_an_adapter(tmp_path):
    for content in (None, b"broken", safetensors.torch.save({"x": torch.zeros(1)})):
        if content is not None:
            (tmp_path / "adapter_model.safetensors").write_bytes(content)
        with pytest.raises(
            ValueError, match=r"found no peft prompt .* expected adapter_model.safetensors"
        ):
            prompts.read_adapter(tmp_path)


@torch.no_grad()
def test_a_prefix_is_keys_and_values_in_front_of_the_others(tmp_path):
    """One GPT-2 layer by hand: keys and values are concatenated, and every token sees the whole
    prefix.
    """
    large = tiny.load(tiny.model_folder(tmp_path, "gpt2", n_layer=1))
    prompt, [text] = prompt_for(large), tiny.texts([8])
    ids = torch.from_numpy(text.ids[:-1]).long()
    core = large.model.transformer
    block, size = core.h[0], len(ids)
    h = (
        core.wte.weight[ids] + core.wpe.weight[5 : 5 + size]
    )  # the prefix takes the first five positions
    x = F.layer_norm(h, [32], block.ln_1.weight, block.ln_1.bias)
    query, key, value = (x @ block.attn.c_attn.weight + block.attn.c_attn.bias).split(32, dim=1)
    key = torch.cat([prompt.prompt[:, :32], key])
    value = torch.cat([prompt.prompt[:, 32:], value])
    mixed = torch.zeros(size, 32)
    for head in range(4):
        part = slice(8 * head, 8 * head + 8)
        for i in range(size):
            scores = torch.stack(
                [query[i, part] @ key[j, part] / math.sqrt(8) for j in range(5 + i + 1)]
            )
            mixed[i, part] = scores.softmax(0) @ value[: 5 + i + 1, part]
    h = h + mixed @ block.attn.c_proj.weight + block.attn.c_proj.bias
    x = F.layer_norm(h, [32], block.ln_2.weight, block.ln_2.bias)
    x = F.gelu(x @ block.mlp.c_fc.weight + block.mlp.c_fc.bias, approximate="tanh")
    h = h + x @ block.mlp.c_proj.weight + block.mlp.c_proj.bias
    expected = F.layer_norm(h, [32], core.ln_f.weight, core.ln_f.bias)
    assert (large.hidden(tiny.collate([text]), prompt)[0] - expected).abs().max() < 1e-5


def test_an_input_prompt_is_embeddings_in_front_of_the_text(folder):
    """A prompt of embedded words is those words."""
    large = tiny.load(folder)
    prompt, [text] = prompt_for(large, "input"), tiny.texts([7])
    front = np.array([50, 51, 52, 53, 54], dtype=np.int32)
    embedded = large.model.get_input_embeddings()(torch.from_numpy(front).long())
    prompt.load({"prompt": embedded.detach()})
    longer = tiny.collate([tiny.Text(np.concatenate([front, text.ids]), 7)])
    assert (
        large.hidden(tiny.collate([text]), prompt) - large.hidden(longer)[:, 5:]
    ).abs().max() < 1e-5


# -- prompts: numbers, names, depth ----------------------------------------------------------------

SPEC = PromptSpec("prefix", 3, 4, 2, 6)


def noise(seed: int, name: str, shape: tuple[int, ...]) -> np.ndarray:
    """The draws of `seed` for a parameter, spelled out."""
    from fedsp_mpi import rng

    return np.random.Generator(np.random.PCG64(rng.key(seed, f"prompt {name}"))).standard_normal(
        shape, "float32"
    )


def test_first_prompts_depend_on_the_seed_only():
    drawn = []
    for state in (0, 1):
        torch.manual_seed(state)
        np.random.seed(state)
        prompt = Prompt(PromptSpec("prefix", 3, 4, 2, 6, 5))
        prompt.transform[0].bias.data.fill_(3.0)
        drawn.append(prompt.initialise(7, 0.5).tensors())
    assert all(torch.equal(drawn[0][name], drawn[1][name]) for name in drawn[0])
    assert {name: tuple(x.shape) for name, x in drawn[0].items()} == {
        "embedding": (3, 6),
        "transform.0.weight": (5, 6),
        "transform.0.bias": (5,),
        "transform.2.weight": (48, 5),
        "transform.2.bias": (48,),
    }
    scales = {"embedding": 0.5, "transform.0.weight": 6**-0.5, "transform.2.weight": 5**-0.5}
    for name, tensor in drawn[0].items():
        expected = scales.get(name, 0.0) * noise(7, name, tuple(tensor.shape))
        assert np.allclose(tensor, expected, rtol=1e-6), name
    plain = [Prompt(SPEC).initialise(seed, 0.5).prompt for seed in (7, 8)]
    assert np.allclose(plain[0].detach(), 0.5 * noise(7, "prompt", (3, 48))) and not torch.equal(
        *plain
    )


def test_a_prompt_keeps_its_memory_when_it_is_loaded():
    """Optimizers hold its parameters: values are copied in."""
    prompt = Prompt(SPEC)
    before = prompt.prompt
    prompt.load({"prompt": torch.ones(3, 48)})
    assert prompt.prompt is before and before.sum() == 144 and prompt.num_parameters() == 144
    with pytest.raises(AssertionError):
        prompt.load({"promt": torch.ones(3, 48)})
    assert prompt.initialise(1, 1.0).prompt is before


def by_hand(matrix: np.ndarray, axis: int, old: int, new: int) -> np.ndarray:
    """Layers of a prompt along `axis`: to fewer by the mean, to more by repetition; one layer at a
    time.
    """
    layers = np.split(np.moveaxis(matrix, axis, 0).astype(np.float64), old)
    if new >= old:
        chosen = [layers[math.floor(i * old / new)] for i in range(new)]
    else:
        chosen = [
            np.mean([layers[i] for i in range(old) if math.floor(i * new / old) == j], axis=0)
            for j in range(new)
        ]
    return np.moveaxis(np.concatenate(chosen), 0, axis)


@pytest.mark.each_once
@pytest.mark.parametrize(
    ("old", "new"), [(4, 1), (1, 4), (4, 2), (2, 4), (5, 3), (3, 5), (4, 4), (48, 1), (7, 4)]
)
@pytest.mark.parametrize("projection", [None, 5])
def test_depth_is_mapped_by_repetition_up_and_by_the_mean_down(old, new, projection):
    prompt = Prompt(PromptSpec("prefix", 3, old, 2, 6, projection)).initialise(1, 1.0)
    tensors = {name: x + 0.1 for name, x in prompt.tensors().items()}  # offsets are not 0 either
    mapped = prompts.to_depth(tensors, prompt.spec, new)
    other = Prompt(prompt.spec.at_depth(new))
    assert {n: x.shape for n, x in mapped.items()} == {
        n: x.shape for n, x in other.tensors().items()
    }
    axes = {"prompt": 1, "transform.2.weight": 0, "transform.2.bias": 0}
    for name, tensor in mapped.items():
        start = tensors[name].numpy()
        expected = by_hand(start, axes[name], old, new) if name in axes else start
        assert np.allclose(tensor, expected, rtol=0, atol=1e-6), name
    other.load(mapped)
    prompt.load(tensors)
    matrix = by_hand(
        prompt.matrix().detach().numpy(), 1, old, new
    )  # the mapping and the projection change places
    assert np.allclose(other.matrix().detach(), matrix, atol=1e-5)
    if new > old:
        back = prompts.to_depth(mapped, other.spec, old)
        assert all(torch.allclose(back[name], tensors[name], atol=1e-6) for name in back)


def test_an_input_prompt_has_no_depth(gpt2):
    spec = PromptSpec.of(tiny.load(gpt2).shape, "input", 5)
    tensors = Prompt(spec).initialise(1, 1.0).tensors()
    assert spec.at_depth(1) == spec and torch.equal(
        prompts.to_depth(tensors, spec, 1)["prompt"], tensors["prompt"]
    )


# -- dropout and checkpointing ---------------------------------------------------------------------


@pytest.mark.parametrize("family", tiny.CAUSAL_FAMILIES)
def test_dropout_acts_only_where_it_was_asked_for(family, tmp_path):
    rates = {
        "gpt2": ["resid_pdrop", "embd_pdrop", "attn_pdrop"],
        "opt": ["dropout", "attention_dropout"],
    }
    changes = dict.fromkeys(rates.get(family, ["attention_dropout"]), 0.5)
    large = tiny.load(tiny.model_folder(tmp_path, family, **changes))
    batch = tiny.batch()
    assert torch.equal(large.hidden(batch), large.hidden(batch))
    for dropout, trained in [(False, False), (False, True), (True, False), (True, True)]:
        small = LanguageModel(
            auxiliary.unroll(auxiliary.cut(large, tiny.cell(1)), 4), dropout=dropout
        )
        small.train_weights(trained)
        same = torch.equal(small.hidden(batch), small.hidden(batch))
        assert same is not (dropout and trained), (dropout, trained)
        small.train_weights(False)
        assert torch.equal(small.hidden(batch), small.hidden(batch))


@pytest.mark.parametrize("family", tiny.CAUSAL_FAMILIES)
def test_every_dropout_of_a_layer_can_be_left_out(family):
    config = tiny.config(family)
    rates = [
        name
        for name in config.to_dict()
        if "drop" in name and not name.startswith(("summary", "classifier"))
    ]
    for name in rates:
        setattr(config, name, 0.5)
    assert rates and not any(getattr(families.without_dropout(config), name) for name in rates)


def gradients(
    model: LanguageModel, prompt: Prompt, of_weights: bool
) -> tuple[dict[str, torch.Tensor], list[int]]:
    """Gradients of the answers' loss, and the positions of each time that the second layer's work
    was done.
    """
    # of a module inside the layer: the layer's own call is not repeated, its contents are
    calls = []
    inner = next(
        module
        for module in families.layers_of(model.model)[1].modules()
        if not list(module.children())
    )
    hook = inner.register_forward_pre_hook(lambda _, arguments: calls.append(arguments[0].shape[1]))
    model.train_weights(of_weights)
    prompt.requires_grad_(not of_weights)
    prompt.zero_grad()
    answer_loss(*model.answer_logits(tiny.batch(), prompt)).backward()
    hook.remove()
    moving = model.model.named_parameters() if of_weights else prompt.named_parameters()
    return {name: parameter.grad.clone() for name, parameter in moving}, calls


@pytest.mark.each_once
@pytest.mark.parametrize("of_weights", [False, True])
def test_checkpointing_gives_the_gradients_of_an_input_prompt(folder, of_weights):
    plain, lean = tiny.load(folder), tiny.load(folder, checkpointing=True)
    if of_weights:
        cell = auxiliary.cell_config(lean.model.config, tiny.cell(2)).to_dict()
        values = auxiliary.pack(unrolled(plain, 0, 2, 4)).torch()
        plain, lean = (
            auxiliary.build(cell, 4, tiny.CPU, dtype=torch.float32, checkpointing=on)
            for on in (False, True)
        )
        for model in (plain, lean):
            auxiliary.load_weights(model, values)
    prompt = prompt_for(plain, "input").double()
    for model in (plain, lean):  # in fp32 sums in another order differ by more on some processors
        model.model.double()
    expected, apart = gradients(plain, prompt, of_weights)
    actual, twice = gradients(lean, prompt, of_weights)
    soft, text = prompt.spec.num_tokens, tiny.batch().input_ids.shape[1]
    assert apart == [soft, text]  # the prompt is read once for all rows
    assert twice == [soft + text] * 2  # it is on: the layer was run again in the backward pass
    largest = max(float(gradient.abs().max()) for gradient in expected.values())
    for name, gradient in expected.items():
        if (
            gradient.abs().max() < 1e-6 * largest
        ):  # rounding: OPT's key bias moves all scores of a query alike
            assert "k_proj.bias" in name and actual[name].abs().max() < 1e-6 * largest
            continue
        assert gradient.any() and torch.allclose(
            actual[name], gradient, rtol=1e-5, atol=1e-6 * gradient.abs().max()
        )


def test_checkpointing_leaves_dropout_off(tmp_path):
    """transformers checkpoints in training mode only, so rates in a configuration must not come
    alive with it.
    """
    path = tiny.model_folder(tmp_path, "gpt2", resid_pdrop=0.5, embd_pdrop=0.5, attn_pdrop=0.5)
    batch = tiny.batch()
    lean = tiny.load(path, checkpointing=True)
    assert torch.equal(lean.hidden(batch), lean.hidden(batch))
    cell = auxiliary.cell_config(
        tiny.load(path).model.config, tiny.cell(1)
    ).to_dict()  # of a run without checkpointing
    built = auxiliary.build(cell, 4, tiny.CPU, dtype=torch.float32, checkpointing=True)
    auxiliary.load_weights(built, auxiliary.pack(unrolled(lean, 0, 1, 4)).torch())
    built.train_weights(True)
    assert torch.equal(built.hidden(batch), built.hidden(batch))


# -- a prompt for each text ------------------------------------------------------------------------


@pytest.mark.each_once
@torch.no_grad()
@pytest.mark.parametrize(("kind", "saved"), [("prefix", 1), ("input", 1), ("input", 1000)])
def test_texts_of_a_batch_have_prompts_of_their_own(folder, kind, saved, monkeypatch):
    """As each of them alone; input prompts are read before the texts, or with them."""
    monkeypatch.setitem(language_model.MIN_SAVED_POSITIONS, "cpu", saved)
    large, batch = tiny.load(folder), tiny.batch((11, 7, 4, 9))
    values = torch.stack([prompt_for(large, kind).matrix() * scale for scale in (1, -0.5, 2)])
    owners = torch.tensor([2, 0, 2, 1])
    prompts = PromptBatch(prompt_for(large, kind).spec, values, owners)
    actual = large.hidden(batch, prompts)
    assert (large.hidden(batch, large.precompute_cache(prompts)) - actual).abs().max() < 1e-5
    for row, owner in enumerate(owners):
        prompt, length = prompt_for(large, kind), int(batch.attention_mask[row].sum())
        prompt.load({"prompt": values[owner]})
        expected = large.hidden(
            tiny.Batch(*(part[row : row + 1, :length] for part in batch[:3])), prompt
        )[0]
        assert (actual[row, :length] - expected).abs().max() < 1e-5


# -- several continuations of one context ----------------------------------------------------------


@pytest.mark.each_once
@torch.no_grad()
@pytest.mark.parametrize(("kind", "projection"), [(None, None), *PROMPTS])
def test_contexts_are_run_once_for_several_continuations(folder, kind, projection):
    """Against every text on its own: a cache that is handed on gives the same logits."""
    large = tiny.load(folder)
    prompt = prompt_for(large, kind, projection) if kind else None
    contexts = torch.from_numpy(np.stack([text.ids for text in tiny.texts([6, 6])])).long()
    endings, rows = tiny.texts([3, 1, 2], seed=5, answer=1), [1, 0, 1]
    width = max(len(ending.ids) for ending in endings)
    ids, mask = torch.zeros(3, width, dtype=torch.int64), torch.zeros(3, width, dtype=torch.int64)
    for row, ending in enumerate(endings):
        ids[row, : len(ending.ids)] = torch.from_numpy(ending.ids)
        mask[row, : len(ending.ids)] = 1
    first, more_logits = large.continue_from(
        contexts, prompt, torch.tensor(rows), endings=tiny.Batch(ids, mask, ids)
    )
    for i, (row, ending) in enumerate(zip(rows, endings)):
        alone = torch.cat([contexts[row], torch.from_numpy(ending.ids).long()])[None]
        expected = large.head(
            large.hidden(tiny.Batch(alone, torch.ones_like(alone), alone), prompt)
        )[0, 5:]
        actual = torch.cat([first[i][None], more_logits[i, : len(ending.ids)]])
        assert (actual - expected).abs().max() < 1e-5
    only, none = large.continue_from(contexts, prompt, torch.tensor(rows), endings=None)
    assert none is None and torch.allclose(only, first, atol=1e-5)


def test_a_prefix_cache_is_repeated_for_every_row(gpt2):
    large = tiny.load(gpt2)
    prompt = prompt_for(large)
    cache = large.cache(prompt, 3)
    assert isinstance(cache, DynamicCache) and cache.get_seq_length() == 5
    layer = prompt.prompt.reshape(5, tiny.LAYERS, 2, 4, 8)[:, 2]
    for row in range(3):
        assert torch.equal(cache.layers[2].keys[row], layer[:, 0].transpose(0, 1))
        assert torch.equal(cache.layers[2].values[row], layer[:, 1].transpose(0, 1))

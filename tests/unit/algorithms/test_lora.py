"""Low-rank adapters: the exact mean of products, ranks of clients, runs, and stock peft."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import peft
import pytest
import torch
from transformers import AutoModelForCausalLM

from fedsp_mpi import config
from fedsp_mpi.aggregation.lora import mean_of_products
from fedsp_mpi.comm.messages import Report
from fedsp_mpi.comm.updates import Updates
from fedsp_mpi.config import ConfigError
from fedsp_mpi.config.lora import LoraConfig
from fedsp_mpi.models import lora
from fedsp_mpi.models.lora import Lora
from fedsp_mpi.record import read
from fedsp_mpi.run.inputs import ExperimentInputs
from fedsp_mpi.run.model_inputs import RESOURCES
from fedsp_mpi.tensors import NamedTensors, Schema
from helpers import tiny
from helpers.runs import SHORT, short_run

SETTINGS = (
    "method=lora",
    "client.tuning.optimizer.learning_rate=0.01",
    "server.tuning.optimizer.learning_rate=0.01",
    "lora.rank=4",
)
RANK, WIDE, NARROW = 3, 7, 5
SCHEMA = Schema.of([("q.lora_A", (RANK, NARROW)), ("q.lora_B", (WIDE, RANK))])


def updates(rows: np.ndarray, weights: list[float]) -> Updates:
    reports = [Report(client, weight, {}) for client, weight in enumerate(weights)]
    whole = slice(0, rows.shape[1])
    return Updates(reports, [], SCHEMA, source=iter([(whole, rows.copy())]))


def product(tensors: NamedTensors) -> np.ndarray:
    return tensors["q.lora_B"].astype(float) @ tensors["q.lora_A"].astype(float)


@pytest.mark.parametrize("num", [1, 2, 4])
def test_products_are_averaged_and_cut_to_the_rank_by_their_singular_values(num):
    rows = np.random.default_rng(num).standard_normal((num, SCHEMA.num_values))
    rows = rows.astype(np.float32)
    weights = [1.0 + client for client in range(num)]
    merged = mean_of_products(updates(rows, weights))
    mean = sum(
        weight / sum(weights) * product(NamedTensors(SCHEMA, row))
        for weight, row in zip(weights, rows)
    )
    u, singular, v = np.linalg.svd(mean)
    nearest = u[:, :RANK] * singular[:RANK] @ v[:RANK]
    np.testing.assert_allclose(product(merged), nearest, atol=1e-5)
    columns = merged["q.lora_B"]
    assert (columns[np.abs(columns).argmax(axis=0), np.arange(RANK)] > 0).all()
    # Factors share the singular values equally, so that neither outgrows the other.
    np.testing.assert_allclose(
        np.linalg.norm(columns, axis=0), np.linalg.norm(merged["q.lora_A"], axis=1), rtol=1e-4
    )


@pytest.mark.parametrize("family", ["gpt2", "llama", "opt", "gpt_neox"])
def test_adapters_begin_as_nothing_and_are_those_of_stock_peft(family, tmp_path):
    name = tiny.model_folder(tmp_path / "model", family)
    model = tiny.load(name)
    ids = torch.arange(4, 24).reshape(2, 10)
    before = model.model(ids).logits
    adapters = Lora(model, LoraConfig(rank=2, alpha=6)).initialise(seed=1)
    assert torch.equal(model.model(ids).logits, before)
    with torch.no_grad():
        for parameter in adapters.parameters():
            parameter.normal_(std=0.3)
    tuned = model.model(ids).logits
    assert not torch.allclose(tuned, before)

    lora.write(tmp_path / "adapter", adapters.pack(), LoraConfig(rank=2, alpha=6), base=name)
    base = AutoModelForCausalLM.from_pretrained(name)
    stock = peft.PeftModel.from_pretrained(base, str(tmp_path / "adapter")).eval()
    torch.testing.assert_close(stock(ids).logits, tuned, rtol=0, atol=1e-5)
    again = Lora(tiny.load(name), LoraConfig(rank=2, alpha=6))
    again.load(lora.read(tmp_path / "adapter"))
    assert all(map(torch.equal, again.parameters(), adapters.parameters()))


def test_maps_that_the_model_does_not_have_are_refused(tmp_path):
    model = tiny.load(tiny.model_folder(tmp_path / "model", "llama"))
    with pytest.raises(ConfigError, match=r"lora.targets: found c_attn for a llama.*q_proj"):
        Lora(model, LoraConfig(targets=("c_attn",)))


@pytest.mark.parametrize(
    ("target", "merged", "message"),
    [
        ("wte", False, "found wte for a gpt2, expected endings of names of its linear maps"),
        ("lm_head", True, "found lm_head with lora.merged=true, expected maps without the head"),
        ("lm_head", False, None),
    ],
)
def test_embeddings_are_no_linear_map_and_a_head_that_is_one_with_them_is_not_merged(
    tmp_path, target, merged, message
):
    model = tiny.load(tiny.model_folder(tmp_path / "model", "gpt2"))
    settings = LoraConfig(targets=(target,), merged=merged)
    if message is None:
        assert [*Lora(model, settings).tensors()] == ["lm_head.lora_A", "lm_head.lora_B"]
        return
    with pytest.raises(ConfigError, match=f"lora.targets: {message}"):
        Lora(model, settings)


@pytest.mark.parametrize("targets", ["nope", "''"])
def test_that_is_said_in_one_line_before_a_weight_is_loaded(tmp_path, targets):
    settings = ("method=lora", f"lora.targets=[{targets}]")
    result = short_run(0, tmp_path, "x", *settings, status=2)
    assert "lora.targets: found" in result.stderr and len(result.stderr.splitlines()) == 1
    assert not (tmp_path / "x").exists()


def test_a_client_of_a_lower_rank_leaves_the_rest_at_zero(tmp_path):
    model = tiny.load(tiny.model_folder(tmp_path / "model", "llama"))
    adapters = Lora(model, LoraConfig(rank=4)).initialise(seed=1)
    with torch.no_grad():
        for parameter in adapters.parameters():
            parameter.normal_()
    adapters.limit_rank(2)
    adapters.begin_training()
    optimizer = torch.optim.AdamW(adapters.parameters(), lr=0.1, weight_decay=0.1)
    for _ in range(3):
        model.model(torch.arange(4, 14)[None]).logits.square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    for name, value in adapters.pack().items():
        kept, rest = (value[:2], value[2:]) if name.endswith("A") else (value[:, :2], value[:, 2:])
        assert (rest == 0).all() and (kept != 0).all(), name


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("lora")
    for name, more in {"same": (), "mixed": ("lora.merge=products", "lora.ranks=[1,4]")}.items():
        short_run(0, folder, name, *SETTINGS, *more)
    return folder


@pytest.mark.parametrize("name", ["same", "mixed"])
def test_a_run_hands_out_the_model_once_and_sends_adapters(folder, name):
    record = read(folder / name)
    losses = {row["method"]: row["loss"] for row in record.results}
    values = {"handout": 0, "up": 0}
    for row in record.wire:
        if (row["direction"] in values and "lora" in row["name"]) or row["direction"] == "handout":
            values[row["direction"]] += row["bytes"]
    clients, rounds = 3, 2
    weights = AutoModelForCausalLM.from_pretrained(RESOURCES / "model").num_parameters()
    assert values["handout"] > 4 * weights
    assert 0 < values["up"] / (clients * rounds) < 0.05 * 4 * weights
    assert losses["lora"] < losses["zero-shot"]


def test_the_folder_of_a_run_is_a_stock_adapter_with_the_runs_scores(folder):
    [row] = [row for row in read(folder / "same").results if row["method"] == "lora"]
    inputs = ExperimentInputs(config.load(None, [*SHORT, *SETTINGS]))
    base = AutoModelForCausalLM.from_pretrained(RESOURCES / "model")
    model = peft.PeftModel.from_pretrained(base, str(folder / "same" / "adapter")).eval()
    total, count = 0.0, 0
    for text in inputs.validation:
        ids = torch.tensor(text.ids[None]).long()
        logits = model(ids[:, :-1]).logits[0, text.answer - 1 :]
        total += torch.nn.functional.cross_entropy(
            logits, ids[0, text.answer :], reduction="sum"
        ).item()
        count += text.num_answers
    assert total / count == pytest.approx(row["loss"], abs=1e-5)


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_a_merged_model_is_the_adapted_one(family, tmp_path):
    name = tiny.model_folder(tmp_path / "model", family)
    settings = LoraConfig(rank=2, alpha=6)
    model = tiny.load(name)
    adapters = Lora(model, settings).initialise(seed=1)
    with torch.no_grad():
        for parameter in adapters.parameters():
            parameter.normal_(std=0.3)
    lora.write(tmp_path / "adapter", adapters.pack(), settings, base=name)
    ids = torch.arange(4, 24).reshape(2, 10)
    merged = lora.merged(AutoModelForCausalLM.from_pretrained(name), tmp_path / "adapter")
    merged.save_pretrained(tmp_path / "merged")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval()
    torch.testing.assert_close(again(ids).logits, model.model(ids).logits, rtol=0, atol=1e-5)
    assert not any("lora" in key for key, _ in again.named_parameters())

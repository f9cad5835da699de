"""Pre-training: blocks of documents, weights from scratch, and a centralised run against a loop."""

from __future__ import annotations

import gzip
import math
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from torch.nn import functional as F
from transformers import AutoModelForCausalLM

from fedsp_mpi import config, rng
from fedsp_mpi.data.tokens import blocks
from fedsp_mpi.record import read
from fedsp_mpi.run.inputs import ExperimentInputs
from fedsp_mpi.run.silo_inputs import SiloInputs
from helpers import tiny
from helpers.configs import refused
from helpers.runs import here

LENGTH = 17
STEPS, BATCH, RATE = 4, 2, 1e-2


def documents(num: int, seed: int = 0) -> list[str]:
    random = np.random.default_rng(seed)
    return [" ".join(random.choice(tiny.words(), random.integers(3, 40))) for _ in range(num)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Make a configuration of a tiny Llama without weights, its tokenizer, and three texts."""
    folder = tmp_path_factory.mktemp("pretrain")
    tiny.config("llama").save_pretrained(folder / "model")
    tiny.tokenizer().save_pretrained(folder / "model")
    (folder / "text").mkdir()
    for split, num in (("train", 40), ("validation", 6), ("test", 6)):
        with gzip.open(folder / "text" / f"{split}.txt.gz", "wt") as file:
            file.write("\n\n".join(documents(num, seed=num)) + "\n")
    stage = {"steps": STEPS, "batch_size": BATCH}
    stage["optimizer"] = {"learning_rate": RATE, "warmup": 0.25, "weight_decay": 0.1}
    settings = {
        "method": "pretrain",
        "model": {"name": str(folder / "model"), "weights": "random"},
        "data": {"task": "plain_text", "source": str(folder / "text"), "max_length": LENGTH},
        "federation": {"clients": 3, "rounds": 2},
        "client": {"tuning": stage, "compute": {"threads": 1}},
        "server": {"accept": "always", "tuning": stage | {"steps": 0}, "compute": {"threads": 1}},
        "run": {"folder": str(folder / "runs")},
    }
    (folder / "pretrain.yaml").write_text(yaml.safe_dump(settings))
    return folder


def run(folder: Path, name: str, *settings: str) -> None:
    words = [word for setting in settings for word in ("--set", setting)]
    here(["run", folder / "pretrain.yaml", "--name", name, *words])


def test_blocks_predict_every_token_but_the_first_once():
    texts = documents(5)
    tokenizer = tiny.tokenizer()
    ids = [id for text in texts for id in [*tokenizer(text)["input_ids"], 2]]
    for whole in (False, True):
        cut = blocks(tokenizer, texts, 9, whole=whole)
        predicted = [id for block in cut for id in block.ids[block.answer :]]
        assert [len(block.ids) for block in cut[:-1]] == [9] * (len(cut) - 1)
        num_lost = (len(ids) - 1) % 8 if whole else 0
        assert predicted == ids[1 : len(ids) - num_lost]
    assert blocks(tokenizer, ["w1"], 9, whole=True) == []


def test_too_little_text_is_said_with_its_owner(folder, tmp_path):
    (tmp_path / "train.txt").write_text("w1 w2\n\n" * 40)
    source = f"data.source={tmp_path}"
    inputs = ExperimentInputs(config.load(folder / "pretrain.yaml", [source, "data.max_length=60"]))
    refused(lambda: inputs.shard(0), "data.max_length: found 60", "the server's 8 documents")
    refused(lambda: inputs.shard(2), "data.max_length: found 60", "client 1's 7 documents")


def test_blocks_shorter_than_asked_for_are_said(folder):
    inputs = ExperimentInputs(config.load(folder / "pretrain.yaml", ["data.max_length=500"]))
    note = "blocks have 65 tokens, as many as the model takes (data.max_length=500)"
    assert note in inputs.warnings
    assert not ExperimentInputs(config.load(folder / "pretrain.yaml")).warnings


def test_texts_without_classes_have_no_shots(folder):
    settings = ["data.shots=1"]
    refused(lambda: config.load(folder / "pretrain.yaml", settings), "data.shots: found 1")


def test_one_document_is_told_how_documents_are_divided(folder, tmp_path):
    (tmp_path / "train.txt").write_text("w1 w2\n" * 40)
    inputs = ExperimentInputs(config.load(folder / "pretrain.yaml", [f"data.source={tmp_path}"]))
    with pytest.raises(ValueError, match=r"found 1 rows in train .* an empty line ends one"):
        _ = inputs.splits


def test_a_text_file_is_the_same_documents_in_memory_and_through_the_cache(folder):
    silos = [{"name": "a", "source": str(folder / "text" / "train.txt.gz")}]
    settings = {
        "federation": {"silos": silos, "clients": None},
        "server": {"data": {"source": str(folder / "text")}},
    }
    data = config.given(folder / "pretrain.yaml") | {"recipe": "bridged"}
    data["federation"] = {"rounds": 1, **settings["federation"]}
    data["server"] |= settings["server"]
    del data["data"]["source"]
    inputs = SiloInputs(config.checked(data))
    silo = inputs.open_silo(0)
    shared = ExperimentInputs(config.load(folder / "pretrain.yaml"))
    assert [example.target for example in silo.splits.train] == [
        example.target for example in shared.splits.train
    ]
    assert len(shared.splits.train) == 40


def test_a_centralised_run_is_a_plain_torch_loop(folder):
    run(
        folder,
        "centralised",
        "federation.clients=0",
        f"server.tuning.steps={STEPS}",
        "evaluation.server_only=false",
    )
    record = read(folder / "runs" / "centralised")
    settings = ["federation.clients=0", f"server.tuning.steps={STEPS}"]
    inputs = ExperimentInputs(config.load(folder / "pretrain.yaml", settings))
    texts = torch.tensor(np.stack([text.ids for text in inputs.shard(0)])).long()

    rng.seed_torch(1, "initial weights")
    model = AutoModelForCausalLM.from_config(tiny.config("llama"))
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=0.1)
    rounds, total = 2, 2 * STEPS
    order = rng.generator(1, "order server", -1, 0).permutation(len(texts))
    losses = []
    for step in range(total):
        rate = (step + 1) / 2 if step < 2 else (total - step) / (total - 2)
        optimizer.param_groups[0]["lr"] = RATE * rate
        batch = texts[order[step * BATCH : (step + 1) * BATCH]]
        logits = model(batch[:, :-1]).logits
        loss = F.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert len(texts) >= total * BATCH, "one epoch, so that the order is one permutation"
    got = record.rounds["server_loss_last"]
    np.testing.assert_allclose(got, losses[STEPS - 1 :: STEPS], rtol=0, atol=1e-6)
    assert len(got) == rounds


def test_a_run_from_scratch_learns_and_its_model_has_the_recorded_perplexity(folder):
    run(folder, "whole", "federation.outer.optimizer=diloco")
    record = read(folder / "runs" / "whole")
    scores = {row["method"]: row for row in record.results}
    assert set(scores) == {"zero-shot", "pretrain"}
    assert scores["pretrain"]["perplexity"] < scores["zero-shot"]["perplexity"]
    assert scores["zero-shot"]["perplexity"] == pytest.approx(tiny.VOCABULARY, rel=0.2)
    # What the best round left behind is a model that transformers loads, with that perplexity.
    inputs = ExperimentInputs(config.load(folder / "pretrain.yaml"))
    model = AutoModelForCausalLM.from_pretrained(folder / "runs" / "whole" / "model")
    loss, count = 0.0, 0
    for block in inputs.test_blocks:
        ids = torch.tensor(block.ids[None]).long()
        loss += F.cross_entropy(model(ids[:, :-1]).logits[0], ids[0, 1:], reduction="sum").item()
        count += ids.shape[1] - 1
    assert count == scores["pretrain"]["n"]
    assert math.exp(loss / count) == pytest.approx(scores["pretrain"]["perplexity"], rel=1e-5)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["method=finetune"], "data.task: found plain_text with method=finetune"),
        (["data.task=sst2"], "data.task: found sst2 with method=pretrain"),
        (["data.max_length=60", "data.limit.train=4"], "expected at least one block"),
        (["data.template='{text}'"], "data.template: found one with plain_text"),
    ],
)
def test_what_cannot_be_read_is_said(folder, settings, message):
    words = [word for setting in settings for word in ("--set", setting)]
    said = here(["check", folder / "pretrain.yaml", *words], 2)
    assert message in said.stdout + said.stderr

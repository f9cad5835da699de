"""FedSP's ablations, systems that are configurations of it, and servers with more, little or no
text of their own.
"""

from __future__ import annotations

import gzip
import math
from collections import Counter

import numpy as np
import pytest

from fedsp_mpi import config
from fedsp_mpi.report import difference
from fedsp_mpi.run import execute
from fedsp_mpi.run.inputs import ExperimentInputs
from helpers import tiny
from helpers.runs import FEDPROMPT, SHORT, short

SINGLE_RANK = ("data.server_share=0", "server.tuning.steps=0")
SINGLE = ("auxiliary.depth=1", "distillation.stage.steps=0", "client.alignment.steps=0")


@pytest.fixture
def text(tmp_path) -> str:
    """Plain text for the distillation."""
    path = tmp_path / "text.txt.gz"
    path.write_bytes(gzip.compress(b"the cat sat on the mat and the dog sat on the cat\n" * 400))
    return str(path)


@pytest.mark.parametrize(
    "settings",
    [
        ("client.training=joint",),
        ("distillation.stage.steps=0",),
        ("auxiliary.depth=1",),
        ("client.alignment.steps=0",),
    ],
    ids=["joint", "no distillation", "no sharing", "prompts only"],
)
def test_ablations_change_the_prompts(tmp_path, settings):
    usual, other = short(tmp_path / "usual"), short(tmp_path / "other", *settings)
    assert difference(usual, other) != []
    values = other.prompts(2)["prompt"]
    assert np.isfinite(values).all() and not np.array_equal(values, usual.prompts(2)["prompt"])


def test_joint_training_steps_both_at_once(tmp_path):
    rows = short(tmp_path, "client.training=joint", "client.tuning.steps=3").clients
    assert np.isnan(rows["loss_model_first"]).all() and np.isfinite(rows["loss_prompt_last"]).all()
    assert set(rows["samples"].tolist()) == {3 * 16}


@pytest.mark.parametrize(
    ("settings", "holds"), [(FEDPROMPT, 1.0), (SINGLE, 0.4)], ids=["fedprompt", "single"]
)
def test_clients_with_frozen_layers_of_the_global_model(tmp_path, settings, holds):
    found = short(tmp_path, *settings)
    models = found.sections["models"]
    assert models["auxiliary"] == pytest.approx(holds * models["global"], rel=0.1)
    assert found.sections["distillation"] == {"engine": "none", "steps": 0}
    assert np.isnan(found.clients["loss_model_first"]).all()


def test_a_server_without_text_only_averages(tmp_path, text):
    found = short(
        tmp_path / "runs", *SINGLE_RANK, f"distillation.text={text}", "distillation.text_length=16"
    )
    assert found.sections["data"]["server_shard"] == 0 and found.sections["data"][
        "client_shards"
    ] == [22, 21, 21]
    assert found.sections["distillation"]["steps"] == 4
    assert [str(row["method"]) for row in found.results] == ["chance", "zero-shot", "fedsp"]
    assert all(math.isnan(loss) for loss in found.rounds["server_loss_last"])
    assert found.rounds["validation_merged"].tolist() == found.rounds["validation_loss"].tolist()


@pytest.mark.parametrize(("share", "rows"), [("16", 16), ("0.25", 16), ("1", 1)])
def test_the_servers_share(tmp_path, share, rows):
    data = short(tmp_path, f"data.server_share={share}").sections["data"]
    assert data["server_shard"] == rows and sum(data["client_shards"]) == 64 - rows


def test_few_examples_of_each_class(tmp_path):
    tiny.model_folder(tmp_path / "model", "gpt2")
    tiny.gap_tokenizer("roberta").save_pretrained(tmp_path / "model")
    tiny.gap_task_folder(tmp_path / "data")

    def few(*more: str) -> ExperimentInputs:
        own = (
            f"model.name={tmp_path / 'model'}",
            f"data.source={tmp_path / 'data'}",
            "data.limit.train=null",
        )
        return ExperimentInputs(config.load(None, [*SHORT, *own, *more]))

    found, other = few("data.shots=5").splits, few("data.shots=5", "run.seed=2").splits
    assert Counter(example.gold[0] for example in found.train) == {0: 5, 1: 5}
    assert found.train != other.train and found.test == other.test
    assert any(note.startswith("train = 5 examples of each class, 10 of ") for note in found.notes)
    with pytest.raises(
        config.ConfigError, match=r"data\.shots: found \d+ examples with label 0, expected"
    ):
        _ = few("data.shots=5000").splits


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            ("data.server_share=0",),
            "server.tuning.steps: found 2 with data.server_share=0, expected 0",
        ),
        (SINGLE_RANK, "distillation.text: found none with data.server_share=0, expected a file"),
        (
            ("data.server_share=2.5",),
            "data.server_share: found 2.5, expected a fraction below 1, or a whole number",
        ),
        (("data.server_share=-1",), "data.server_share: found -1.0, expected at least 0"),
        (("data.alpha=0",), "data.alpha: found 0.0, expected a number above 0"),
        (
            ("data.shots=4",),
            "data.shots: found 4 with multiple_choice, whose examples have no classes in common",
        ),
        (
            ("data.partition=labels",),
            "data.partition: found labels with multiple_choice, whose examples have no classes",
        ),
        (("data.shots=0",), "data.shots: found 0, expected at least 1"),
        (
            ("data.server_share=62",),
            "found 64 examples for a server's share of 62 and 3 clients, expected at least 65",
        ),
        (
            ("distillation.text=/nowhere",),
            "found no text in '/nowhere', expected a .txt or .txt.gz file",
        ),
    ],
)
def test_what_cannot_be_is_refused(tmp_path, settings, message):
    with pytest.raises((ValueError, execute.comm.Refused)) as told:
        short(tmp_path, *settings)
    assert message in str(told.value)


def test_tuning_that_makes_it_worse_is_taken_back(tmp_path):
    """With a learning rate that ruins prompts, the merged ones stay; and what is broadcast next is
    what was kept.
    """
    wild = (
        "server.tuning.optimizer.learning_rate=50",
        "server.tuning.steps=2",
        "evaluation.server_only=true",
    )
    spoiled = short(tmp_path / "always", *wild)
    assert spoiled.rounds["validation_loss"][0] > spoiled.rounds["validation_merged"][0]
    kept = short(tmp_path / "better", "server.accept=better", *wild)
    assert (kept.rounds["validation_loss"] == kept.rounds["validation_merged"]).all()
    untouched = short(tmp_path / "none", "server.tuning.steps=0")
    for round in (1, 2):
        assert np.array_equal(kept.prompts(round)["prompt"], untouched.prompts(round)["prompt"])
    helps = short(tmp_path / "helps", "server.accept=better")
    assert helps.rounds["validation_loss"][0] < helps.rounds["validation_merged"][0], (
        "what helps stays"
    )

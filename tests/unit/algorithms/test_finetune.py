"""Fine-tuning as a method: all weights travel and are averaged; and training in one place, without
clients.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
import transformers

from fedsp_mpi import config
from fedsp_mpi.comm import Refused
from fedsp_mpi.estimate import cost
from fedsp_mpi.estimate import text as plan_text
from fedsp_mpi.record import read
from fedsp_mpi.report import difference, summarize
from helpers.mpi import both_ends
from helpers.runs import FAULTY, short, short_run

RATES = tuple(f"{who}.tuning.optimizer.learning_rate=1e-3" for who in ("client", "server"))
FINETUNE = ("method=finetune", *RATES)


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    """A short run that nobody disturbed."""
    folder = tmp_path_factory.mktemp("finetune")
    short(folder, *FINETUNE)
    return folder / "run"


def test_the_tuned_model_is_a_folder_of_transformers(whole):
    run = read(whole)
    tuned = transformers.AutoModelForCausalLM.from_pretrained(whole / "model", dtype=torch.float32)
    before = transformers.AutoModelForCausalLM.from_pretrained(
        config.EMBEDDED.parent / "model", dtype=torch.float32
    )
    far = [
        (w - before.get_parameter(name)).abs().max().item() for name, w in tuned.named_parameters()
    ]
    assert min(far) > 0 and len(transformers.AutoTokenizer.from_pretrained(whole / "model")) > 0
    assert (
        not (whole / "prompt").exists()
        and not (whole / "auxiliary").exists()
        and run.prompt_rounds == ()
    )
    assert [str(row["method"]) for row in run.results[1:]] == [
        "zero-shot",
        "server-only",
        "finetune",
    ]
    assert (
        len(set(run.results["loss"][1:].tolist())) == 3
    )  # each was scored with weights of its own


def test_every_byte_is_a_weight(whole):
    run = read(whole)
    size = run.sections["models"]["global"]
    rows = [
        row
        for row in run.wire
        if row["direction"] in ("down", "up") and "header" not in row["name"]
    ]
    weights = sum(int(row["bytes"]) for row in rows)
    assert (
        run.sections["models"]["prompt_on_the_wire"] == size
        and run.sections["models"]["prompt"] == 0
    )
    assert weights == 2 * 3 * 2 * 4 * size  # rounds, clients, ways, bytes of a value
    assert set(run.clients["bytes_up"].tolist()) == {4 * size + 256}


def test_the_plan_says_what_the_run_sends_and_holds(whole):
    run = read(whole)
    found = cost.plan(config.load(None, list(FINETUNE)), "embedded")
    [method] = found.methods
    assert (method.holds, method.trains) == (run.sections["models"]["global"],) * 2
    assert method.up == run.clients["bytes_up"][0] and method.handout == 0
    assert found.phases["distillation"] == 0 and found.phases["client fine-tuning"] > 0
    text = plan_text.text(found, 40)
    assert "auxiliary" not in text and f"{4 * method.holds:,} bytes down" in text
    assert (
        found.server.device > 16 * method.holds
    )  # weights, gradients, moments: of server and control


@pytest.mark.slow
@pytest.mark.parametrize("kept", ["kept", "restarted"])
def test_a_killed_run_goes_on_with_equal_bits(tmp_path, kept):
    settings = (
        *FINETUNE,
        f"federation.client_state={kept}",
        "federation.rounds=3",
        "client.resident=1",
    )
    short_run(2, tmp_path, "whole", *settings)
    program = (FAULTY, "kill:checkpoint:0:2")
    killed = short_run(2, tmp_path, "killed", *settings, program=program, status=None)
    assert killed.returncode != 0 and "Traceback" not in killed.stderr, both_ends(killed)
    short_run(3, tmp_path, "killed", *settings, "run.resume=must")
    assert difference(read(tmp_path / "whole"), read(tmp_path / "killed")) == []
    folders = [tmp_path / name / "model" / "model.safetensors" for name in ("whole", "killed")]
    assert folders[0].read_bytes() == folders[1].read_bytes()


@pytest.mark.slow
def test_a_server_of_two_ranks_has_the_losses_of_one(tmp_path):
    two = ("federation.clients=2", *FINETUNE)
    short_run(3, tmp_path, "one", *two)
    short_run(4, tmp_path, "two", *two, "topology.server_ranks=2")
    one, other = read(tmp_path / "one"), read(tmp_path / "two")
    for name in (
        "server_loss_last",
        "validation_merged",
        "validation_loss",
        "control_validation_loss",
    ):
        assert np.abs(other.rounds[name] / one.rounds[name] - 1).max() < 1e-4, name
    assert other.results["acc"].tolist() == one.results["acc"].tolist()


def test_a_client_whose_weights_explode_is_left_out(tmp_path):
    settings = (
        "method=finetune",
        "client.tuning.optimizer.learning_rate=1e6",
        "federation.min_clients=1",
    )
    with pytest.raises(RuntimeError, match=r"min_clients=1: client 0 in local training"):
        short(tmp_path, *settings)
    run = read(tmp_path / "run")
    assert run.status == "failed" and run.committed_rounds == 0


@pytest.mark.parametrize("method", ["fedsp", "finetune"])
def test_one_place_has_all_the_data_and_sends_nothing(tmp_path, method):
    alone = short(
        tmp_path, f"method={method}", *RATES, "federation.clients=0", "distillation.stage.steps=0"
    )
    assert (
        alone.sections["data"]["server_shard"] == 64
        and alone.sections["data"]["client_shards"] == []
    )
    assert len(alone.clients) == 0 and set(alone.rounds["num_clients"].tolist()) == {0}
    assert sum(int(row["bytes"]) for row in alone.wire if row["direction"] in ("down", "up")) == 0
    assert (
        alone.rounds["validation_merged"].tolist()[1:]
        == alone.rounds["validation_loss"].tolist()[:-1]
    )
    assert [str(row["method"]) for row in alone.results] == ["chance", "zero-shot", method]
    assert "0 clients" not in summarize(alone)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            ("federation.clients=0", "server.tuning.steps=0"),
            "server.tuning.steps: found 0 with federation.clients=0",
        ),
        (
            ("federation.clients=0", "federation.clients_per_round=1"),
            "federation.clients_per_round: found with",
        ),
        (("federation.clients=-1",), "federation.clients: found -1, expected at least 0"),
        (("method=finetuning",), "did you mean 'finetune'?"),
    ],
)
def test_what_cannot_be_is_refused(tmp_path, settings, message):
    with pytest.raises((ValueError, Refused)) as told:
        short(tmp_path, *settings)
    assert message in str(told.value)

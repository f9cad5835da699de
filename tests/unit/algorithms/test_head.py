"""A classification head on the frozen model: a plain loop, what other methods can do, refusals."""

from __future__ import annotations

import contextlib
import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from fedsp_mpi import config
from fedsp_mpi.config import ConfigError
from fedsp_mpi.estimate import cost
from fedsp_mpi.evaluation.scoring import loglikelihoods
from fedsp_mpi.models import backbone
from fedsp_mpi.models.class_head import ClassHead
from fedsp_mpi.record import Run, read
from fedsp_mpi.report import difference, summarize
from fedsp_mpi.run.inputs import ExperimentInputs
from fedsp_mpi.run.model_inputs import RESOURCES
from fedsp_mpi.run.silo_inputs import SiloInputs
from helpers.runs import SHORT, gap_settings, here, short, short_run

WORDS = {"colour": ("grey", "blue", "violet"), "trade": ("miller", "carpenter", "baker")}
HEAD = (
    "method=head",
    "data.task=classification",
    "data.columns={text: review, label: outcome}",
    "data.classes=[colour, trade]",
    "data.template={review} {mask}",
    "client.tuning.steps=6",
    "client.alignment.steps=0",
    "client.tuning.optimizer={learning_rate: 1e-2, schedule: constant}",
    "server.tuning.steps=0",
    "checkpoint.keep_client_states=true",
)


def write_table(path: Path, rows: int, seed: int) -> None:
    """Questions of two classes, which the words in them tell."""
    random = np.random.default_rng(seed)
    lines = ["review,outcome"]
    for _ in range(rows):
        name = str(random.choice(list(WORDS)))
        lines.append(f"Question: Which {random.choice(WORDS[name])},{name}")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(lines) + "\n")


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("head")
    for split, rows in {"train": 64, "validation": 16, "test": 40}.items():
        write_table(folder / "data" / f"{split}.csv", rows, seed=rows)
    for silo, rows in {"north": 20, "south": 30}.items():
        write_table(folder / "sites" / f"{silo}.csv", rows, seed=rows)
    return folder


@pytest.fixture(scope="module")
def run(folder) -> Run:
    """Three rounds."""
    source = f"data.source={folder / 'data'}"
    short_run(0, folder, "straight", *HEAD, source, "federation.rounds=3")
    return read(folder / "straight")


def states(model: Any, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """The last hidden states [batch, hidden] at each text's last token."""
    hidden = model.base_model(input_ids=ids, attention_mask=mask).last_hidden_state
    return hidden[torch.arange(len(ids)), mask.sum(dim=1) - 1]


def test_rounds_are_a_plain_loop_on_the_same_batches_and_learn(run):
    settings = config.load(run.folder / "config.yaml")
    inputs = ExperimentInputs(settings)
    model = AutoModelForCausalLM.from_pretrained(RESOURCES / "model").eval()
    stage = settings.client.tuning
    tuned = [torch.nn.Linear(model.config.hidden_size, 2) for _ in range(3)]
    optimizers = [torch.optim.AdamW(head.parameters(), lr=1e-2) for head in tuned]
    mean = {name: torch.zeros_like(value) for name, value in tuned[0].state_dict().items()}
    for round in range(3):
        for client, (head, optimizer) in enumerate(zip(tuned, optimizers)):
            head.load_state_dict(mean)
            batches = inputs.batches(client + 1, stage, "prompt")
            for step in range(6 * round, 6 * round + 6):
                [batch] = batches.step(step)
                with torch.no_grad():
                    known = states(model, batch.input_ids, batch.attention_mask)
                classes = batch.targets[batch.targets != -100]
                loss = torch.nn.functional.cross_entropy(head(known), classes)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
        merged = [head.state_dict() for head in tuned]
        mean = {name: torch.stack([m[name] for m in merged]).mean(dim=0) for name in mean}
    assert run.rounds["validation_loss"].argmin() == 2, "the last round's head is exported"
    exported = load_file(run.folder / "head" / "head.safetensors")
    for name, value in mean.items():
        torch.testing.assert_close(exported[name], value, rtol=0, atol=1e-4)
    [row] = [row for row in run.results if row["method"] == "head"]
    assert row["acc"] > 0.9 and row["acc_norm"] == row["acc"] and row["loss"] < 0.6
    assert {result["method"] for result in run.results} == {"chance", "majority", "head"}


def test_the_printed_lines_score_as_the_run_does(run):
    variables: dict[str, Any] = {}
    with contextlib.redirect_stdout(io.StringIO()) as out:
        exec(summarize(run).partition("(Python):\n")[2], variables)
    inputs = ExperimentInputs(config.load(run.folder / "config.yaml"))
    model = backbone.load_global(
        str(RESOURCES / "model"), device=torch.device("cpu"), dtype=torch.float32
    )
    exported = load_file(run.folder / "head" / "head.safetensors")
    ClassHead(model, 2).load({f"head.{name}": value for name, value in exported.items()})
    numbers = [
        index
        for index, example in enumerate(inputs.splits.test)
        if example.context.rstrip() == variables["text"]
    ]
    [scores] = loglikelihoods(model, None, [inputs.test[numbers[0]]], batch_tokens=512) or []
    assert variables["choices"] == ["colour", "trade"]
    assert list(variables["scores"].values()) == pytest.approx(scores.loglikelihood, abs=1e-4)
    assert out.getvalue().startswith(variables["choices"][scores.loglikelihood.argmax()])


def test_the_plan_is_what_the_run_records(run):
    estimate = cost.plan(config.load(run.folder / "config.yaml"), "straight")
    [head] = estimate.methods
    values = 2 * (estimate.sizes.width + 1)
    assert (head.name, head.trains) == ("classification head", values)
    assert set(run.clients["bytes_down"]) == {head.down}
    assert set(run.clients["bytes_up"]) == {head.up}
    handout = [row for row in run.wire if row["direction"] == "handout" and row["name"][0] != "("]
    assert sum(row["bytes"] for row in handout) == head.handout == 4 * (head.holds + values)
    finetuning = cost.plan(
        config.load(run.folder / "config.yaml", ["method=finetune"]), "finetuning"
    )
    assert head.round < finetuning.methods[0].round / 3
    assert estimate.client.device < finetuning.client.device / 3


def test_a_run_goes_on_to_the_same_bits(run, folder):
    short_run(0, folder, "resumed", *HEAD, f"data.source={folder / 'data'}")
    here(["run", "--resume", str(folder / "resumed"), "--set", "federation.rounds=3"])
    assert difference(read(folder / "resumed"), run) == []


def test_few_labels_pseudo_labels_a_robust_rule_and_compression(folder, tmp_path):
    few = ("data.labels=6", "data.label_spread=0.1", "data.server_share=0")
    augment = ("augment.clients=2", "augment.per_client=8")
    wire = ("federation.rule=median", "federation.compression.format=int8")
    source = f"data.source={folder / 'data'}"
    run = short(tmp_path, *HEAD, source, *few, *augment, *wire)
    clients = run.clients[run.clients["status"] == "ok"]
    assert len(clients) == len(run.clients) and np.isfinite(run.rounds["validation_loss"]).all()
    labelled = clients[clients["texts_scored"] > 0]
    assert len(labelled) and (labelled["pseudo_labels"] > 0).all()


def test_silos_score_where_the_text_is(folder, tmp_path):
    sites = f"federation.silos={{source: '{folder / 'sites'}/{{silo}}.csv', names: [north, south]}}"
    own = (f"server.data.source={folder / 'data'}", "data.source=null", "federation.clients=null")
    run = short(tmp_path, *HEAD, sites, *own, "evaluation.at=both", "evaluation.held_out=0.3")
    last = run.silos[run.silos["round"] == 2]
    assert last["silo"].tolist() == [0, 1] and (last["acc"] > 0.6).all()


@pytest.mark.parametrize("family", ["bert", pytest.param("t5", marks=pytest.mark.slow)])
def test_models_that_fill_in_a_gap(family, tmp_path):
    rate = "client.tuning.optimizer.learning_rate=1e-2"
    settings = ("method=head", "server.tuning.steps=0", rate, "client.tuning.steps=8")
    run = short(tmp_path / "runs", *gap_settings(tmp_path, family, *settings))
    losses = run.clients["loss_model_last"]
    assert losses[run.clients["round"] == 2].mean() < 0.69
    variables: dict[str, Any] = {}
    with contextlib.redirect_stdout(io.StringIO()):
        exec(summarize(run).partition("(Python):\n")[2], variables)
    assert list(variables["scores"]) == [" w1", " w2"]
    probabilities = np.exp(list(variables["scores"].values()))
    assert probabilities.sum() == pytest.approx(1, abs=1e-5) and probabilities[0] != 0.5


def test_what_has_no_classes_is_refused_before_a_model_is_loaded(tmp_path, monkeypatch):
    def load(*_: object, **__: object) -> None:
        raise AssertionError("a model is loaded")

    monkeypatch.setattr(backbone, "load_global", load)
    done = here(["run", "--set", f"run.folder={tmp_path}", "--set", "method=head"], status=2)
    [line] = done.stderr.splitlines()
    assert "method: found head with multiple_choice, whose examples have no classes" in line
    assert "expected a task with one set of choices" in line
    silos = "federation.silos={source: '/nowhere/{silo}.csv', names: [north, south]}"
    unnamed = [
        *SHORT,
        *HEAD,
        silos,
        "data.source=null",
        "federation.clients=null",
        "data.classes=[]",
        "evaluation.at=silos",
    ]
    with pytest.raises(ConfigError, match=r"the server owns no text .*\(data.classes\)"):
        SiloInputs(config.load(None, unnamed)).check()


def test_lm_eval_is_not_asked(run):
    done = here(["evaluate", str(run.folder)], status=2)
    assert "method=head, whose answers are classes" in done.stderr

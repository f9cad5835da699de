"""`model.after`: a run that starts from another's result, and what is refused."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from fedsp_mpi import config
from fedsp_mpi.config import ConfigError
from fedsp_mpi.files import fingerprint
from fedsp_mpi.record import read
from fedsp_mpi.run.inputs import ExperimentInputs
from fedsp_mpi.run.origin import origin
from helpers.record_samples import make
from helpers.runs import short_run

FINETUNE = ("method=finetune", "data.limit.test=8", "evaluation.server_only=false")


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of fine-tuning, and one of fine-tuning that starts from its result."""
    folder = tmp_path_factory.mktemp("origin")
    short_run(0, folder, "first", *FINETUNE, "federation.rounds=1")
    after = f"model.after={folder / 'first'}"
    short_run(0, folder, "second", *FINETUNE, "federation.rounds=1", after)
    return folder


def settings(after: Path, *more: str) -> config.Config:
    return config.load(None, [f"model.after={after}", *more])


def test_a_run_starts_from_the_weights_that_another_has_left(runs):
    first, second = read(runs / "first"), read(runs / "second")
    scores = [{row["method"]: row["loss"] for row in run.results} for run in (first, second)]
    assert scores[1]["zero-shot"] == scores[0]["finetune"] != scores[0]["zero-shot"]
    [earlier] = second.sections["origin"]["runs"]
    assert (earlier["run"], earlier["method"]) == ("first", "finetune")
    assert earlier["weights"] == {
        "model.safetensors": fingerprint.of_file(runs / "first" / "model" / "model.safetensors")
    }
    third = origin(settings(runs / "second"))
    assert third is not None and third["initial"] == "pretrained"
    assert [item["run"] for item in third["runs"]] == ["second", "first"]


def test_its_tokenizer_and_shape_are_those_of_the_result(runs):
    inputs = ExperimentInputs(settings(runs / "first"))
    assert inputs.model_name == str(runs / "first" / "model")
    assert inputs.model_config.name_or_path or len(inputs.tokenizer) == 356


def test_changed_weights_are_refused_and_a_run_that_was_begun_with_others_too(runs, tmp_path):
    copy = tmp_path / "first"
    shutil.copytree(runs / "first", copy)
    free = ("server.tuning.steps=0", "federation.client_state=restarted")  # in its rounds' number
    words = (*FINETUNE, *free, f"model.after={copy}")
    short_run(0, tmp_path, "later", *words, "federation.rounds=1")
    path = copy / "model" / "model.safetensors"
    model = AutoModelForCausalLM.from_pretrained(copy / "model")
    with torch.no_grad():
        model.get_input_embeddings().weight.add_(1)
    model.save_pretrained(copy / "model")
    with pytest.raises(ConfigError, match=rf"model.after: {path}: found digest .* changed"):
        origin(settings(copy))
    fingerprint.list_folder(copy / "model")  # as another run there would have left it
    said = short_run(0, tmp_path, "later", *words, "run.resume=must", status=2)
    assert "found other inputs than the run was begun with (weights of model.name)" in said.stderr


def test_a_model_that_is_gone_is_missed(runs, tmp_path):
    shutil.copytree(runs / "first", tmp_path / "first")
    shutil.rmtree(tmp_path / "first" / "model")
    with pytest.raises(ConfigError, match=r"found no folder .*/model, expected the model that the"):
        origin(settings(tmp_path / "first"))


def test_what_is_no_complete_run_of_this_model_is_refused(runs, tmp_path):
    running = make(tmp_path / "running").folder
    without = make(tmp_path / "without")
    without.finish()
    cases = {
        tmp_path / "nowhere": "found no folder .*nowhere, expected that of a complete run",
        tmp_path: "run.h5: found no such file, expected the record of a run",
        running: "found the run .*running that is (running|stopped), expected a complete one",
        without.folder: "found the run .*without of None, which has left no model, expected one",
    }
    for folder, message in cases.items():
        with pytest.raises(ConfigError, match=rf"model.after: .*{message}") as error:
            origin(settings(folder))
        assert len(str(error.value)) <= 300 and "\n" not in str(error.value)
    other = settings(runs / "first", "model.name=other/model")
    with pytest.raises(ConfigError, match=r"model.name: found 'other/model' with model.after"):
        origin(other)
    with pytest.raises(ConfigError, match=r"model.weights: found random with model.after"):
        settings(runs / "first", "method=finetune", "model.weights=random")


def test_a_mistake_is_found_by_check_before_any_model_is_loaded(runs, tmp_path):
    inputs = ExperimentInputs(settings(tmp_path / "nowhere"))
    with pytest.raises(ConfigError, match=r"model.after: found no folder"):
        inputs.check()


def test_a_run_does_not_replace_what_it_starts_from(runs):
    said = short_run(
        0,
        runs,
        "first",
        *FINETUNE,
        f"model.after={runs / 'first'}",
        "run.if_exists=replace",
        status=2,
    )
    assert "of model.after in the run's folder, expected it elsewhere" in said.stderr
    assert read(runs / "first").status == "complete"

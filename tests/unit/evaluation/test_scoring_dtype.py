"""What trains in bf16 is scored in fp32 on the files' own weights, all methods alike."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from fedsp_mpi.config import Config, load
from fedsp_mpi.evaluation.scoring import Score, answer_loss_mean, score
from fedsp_mpi.models.language_model import LanguageModel
from fedsp_mpi.models.prompts import Prompt
from fedsp_mpi.record import read
from fedsp_mpi.run import build
from fedsp_mpi.run.inputs import ExperimentInputs
from fedsp_mpi.tensors import seal
from fedsp_mpi.training.device import Compute
from helpers import tiny
from helpers.mpi import run_mpi

SHORT = (
    "server.compute.dtype=bfloat16",
    "data.task=multiple_choice",
    "federation.rounds=2",
    "federation.clients=2",
    "distillation.stage.steps=1",
    "client.alignment.steps=1",
    "client.tuning.steps=1",
    "server.tuning.steps=3",
    "prompt.num_tokens=5",
)


@pytest.fixture(autouse=True)
def unsealed():
    yield
    seal.clear()


@pytest.fixture(scope="module")
def settings(tmp_path_factory) -> list[str]:
    """A tiny fp32 model and a task, trained on in bf16."""
    folder = tmp_path_factory.mktemp("tiny")
    model = tiny.model_folder(folder / "model", "gpt2")
    tiny.tokenizer().save_pretrained(model)
    data = tiny.data_folder(folder / "data", validation=16, test=40)
    return [*SHORT, f"model.name={model}", f"data.source={data}", f"run.folder={folder / 'runs'}"]


def judged(
    model: LanguageModel, prompt: Prompt | None, materials: ExperimentInputs
) -> tuple[Score, float]:
    """Score but for its seconds, and validation loss."""
    size = materials.config.evaluation.batch_tokens
    found = score(model, prompt, materials.test, metric=materials.task.metric, batch_tokens=size)
    return replace(found, seconds=0), answer_loss_mean(
        model, prompt, materials.validation, batch_tokens=size
    )


def loaded(config: Config, server_dtype: torch.dtype) -> tuple[ExperimentInputs, LanguageModel]:
    materials = ExperimentInputs(config)
    return materials, build.global_model(materials, Compute(tiny.CPU, server_dtype, 1))


def test_the_scoring_model_is_the_stock_model_in_the_type_of_the_evaluation(settings):
    config = load(None, settings)
    materials, half = loaded(config, torch.bfloat16)
    rounded = judged(half, None, materials)
    assert build.scoring_model(materials, half) is half
    found = judged(half, None, materials)
    seal.clear()
    whole = tiny.load(config.model.name)
    wanted = judged(whole, None, materials)
    assert str(found) == str(wanted) and found[1] != rounded[1]
    assert build.scoring_model(materials, whole) is whole


def test_losses_of_all_methods_are_of_the_scoring_model(settings):
    given = [item for setting in settings for item in ("--set", setting)]
    run_mpi(0, ["-m", "fedsp_mpi", "run", "--name", "half", *given], timeout=120)
    config = load(None, settings)
    run = read(Path(config.run.folder) / "half")
    materials, whole = loaded(config, torch.float32)
    rows = {row["method"]: row for row in run.results}
    assert list(rows) == ["chance", "zero-shot", "server-only", "fedsp"]
    prompt = Prompt(materials.prompt_spec)
    best = int(rows["fedsp"]["round"])
    prompt.load({name: torch.tensor(values) for name, values in run.prompts(best).items()})
    torch.set_num_threads(config.server.compute.threads)
    for method, tuned in (("zero-shot", None), ("fedsp", prompt)):
        wanted, loss = judged(whole, tuned, materials)
        assert (rows[method]["acc"], rows[method]["acc_norm"]) == (wanted.acc, wanted.acc_norm)
        assert rows[method]["loss"] == pytest.approx(loss, rel=1e-6)
    trained = run.rounds[run.rounds["round"] == best]["validation_loss"]
    assert (
        np.abs(trained - rows["fedsp"]["loss"]) > 1e-6 * trained
    )  # bf16's own loss is another number

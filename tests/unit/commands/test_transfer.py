"""Gradients of the auxiliary and the global model are equal where the models are."""

from __future__ import annotations

import json
import math

import pytest
import torch

from fedsp_mpi import config
from fedsp_mpi.commands import bench_transfer
from fedsp_mpi.commands.bench_transfer import TransferPoint, cosine
from fedsp_mpi.log import Log
from helpers.mpi import run_mpi

SHORT = [
    "client.tuning.batch_size=4",
    "data.limit.train=128",
    "data.limit.validation=16",
    "distillation.stage.steps=2",
    "distillation.engine=torch",
]
WHOLE = ["auxiliary.layers_per_cell=null", "distillation.stage.steps=0"]


def points(folder, *settings: str, steps: int = 3) -> list[TransferPoint]:
    return bench_transfer.transfer(
        config.load(None, [*SHORT, f"run.folder={folder}", *settings]), steps, Log()
    )


def test_a_whole_copy_has_the_gradients_of_the_global_model(tmp_path):
    first, by_small, by_large = points(tmp_path, *WHOLE)
    for point in (first, by_small, by_large):
        assert point.cosine == pytest.approx(1, abs=1e-4)
        assert point.loss == pytest.approx(point.auxiliary_loss, rel=1e-4)
        assert -1 <= point.ceiling < 0.9999
    assert by_small.loss == pytest.approx(by_large.loss, rel=1e-3)
    assert by_small.loss < first.loss


def test_both_choose_answers_from_the_same_tokens(tmp_path):
    """A task whose examples have the same choices; the auxiliary model is the whole global one."""
    source = tmp_path / "fixed"
    source.mkdir()
    for split in ("train", "validation", "test"):
        rows = [
            {"context": f"w{i}", "choices": ["grey", "miller"], "label": i % 2} for i in range(40)
        ]
        (source / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    fixed = [f"data.source={source}", "data.loss_over=choices", "federation.clients=2"]
    for _ in range(2):  # distilled, then reused
        first, *_ = points(tmp_path, *WHOLE, *fixed)
        assert first.cosine == pytest.approx(1, abs=1e-4)
        assert first.loss == pytest.approx(first.auxiliary_loss, rel=1e-4)


def test_a_cell_has_others_and_a_prefix_of_another_depth_is_mapped(tmp_path):
    for settings in ([], ["auxiliary.depth=1"], ["prompt.projection=8"], ["prompt.kind=input"]):
        first, by_small, by_large = points(tmp_path, *settings)
        assert abs(first.cosine) < 0.99 and math.isfinite(by_small.cosine), settings
        assert by_small.loss != by_large.loss, settings
    assert (tmp_path / bench_transfer.FOLDER / "auxiliary" / "distillation.json").exists()


def test_a_cosine_is_that_of_all_tensors_as_one_vector():
    first = {"a": torch.tensor([3.0, 0.0]), "b": torch.tensor([4.0])}
    second = {"a": torch.tensor([3.0, 1.0]), "b": torch.tensor([0.0])}
    assert cosine(first, second) == pytest.approx(9 / (5 * math.sqrt(10)))
    assert math.isnan(cosine(first, {"a": torch.zeros(2), "b": torch.zeros(1)}))


@pytest.mark.parametrize("settings", [["method=finetune"], ["federation.clients=0"]])
def test_what_has_no_transfer(tmp_path, settings):
    with pytest.raises(ValueError, match="found no clients with prompts"):
        points(tmp_path, *settings)
    with pytest.raises(ValueError, match="--steps: found 0"):
        points(tmp_path, steps=0)


def test_a_run_of_that_name_keeps_its_auxiliary_model(tmp_path):
    folder = tmp_path / bench_transfer.FOLDER
    folder.mkdir()
    (folder / "run.h5").touch()
    with pytest.raises(ValueError, match="found a run, expected a folder for the auxiliary model"):
        points(tmp_path)
    assert [path.name for path in folder.iterdir()] == ["run.h5"]


def test_the_verb_shows_a_table(tmp_path):
    settings = [
        item for setting in (*SHORT, f"run.folder={tmp_path}") for item in ("--set", setting)
    ]
    text = run_mpi(0, ["-m", "fedsp_mpi", "bench", "transfer", *settings, "--steps", "2"]).stdout
    assert "first prompts" in text and "2 steps on the global model" in text and "ceiling" in text

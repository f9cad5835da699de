"""A user's mistakes: one line, by one rank, exit status 2, before any weight is loaded where that
is possible.
"""

from __future__ import annotations

import gzip
import json
import shutil
from pathlib import Path

import pytest

from fedsp_mpi.run.inputs import RESOURCES
from helpers.mpi import both_ends, run_mpi
from helpers.runs import fedsp


def refused(n: int, *arguments: str, config: Path | None = None, folder: Path) -> str:
    """The one line that a run with these --set settings ends with."""
    settings = [
        item
        for setting in (f"run.folder={folder / 'runs'}", *arguments)
        for item in ("--set", setting)
    ]
    result = fedsp(n, ["run", *([config] if config else []), *settings], status=2)
    lines = result.stderr.strip().splitlines()
    assert len(lines) == 1 and lines[0].startswith("fedsp_mpi: "), both_ends(result)
    assert "Traceback" not in result.stdout
    assert not any((folder / "runs").rglob("run.h5")) if (folder / "runs").exists() else True
    return lines[0]


@pytest.mark.parametrize("n", [0, 2])
def test_unknown_key_with_the_nearest_name(tmp_path, n):
    assert "did you mean 'rounds'" in refused(n, "federation.round=3", folder=tmp_path)


def test_wrong_type(tmp_path):
    assert "expected a whole number" in refused(0, "federation.rounds=many", folder=tmp_path)


def test_prefix_with_gradient_checkpointing(tmp_path):
    assert "gradient_checkpointing" in refused(
        0, "model.gradient_checkpointing=true", folder=tmp_path
    )


@pytest.mark.parametrize("n", [0, pytest.param(2, marks=pytest.mark.slow)])
def test_missing_model_folder(tmp_path, n):
    assert "nowhere" in refused(n, f"model.name={tmp_path / 'nowhere'}", folder=tmp_path)


def test_model_of_another_family(tmp_path):
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text('{"model_type": "bloom"}')
    assert "'bloom'" in refused(0, f"model.name={tmp_path / 'model'}", folder=tmp_path)


@pytest.mark.slow
def test_truncated_weights(tmp_path):
    shutil.copytree(RESOURCES / "model", tmp_path / "model")
    weights = tmp_path / "model" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    assert "weights" in refused(2, f"model.name={tmp_path / 'model'}", folder=tmp_path)


def test_data_without_a_needed_column(tmp_path):
    for split in ("train", "validation", "test"):
        with gzip.open(tmp_path / f"{split}.jsonl.gz", "wt") as file:
            file.write(json.dumps({"context": "a", "options": ["b", "c"], "label": 0}) + "\n")
    assert "choices" in refused(0, f"data.source={tmp_path}", folder=tmp_path)


@pytest.mark.parametrize("n", [0, pytest.param(2, marks=pytest.mark.slow)])
def test_more_clients_than_examples(tmp_path, n):
    line = refused(n, "federation.clients=50", "data.limit.train=20", folder=tmp_path)
    assert "20" in line and "51" in line


def test_prompt_longer_than_the_positions_left(tmp_path):
    assert "prompt.num_tokens" in refused(0, "prompt.num_tokens=100000", folder=tmp_path)


def test_more_client_ranks_than_clients(tmp_path):
    assert "2" in refused(4, "federation.clients=2", folder=tmp_path)


@pytest.mark.parametrize("ranks", [1, 5])
def test_another_number_of_ranks_than_expected(tmp_path, ranks):
    line = refused(3, f"topology.ranks={ranks}", folder=tmp_path)
    assert "found 3" in line and str(ranks) in line


def test_existing_run_without_a_decision(tmp_path):
    (tmp_path / "runs" / "taken").mkdir(parents=True)
    (tmp_path / "runs" / "taken" / "config.yaml").write_text("")
    assert "no sign that a run wrote it" in refused(0, "run.name=taken", folder=tmp_path)
    (tmp_path / "runs" / "taken" / "lock").write_text('{"host": "other", "pid": 7, "job": null}\n')
    line = refused(0, "run.name=taken", folder=tmp_path)
    assert "taken" in line and "replace" in line


def test_unreadable_configuration(tmp_path):
    (tmp_path / "bad.yaml").write_text("a: [1,")
    assert "bad.yaml" in refused(0, config=tmp_path / "bad.yaml", folder=tmp_path)
    assert "none.yaml" in refused(0, config=tmp_path / "none.yaml", folder=tmp_path)


def test_cell_outside_the_model(tmp_path):
    assert "start_layer" in refused(0, "auxiliary.start_layer=99", folder=tmp_path)


def test_launcher_whose_processes_do_not_see_each_other(tmp_path):
    """What `srun` gives with the wrong PMI: every process believes that it is alone."""
    arguments = ["-m", "fedsp_mpi", "run", "--set", f"run.folder={tmp_path}"]
    env = {"SLURM_PROCID": "0", "SLURM_NTASKS": "4", "SLURM_STEP_ID": "0", "SLURM_JOB_ID": "7"}
    result = run_mpi(0, arguments, timeout=60, env=env, status=2)
    assert len(result.stderr.strip().splitlines()) == 1 and "pmi" in result.stderr.lower(), (
        both_ends(result)
    )


def test_weights_that_are_not_all_there(tmp_path):
    shutil.copytree(RESOURCES / "model", tmp_path / "model")
    config = tmp_path / "model" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"n_layer": 9}))
    assert "of its weights" in refused(0, f"model.name={tmp_path / 'model'}", folder=tmp_path)


def test_folder_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    assert "cannot be written" in refused(
        0, f"run.folder={tmp_path / 'file' / 'runs'}", folder=tmp_path
    )

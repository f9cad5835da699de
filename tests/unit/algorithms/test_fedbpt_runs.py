"""Whole runs of FedBPT in this process: what travels, what the record says, what is refused."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from fedsp_mpi import config, record
from fedsp_mpi.comm import Refused
from fedsp_mpi.estimate import cost
from fedsp_mpi.estimate import text as plan_text
from fedsp_mpi.models.subspace import Subspace, scale_of
from fedsp_mpi.record import read
from fedsp_mpi.report import comparison
from helpers import tiny
from helpers.runs import FEDBPT, gap_settings, short

AVERAGE = (*FEDBPT, "search.rule=average", "search.objective=loss")
KEPT = (*FEDBPT, "search.step_size_by=clients", "search.rank_by=improvement", "search.parents=all")


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    """A short run that nobody disturbed."""
    folder = tmp_path_factory.mktemp("fedbpt")
    short(folder, *FEDBPT)
    return folder / "run"


def names_on_the_wire(run: record.Run) -> dict[str, set[str]]:
    rows = [(str(row["direction"]), str(row["name"])) for row in run.wire]
    return {way: {name for direction, name in rows if direction == way} for way in ("down", "up")}


def test_every_byte_has_a_name_and_the_plan_knows_it(whole):
    run = read(whole)
    found = cost.plan(
        config.load(None, [*FEDBPT, "federation.clients=3", "federation.rounds=2"]), "embedded"
    )
    own = found.methods[0]
    assert set(run.clients["bytes_up"].tolist()) == {4 * 20 + 256} == {own.up}
    assert set(run.clients["bytes_down"].tolist()) == {4 * (20 + 1 + 210) + 256} == {own.down}
    assert names_on_the_wire(run) == {
        "down": {"(header)", "mean", "step_size", "covariance"},
        "up": {"(header)", "mean"},
    }
    handed_out = [
        row
        for row in run.wire
        if str(row["direction"]) == "handout" and "(" not in str(row["name"])
    ]
    assert sum(int(row["bytes"]) for row in handed_out) == own.handout
    assert (own.holds, own.trains) == (run.sections["models"]["auxiliary"], 20)
    text = plan_text.text(found, 40)
    assert (
        "924 bytes down and 80 up" in text
        and "searched for in 20 dimensions" in text
        and "client search" in text
    )


def test_the_record_says_what_was_searched(whole):
    run = read(whole)
    assert run.status == "complete" and run.sections["models"]["searched"] == 20
    assert [str(row["method"]) for row in run.results] == ["chance", "zero-shot", "fedbpt"]
    for column in ("fitness", "step_size", "loss_prompt_first", "loss_prompt_last"):
        assert np.isfinite(run.clients[column]).all(), column
    assert run.rounds["validation_merged"].tolist() == run.rounds["validation_loss"].tolist()
    assert set(run.clients["samples"].tolist()) == {16}
    assert not np.array_equal(run.prompts(1)["prompt"], run.prompts(2)["prompt"])
    table = comparison.comparison_table(comparison.compare([run]))
    assert "| fedbpt |" in table and "| 20 |" in table


def test_the_prompt_is_the_first_one_and_a_projection(whole):
    """The adapter is what the best round's mean leads to, from the words that prompts begin as."""
    from fedsp_mpi.models.backbone import load_global
    from fedsp_mpi.models.prompts import read_adapter
    from fedsp_mpi.run.inputs import ExperimentInputs

    run, materials = read(whole), ExperimentInputs(config.load(whole / "config.yaml"))
    best = int(run.results[-1]["round"])
    adapter = read_adapter(whole / "prompt")
    assert np.array_equal(adapter.numpy(), run.prompts(best)["prompt"])
    large = load_global(materials.model_name, device=tiny.CPU)
    first = materials.first_prompt(large).prompt.detach()
    space = Subspace(
        materials.prompt_spec,
        20,
        scale_of(large, materials.first_prompt(large), 20, step_size=1.0, spread=1.0),
        1,
    )
    matrix = space.expand(np.eye(20)).flatten(1).T
    rest = torch.linalg.lstsq(matrix, (adapter - first).flatten()[:, None])
    assert torch.allclose(matrix @ rest.solution[:, 0], (adapter - first).flatten(), atol=1e-4)


def test_what_clients_know_travels(tmp_path):
    for settings, name in ((AVERAGE, "FedAvg-BBT"), (KEPT, "FedBPT")):
        run, wanted = short(tmp_path / name, *settings), config.load(None, list(settings))
        down, up = wanted.search.travelling()
        assert names_on_the_wire(run) == {"down": {"(header)", *down}, "up": {"(header)", *up}}
        found = cost.plan(wanted, "embedded").methods[0]
        assert (found.name, found.up) == (
            name,
            run.clients["bytes_up"][0],
        ) and found.down == run.clients["bytes_down"][0]
    assert down == ["mean", "step_size", "covariance"] and up == ["mean", "step_size"]


@pytest.mark.parametrize(
    "more",
    [
        (
            "prompt.kind=prefix",
            "auxiliary.depth=2",
            "auxiliary.first_layers=1",
            "prompt.mapping=same_layers",
        ),
        (
            "prompt.kind=prefix",
            "auxiliary.layers_per_cell=1",
            "auxiliary.depth=1",
            "prompt.init=random",
        ),
    ],
    ids=["both ends", "one layer"],
)
def test_clients_may_hold_less_than_the_whole_model(tmp_path, more):
    run = short(tmp_path, *FEDBPT, *more, "data.loss_over=auto")
    assert run.sections["models"]["auxiliary"] < run.sections["models"]["global"]
    assert np.isfinite(run.rounds["validation_loss"]).all()
    assert set(run.clients["bytes_up"].tolist()) == {4 * 20 + 256}


@pytest.mark.parametrize("family", ["roberta", "t5"])
def test_models_that_fill_in_a_gap_are_searched_too(tmp_path, family):
    own = [item for item in FEDBPT if not item.startswith(("prompt", "auxiliary"))]
    words = (
        "prompt.init=text",
        "prompt.init_text=w3 w4",
        "data.loss_over=auto",
        "search.objective=mean_of_ratios",
    )
    run = short(tmp_path / "runs", *gap_settings(tmp_path, family, *own, *words))
    assert run.status == "complete" and np.isfinite(run.clients["fitness"]).all()
    assert not np.array_equal(run.prompts(1)["prompt"], run.prompts(2)["prompt"])


def test_poisoned_clients_are_watched(tmp_path):
    attack = ("attack.target=1", "attack.clients=[0]", "attack.trigger=w20", "federation.rounds=1")
    run = short(tmp_path, *FEDBPT, *attack)
    assert np.isfinite(run.clients["attack_success"]).tolist() == [True, False, False]


def test_a_record_of_before_has_no_fitness(whole, tmp_path, monkeypatch):
    import h5py

    old = tmp_path / "run.h5"
    old.write_bytes((whole / "run.h5").read_bytes())
    with h5py.File(old, "r+") as file:
        table = file["clients"][()]
        kept = [name for name in table.dtype.names if name not in ("fitness", "step_size")]
        del file["clients"]
        file["clients"] = np.array(
            table[kept].tolist(), dtype=[(name, table.dtype[name]) for name in kept]
        )
    assert (
        np.isnan(read(old).clients["fitness"]).all()
        and read(old).clients["samples"].tolist() == [16] * 6
    )


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (("server.tuning.steps=2",), "server.tuning.steps: found 2 with method=fedbpt, expected 0"),
        (
            ("federation.clients=0",),
            "federation.clients: found 0 with method=fedbpt, expected at least 1",
        ),
        (
            ("prompt.kind=prefix", "prompt.init=random", "prompt.projection=4"),
            "prompt.projection: found 4 with method=fedbpt, expected null",
        ),
        (
            ("prompt.kind=prefix", "prompt.init=random", "prompt.init_std=0"),
            "prompt.init_std: found 0 with method=fedbpt",
        ),
        (("prompt.encoder=mlp",), "prompt.encoder: found mlp with method=fedbpt, expected null"),
        (
            ("federation.rule=median",),
            "federation.rule: found median with method=fedbpt, expected mean",
        ),
        (
            ("federation.compression.format=int8",),
            "federation.compression.format: found int8 with method=fedbpt, expected none",
        ),
        (
            ("client.privacy.clip=1", "client.privacy.noise_scale=1"),
            "client.privacy.clip: found 1.0 with method=fedbpt, expected null",
        ),
        (("search.dimension=1",), "search.dimension: found 1, expected at least 2"),
        (("search.population=1",), "search.population: found 1, expected at least 2"),
        (("search.iterations=0",), "search.iterations: found 0, expected at least 1"),
        (("search.step_size=0",), "search.step_size: found 0.0, expected a number above 0"),
        (("search.perturbation=0",), "search.perturbation: found 0.0, expected a number above 0"),
        (
            ("search.objective=ratio",),
            "search.objective: found 'ratio', expected one of loss, ratio_of_means",
        ),
        (("search.sigma=1",), "search.sigma: found an unknown key"),
        (("method=fedbtp",), "did you mean 'fedbpt'?"),
    ],
)
def test_what_cannot_be_is_refused(tmp_path, settings, message):
    with pytest.raises((ValueError, Refused)) as told:
        short(tmp_path, *FEDBPT, *settings)
    assert message in str(told.value) and "\n" not in str(told.value)

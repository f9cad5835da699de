"""Golden numbers: what every method of configs/methods makes of a short run, on 1, 2 and 4 ranks;
and further features, whose bits depend as little on the number of ranks.

FEDSP_GOLDEN=write pytest tests/ranks/test_golden.py writes golden.json anew; a changed number is a
commit of its own that says why. The numbers hold to the digits that processors differ in; between
numbers of ranks, bits are equal.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable, Mapping
from pathlib import Path

import numpy as np
import pytest
import yaml

from fedsp_mpi import config
from fedsp_mpi.config.model import recipe
from fedsp_mpi.config.parsing import merge
from fedsp_mpi.record import Run, read
from fedsp_mpi.report import difference, summarize
from helpers import blas_kernels, tiny
from helpers.mpi import run_mpi
from helpers.paths import PROGRAMS, ROOT
from helpers.runs import FEDBPT, FEDPROMPT, command, gap_settings, together

GOLDEN = Path(__file__).with_name("golden.json")
METHODS = {path.stem: path for path in sorted((ROOT / "configs" / "methods").glob("*.yaml"))}
SHORT = {
    "run": {"seed": 1},
    "federation": {"rounds": 2, "clients": 3},
    "distillation": {"stage": {"steps": 4}, "engine": "torch"},
    "client": {"alignment": {"steps": 2}, "tuning": {"steps": 3}},
    "server": {"tuning": {"steps": 2}},
    "data": {"limit": {"train": 64, "validation": 16, "test": 24}},
    "prompt": {"num_tokens": 8},
}
WEIGHTS = {  # what suits prompts ruins weights
    "client": {"tuning": {"optimizer": {"learning_rate": 1e-3}}},
    "server": {"tuning": {"optimizer": {"learning_rate": 1e-3}}},
}
SEARCHES = {
    name: {"search": {"dimension": 20, "iterations": 3}}
    for name in ("fedbpt", "fedbpt_private", "fedavg_bbt")
}
SEARCHES["prompt_search"] = {
    "prompt": {"num_tokens": 8},
    "instructions": {
        "pool": ["Question", "Answer:", "Question now", "Answer: the old colour"],
        "candidates": 6,
        "beam": 2,
        "paraphrases": 2,
    },
}
SEARCHES["fedbpt"]["search"] |= recipe("bridged")[
    "search"
]  # the default; the others search as the papers do
LABELS = {  # of 48 texts of three clients
    "aug_fedprompt": {
        "data": {"labels": 6, "label_spread": 0.1, "verbaliser": ["grey", "blue"]},
        "augment": {"clients": 2, "per_client": 8},
    },
}
COLUMNS = (
    "server_loss_first",
    "server_loss_last",
    "validation_merged",
    "validation_loss",
    "control_validation_loss",
)


def write_configurations(folder: Path) -> list[Path]:
    """One file a method: the embedded default, shortened, under the method's own keys."""
    short, files = folder / "short.yaml", []
    two_classes = {"data": {"source": tiny.gap_task_folder(folder / "data")}}
    for name, path in METHODS.items():
        keys = WEIGHTS if name.startswith(("finetune", "p_tuning")) else SEARCHES.get(name, {})
        if name in LABELS:
            keys = merge(LABELS[name], two_classes)
        own = {"extends": [str(config.EMBEDDED), short.name, str(path)]}
        files.append(folder / f"{name}.yaml")
        files[-1].write_text(yaml.safe_dump({**own, **keys}))
    short.write_text(yaml.safe_dump(SHORT))
    return files


def features(folder: Path) -> dict[str, tuple[str, ...]]:
    """Settings of short runs that no method of configs/methods has."""
    quiet = ("evaluation.zero_shot=false", "evaluation.server_only=false")
    robust = (*quiet, "federation.clients=5", "federation.outlier_deviations=0")
    attack = ("attack.target=1", "attack.clients=[1]", "attack.questions=5")
    labels = ("data.partition=labels", "data.alpha=0.3", "data.server_share=16")
    words = ("data.limit.train=null", "data.verbaliser=[grey, blue]")
    clients = ("federation.clients=60", "federation.clients_per_round=6", "client.resident=1")
    kept = ("checkpoint.keep=3", "checkpoint.keep_client_states=true")
    weights = ("method=finetune", "client.tuning.optimizer.learning_rate=1e-3")
    outer = ("federation.outer.optimizer=fedavgm", "federation.clients_per_round=2")
    int8 = ("federation.compression.format=int8", "federation.rounds=3")
    source = f"data.source={tiny.gap_task_folder(folder / 'data')}"
    few = ("data.labels=6", "augment.clients=2", "augment.per_client=8", "data.server_share=8")
    soft = ("augment.targets=soft", "augment.quota=balanced", "augment.calibrate=true")
    templates = ("augment.second_template={context} now {mask}", "federation.rounds=3")
    some = ("federation.clients=6", "federation.clients_per_round=3", "client.resident=1")
    return {
        "median": (*robust, "federation.rule=median"),
        "reject_outliers": (*robust, "federation.rule=reject_outliers"),
        "backdoor": (*FEDPROMPT, *quiet, *attack),
        "joint_by_labels": ("client.training=joint", *labels, source, *words),
        "bert": tuple(gap_settings(folder / "bert", "bert")),
        "soft_labels": (*few, *soft, *templates, *some, source, *words, *quiet),
        "int8": (*weights, *outer, *int8, *quiet),
        "sealed_requests": (*FEDBPT, *quiet, "search.forward=server", "wire.encryption=true"),
        "many_clients": (*clients, *kept, "federation.rounds=3", "data.limit.train=560"),
    }


ONE_CLIENT = "prefix_tuning"  # which does not fill three ranks
ON_FOUR_RANKS = ("fedsp", "fedbpt", "finetune", "fedprompt", "plmm")
ON_TWO_RANKS = ("fedsp", "fedbpt", "finetune", "aug_fedprompt", "plmm", ONE_CLIENT)
FEATURES = (
    "median",
    "reject_outliers",
    "backdoor",
    "joint_by_labels",
    "bert",
    "soft_labels",
    "int8",
    "sealed_requests",
    "many_clients",
)


@pytest.fixture(scope="module")
def configurations(tmp_path_factory) -> Path:
    """The folder of one configuration a method, and of the runs."""
    folder = tmp_path_factory.mktemp("golden")
    write_configurations(folder)
    return folder


def run_methods(
    folder: Path,
    n: int,
    names: Iterable[str],
    settings: Mapping[str, tuple[str, ...]],
    *,
    shared: tuple[str, ...] = (),
) -> Path:
    """Run methods, and features by their settings, in one start of n ranks; 1: in this process.

    `shared` are settings of all of them.
    """
    target = folder / f"n{n}{'-shared' if shared else ''}"
    target.mkdir(exist_ok=True)
    jobs: list[tuple[list[str], Path | None]] = []
    for name in names:
        words = [word for setting in shared for word in ("--set", setting)]
        where = ["--set", f"run.folder={target}", "--name", name, *words]
        jobs.append((["run", str(folder / f"{name}.yaml"), *where], None))
    for name, own_settings in settings.items():
        jobs.append((command(target, name, *own_settings, *shared), target / f"{name}.txt"))
    together(0 if n == 1 else n, jobs)
    return target


@pytest.fixture(scope="module")
def runs(configurations) -> dict[int, Path]:
    """Folders of runs by the number of ranks."""
    settings = features(configurations)
    assert set(settings) == set(FEATURES)
    folders = {
        1: run_methods(configurations, 1, METHODS, settings),
        4: run_methods(configurations, 4, ON_FOUR_RANKS, settings),
    }
    if os.environ.get("FEDSP_GOLDEN") == "write":
        made = {name: numbers(read(folders[1] / name)) for name in METHODS}
        GOLDEN.write_text(json.dumps(made, indent=1) + "\n")
    return folders


SEALED_ON_RANKS = {  # compared with the open runs of one process: so the bits hold open as well
    1: ("fedsp", "int8"),
    2: ("fedbpt_private", ONE_CLIENT),
    4: (*(name for name in METHODS if name != ONE_CLIENT), "joint_by_labels", "bert", "int8"),
}


@pytest.fixture(scope="module")
def sealed_runs(configurations, runs) -> dict[int, Path]:
    """Folders of runs whose clients seal what they send, by the number of ranks."""
    settings = features(configurations)
    return {
        n: run_methods(
            configurations,
            n,
            [name for name in names if name in METHODS],
            {name: settings[name] for name in names if name in FEATURES},
            shared=("wire.encryption=true",),
        )
        for n, names in SEALED_ON_RANKS.items()
    }


def numbers(run: Run) -> dict[str, list[float]]:
    """Losses by round, and of the clients' last step their mean; None where a method has none."""
    found = {name: run.rounds[name].tolist() for name in COLUMNS}
    for name in ("loss_model_last", "loss_prompt_last"):
        by_round = [
            run.clients[name][run.clients["round"] == round + 1] for round in range(len(run.rounds))
        ]
        found[name] = [float(np.mean(losses)) if len(losses) else math.nan for losses in by_round]
    return {
        name: [None if math.isnan(x) else float(f"{x:.9g}") for x in values]
        for name, values in found.items()
    }


def test_the_short_runs_are_those_of_the_overlays(tmp_path):
    write_configurations(tmp_path)
    shared = merge(SHORT, {})
    for name, path in METHODS.items():
        found = config.load(tmp_path / f"{name}.yaml")
        own = yaml.safe_load(path.read_text())
        assert (
            found.run.label == own["run"]["label"]
            and found.federation.rounds == shared["federation"]["rounds"]
        )


@pytest.mark.parametrize("name", METHODS)
def test_golden_numbers(runs, name):
    assert_golden(read(runs[1] / name), name)


def assert_golden(run: Run, name: str) -> None:
    wanted, found = json.loads(GOLDEN.read_text())[name], numbers(run)
    assert wanted.keys() == found.keys() and run.status == "complete"
    for column, values in wanted.items():
        assert [x is None for x in values] == [x is None for x in found[column]], column
        known = [(x, y) for x, y in zip(values, found[column]) if x is not None]
        assert [y for _, y in known] == pytest.approx([x for x, _ in known], rel=1e-4), column
    assert any(x is not None for x in found["validation_loss"])


@pytest.mark.parametrize("name", [*ON_FOUR_RANKS, *FEATURES])
def test_bits_do_not_depend_on_the_number_of_ranks(runs, name):
    assert difference(read(runs[1] / name), read(runs[4] / name)) == []


@pytest.mark.slow
def test_bits_do_not_depend_on_it_where_one_rank_plays_all_clients(configurations, runs):
    folder = run_methods(configurations, 2, ON_TWO_RANKS, {})
    for name in ON_TWO_RANKS:
        assert difference(read(runs[1] / name), read(folder / name)) == [], name


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "n"), [(name, n) for n, names in SEALED_ON_RANKS.items() for name in names]
)
def test_sealed_runs_have_the_bits_of_open_ones(runs, sealed_runs, name, n):
    plain = read(runs[1] / name)
    sealed = read(sealed_runs[n] / name)
    assert difference(plain, sealed) == []
    [start] = sealed.sections["encryption"].values()
    assert (
        len(start["ranks"]) == n and len(start["clients"]) == sealed.config["federation"]["clients"]
    )
    seals = sealed.wire[sealed.wire["name"] == "(seal)"]
    assert (sum(seals["bytes"]) > 0) == (n > 1 or len(start["clients"]) > 0)
    grown = sealed.rounds["bytes_up"] - plain.rounds["bytes_up"]
    in_rounds = seals[(seals["direction"] == "up") & (seals["phase"] != "evaluation")]
    assert sum(grown) == sum(in_rounds["bytes"])


@pytest.mark.slow
def test_bits_of_robust_rules_and_a_masked_model_on_two_ranks(tmp_path):
    settings = features(tmp_path)
    names = ("median", "reject_outliers", "bert")
    for n in (0, 2):
        jobs = [(command(tmp_path / f"n{n}", name, *settings[name]), None) for name in names]
        together(n, jobs)
    for name in names:
        alone, two = read(tmp_path / "n0" / name), read(tmp_path / "n2" / name)
        assert difference(alone, two) == [], name
        assert set(two.clients["rank"].tolist()) == {1}, "one rank plays all clients"


@pytest.mark.parametrize("rule", ["median", "reject_outliers"])
def test_rejected_clients_are_named(runs, rule):
    run, printed = read(runs[4] / rule), (runs[4] / f"{rule}.txt").read_text()
    out = run.clients[run.clients["status"] == "rejected"]
    assert (len(out) > 0) == (rule == "reject_outliers")
    if len(out):
        assert "of them rejected" in printed
        assert f"client {out['client'][0]} rejected in round" in summarize(run)
        assert run.rounds["num_failed"].sum() == len(out)
        assert "away from the median prompt" in out["reason"][0]


def test_success_of_an_attack_is_counted_in_questions(runs):
    run = read(runs[1] / "backdoor")
    assert set((5 * run.clients["attack_success"][1::3]).tolist()) <= set(range(6))


def test_a_tenth_of_many_clients_each_round(runs):
    run = read(runs[4] / "many_clients")
    assert run.rounds["num_clients"].tolist() == [6, 6, 6]
    took_part = [
        set(run.clients["client"][run.clients["round"] == round].tolist()) for round in (1, 2, 3)
    ]
    assert [len(clients) for clients in took_part] == [6, 6, 6] and took_part[0] != took_part[1]
    marks = [
        json.loads((run.file.parent / "checkpoints" / f"000{round}.json").read_text())
        for round in (1, 2)
    ]
    assert {int(id) for id in marks[0]["clients"]} == took_part[0]
    assert {int(id) for id in marks[1]["clients"]} == took_part[0] | took_part[1]
    again = {int(id): piece[0] for id, piece in marks[1]["clients"].items()}
    assert all(again[id] == (2 if id in took_part[1] else 1) for id in again)


@pytest.mark.slow
@pytest.mark.parametrize("kernel", blas_kernels.available())
def test_golden_numbers_of_searches_hold_under_every_blas_kernel(tmp_path, kernel):
    files = [file for file in write_configurations(tmp_path) if file.stem in SEARCHES]
    jobs = [
        [["run", str(f), "--set", f"run.folder={tmp_path / 'runs'}", "--name", f.stem], None]
        for f in files
    ]
    (tmp_path / "jobs.json").write_text(json.dumps(jobs))
    arguments = [PROGRAMS / "several.py", tmp_path / "jobs.json"]
    run_mpi(0, arguments, timeout=300, env={"OPENBLAS_CORETYPE": kernel})
    for name in SEARCHES:
        assert_golden(read(tmp_path / "runs" / name), name)

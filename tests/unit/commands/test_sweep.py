"""Sweeps: trials from layers, small real runs, failures and signals."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from dataclasses import asdict
from functools import reduce
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from fedsp_mpi import cli, config
from fedsp_mpi.commands import jobs
from fedsp_mpi.commands.trials import Trial, trials_of
from fedsp_mpi.config.parsing import put
from fedsp_mpi.record import read
from fedsp_mpi.report import difference
from helpers.mpi import both_ends, kill_tree, mpirun, run_mpi
from helpers.paths import ROOT
from helpers.runs import SHORT, here

METHODS = ROOT / "configs" / "methods"
SWEEPS = [
    path for path in sorted((ROOT / "configs").rglob("*.yaml")) if "\nfolder: " in path.read_text()
]
EMBEDDED = str(config.EMBEDDED.resolve())


def short_base(*more: str) -> dict[str, Any]:
    """The embedded default, shortened."""
    base: dict[str, Any] = {"extends": EMBEDDED}
    for item in (*SHORT, "distillation.engine=torch", *more):
        key, value = item.split("=")
        put(base, key, yaml.safe_load(value), whose=key)
    return base


def written(home: Path, name: str = "sweep.yaml", /, **content: Any) -> Path:
    """A sweep's file: one task, FedSP and FedPrompt, one seed, unless `content` says otherwise."""
    defaults = {
        "folder": str(home / "runs"),
        "base": short_base(),
        "seeds": [1],
        "tasks": {"world": None},
        "methods": {
            "fedsp": str(METHODS / "fedsp.yaml"),
            "fedprompt": str(METHODS / "fedprompt.yaml"),
        },
    }
    path = home / name
    path.write_text(yaml.safe_dump({**defaults, **content}, sort_keys=False))
    return path


@pytest.mark.parametrize("path", SWEEPS, ids=lambda path: path.stem)
def test_every_sweep_of_the_project_can_be_begun(path):
    """Its keys exist, its values go together, and its runs have names and labels of their own."""
    assert trials_of(path, ["distillation.text=FILE"])


# Keys of the FedSP paper's experiments, as its reference code has them for this task and method.
PAPER = [
    (
        "gpt2xl",
        "arc_easy-fedsp-1",
        {
            "federation.rounds": 50,
            "client.alignment.steps": 10,
            "client.tuning.optimizer.learning_rate": 5e-4,
            "client.tuning.micro_batch": 1,
            "prompt.projection": None,
            "distillation.stage.steps": 5000,
        },
    ),
    (
        "gpt2xl",
        "hellaswag-fedsp-1",
        {
            "federation.rounds": 200,
            "client.alignment.steps": 20,
            "client.tuning.optimizer.learning_rate": 1e-4,
            "server.tuning.steps": 20,
            "prompt.projection": 512,
        },
    ),
    (
        "gpt2xl",
        "openbookqa-finetune-1",
        {
            "method": "finetune",
            "federation.rounds": 100,
            "client.tuning.steps": 20,
            "client.tuning.optimizer.learning_rate": 2e-5,
            "evaluation.server_only": False,
            "checkpoint.every": 10,
        },
    ),
    (
        "gpt2xl",
        "race-finetune_centralised-1",
        {"federation.clients": 0, "federation.rounds": 3, "server.tuning.steps": 5492},
    ),
    (
        "opt",
        "arc_easy-fedsp-1",
        {
            "federation.rounds": 20,
            "client.tuning.micro_batch": None,
            "distillation.stage.micro_batch": None,
        },
    ),
    (
        "opt",
        "race-fedsp-1",
        {
            "federation.rounds": 50,
            "client.alignment.micro_batch": 1,
            "distillation.stage.micro_batch": 1,
            "prompt.projection": 512,
        },
    ),
    (
        "opt",
        "sciq-fedprompt-1",
        {
            "auxiliary.layers_per_cell": 24,
            "client.alignment.steps": 0,
            "client.tuning.micro_batch": 1,
            "client.tuning.optimizer.learning_rate": 5e-2,
            "server.tuning.optimizer.learning_rate": 5e-3,
            "distillation.stage.steps": 0,
            "prompt.projection": None,
        },
    ),
    (
        "opt",
        "piqa-prefix_tuning_centralised-1",
        {"federation.clients": 0, "federation.rounds": 100, "server.tuning.steps": 100},
    ),
]


def paper_trials(name: str) -> dict[str, Trial]:
    """The trials of a sweep of configs/paper, by name."""
    trials = trials_of(ROOT / "configs" / "paper" / f"{name}.yaml")
    return {trial.name: trial for trial in trials}


@pytest.mark.parametrize(("model", "name", "expected"), PAPER)
def test_an_experiment_of_the_paper_is_a_trial(model, name, expected):
    trials = paper_trials(model)
    assert len(trials) == 7 * 8
    for key, value in expected.items():
        assert reduce(getattr, key.split("."), trials[name].config) == value, key


@pytest.mark.parametrize("model", ["gpt2xl", "opt"])
def test_fedsp_is_the_same_in_the_papers_two_sweeps(model):
    """So the ablations differ from FedSP by what is ablated alone."""
    ablations = paper_trials(f"ablations_{model}")
    fedsp = {name: trial for name, trial in paper_trials(model).items() if "-fedsp-" in name}
    assert len(fedsp) == 8
    for name, trial in fedsp.items():
        assert config.changed_keys(asdict(trial.config), asdict(ablations[name].config)) == []
        assert trial.method_label == ablations[name].method_label


def go(path: Path, *more: str, status: int = 0) -> subprocess.CompletedProcess[str]:
    return run_mpi(0, ["-m", "fedsp_mpi", "sweep", path, *more], timeout=150, status=status)


def in_process(capsys: pytest.CaptureFixture[str], path: Path, *more: str) -> tuple[int, str, str]:
    """Run a sweep in this process, where nothing is started: status, output, errors."""
    status = cli.main(["sweep", str(path), *more])
    captured = capsys.readouterr()
    return status, captured.out, captured.err


# -- trials ---------------------------------------------------------------------------------------


def test_a_trial_is_base_task_method_and_seed(tmp_path):
    (tmp_path / "more").mkdir()
    (tmp_path / "more" / "base.yaml").write_text(
        f"extends: {EMBEDDED}\nfederation: {{rounds: 3, clients: 4}}\n"
    )
    (tmp_path / "task.yaml").write_text("data: {limit: {test: 7}}\nfederation: {rounds: 5}\n")
    path = written(
        tmp_path,
        base=["more/base.yaml"],
        seeds=[3, 1],
        tasks={"a": "task.yaml", "b": {"data": {"limit": {"test": 8}}}},
        methods={
            "plain": None,
            "own": {
                "extends": str(METHODS / "fedprompt.yaml"),
                "run": {"label": "own"},
                "federation": {"clients": 2},
            },
            "two": [str(METHODS / "fedsp.yaml"), str(METHODS / "fedsp_joint.yaml")],
        },
    )
    trials = trials_of(path, ["prompt.num_tokens=5"])
    assert [trial.name for trial in trials] == [
        f"{t}-{m}-{s}" for s in (3, 1) for t in "ab" for m in ("plain", "own", "two")
    ]
    by_name = {trial.name: trial.config for trial in trials}
    assert [by_name[name].run.task_label for name in ("a-plain-3", "b-own-1")] == ["a", "b"]
    assert [by_name[f"a-{m}-3"].run.label for m in ("plain", "own", "two")] == [
        "plain",
        "own",
        "FedSP without AT (joint)",
    ]
    assert (by_name["a-plain-3"].federation.rounds, by_name["b-plain-3"].federation.rounds) == (
        5,
        3,
    )
    assert (by_name["a-plain-1"].data.limit.test, by_name["b-plain-1"].data.limit.test) == (7, 8)
    assert (by_name["a-own-1"].federation.clients, by_name["a-own-1"].client.alignment.steps) == (
        2,
        0,
    )
    assert {one.prompt.num_tokens for one in by_name.values()} == {5}
    run = by_name["b-two-1"].run
    assert (run.seed, run.name, run.folder) == (1, "b-two-1", str(tmp_path / "runs"))


def test_a_sweep_without_a_base_is_of_the_embedded_default(tmp_path):
    [trial, _] = trials_of(written(tmp_path, base=None))
    assert trial.config.model.name == "embedded" and trial.config.federation.rounds == 6


def test_a_value_may_name_the_task(tmp_path):
    path = written(tmp_path, tasks={"a": None, "b": None}, methods={"fedsp": None})
    names = [
        trial.config.data.source
        for trial in trials_of(path, ["data.source=x/{task}/y", "run.label=z {z}"])
    ]
    assert names == ["x/a/y", "x/b/y"]


def test_trials_have_recipes_too(tmp_path):
    path = written(
        tmp_path, base=None, methods={"paper": None, "bridged": str(METHODS / "fedsp.yaml")}
    )
    for over in ([], ["auxiliary.dropout=true"]):
        [paper, bridged] = trials_of(path, over)
        assert (paper.config.auxiliary.first_layers, bridged.config.auxiliary.first_layers) == (
            None,
            1,
        )
    (tmp_path / "plain.yaml").write_text("model: {name: embedded}\ndata: {source: embedded}\n")
    [plain] = trials_of(written(tmp_path, base="plain.yaml", methods={"plain": None}))
    assert plain.config.recipe == "bridged" and plain.config.auxiliary.first_layers == 1


def test_only_some_of_the_runs(tmp_path, capsys):
    path = written(tmp_path, seeds=[1, 2], tasks={"a": None, "b": None}, methods={"c": None})
    status, out, error = in_process(capsys, path, "--dry-run", "--only", "b-*")
    assert (
        status == 0
        and [name in out + error for name in ("a-c-1", "a-c-2", "b-c-1", "b-c-2")]
        == [False] * 2 + [True] * 2
    )


def test_trials_are_run_by_name(tmp_path, capsys):
    path = written(tmp_path, seeds=[1, 2], tasks={"a": None, "b": None}, methods={"c": None})
    names = ["a-c-1", "a-c-2", "b-c-1", "b-c-2"]

    def listed(*only: str) -> list[str]:
        words = [word for name in only for word in ("--only", name)]
        status, out, error = in_process(capsys, path, "--dry-run", *words)
        assert status == 0 and error == ""
        return [line.split()[1] for line in out.splitlines()[1:]]

    assert set(listed()) == set(names)
    assert listed("b-c-1") == ["b-c-1"]
    assert listed("b-c-2", "a-*", "a-c-1") == ["a-c-1", "a-c-2", "b-c-2"]


@pytest.mark.parametrize("only", [["d"], ["a-c-1", "d"]])
def test_a_name_that_no_trial_has_is_a_mistake_that_lists_the_names(tmp_path, capsys, only):
    path = written(tmp_path, seeds=[1, 2], tasks={"a": None}, methods={"c": None})
    words = [word for name in only for word in ("--only", name)]
    status, out, error = in_process(capsys, path, *words)
    assert status == 2 and out == "" and error.count("\n") == 1
    assert f"--only d: found no run of that name in {path}, expected one of a-c-1, a-c-2" in error
    path = written(tmp_path, seeds=list(range(20)), tasks={"a": None}, methods={"c": None})
    _, _, error = in_process(capsys, path, "--only", "d")
    assert "a-c-11 and 8 more, which --dry-run lists" in error and "a-c-12" not in error


def test_a_trial_has_settings_of_its_own(tmp_path):
    path = written(
        tmp_path,
        tasks={"a": {"federation": {"rounds": 3}}, "b": None},
        methods={"c": {"federation": {"rounds": 4}}, "d": None},
        trials={
            "a-*": {"federation": {"clients": 5}},
            "a-c": {"federation": {"rounds": 7, "clients": 6}},
        },
    )
    federation = {trial.name: trial.config.federation for trial in trials_of(path)}
    assert [federation[f"{name}-1"].rounds for name in ("a-c", "a-d", "b-c")] == [7, 3, 4]
    assert [federation[f"{name}-1"].clients for name in ("a-c", "a-d")] == [6, 5]
    [first, *_] = trials_of(path, ["federation.rounds=9"])
    assert first.config.federation.rounds == 9


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"seed": [1]}, "seed: found an unknown key; did you mean 'seeds'?"),
        ({"seeds": 3}, "seeds: found 3, expected a list of whole numbers"),
        ({"seeds": []}, "seeds: found [], expected a list"),
        ({"seeds": [1, True]}, "seeds: found [1, true], expected a list"),
        ({"seeds": [1, 1]}, "seeds: found [1, 1], expected each once"),
        ({"folder": None}, "folder: found null, expected the folder of all runs"),
        ({"tasks": {}}, "tasks: found {}, expected names, each with settings or a file"),
        ({"methods": ["a.yaml"]}, "methods: found ['a.yaml'], expected names"),
        ({"tasks": {"a/b": None}}, "tasks: found the name 'a/b', expected letters"),
        ({"trials": ["a"]}, "trials: found ['a'], expected TASK-METHOD, each with settings"),
        ({"trials": {"word-*": {}}}, "trials: found 'word-*', which is no task with a method"),
        ({"tasks": {"a": 3}}, "tasks.a: found 3, expected settings, a file, or a list of files"),
        ({"methods": {"a": "gone.yaml"}}, "gone.yaml: found no readable file"),
        (
            {"methods": {"a": {"federation": {"round": 3}}}},
            "world-a-1: federation.round: found an unknown key; did you",
        ),
        (
            {"methods": {"a": {"federation": {"rounds": 0}}}},
            "world-a-1: federation.rounds: found 0, expected at least 1",
        ),
        (
            {"methods": {"a": {"run": {"label": "x"}}, "b": {"run": {"label": "x"}}}},
            "a and b both called 'x', expected two",
        ),
        (  # in the last trial of all
            {
                "methods": {
                    "good": None,
                    "bad": {"federation": {"clients": 0}, "server": {"tuning": {"steps": 0}}},
                }
            },
            "world-bad-1: server.tuning.steps: found 0 with federation.clients=0",
        ),
        (
            {"tasks": {"a": None, "a-b": None}, "methods": {"b-c": None, "c": None}},
            "found a with b-c and a-b with c both named a-b-c-1, expected other names",
        ),
    ],
)
def test_mistakes_are_one_line_and_nothing_is_started(tmp_path, capsys, content, message):
    status, out, error = in_process(capsys, written(tmp_path, **content))
    assert status == 2 and out == "" and error.count("\n") == 1 and message in error
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--set", "run.seed=3"], "--set run.seed=3: found a key that the sweep gives to each run"),
        (
            ["--set", "federation.round=3"],
            "world-fedsp-1: federation.round: found an unknown key; did you mean 'rounds'?",
        ),
        (["--set", "run.label=x"], "fedsp and fedprompt both called 'x'"),
        (["--launch", "no-such-mpirun -n 4"], "--launch: found no command 'no-such-mpirun'"),
        (["--launch", "mpirun 'x"], '--launch: found "mpirun \'x" (No closing quotation)'),
    ],
)
def test_mistakes_of_the_command_line(tmp_path, capsys, words, message):
    status, _, error = in_process(capsys, written(tmp_path), *words)
    assert status == 2 and error.count("\n") == 1 and message in error
    assert not (tmp_path / "runs").exists()


def test_it_is_not_for_mpirun(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("PMI_RANK", "0")
    monkeypatch.setenv("PMI_SIZE", "4")
    status, _, error = in_process(capsys, written(tmp_path))
    assert status == 2 and "found 4 processes, expected one; give mpirun to --launch" in error


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "it wrote nothing"),
        ("\n one \n two\n\n", " two"),
        ("x\nfedsp_mpi: found, expected\nAbort(2) on node 0\n", "fedsp_mpi: found, expected"),
        (
            "x\nTraceback (most recent call last):\n  File\nKeyError: "
            "1\n\nDuring\nTraceback (most recent call last):\n"
            "  File\n    here\nRuntimeError: why\nAbort(1) on node 1\n",
            "RuntimeError: why",
        ),
    ],
)
def test_an_error_summary_is_the_line_that_says_why(text, words):
    assert jobs.error_summary(text) == words


# -- real runs -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def done(tmp_path_factory) -> Path:
    """A folder with a sweep that came to its end, and what it said."""
    folder = tmp_path_factory.mktemp("sweep")
    result = go(written(folder))
    (folder / "said.txt").write_text(result.stdout)
    return folder


def test_each_run_is_complete_and_told_in_one_line(done):
    first, *lines, last = (done / "said.txt").read_text().splitlines()
    assert first == f"2 runs in {done / 'runs'}, 0 of them complete"
    for number, (line, name) in enumerate(
        zip(lines, ["world-fedsp-1", "world-fedprompt-1"], strict=True), 1
    ):
        run = read(done / "runs" / name)
        assert run.status == "complete" and run.committed_rounds == 2
        score = 100 * run.results[-1]["acc"]
        assert line.startswith(f"{number}/2  {name}  ") and line.endswith(f" s  acc {score:.2f} %")
        assert "round 2/2" in (done / "runs" / "logs" / f"{name}.txt").read_text()
    assert (
        last
        == f"all runs are complete: python -m fedsp_mpi report {done / 'runs'} --table comparison"
    )


def test_each_configuration_is_beside_the_runs_and_gives_the_same_run_alone(done):
    trials = trials_of(done / "sweep.yaml")
    for trial in trials:
        assert config.load(done / "runs" / "configs" / f"{trial.name}.yaml") == trial.config
        assert config.changed_keys(read(trial.folder).config, asdict(trial.config)) == []


def test_what_is_complete_is_not_started_again(done, capsys):
    logs = {path: path.stat().st_mtime_ns for path in (done / "runs" / "logs").iterdir()}
    status, out, _ = in_process(capsys, done / "sweep.yaml", "--launch", "false")
    assert status == 0 and "2 of them complete" in out
    assert out.count("  complete  acc ") == 2
    assert logs == {path: path.stat().st_mtime_ns for path in (done / "runs" / "logs").iterdir()}


def test_a_dry_run_says_what_is_to_do_and_writes_nothing(done, capsys):
    path = written(done, "more.yaml", seeds=[1, 2])
    before = sorted(done.rglob("*"))
    status, out, _ = in_process(capsys, path, "--dry-run")
    assert status == 0 and "4 runs in" in out and "2 of them complete" in out
    lines = out.splitlines()[1:]
    assert [line.split()[2] for line in lines] == ["complete", "complete", "new", "new"]
    assert sorted(done.rglob("*")) == before


def test_several_files_are_one_sweep(done, capsys):
    written(done, "second.yaml", folder=str(done / "others"))
    names = ["world-fedsp-1", "world-fedprompt-1"]
    status, out, _ = in_process(capsys, done / "sweep.yaml", str(done / "second.yaml"), "--dry-run")
    first, *lines = out.splitlines()
    assert (
        status == 0 and first == f"4 runs in {done / 'runs'}, {done / 'others'}, 2 of them complete"
    )
    places = [str(done / home / name) for home in ("runs", "others") for name in names]
    assert [line.split()[:3] for line in lines] == [
        [f"{number}/4", place, state]
        for number, (place, state) in enumerate(zip(places, ["complete"] * 2 + ["new"] * 2), 1)
    ]
    status, out, _ = in_process(
        capsys, done / "second.yaml", str(done / "sweep.yaml"), "--launch", "false"
    )
    assert (
        status == 1
        and out.count("FAILED with status 1") == 2
        and out.count("  complete  acc ") == 2
    )
    assert f"2 of 4 runs failed: {places[2]}, {places[3]}; " in out
    assert (done / "others" / "configs" / f"{names[0]}.yaml").is_file()
    assert (done / "others" / "logs" / f"{names[0]}.txt").is_file()


def test_what_is_set_can_name_the_file_and_the_task(tmp_path):
    path = written(tmp_path, "small.yaml")
    [trial, _] = trials_of(path, ["model.name=/models/{file}/x", "data.source={file}/{task}"])
    assert (trial.config.model.name, trial.config.data.source) == ("/models/small/x", "small/world")


def test_files_that_share_a_run_are_refused(tmp_path, capsys):
    paths = [written(tmp_path, name) for name in ("one.yaml", "two.yaml")]
    status, out, error = in_process(capsys, paths[0], str(paths[1]))
    assert status == 2 and out == "" and error.count("\n") == 1
    run = tmp_path / "runs" / "world-fedsp-1"
    assert (
        f"{paths[1]}: found the run {run}, which {paths[0]} has too, expected another folder"
        in error
    )


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        (
            "federation.rounds=3",
            (
                "world-fedsp-1: found a run (complete) of another configuration "
                "(federation.rounds: was 2"
            ),
        ),
        ("run.label=null", "fedsp and fedprompt both called 'fedsp'"),
    ],
)
def test_records_of_other_configurations_are_refused(done, capsys, setting, message):
    status, out, error = in_process(capsys, done / "sweep.yaml", "--set", setting)
    assert status == 2 and out == "" and message in error and error.count("\n") == 1
    assert "rounds" not in setting or "so have world-fedprompt-1" in error


def test_a_complete_run_whose_method_was_called_otherwise_is_refused(done, capsys):
    path = written(
        done,
        "renamed.yaml",
        methods={"fedsp": {"extends": str(METHODS / "fedsp.yaml"), "run": {"label": "B"}}},
    )
    status, _, error = in_process(capsys, path)
    assert status == 2 and "run.label: was FedSP, is B" in error


@pytest.mark.slow
def test_a_run_that_fails_is_named_and_the_others_go_on(tmp_path):
    bad = {"extends": str(METHODS / "fedsp.yaml"), "data": {"source": str(tmp_path / "nowhere")}}
    methods = {
        "bad": bad,
        "locked": str(METHODS / "finetune.yaml"),
        "good": str(METHODS / "fedprompt.yaml"),
    }
    path = written(tmp_path, methods=methods)
    logs = tmp_path / "runs" / "logs"
    (logs / "world-locked-1.txt").mkdir(parents=True)  # where its output should go
    result = go(path, status=1)
    _, failed, locked, good, last = result.stdout.splitlines()
    assert (
        failed.startswith("1/3  world-bad-1  ") and "FAILED with status 2: fedsp_mpi: " in failed
    ), both_ends(result)
    assert "nowhere" in failed and failed.endswith(f"({logs / 'world-bad-1.txt'})")
    assert f"FAILED: could not be started: {logs / 'world-locked-1.txt'}: Is a directory" in locked
    assert good.startswith("3/3  world-good-1  ") and " acc " in good
    assert (
        last == "2 of 3 runs failed: world-bad-1, world-locked-1; the same command tries them again"
    )


def test_a_run_whose_output_was_taken_away_is_a_line(tmp_path, capsys):
    path, script = written(tmp_path), tmp_path / "launch.sh"
    script.write_text(f"rm -r {tmp_path / 'runs' / 'logs'}; exit 3\n")
    status, out, _ = in_process(capsys, path, "--launch", f"sh {script}", "--only", "*-1")
    assert (
        status == 1
        and "FAILED with status 3: its output cannot be read: No such file or directory" in out
    )


# -- side by side ----------------------------------------------------------------------------------

needs_cores = pytest.mark.skipif(
    len(os.sched_getaffinity(0)) < 2, reason="two runs at a time need two cores"
)


@pytest.mark.parametrize(
    ("cores", "visible", "number", "shares"),
    [
        (6, "", 1, [(range(6), None)]),
        (6, "0,1", 1, [(range(6), None)]),
        (
            5,
            "",
            2,
            [({0, 1}, None), ({2, 3}, None)],
        ),  # equal shares: bits depend on the number of threads
        (4, "3, GPU-a,5,6", 2, [({0, 1}, "3,GPU-a"), ({2, 3}, "5,6")]),
        (3, "3,4", 3, [({0}, "3"), ({1}, "4"), ({2}, "3")]),
    ],
)
def test_places_are_equal_shares(monkeypatch, cores, visible, number, shares):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(cores)))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert [(set(place.cores), place.devices) for place in jobs.split_resources(number)] == [
        (set(share), devices) for share, devices in shares
    ]


@pytest.mark.parametrize("number", ["0", "4096"])
def test_more_places_than_cores_are_a_mistake(tmp_path, capsys, number):
    status, _, error = in_process(capsys, written(tmp_path), "--jobs", number)
    assert (
        status == 2
        and f"--jobs: found {number}, expected 1 to " in error
        and error.count("\n") == 1
    )


@pytest.mark.slow
@needs_cores
def test_two_at_a_time_have_half_of_the_cores_each_and_the_bits_of_one_at_a_time(tmp_path):
    half = len(os.sched_getaffinity(0)) // 2
    go(written(tmp_path), "--jobs", "2")
    beside = [read(tmp_path / "runs" / f"world-{name}-1") for name in ("fedsp", "fedprompt")]
    for run in beside:
        [host] = run.environment["hosts"]
        assert {device["threads"] for device in host["devices"].values()} == {half}
    settings = (
        f"run.folder={tmp_path / 'alone'}",
        f"server.compute.threads={half}",
        f"client.compute.threads={half}",
    )
    threads = torch.get_num_threads()
    file = tmp_path / "runs" / "configs" / "world-fedsp-1.yaml"
    try:
        here(["run", file, *(word for setting in settings for word in ("--set", setting))])
    finally:
        torch.set_num_threads(threads)
    assert difference(beside[0], read(tmp_path / "alone" / "world-fedsp-1")) == []


@needs_cores
@pytest.mark.slow
def test_both_run_at_once_are_told_to_stop_and_go_on(tmp_path):
    path = written(
        tmp_path,
        base=short_base("federation.rounds=20", "client.tuning.steps=12"),
        methods={"fedprompt": str(METHODS / "fedprompt.yaml")},
        seeds=[1, 2],  # of one method, so that neither is over before the other has begun
    )
    runs = [tmp_path / "runs" / f"world-fedprompt-{seed}" for seed in (1, 2)]
    command = [sys.executable, "-m", "fedsp_mpi", "sweep", str(path), "--jobs", "2"]
    process = subprocess.Popen(
        command,
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        wait_for_checkpoints(runs, process)
        process.send_signal(signal.SIGUSR1)
        _, error = process.communicate(timeout=60)
    finally:
        kill_tree(process)
    assert process.returncode == 75, error
    [line] = error.splitlines()
    assert "told to stop (SIGUSR1) in " in line and all(run.name in line for run in runs)
    for run in runs:
        assert read(run).status == "stopped" and 1 <= read(run).committed_rounds < 20
        require_alone(run)
    go(path, "--jobs", "2")
    assert [read(run).status for run in runs] == ["complete"] * 2


def wait_for_checkpoints(
    runs: list[Path], process: subprocess.Popen[str], seconds: float = 90.0
) -> None:
    """Until each run has a checkpoint (of any round: old ones go), the process has ended, or the
    time is over.
    """
    end = time.monotonic() + seconds
    while not all([*run.glob("checkpoints/[0-9]*.json")] for run in runs):
        if process.poll() is not None or time.monotonic() > end:
            return
        time.sleep(0.01)


# -- stopped ---------------------------------------------------------------------------------------

STOPS = [
    pytest.param("mpirun", signal.SIGTERM, 143, id="mpirun", marks=pytest.mark.slow),
    pytest.param("", signal.SIGINT, 130, id="interrupt", marks=pytest.mark.slow),
    pytest.param("", signal.SIGUSR1, 75, id="time limit", marks=pytest.mark.slow),
]


@pytest.mark.parametrize(("launch", "number", "status"), STOPS)
def test_told_to_stop_it_ends_with_its_run_and_goes_on_where_it_was(
    tmp_path, launch, number, status
):
    path = written(
        tmp_path,
        base=short_base("federation.rounds=6", "client.tuning.steps=12"),
        methods={"fedsp": str(METHODS / "fedsp.yaml")},
    )
    words = ["--launch", f"{mpirun()} -n 2"] if launch else []
    command = [sys.executable, "-m", "fedsp_mpi", "sweep", str(path), *words]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(
        command,
        cwd=ROOT,
        env=environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(
            signal.SIGINT, signal.SIG_DFL
        ),  # what runs in the background may ignore it
    )
    run = tmp_path / "runs" / "world-fedsp-1"
    try:
        wait_for_checkpoints([run], process)
        process.send_signal(number)
        _, error = process.communicate(timeout=60)
    finally:
        kill_tree(process)
    assert process.returncode == status, error
    assert (
        f"told to stop ({number.name}) in world-fedsp-1; the same command goes on" in error
        and error.count("\n") == 1
    )
    assert 1 <= read(run).committed_rounds < 6 and read(run).status != "complete"
    require_alone(run)
    dry = go(path, "--dry-run").stdout
    assert "after round" in dry and "of 6" in dry
    go(path, *words)
    assert read(run).status == "complete" and read(run).rounds["round"].tolist() == [
        1,
        2,
        3,
        4,
        5,
        6,
    ]
    assert "goes on after round" in (tmp_path / "runs" / "logs" / "world-fedsp-1.txt").read_text()


def require_alone(run: Path) -> None:
    """No process writes to a run any more."""
    from fedsp_mpi.record.lock import RunLock

    RunLock.take(run).release()

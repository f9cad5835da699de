"""Phases: trials that start from the results of others, and a sweep that is killed between two."""

from __future__ import annotations

import dataclasses
import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from fedsp_mpi import config
from fedsp_mpi.commands.sweep import sweep
from fedsp_mpi.commands.trials import trials_of
from fedsp_mpi.config import ConfigError
from fedsp_mpi.files import fingerprint
from fedsp_mpi.log import Log
from fedsp_mpi.record import read
from fedsp_mpi.report import compare, phases_table, read_all, summarize
from helpers.mpi import kill_tree
from helpers.paths import ROOT
from helpers.record_samples import make
from helpers.runs import SHORT

FINETUNE = {"method": "finetune"}
PROMPTS = str(ROOT / "configs" / "methods" / "fedprompt.yaml")


def base() -> dict[str, Any]:
    """The embedded default, shortened."""
    settings = config.given(None, [*SHORT, "evaluation.server_only=false"])
    return {**settings, "recipe": "bridged"}


def written(home: Path, **content: Any) -> Path:
    """A sweep's file: three phases in two ways, unless `content` says otherwise."""
    import yaml

    defaults: dict[str, Any] = {
        "folder": str(home / "runs"),
        "base": base(),
        "seeds": [1],
        "tasks": {
            "first": FINETUNE,
            "second": {**FINETUNE, "after": "first"},
            "third": {"extends": PROMPTS, "after": "second"},
        },
        "methods": {"x": {"run": {"label": "x"}}, "y": {"run": {"label": "y"}}},
    }
    path = home / "sweep.yaml"
    path.write_text(yaml.safe_dump({**defaults, **content}, sort_keys=False))
    return path


def test_a_phase_starts_from_the_one_of_the_same_method_and_seed(tmp_path):
    trials = {trial.name: trial for trial in trials_of(written(tmp_path, seeds=[1, 2]))}
    assert {name: trial.after for name, trial in trials.items()} == {
        f"{task}-{way}-{seed}": earlier and f"{earlier}-{way}-{seed}"
        for task, earlier in {"first": None, "second": "first", "third": "second"}.items()
        for way in "xy"
        for seed in (1, 2)
    }
    third = trials["third-y-2"]
    assert third.config.model.after == str(tmp_path / "runs" / "second-y-2")
    assert third.after_folder == trials["second-y-2"].folder
    assert trials["first-x-1"].config.model.after is None


def test_a_trial_may_have_another_start_or_none(tmp_path):
    path = written(
        tmp_path, trials={"*-y": {"after": None}, "second-y": {"after": "first-x"}, "first-*": {}}
    )
    after = {trial.name: trial.after for trial in trials_of(path)}
    assert after["second-x-1"] == after["second-y-1"] == "first-x-1"
    assert (after["third-x-1"], after["third-y-1"]) == ("second-x-1", None)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"tasks": {"a": {"after": "b"}}}, "tasks.a.after: found 'b', expected a task of the file"),
        ({"tasks": {"a": {"after": 3}}}, "tasks.a.after: found 3, expected a task of the file"),
        (
            {"trials": {"second-x": {"after": "first"}}},
            "trials.second-x.after: found 'first', expected TASK-METHOD, or null",
        ),
        (
            {"tasks": {"a": {**FINETUNE, "after": "b"}, "b": {**FINETUNE, "after": "a"}}},
            "after: found a-x after b-x after a-x, expected a first phase",
        ),
        ({"tasks": {"a": {"after": "a"}}}, "found a-x after a-x, expected a first phase"),
        (
            {"tasks": {"a": PROMPTS, "b": {**FINETUNE, "after": "a"}}},
            "b-x-1: found it after a-x-1 of fedsp, which leaves no model, expected one of finetune",
        ),
        (
            {"tasks": {"a": {"method": "lora"}, "b": {**FINETUNE, "after": "a"}}},
            "b-x-1: found it after a-x-1 of lora, which leaves no model",
        ),
        (
            {"trials": {"second-x": {"model": {"name": "other"}}}},
            "second-x-1: found model.name other after first-x-1 with embedded, expected one model",
        ),
        (
            {"trials": {"second-x": {"model": {"weights": "random"}}}},
            "second-x-1: model.weights: found random with model.after",
        ),
    ],
)
def test_mistakes_are_found_before_anything_starts(tmp_path, content, message):
    with pytest.raises(ConfigError) as error:
        trials_of(written(tmp_path, **content))
    assert message in str(error.value) and "\n" not in str(error.value)


def test_what_starts_from_a_failed_run_is_named_and_not_begun(tmp_path):
    lines: list[str] = []
    status = sweep([written(tmp_path)], [], Log(lines.append), launch="false", num_parallel=1)
    names = ["first-x-1", "first-y-1", "second-x-1", "second-y-1", "third-x-1", "third-y-1"]
    assert status == 1
    for number, name in enumerate(names, 1):
        [line] = [line for line in lines if line.startswith(f"{number}/6  {name}  ")]
        assert ("FAILED with status 1" in line) == (number <= 2)
        earlier = names[number - 3]
        assert number <= 2 or f"not started: {earlier}, its start, is not complete" in line
    assert lines[-1].startswith(
        "2 of 6 runs failed: first-x-1, first-y-1, and 4 that start from them were not begun; "
    )
    assert not (tmp_path / "runs" / "logs" / "second-x-1.txt").exists()


def test_a_task_whose_name_is_a_number_has_one_after_it(tmp_path):
    trials = trials_of(written(tmp_path, tasks={1: FINETUNE, 2: {**FINETUNE, "after": 1}}))
    assert {trial.name: trial.after for trial in trials}["2-x-1"] == "1-x-1"


def test_a_run_whose_start_was_run_anew_is_named_in_the_end(tmp_path):
    path = written(
        tmp_path, methods={"x": None}, tasks={"a": FINETUNE, "b": {**FINETUNE, "after": "a"}}
    )
    for trial in trials_of(path):
        record = make(trial.folder, **dataclasses.asdict(trial.config))
        if trial.after:
            weights = {"model.safetensors": "0" * 32}  # other ones
            record.describe(origin={"runs": [{"run": trial.after, "weights": weights}]})
        record.finish()
    runs = tmp_path / "runs"
    (runs / "a-x-1" / "model").mkdir()
    (runs / "a-x-1" / "model" / "model.safetensors").write_text("new")
    fingerprint.list_folder(runs / "a-x-1" / "model")
    (runs / "a-x-1").rename(tmp_path / "anew")
    copy = shlex.join(["cp", "-r", str(tmp_path / "anew"), str(runs / "a-x-1")])
    with pytest.raises(ConfigError, match=r"b-x-1: found .*: a-x-1 has another result now"):
        sweep([path], [], Log(), launch=shlex.join(["sh", "-c", copy]), num_parallel=1)


def test_a_pipe_for_the_output_is_not_waited_for(tmp_path):
    path = written(tmp_path, methods={"x": None}, tasks={"a": FINETUNE})
    (tmp_path / "runs" / "logs").mkdir(parents=True)
    os.mkfifo(tmp_path / "runs" / "logs" / "a-x-1.txt")
    lines: list[str] = []
    assert sweep([path], [], Log(lines.append), launch="true", num_parallel=1) == 1
    assert "a-x-1.txt: No regular file" in lines[-2]


def test_a_run_without_its_start_is_no_sweep(tmp_path):
    with pytest.raises(ConfigError, match=r"--only: found second-x-1 without first-x-1, .* add"):
        sweep([written(tmp_path)], [], Log(), only=["second-x-*"])
    lines: list[str] = []
    sweep(
        [written(tmp_path)], [], Log(lines.append), only=["second-x-*", "first-x-1"], dry_run=True
    )
    assert lines[1:] == ["1/2  first-x-1  new", "2/2  second-x-1  new, starts from first-x-1"]


# -- real runs -------------------------------------------------------------------------------------


def wait_until(is_true: Any, process: subprocess.Popen[str], seconds: float = 90.0) -> None:
    """Until something is true; fails if the process has ended, or the time is over."""
    end = time.monotonic() + seconds
    while not is_true():
        assert process.poll() is None and time.monotonic() < end
        time.sleep(0.01)


@pytest.mark.slow
def test_phases_by_one_command_that_is_killed_in_between(tmp_path):
    """Adapters, merged; then all weights; then prompts: the third run's record names both."""
    path = written(
        tmp_path,
        tasks={
            "first": {"method": "lora", "lora": {"merged": True}},
            "second": {**FINETUNE, "after": "first", "federation": {"rounds": 4}},
            "third": {"extends": PROMPTS, "after": "second"},
        },
        methods={"x": {"run": {"label": "x"}}},
    )
    command = [sys.executable, "-m", "fedsp_mpi", "sweep", str(path)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    runs = tmp_path / "runs"
    process = subprocess.Popen(
        command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True
    )
    try:
        second = runs / "second-x-1"
        wait_until(lambda: [*second.glob("checkpoints/[0-9]*.json")], process)
        process.send_signal(signal.SIGSTOP)  # it starts nothing more
    finally:
        kill_tree(process)
    assert read(runs / "first-x-1").status == "complete"
    end = time.monotonic() + 10
    while read(second).status == "running" and time.monotonic() < end:
        time.sleep(0.01)  # its last threads hold the lock for a moment
    assert read(second).status == "stopped"
    done = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "1/3  first-x-1  complete" in done.stdout and "--table phases" in done.stdout

    records = {name: read(runs / f"{name}-x-1") for name in ("first", "second", "third")}
    assert [run.status for run in records.values()] == ["complete"] * 3
    assert "resumes" in records["second"].sections and "origin" not in records["first"].sections
    earlier = records["third"].sections["origin"]["runs"]
    assert [item["run"] for item in earlier] == ["second-x-1", "first-x-1"]
    assert [item["method"] for item in earlier] == ["finetune", "lora"]
    for item, run in zip(earlier, (records["second"], records["first"])):
        best = run.rounds["round"][run.rounds["is_best"]][-1]
        assert (item["round"], item["rounds"]) == (best, run.committed_rounds)
        for name, digest in item["weights"].items():
            assert fingerprint.of_file(run.folder / "model" / name) == digest
    # The start of a phase is the result of the one before: the same test, the same model.
    scores = {name: {row["method"]: row for row in run.results} for name, run in records.items()}
    assert scores["second"]["zero-shot"]["loss"] == pytest.approx(
        scores["first"]["x"]["loss"], abs=1e-5
    )
    assert scores["third"]["zero-shot"]["loss"] == scores["second"]["x"]["loss"]

    text = summarize(records["third"])
    assert "starts    from second-x-1 (finetune, round " in text
    table = phases_table(compare(read_all([runs])))
    lines = [line.split(" | ") for line in table.splitlines()[2:5]]
    assert [(cells[0].strip("| "), cells[2]) for cells in lines] == [
        ("first", "pretrained weights"),
        ("second", "first (x)"),
        ("third", "second (x)"),
    ]

"""Runs that are killed, stopped or starved go on with the same bits, on any number of ranks."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from fedsp_mpi.record import Run, read
from fedsp_mpi.report import difference
from helpers import tiny
from helpers.mpi import both_ends, kill_tree, mpirun, run_mpi
from helpers.paths import ROOT
from helpers.runs import FAULTY, SHORT, WHOLE_MODEL, here

pytestmark = pytest.mark.slow

SETTINGS = (*SHORT, "federation.rounds=5", "client.resident=1")
NUM_RANDOM = int(os.environ.get("FEDSP_KILLS", "1"))  # moments; 20 for the figure in the README


def arguments(folder: Path, name: str, *words: str, fault: str = "") -> list[str]:
    settings = sets(*SETTINGS, f"run.folder={folder}")
    program = [str(FAULTY), fault] if fault else ["-m", "fedsp_mpi"]
    return [*program, "run", "--name", name, *settings, *words]


def go(n: int, folder: Path, name: str, *words: str, fault: str = "", status: int | None = 0):
    if n == 0 and not fault and status is not None:  # in this process
        return here(arguments(folder, name, *words)[2:], status)
    return run_mpi(n, arguments(folder, name, *words, fault=fault), timeout=120, status=status)


def sets(*settings: str) -> list[str]:
    """Return the words of the command line that set keys."""
    return [word for setting in settings for word in ("--set", setting)]


def die(ranks: int, folder: Path, name: str, *words: str, fault: str) -> int:
    """Run until the fault kills it; return the last round that has a checkpoint, 0 for none."""
    killed = go(ranks, folder, name, *words, fault=fault, status=None)
    assert killed.returncode != 0 and "Traceback" not in killed.stderr, both_ends(killed)
    checkpoints = (folder / name / "checkpoints").glob("[0-9]*.json")
    return max((int(path.stem) for path in checkpoints), default=0)


def die_and_go_on(
    folder: Path, name: str, *words: str, fault: str, ranks_after: int
) -> tuple[Run, Run]:
    """Return the run `{name}-whole`, and its equal that a fault killed on two ranks.

    While clients train, the server writes the checkpoint of the round before: where the fault is
    not on rank 0, it may come before that.
    """
    round = die(2, folder, f"{name}-killed", *words, fault=fault)
    assert round > 0
    resumed = go(ranks_after, folder, f"{name}-killed", "--resume", "auto", *words)
    assert f"goes on after round {round}" in resumed.stdout
    undisturbed, run = read(folder / f"{name}-whole"), read(folder / f"{name}-killed")
    assert difference(undisturbed, run) == []
    return undisturbed, run


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Make a folder with the undisturbed run `whole`, whose auxiliary model the others reuse."""
    folder = tmp_path_factory.mktemp("runs")
    go(2, folder, "whole")
    return folder


def require_equal(folder: Path, name: str) -> None:
    """Require that the run has the bits of the undisturbed one, and every round once."""
    undisturbed, run = read(folder / "whole"), read(folder / name)
    assert run.status == "complete" and difference(undisturbed, run) == []
    assert run.rounds["round"].tolist() == [1, 2, 3, 4, 5]
    assert run.clients["client"].tolist() == [0, 1, 2] * 5
    for column in ("acc", "loss", "round"):
        assert run.results[column].tobytes() == undisturbed.results[column].tobytes()


MOMENTS = [
    ("kill:checkpoint:0:2", 2, 4),
    ("kill:evaluation:0", 2, 0),
    ("die:local training:2:4", 3, 0),
    ("tear:client-00001:2", 2, 0),
    ("tear:0003.json:1", 0, 0),
    ("tear:run.h5:5", 0, 0),
]


@pytest.mark.parametrize(
    ("moment", "ranks", "ranks_after"), MOMENTS, ids=[moment for moment, *_ in MOMENTS]
)
def test_killed_at_a_chosen_moment(folder, moment, ranks, ranks_after):
    name = moment.replace(":", "-").replace(" ", "-")
    die(ranks, folder, name, fault=moment)
    go(ranks_after, folder, name, "--resume", "auto")
    require_equal(folder, name)


@pytest.mark.parametrize("number", range(NUM_RANDOM))
def test_killed_at_a_random_moment(folder, number):
    dice = random.Random(number)
    ranks, ranks_after = dice.choice([2, 3, 4]), dice.choice([0, 2, 4])
    name = f"random{number}"
    command = [mpirun(), "-n", str(ranks), sys.executable, *arguments(folder, name)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(
        command, cwd=ROOT, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    # Not in the imports, of which there are seconds.
    end = time.monotonic() + 60
    while not (folder / name / "run.h5").exists() and time.monotonic() < end:
        time.sleep(0.01)
    time.sleep(dice.uniform(0, 6))
    kill_tree(process)
    if (folder / name / "run.h5").exists():
        read(folder / name)
    go(ranks_after, folder, name, "--resume", "auto", status=None)
    require_equal(folder, name)


def test_killed_between_compressed_rounds(folder):
    """References, residuals and the outer optimizer's moments go on, on other ranks."""
    settings = (
        "federation.compression.format=int8",
        "federation.clients_per_round=2",
        "federation.outer.optimizer=fedadam",
        "method=finetune",
        "client.tuning.optimizer.learning_rate=1e-3",
    )
    words = sets(*settings)
    go(0, folder, "int8-whole", *words)
    undisturbed, run = die_and_go_on(folder, "int8", *words, fault="kill:gather:0:4", ranks_after=0)
    assert run.rounds["bytes_up"].tolist() == undisturbed.rounds["bytes_up"].tolist()


def test_killed_between_sealed_rounds(folder):
    """The start after it has new keys, on other ranks, and the bits of an open run."""
    words = sets("wire.encryption=true")
    assert die(2, folder, "sealed", *words, fault="kill:gather:0:4") == 3
    go(4, folder, "sealed", "--resume", "auto", *words)
    require_equal(folder, "sealed")
    first, second = read(folder / "sealed").sections["encryption"].values()
    assert (first["round"], second["round"]) == (0, 3)
    keys = [[*start["ranks"], *start["clients"].values()] for start in (first, second)]
    assert [len(of_start) for of_start in keys] == [2 + 3, 4 + 3]
    assert len({key for of_start in keys for key in of_start}) == 12


def test_killed_in_the_middle_of_labelling(folder, tmp_path):
    """Pseudo-labels are kept like all else that clients keep; those of earlier rounds count."""
    settings = (
        *WHOLE_MODEL,
        f"data.source={tiny.gap_task_folder(tmp_path / 'data')}",
        "data.verbaliser=[grey, blue]",
        "data.labels=6",
        "data.server_share=8",
        "augment.clients=2",
        "augment.per_client=8",
    )
    words = sets(*settings)
    go(0, folder, "labels-whole", *words)
    clients = read(folder / "labels-whole").clients
    labelled = clients[(clients["round"] == 4) & (clients["texts_scored"] > 0)]
    fault = f"labels:{labelled['client'][-1]}:4"
    _, run = die_and_go_on(folder, "labels", *words, fault=fault, ranks_after=3)
    waiting = run.clients[(run.clients["round"] == 4) & (run.clients["texts_scored"] == 0)]
    assert (waiting["pseudo_labels"] > 0).any(), "labels of an earlier round were kept"


def test_told_to_stop_where_no_checkpoint_is_due(folder):
    words = sets("checkpoint.every=null")
    stopped = go(2, folder, "late", *words, fault="signal:merge:0:3", status=75)
    assert "told to stop after round 3" in stopped.stderr
    run = read(folder / "late")
    assert run.status == "stopped" and run.committed_rounds == 3
    assert [path.name for path in (folder / "late" / "checkpoints").glob("*.json")] == ["0003.json"]
    go(0, folder, "late", "--resume")
    require_equal(folder, "late")


def test_killed_in_the_round_of_the_tier_above(folder):
    """The experts, the general model and what users keep go on, on other ranks."""
    experts = "[{name: a, users: [ann, ben]}, {name: b, users: [ben, cem]}]"
    settings = (
        "method=plmm",
        f"tiers.experts={experts}",
        "tiers.judge=rounds",
        "tiers.questions=5",
        "tiers.personal.proximal=0.1",
        "client.alignment.steps=0",
    )
    words = sets(*settings)
    go(0, folder, "tiers-whole", *words)
    # On rank 0, which plays no user, two experts train a round: this is in the third one.
    fault = "kill:local training:0:3"
    undisturbed, run = die_and_go_on(folder, "tiers", *words, fault=fault, ranks_after=4)
    assert len(run.tiers) == len(undisturbed.tiers)


@pytest.mark.parametrize("phase", ["distillation", "evaluation"])
def test_told_to_stop_before_and_after_the_rounds(folder, phase):
    name, words = f"stop-{phase}", sets("distillation.reuse=false")
    stopped = go(2, folder, name, *words, fault=f"signal:{phase}:0", status=75)
    assert "told to stop" in stopped.stderr and "Traceback" not in stopped.stderr
    resumed = go(0, folder, name, "--resume", *words)
    assert ("goes on after 1 of 4 steps of the distillation" in resumed.stdout) == (
        phase == "distillation"
    )
    require_equal(folder, name)


@pytest.mark.parametrize("moment", ["distillation-3.safetensors", "distillation.json"])
def test_killed_while_a_state_of_the_distillation_is_written(folder, moment):
    name = f"torn-{moment}"
    words = sets("distillation.reuse=false", "checkpoint.distillation_seconds=0")
    count = 3 if moment.endswith("json") else 1
    die(0, folder, name, *words, fault=f"tear:{moment}:{count}")
    resumed = go(0, folder, name, "--resume", *words)
    assert "goes on after 2 of 4 steps of the distillation" in resumed.stdout
    require_equal(folder, name)
    assert list((folder / name / "checkpoints").glob("distillation*")) == []


def test_a_damaged_checkpoint_gives_way_and_another_configuration_does_not_go_on(folder):
    round = die(2, folder, "damaged", fault="kill:local training:1:4")
    other = sets("server.tuning.steps=3", "run.seed=2")
    refused = go(0, folder, "damaged", "--resume", *other, status=2)
    assert "run.seed: was 1, is 2; server.tuning.steps: was 2, is 3" in refused.stderr
    assert refused.stderr.count("\n") == 1
    newest = folder / "damaged" / "checkpoints" / f"server-{round:04d}.safetensors"
    newest.write_bytes(newest.read_bytes()[:-100])
    free = sets("deadlines.gather=100", "client.resident=5")
    again = go(0, folder, "damaged", "--resume", *free)
    assert "checkpoint is not usable" in again.stdout
    assert f"goes on after round {round - 1}" in again.stdout
    require_equal(folder, "damaged")


def test_a_complete_run_and_no_run(folder):
    done = go(0, folder, "whole", "--resume", "auto")
    assert "is complete, there is nothing to go on with" in done.stderr
    none = go(0, folder, "nobody", "--resume", status=2)
    assert "found no run in" in none.stderr and not (folder / "nobody").exists()


def test_a_full_disk_ends_the_run_and_leaves_the_last_checkpoint(folder):
    full = go(0, folder, "full", fault="full:client-:5", status=None)
    assert full.returncode == 1 and "No space left on device" in full.stderr, both_ends(full)
    assert "the last checkpoint is still there" in full.stderr
    assert "Traceback" not in full.stderr, full.stderr
    assert read(folder / "full").status == "failed"
    go(0, folder, "full", "--resume")
    require_equal(folder, "full")


def test_two_jobs_do_not_write_to_one_run(folder):
    first = subprocess.Popen(
        [sys.executable, *arguments(folder, "shared", fault="stop:local training:0:2")],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.DEVNULL,
    )
    try:
        while not (folder / "shared" / "checkpoints" / "0001.json").exists():
            assert first.poll() is None
            time.sleep(0.05)
        second = go(0, folder, "shared", "--resume", status=2)
        assert (
            f"process {first.pid} on host" in second.stderr
            and "expected to be alone" in second.stderr
        )
        assert go(0, folder, "shared", "--replace", status=2).stderr.count("\n") == 1
    finally:
        first.send_signal(signal.SIGKILL)
        first.wait()
    go(0, folder, "shared", "--resume")
    require_equal(folder, "shared")

"""The batch scripts in a real Slurm: they run, stop in time, go on after a requeue, and refuse what
cannot work.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from fedsp_mpi.config import load, to_yaml
from fedsp_mpi.record import read
from fedsp_mpi.report import difference
from helpers import runs
from helpers.mpi import mpirun
from helpers.paths import PROGRAMS, ROOT
from helpers.slurm import Job, Slurm

pytestmark = pytest.mark.slow

ROUNDS = 30
SHORT = (*runs.SHORT, f"federation.rounds={ROUNDS}", "federation.clients=2")
ONE_ROUND = "federation.rounds=1"
ENDLESS = ("distillation.stage.steps=1000000", "distillation.reuse=false")
TWO = ("--ntasks=2",)

# Python runs this at its start. A round takes at least four seconds then, on any machine, until the
# job is requeued.
SLOW = f"""
import os, sys, time
if "SLURM_RESTART_COUNT" not in os.environ:
    sys.path.append({str(PROGRAMS)!r})
    import faulty
    faulty.in_phase(lambda: time.sleep(4), "merge", "0")
"""


@pytest.fixture(scope="module")
def slurm() -> Iterator[Slurm]:
    mpirun()
    with Slurm() as slurm:
        yield slurm


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("runs")


@pytest.fixture(scope="module")
def slow(tmp_path_factory) -> str:
    """A PYTHONPATH under which rounds take their time."""
    folder = tmp_path_factory.mktemp("slow")
    (folder / "sitecustomize.py").write_text(SLOW)
    return f"{folder}:{ROOT}"


def settings(*more: str) -> list[str]:
    return [item for setting in (*SHORT, *more) for item in ("--set", setting)]


def submit(
    slurm: Slurm,
    folder: Path,
    name: str,
    *more: str,
    options=TWO,
    script="fedsp.sbatch",
    **variables,
) -> Job:
    """The embedded default, shortened, under a name below the folder."""
    return slurm.submit(
        options, script, *settings(*more), FEDSP_RUNS=str(folder), FEDSP_NAME=name, **variables
    )


@pytest.fixture(scope="module")
def limited(slurm, folder, slow) -> Job:
    """A job whose rounds alone need the two minutes that it has; what is left needs far less after
    a requeue.
    """
    options = (*TWO, "--time=2", "--signal=B:USR1@1")
    return submit(slurm, folder, "limited", options=options, PYTHONPATH=slow)


@pytest.fixture(scope="module")
def whole(slurm, folder, limited) -> Path:
    """The same run without a disturbance.

    The limited one has begun before, because it waits most of the time.
    """
    submit(slurm, folder, "whole").wait("COMPLETED")
    return folder / "whole"


def test_the_script_runs_the_embedded_default_with_mpirun(whole):
    run = read(whole)
    assert run.status == "complete" and run.committed_rounds == ROUNDS
    assert len(run.environment["hosts"]) == 2


def test_it_runs_with_srun_over_two_nodes(slurm, folder):
    job = submit(
        slurm, folder, "srun", ONE_ROUND, options=("--nodes=2", *TWO), FEDSP_LAUNCHER="srun"
    )
    job.wait("COMPLETED")
    assert (
        "2 (1 server, 1 client ranks)" in job.text() and read(folder / "srun").status == "complete"
    )


def test_a_heterogeneous_job_is_one_world(slurm, folder):
    """What the script asks for is too much for this machine; the command line takes its place, part
    by part.
    """
    options = ["-n1", "-c1", ":", "-n2", "-c1"]
    job = submit(slurm, folder, "het", ONE_ROUND, options=options, script="fedsp_het.sbatch")
    job.wait("COMPLETED")
    assert (
        "3 (1 server, 2 client ranks)" in job.text() and read(folder / "het").status == "complete"
    )


def test_one_task_of_a_sweep_is_requeued_alone(slurm, folder, slow, tmp_path):
    """The second: Slurm knows the last task by the array's own number too."""
    files = [tmp_path / "one.yaml", tmp_path / "two.yaml"]
    for rounds, file in zip((1, 5), files):
        file.write_text(to_yaml(load(None, [*SHORT, f"federation.rounds={rounds}"])))
    variables = {"FEDSP_RUNS": str(folder), "FEDSP_NAME": "sweep", "PYTHONPATH": slow}
    sweep = slurm.submit(
        ["--ntasks=1", "--array=1-2"], "sweep.sbatch", *map(str, files), **variables
    )
    one, two = (Job(slurm, f"{sweep.id}_{task}") for task in (1, 2))
    two.wait_for("round 2/")
    two.tell_to_stop()
    assert two.wait("COMPLETED")["Restarts"] == "1" and one.wait("COMPLETED")["Restarts"] == "0"
    assert [read(folder / name).committed_rounds for name in ("sweep-1-one", "sweep-2-two")] == [
        1,
        5,
    ]


@pytest.mark.parametrize(
    ("script", "setting", "variables", "message"),
    [
        # Processes that do not find each other would be so many runs, all writing to one folder.
        (
            "fedsp.sbatch",
            ONE_ROUND,
            {"FEDSP_LAUNCHER": "srun", "FEDSP_SRUN_MPI": "none"},
            r"^fedsp_mpi: .*--mpi=pmi2",
        ),
        (
            "fedsp.sbatch",
            "federation.round=1",
            {"FEDSP_LAUNCHER": "srun"},
            r"^fedsp_mpi: .*federation\.round: ",
        ),
        ("fedsp.sbatch", "federation.round=1", {}, r"^fedsp_mpi: .*federation\.round: "),
        ("fedsp.sbatch", ONE_ROUND, {"FEDSP_LAUNCHER": "prun"}, r"^FEDSP_LAUNCHER: found prun"),
        ("sweep.sbatch", ONE_ROUND, {}, r"^sweep\.sbatch: .*--array=1-"),
    ],
    ids=[
        "singletons",
        "typo under srun",
        "typo under mpirun",
        "launcher",
        "sweep without an array",
    ],
)
def test_a_mistake_is_one_message_and_status_2(slurm, folder, script, setting, variables, message):
    job = submit(
        slurm, folder, "refused", setting, options=("--nodes=2", *TWO), script=script, **variables
    )
    assert job.wait("FAILED")["ExitCode"] == "2:0"
    assert len(re.findall(message, job.text(), re.M)) == 1 and "Traceback" not in job.text(), (
        job.text()
    )
    assert not (folder / "refused").exists()


def test_no_requeue_if_nothing_was_gained(slurm, folder):
    job = submit(
        slurm, folder, "nothing", *ENDLESS, "distillation.zero_stage=1", options=["--ntasks=1"]
    )
    job.wait_for(str(folder / "nothing"))
    job.tell_to_stop()
    found = job.wait("FAILED")
    assert (found["ExitCode"], found["Restarts"]) == ("75:0", "0")
    assert "nothing was gained since its last start" in job.text()


def test_a_cancelled_job_leaves_a_readable_record_and_another_job_goes_on(
    slurm, folder, slow, whole
):
    job = submit(slurm, folder, "cancelled", PYTHONPATH=slow)
    job.wait_for("round 2/")
    job.cancel()
    job.wait("CANCELLED")
    done = subprocess.run(
        [sys.executable, "-m", "fedsp_mpi", "report", folder / "cancelled"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert re.search(r"^ +2 +2/2 ", done.stdout, re.M), done.stdout
    slurm.submit(TWO, "fedsp.sbatch", "--resume", str(folder / "cancelled")).wait("COMPLETED")
    assert difference(read(whole), read(folder / "cancelled")) == []


def test_a_job_that_meets_its_time_limit_goes_on_to_the_same_bits(limited, whole, folder):
    assert int(limited.wait("COMPLETED", timeout=300)["Restarts"]) >= 1
    told = re.search(r"told to stop after round (\d+)", limited.text())
    assert told and f"goes on after round {told[1]} " in limited.text(), limited.text()
    assert difference(read(whole), read(folder / "limited")) == []


@pytest.mark.parametrize(
    "script",
    [*sorted((ROOT / "slurm").glob("*.s*")), ROOT / "configs" / "comparison" / "gpu.sh"],
    ids=lambda path: path.name,
)
def test_shellcheck_has_nothing_to_say(script):
    if not shutil.which("shellcheck"):
        pytest.skip("there is no shellcheck")
    done = subprocess.run(["shellcheck", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout

"""The batch scripts in a real Slurm: they run, stop in time, go on after a requeue, and refuse what cannot work."""

from __future__ import annotations

import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from mpi import PROGRAMS, ROOT, mpirun
from slurm import Job, Slurm

from fedsp_mpi.record import difference, read

ROUNDS = 30
SHORT = (
    f"federation.rounds={ROUNDS}",
    "federation.clients=2",
    "distillation.stage.steps=4",
    "client.alignment.steps=2",
    "client.prompt.steps=2",
    "server.tuning.steps=2",
    "data.limit.train=64",
    "data.limit.validation=16",
    "data.limit.test=24",
)
TWO = ("--ntasks=2",)

# Python runs this at its start. A round takes at least two seconds then, on any machine, until the job is requeued.
SLOW = f"""
import os, sys, time
if "SLURM_RESTART_COUNT" not in os.environ:
    sys.path.append({str(PROGRAMS)!r})
    import faulty
    faulty.in_phase(lambda: time.sleep(2), "broadcast", "0")
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


def submit(slurm: Slurm, folder: Path, name: str, *more: str, options=TWO, script="fedsp.sbatch", **variables) -> Job:
    """The embedded default, shortened, under a name below the folder."""
    return slurm.submit(options, script, *settings(*more), FEDSP_RUNS=str(folder), FEDSP_NAME=name, **variables)


@pytest.fixture(scope="module", autouse=True)
def limited(slurm, folder, slow) -> Job:
    """A job that needs more than the minute it has. It is submitted first, because it waits most of the time."""
    options = (*TWO, "--time=1", "--signal=B:USR1@1")
    return submit(slurm, folder, "limited", options=options, PYTHONPATH=slow)


@pytest.fixture(scope="module")
def whole(slurm, folder) -> Path:
    """The same run without a disturbance."""
    submit(slurm, folder, "whole").wait("COMPLETED")
    return folder / "whole"


def test_the_script_runs_the_embedded_default_with_mpirun(whole):
    run = read(whole)
    assert run.status == "complete" and run.committed_rounds == ROUNDS
    assert len(run.environment["hosts"]) == 2


def test_it_runs_with_srun_over_two_nodes_with_the_same_bits(slurm, folder, whole):
    options = ("--nodes=2", *TWO)
    job = submit(slurm, folder, "srun", options=options, FEDSP_LAUNCHER="srun")
    job.wait("COMPLETED")
    assert "2 (1 server, 1 client ranks)" in job.text()
    assert difference(read(whole), read(folder / "srun")) == []


def test_a_heterogeneous_job_is_one_world(slurm, folder, whole):
    """The smaller parts are asked for on the command line, in the place of those in the script."""
    job = submit(slurm, folder, "het", options=(*"-n1 -c1 : -n2 -c1".split(),), script="fedsp_het.sbatch")
    job.wait("COMPLETED")
    assert "3 (1 server, 2 client ranks)" in job.text()
    assert difference(read(whole), read(folder / "het")) == []


def test_one_task_of_a_sweep_is_requeued_alone(slurm, folder, slow, tmp_path):
    files = []
    for name in ("one", "two"):
        lines = [f"{key}: {value}" for key, value in (setting.split("=") for setting in SHORT)]
        files.append(tmp_path / f"{name}.yaml")
        files[-1].write_text(f"extends: {ROOT}/fedsp_mpi/resources/embedded.yaml\n" + nested(lines))
    variables = {"FEDSP_RUNS": str(folder), "FEDSP_NAME": "sweep", "PYTHONPATH": slow}
    sweep = slurm.submit([*TWO, "--array=1-2"], "sweep.sbatch", *map(str, files), **variables)
    tasks = [Job(slurm, f"{sweep.id}_{number}") for number in (1, 2)]
    tasks[1].wait_for("round 2/")
    tasks[1].tell_to_stop()
    assert [int(task.wait("COMPLETED")["Restarts"]) for task in tasks] == [0, 1]
    for name in ("sweep-1-one", "sweep-2-two"):
        assert read(folder / name).status == "complete"

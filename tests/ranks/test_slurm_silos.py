"""Silos on the disks of two Slurm nodes, each of which sees its own alone: the shipped script finds
a rank for each, with `host` and without.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from fedsp_mpi.record import Run, read
from helpers import runs
from helpers.mpi import mpirun
from helpers.paths import ROOT
from helpers.slurm import Job, Slurm

pytestmark = pytest.mark.slow

# Rank 0 is the server; ranks 0 and 1 are on n1, rank 2 is on n2.
OPTIONS = ("--nodes=2", "--ntasks=3")
NODE_OF_RANK = ("n1", "n1", "n2")
NUM_ROWS = {
    "n1": {"sites/north": 8, "own": 10},
    "n2": {"sites/south": 12, "sites/east": 14, "own": 6},
}

# Python runs this at its start: it imports all that a run needs, and the server says when all ranks
# have met.
CLOCK = """
import time
from fedsp_mpi.run import execute, silo_inputs

connect = execute.connect

def timed(*arguments):
    wire = connect(*arguments)
    if wire.is_server:
        print(f"met at {time.time():.3f}", flush=True)
    return wire

execute.connect = timed
"""


def write(folder: Path, num_rows: int, split: str = "train") -> None:
    folder.mkdir(parents=True)
    rows = [{"sentence": f"w1 w2 {index}", "label": index % 2} for index in range(num_rows)]
    (folder / f"{split}.jsonl").write_text("\n".join(map(json.dumps, rows)))


@pytest.fixture(scope="module")
def local(tmp_path_factory) -> Path:
    """Where each node has its own disk."""
    return tmp_path_factory.mktemp("local")


@pytest.fixture(scope="module")
def slurm(tmp_path_factory, local) -> Iterator[Slurm]:
    mpirun()
    disks = tmp_path_factory.mktemp("disks")
    for node, silos in NUM_ROWS.items():
        for name, num_rows in silos.items():
            write(disks / node / name, num_rows)
    write(disks / "n1/server", 8, "validation")
    (disks / "n1/sites/south").mkdir()  # as where a disk is not mounted
    with Slurm({node: {local: disks / node} for node in NUM_ROWS}) as slurm:
        yield slurm


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("runs")


def submit(slurm: Slurm, local: Path, folder: Path, name: str, *silos: str, **variables) -> Job:
    """FedPrompt with these silos; a silo is written `{name: north, host: n1}`, its source left out
    where it is a folder of its name.
    """
    items = [
        silo if "source" in silo else silo.replace("}", f", source: '{local}/sites/{name}'}}")
        for silo in silos
        for name in re.findall(r"name: (\w+)", silo) or [""]
    ]
    settings = [
        *(item for item in runs.SHORT if not item.startswith(("data.", "federation.clients"))),
        *runs.FEDPROMPT,
        "data.task=sst2",
        "data.verbaliser=[green, purple]",
        "data.source=null",
        "federation.clients=null",
        f"federation.silos=[{', '.join(items)}]",
        f"server.data.source={local / 'server'}",
        "server.tuning.steps=0",
        "evaluation.server_only=false",
        *(["federation.on_failure=stop"] if name == "stop" else []),
    ]
    arguments = [word for item in settings for word in ("--set", item)]
    where = {"FEDSP_RUNS": str(folder), "FEDSP_NAME": name}
    return slurm.submit(OPTIONS, "fedsp.sbatch", *arguments, **where, **variables)


@pytest.fixture(scope="module")
def jobs(slurm, local, folder, tmp_path_factory) -> dict[str, Job]:
    """All jobs at once: most of their time they wait."""
    clock = tmp_path_factory.mktemp("clock")
    (clock / "sitecustomize.py").write_text(CLOCK)
    hosts = [
        "{name: east}",
        "{name: south, host: n2}",
        f"{{name: first, host: n1, source: '{local / 'own'}'}}",
        f"{{name: second, host: n2, source: '{local / 'own'}'}}",
        "{name: elsewhere, host: n2}",
        f"{{name: either, source: '{local / 'own'}'}}",
    ]
    places = (slurm, local, folder)
    return {
        "found": submit(*places, "found", f"{{source: '{local}/sites/*'}}"),
        "hosts": submit(*places, "hosts", *hosts, FEDSP_LAUNCHER="srun"),
        "stop": submit(
            *places, "stop", "{name: north}", "{name: elsewhere}", PYTHONPATH=f"{clock}:{ROOT}"
        ),
    }


def nodes_of(run: Run) -> dict[str, str]:
    """The node that played each silo, by the record."""
    names = run.sections["silos"]["names"]
    assignment = run.sections["topology"]["assignment"]
    return {
        names[client]: NODE_OF_RANK[rank] for rank, ids in enumerate(assignment) for client in ids
    }


def took_part(run: Run) -> dict[int, list[int]]:
    """The clients whose updates were used, by round."""
    rows = run.clients[run.clients["status"] == "ok"]
    return {round: rows["client"][rows["round"] == round].tolist() for round in (1, 2)}


def test_a_silo_goes_to_a_node_that_sees_its_rows(jobs, folder):
    """Each rank finds those of its own node; n1 has an empty folder of the name of one on n2."""
    jobs["found"].wait("COMPLETED")
    run = read(folder / "found")
    assert nodes_of(run) == {"east": "n2", "north": "n1", "south": "n2"}
    assert took_part(run) == {1: [0, 1, 2], 2: [0, 1, 2]}
    assert run.sections["data"]["client_shards"] == [14, 8, 12]
    said = jobs["found"].text()  # by check
    for node, sight in (("n1", "2 of 3 folders, not east"), ("n2", "2 of 3 folders, not north")):
        assert f"{node} sees {sight}\n" in said, said


def test_a_silo_goes_to_its_host_and_one_that_nobody_sees_is_left_out(jobs, folder):
    """Two silos have the same path, each on its own node; a third does not say which it means."""
    jobs["hosts"].wait("COMPLETED")
    run = read(folder / "hosts")
    nodes = nodes_of(run)
    del nodes["either"]
    assert nodes == {"east": "n2", "south": "n2", "first": "n1", "second": "n2", "elsewhere": "n2"}
    assert took_part(run) == {1: [0, 1, 2, 3], 2: [0, 1, 2, 3]}
    assert run.sections["data"]["client_shards"] == [14, 12, 10, 6, 0, 0]
    elsewhere, either = re.findall(r"^left out: .*", jobs["hosts"].text(), re.M)
    assert elsewhere.startswith("left out: silo elsewhere on n2: sst2: found no folder ")
    assert re.match(
        r"left out: silo either on n\d: found other files on each host \(\d+ bytes on n1, ", either
    )


def test_one_that_nobody_sees_ends_the_job_at_once_where_all_are_needed(jobs, folder):
    """The check before the run says so."""
    job = jobs["stop"]
    assert job.wait("FAILED")["ExitCode"] == "2:0"
    [line] = re.findall(r"^fedsp_mpi: .*", job.text(), re.M)
    assert re.search(r"silo: elsewhere on n\d: .*found no folder ", line)
    assert "federation.on_failure=stop: a run ends before its first round\n" in job.text()
    ended = Path(job.fields()["StdOut"]).stat().st_mtime
    assert ended - float(re.findall(r"^met at (\S+)", job.text(), re.M)[-1]) < 10
    assert not (folder / "stop").exists()

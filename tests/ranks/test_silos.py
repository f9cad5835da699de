"""Silos: text of their own, opened by the rank that plays them; the same bits as the simulation."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from fedsp_mpi.record import read
from fedsp_mpi.report.diff import difference
from helpers.mpi import both_ends, run_mpi
from helpers.opened import opened_files
from helpers.paths import PROGRAMS
from helpers.runs import FAULTY, FEDBPT, FEDPROMPT, SHORT, fedsp, here, together

TRESPASS = PROGRAMS / "trespass.py"
METHODS = {
    "fedsp": (),
    "fedprompt": FEDPROMPT,
    "fedbpt": FEDBPT,
    "finetune": ("method=finetune", "client.tuning.optimizer.learning_rate=1e-4"),
}


@pytest.fixture(scope="module")
def silos(tmp_path_factory) -> Path:
    """What `split` writes of the short embedded run."""
    folder = tmp_path_factory.mktemp("split") / "silos"
    here(["split", "--to", folder, *sets(SHORT)])
    return folder


def sets(settings) -> list[str]:
    return [word for item in settings for word in ("--set", item)]


def of_silos(silos: Path, *settings: str) -> list[str]:
    """The arguments of a run on the silos, with the settings of SHORT that they leave open."""
    kept = [item for item in SHORT if not item.startswith(("data.", "federation.clients"))]
    return [str(silos / "silos.yaml"), *sets([*kept, *settings])]


def words_of_run(folder: Path, name: str) -> list[str]:
    return ["run", "--name", name, "--set", f"run.folder={folder}"]


def simulate(folder: Path, name: str, *settings: str) -> Path:
    here([*words_of_run(folder, name), *sets([*SHORT, *settings])])
    return folder / name


def run_silos(n, silos, folder, name, *settings, status=0):
    return fedsp(n, [*words_of_run(folder, name), *of_silos(silos, *settings)], status)


def test_the_same_bits_as_the_simulation(tmp_path, silos):
    whole = simulate(tmp_path, "simulation", *FEDBPT)
    run_silos(0, silos, tmp_path, "silos", *FEDBPT)
    assert difference(read(whole), read(tmp_path / "silos")) == []


@pytest.mark.slow
def test_the_same_bits_as_the_simulation_on_any_number_of_ranks(tmp_path, silos):
    on_ranks = {0: ["fedsp", "fedprompt", "finetune"], 2: [*METHODS], 3: ["fedsp"], 4: [*METHODS]}
    for n, names in on_ranks.items():
        folder = tmp_path / f"n{n}"
        runs = [[*words_of_run(folder, m), *of_silos(silos, *METHODS[m])] for m in names]
        together(n, [(arguments, None) for arguments in runs])
    for name, settings in METHODS.items():
        whole = read(simulate(tmp_path, name, *settings))
        for n in on_ranks:
            if name in on_ranks[n]:
                assert difference(whole, read(tmp_path / f"n{n}" / name)) == [], (name, n)


@pytest.mark.slow
@pytest.mark.parametrize("n", [0, 3])
def test_silos_choose_the_best_round_where_the_server_owns_no_text(tmp_path, silos, n):
    names = [f"client_{client:03d}" for client in range(3)]
    settings = [
        *FEDPROMPT,
        "server.tuning.steps=0",
        "server.data.source=null",
        "evaluation.at=silos",
        "evaluation.held_out=0.25",
        "federation.rounds=3",
        f"federation.silos={{source: '{silos}/{{silo}}', names: [{', '.join(names)}]}}",
    ]
    run_silos(n, silos, tmp_path, "run", *settings)
    run = read(tmp_path / "run")
    assert np.isnan(run.rounds["validation_loss"]).all()
    assert run.silos["silo"].tolist() == [0, 1, 2] * 3
    assert set(run.silos["n"].tolist()) == {4}
    means = run.silos["loss"].reshape(3, 3).mean(axis=1)
    lowest = np.minimum.accumulate(means)
    assert (run.rounds["is_best"] == (means == lowest)).all()
    [size] = [
        row["bytes"] for row in run.wire if (row["phase"], row["name"]) == ("evaluation", "prompt")
    ]
    assert size == 9 * 4 * run.sections["models"]["prompt_on_the_wire"]
    assert (tmp_path / "run" / "prompt").is_dir()


@pytest.mark.slow
def test_two_ranks_of_the_server_judge_alike(tmp_path, silos):
    settings = ("evaluation.at=both", "topology.server_ranks=2")
    run_silos(4, silos, tmp_path, "two", *settings)
    run_silos(0, silos, tmp_path, "one", settings[0])
    one, two = read(tmp_path / "one"), read(tmp_path / "two")
    assert two.silos["loss"] == pytest.approx(one.silos["loss"], rel=1e-4)
    assert two.rounds["is_best"].tolist() == one.rounds["is_best"].tolist()


@pytest.mark.slow
def test_a_killed_run_goes_on_with_the_same_bits(tmp_path, silos):
    whole = simulate(tmp_path, "simulation", "federation.rounds=4")
    where = ["--name", "killed", "--set", f"run.folder={tmp_path}"]
    arguments = [*where, *of_silos(silos, "federation.rounds=4")]
    killed = run_mpi(
        3, [FAULTY, "kill:local training:1:3", "run", *arguments], timeout=60, status=None
    )
    assert killed.returncode != 0
    fedsp(2, ["run", "--resume", *arguments])
    assert difference(read(whole), read(tmp_path / "killed")) == []


# -- who opens what --------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def six(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("six") / "silos"
    here(["split", "--to", folder, *sets([*SHORT, "federation.clients=6"])])
    return folder


def watched(
    tmp_path: Path, silos: Path, program: Sequence[object] = ("-m", "fedsp_mpi")
) -> tuple[dict[str, set[int]], list[list[int]]]:
    """Run six silos on four ranks; return who opened a file of each silo, and who plays whom."""
    where = ["--name", "run", "--set", f"run.folder={tmp_path}"]
    arguments = [*where, *of_silos(silos, "federation.clients=null", "evaluation.at=both")]
    opened: dict[str, set[int]] = {}
    for path, ranks in opened_files(tmp_path / "trace", 4, [*program, "run", *arguments]).items():
        if path.is_relative_to(silos):
            opened.setdefault(path.relative_to(silos).parts[0], set()).update(ranks)
    return opened, read(tmp_path / "run").sections["topology"]["assignment"]


def strangers(opened: dict[str, set[int]], assignment: list[list[int]]) -> list[str]:
    """The silos that another rank than their own has opened, or that nobody has."""
    own = {f"client_{client:03d}": {rank} for rank, ids in enumerate(assignment) for client in ids}
    return [name for name, ranks in (own | {"server": {0}}).items() if opened.get(name) != ranks]


@pytest.mark.slow
def test_each_silo_is_opened_by_its_own_rank_alone(tmp_path, six):
    opened, assignment = watched(tmp_path, six)
    assert sorted(map(len, assignment)) == [0, 2, 2, 2]
    assert strangers(opened, assignment) == []


@pytest.mark.slow
def test_the_watch_sees_a_rank_that_reads_anothers_silo(tmp_path, six):
    opened, assignment = watched(tmp_path, six, (TRESPASS, 1, six / "client_005"))
    assert assignment[1] and 5 not in assignment[1]
    assert strangers(opened, assignment) == ["client_005"]


# -- silos that cannot be used ---------------------------------------------------------------------


def write(folder: Path, rows: list[object], name: str = "train.jsonl") -> None:
    folder.mkdir(parents=True)
    lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
    (folder / name).write_text("\n".join(lines) + "\n")


def reviews(labels: list[object], text: str = "w1 w2") -> list[object]:
    return [{"sentence": f"{text} {index}", "label": label} for index, label in enumerate(labels)]


BAD = {
    "missing": ("found no folder", None),
    "empty": ("found no data file", []),
    "garbage": ("while reading train.parquet", "train.parquet"),
    "columns": ("found no column 'sentence'", [{"text": "w1", "label": 0}] * 4),
    "words": ("'excellent'", reviews(["excellent", "awful", "awful", "excellent"])),
    "floats": ("label", reviews([0.5, 1.5, 0.5, 1.5])),
    "stranger": ("label", reviews([0, 1, 7, 1])),
    "broken": ("while reading train.jsonl", [*reviews([0, 1]), '{"sentence": "w', *reviews([1])]),
    "nulls": ("found no usable row", reviews([None, None, None])),
    "elsewhere": ("found no client rank on its host nowhere", reviews([0, 1, 0, 1])),
}


@pytest.fixture(scope="module")
def sites(tmp_path_factory) -> Path:
    """Two good silos, and one of each kind that cannot be used."""
    folder = tmp_path_factory.mktemp("sites")
    for name in ("north", "south"):
        write(folder / name, reviews([0, 1] * 4))
    write(folder / "server", reviews([0, 1] * 4), "validation.jsonl")
    for name, (_, rows) in BAD.items():
        if isinstance(rows, list):
            (folder / name).mkdir() if not rows else write(folder / name, rows)
    (folder / "garbage").mkdir()
    (folder / "garbage/train.parquet").write_bytes(b"PAR1 and no more")
    return folder


def of_sites(sites: Path, *names: str) -> list[str]:
    items = [
        f"{{name: {name}, source: '{sites / name}'"
        + (", host: nowhere}" if name == "elsewhere" else "}")
        for name in names
    ]
    return sets(
        [
            *(item for item in SHORT if not item.startswith(("data.", "federation.clients"))),
            "data.task=sst2",
            "data.verbaliser=[green, purple]",
            "data.source=null",
            "federation.clients=null",
            "server.tuning.steps=0",
            "evaluation.server_only=false",
            *FEDPROMPT,
            f"server.data.source={sites / 'server'}",
            f"federation.silos=[{', '.join(items)}]",
        ]
    )


@pytest.mark.slow
def test_bad_silos_are_named_in_a_line_each_and_the_others_go_on(tmp_path, sites):
    where = ["--name", "run", "--set", f"run.folder={tmp_path}"]
    ended = fedsp(3, ["run", *where, *of_sites(sites, "north", *BAD, "south")])
    lines = [line for line in ended.stdout.splitlines() if line.startswith("left out: ")]
    assert len(lines) == len(BAD), both_ends(ended)
    for name, (words, _) in BAD.items():
        [line] = [line for line in lines if line.startswith(f"left out: silo {name} on ")]
        assert words in line and len(line) < 420, line
        assert "w1 w2" not in line
    clients = read(tmp_path / "run").clients
    assert clients[clients["status"] == "ok"]["client"].tolist() == [0, 11] * 2
    assert re.search(r"^of 12 clients, 10 took part in vain", ended.stdout, re.M)


def test_a_bad_silo_stops_the_run_where_all_are_needed(tmp_path, sites):
    where = ["--name", "run", "--set", f"run.folder={tmp_path}"]
    settings = ["--set", "federation.on_failure=stop"]
    ended = fedsp(0, ["run", *where, *of_sites(sites, "north", "columns", "nulls"), *settings], 2)
    assert re.search(
        r"silo columns on \S+: sst2: found no column 'sentence'.*and 1 more silo.*on_failure=drop",
        ended.stderr,
    ), ended.stderr
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_the_log_and_the_report_of_a_crash_name_silos(tmp_path, sites):
    where = ["--name", "run", "--set", f"run.folder={tmp_path}"]
    settings = [*of_sites(sites, "north", "south"), "--set", "record.progress_seconds=0"]
    fault = "raise:local training:0:2"
    ended = run_mpi(0, [FAULTY, fault, "run", *where, *settings], timeout=60, status=1)
    assert "round 1: silo south (2 of 2 on this rank) at tuning step 1 of 2" in ended.stdout
    assert re.search(r"^run failed: .*, round 2, silo north, phase 'local training'", ended.stderr)
    assert "client 0" not in ended.stdout + ended.stderr


@pytest.mark.slow
def test_a_silo_that_comes_back_takes_part_again(tmp_path, sites):
    folder = tmp_path / "found"
    for name in ("north", "south"):
        shutil.copytree(sites / name, folder / name)
    settings = of_sites(sites)[:-2] + sets(
        [f"federation.silos={{source: '{folder}/*'}}", "federation.rounds=4", "checkpoint.every=1"]
    )
    where = ["--name", "run", "--set", f"run.folder={tmp_path}"]
    stopped = run_mpi(
        1, [FAULTY, "kill:checkpoint:0:2", "run", *where, *settings], timeout=60, status=None
    )
    assert stopped.returncode != 0
    (folder / "south").rename(tmp_path / "away")
    stopped = run_mpi(
        1,
        [FAULTY, "kill:checkpoint:0:3", "run", "--resume", *where, *settings],
        timeout=60,
        status=None,
    )
    assert "left out: silo south" in stopped.stdout, both_ends(stopped)
    (tmp_path / "away").rename(folder / "south")
    fedsp(0, ["run", "--resume", *where, *settings])
    clients = read(tmp_path / "run").clients
    by_round = {
        number: clients[(clients["round"] == number) & (clients["status"] == "ok")][
            "client"
        ].tolist()
        for number in range(1, 5)
    }
    assert by_round == {1: [0, 1], 2: [0], 3: [0, 1], 4: [0, 1]}
    write(folder / "west", reviews([0, 1]))
    ended = fedsp(0, ["run", "--resume", *where, *settings, "--set", "federation.rounds=5"], 2)
    assert "west" in ended.stderr

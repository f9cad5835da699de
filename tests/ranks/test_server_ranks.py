"""A server of several ranks: the same losses as one rank, whatever is shared; it stops, dies and
resumes like one.
"""

from __future__ import annotations

import json
import time
from pathlib import Path

import numpy as np
import pytest

from fedsp_mpi.record import read
from fedsp_mpi.report import difference
from helpers import tiny
from helpers.mpi import both_ends, run_mpi
from helpers.paths import PROGRAMS
from helpers.runs import short_run

FAULTY = PROGRAMS / "faulty.py"
TWO = ("topology.server_ranks=2", "federation.clients=2")
LOSSES = (
    "server_loss_first",
    "server_loss_last",
    "validation_merged",
    "validation_loss",
    "control_validation_loss",
)


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> Path:
    """The same experiment with one server rank and with two, and two clients."""
    folder = tmp_path_factory.mktemp("server_ranks")
    short_run(3, folder, "one", "federation.clients=2")
    for zero in (0, 3):
        result = short_run(4, folder, f"zero{zero}", *TWO, f"distillation.zero_stage={zero}")
        (folder / f"zero{zero}.txt").write_text(result.stdout)
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("zero", [0, 3])
def test_losses_are_those_of_one_rank(runs, zero):
    single, double = read(runs / "one"), read(runs / f"zero{zero}")
    for name in LOSSES:
        assert np.abs(double.rounds[name] / single.rounds[name] - 1).max() < 1e-5, name
    for name in ("loss_first", "loss_last"):
        assert (
            abs(double.sections["distillation"][name] - single.sections["distillation"][name])
            < 1e-5
        )
    assert np.nanmax(np.abs(double.results["loss"] / single.results["loss"] - 1)) < 1e-5
    assert double.results["acc"].tolist() == single.results["acc"].tolist()
    # Zero-shot: no sum depends on who shares.
    zero_shot = double.results["method"].tolist().index("zero-shot")
    assert double.results["loss"][zero_shot] == single.results["loss"][zero_shot]


@pytest.mark.slow
def test_the_record_says_who_was_the_server(runs):
    run, text = read(runs / "zero3"), (runs / "zero3.txt").read_text()
    assert "4 (2 server, 2 client ranks)" in text and "helpers are ready" in text
    distillation = run.sections["distillation"]
    assert (distillation["engine"], distillation["zero_stage"], distillation["ranks"]) == (
        "deepspeed",
        3,
        2,
    )
    assert [sorted(host["devices"]) for host in run.environment["hosts"]] == [["server"]] * 2 + [
        ["client"]
    ] * 2
    assert sorted(set(run.clients["rank"].tolist())) == [2, 3]


@pytest.mark.parametrize(
    "pairs",
    [
        pytest.param("[[null, [0, 2]], [2, [1, 3]]]", marks=pytest.mark.slow),
        pytest.param("[[null, [1, 3]], [2, [0, 2]]]", marks=pytest.mark.slow),
    ],
    ids=["usual", "others"],
)
def test_every_engine_gives_the_losses_of_one_rank(tmp_path, pairs):
    model = tiny.model_folder(tmp_path, "gpt2")
    result = run_mpi(2, [PROGRAMS / "team.py", model, pairs], timeout=120)
    differences = json.loads(result.stdout.splitlines()[-1])
    assert len(differences) == 6
    for case, (losses, weights, between_ranks) in differences.items():
        assert losses < 1e-5 and weights < 1e-3 and between_ranks == 0, (case, differences)
    assert "Warning" not in result.stderr


@pytest.mark.slow
@pytest.mark.parametrize(("phase", "rank"), [("server-only control", 0), ("server tuning", 1)])
def test_a_killed_run_goes_on_to_the_same_bits(runs, tmp_path, phase, rank):
    """At both places the checkpoint of round 1 is complete, which rank 0 writes in round 2."""
    program = [FAULTY, f"die:{phase}:{rank}:2"]
    killed = short_run(4, tmp_path, "run", *TWO, program=program, status=None)
    assert killed.returncode not in (0, 2, 75), both_ends(killed)
    resumed = short_run(3, tmp_path, "run", *TWO, "run.resume=must")
    assert "goes on after round 1" in resumed.stdout
    assert difference(read(runs / "zero0"), read(tmp_path / "run")) == []


@pytest.mark.slow
@pytest.mark.parametrize("phase", ["distillation", "evaluation"])
def test_told_to_stop_at_the_rank_that_decides_nothing(tmp_path, phase):
    result = short_run(4, tmp_path, "run", *TWO, program=[FAULTY, f"signal:{phase}:1"], status=75)
    assert "told to stop" in result.stderr and "Traceback" not in result.stderr
    assert read(tmp_path / "run").status == "stopped"


@pytest.mark.slow
def test_a_rank_that_stops_is_noticed_within_the_deadline(tmp_path):
    start = time.monotonic()
    limits = ("deadlines.server=4", "deadlines.handout=60")
    result = short_run(
        4, tmp_path, "run", *TWO, *limits, program=[FAULTY, "stop:server tuning:1:1"], status=None
    )
    assert result.returncode == 124, both_ends(result)
    assert "server's ranks: found one that did not take part in time" in result.stderr
    assert time.monotonic() - start < 60


@pytest.mark.slow
def test_the_servers_ranks_wait_for_clients_longer_than_for_each_other(tmp_path):
    limits = ("deadlines.server=20", "client.tuning.steps=2", "federation.rounds=1")
    short_run(4, tmp_path, "run", *TWO, *limits, program=[FAULTY, "slow:0:13"])
    record = read(tmp_path / "run")
    assert record.status == "complete" and record.rounds["seconds_clients"][0] > 20


@pytest.mark.parametrize(
    ("n", "setting", "message"),
    [
        (
            2,
            "topology.server_ranks=2",
            "topology.server_ranks: found 2 with 2 ranks, expected at least one rank more",
        ),
        (0, "topology.server_ranks=2", "topology.server_ranks: found 2 with 1 ranks"),
        (
            4,
            "server.tuning.batch_size=5",
            "server.tuning.batch_size: found 5, expected a multiple of",
        ),
        (4, "topology.server_ranks=0", "topology.server_ranks: found 0, expected at least 1"),
    ],
)
def test_what_cannot_be_shared_is_refused(tmp_path, n, setting, message):
    result = short_run(n, tmp_path, "run", *TWO, setting, status=2)
    assert message in result.stderr and "Traceback" not in result.stderr

"""Nothing hangs: ranks that stop, die or dawdle, and clients that fail alone. On a real mpirun."""

from __future__ import annotations

import re
import time

import numpy as np
import pytest

from fedsp_mpi.record import read
from helpers.mpi import both_ends, only_report, run_mpi
from helpers.paths import PROGRAMS
from helpers.runs import short_run

pytestmark = pytest.mark.slow

DEADLINE = 4.0


def timed(*arguments, fault: str, **more):
    """Run with a fault; return the result, and the seconds that it took."""
    start = time.monotonic()
    result = short_run(*arguments, program=[PROGRAMS / "faulty.py", fault], status=None, **more)
    return result, time.monotonic() - start


@pytest.fixture(scope="module")
def usual(tmp_path_factory) -> float:
    """Seconds of a run that nobody disturbs."""
    start = time.monotonic()
    short_run(3, tmp_path_factory.mktemp("usual"), "usual")
    return time.monotonic() - start


@pytest.mark.parametrize("kind", ["stop", "hang"])
def test_a_client_rank_that_stops_is_named_within_the_deadline(tmp_path, usual, kind):
    """The deadline counts from the end of the server's own work, which is over sooner than the
    whole usual run.
    """
    limit = f"deadlines.gather={DEADLINE}"
    result, seconds = timed(3, tmp_path, "run", limit, fault=f"{kind}:local training:2:1")
    assert result.returncode == 124, both_ends(result)
    assert seconds < usual + DEADLINE + 15
    assert "rank 0" in only_report(result)
    assert re.search(
        r"found nothing from rank 2 after 4\.\d s, expected an answer within 4 s", result.stderr
    )
    if kind == "hang":  # a stopped process cannot show its stack; one that hangs can
        assert "most recent call first" in result.stderr and "train_clients" in result.stderr
    assert read(tmp_path / "run").status == "failed"


def test_a_server_that_stops_is_named_by_the_clients(tmp_path, usual):
    limit = f"deadlines.broadcast={DEADLINE}"
    result, seconds = timed(3, tmp_path, "run", limit, fault="stop:server tuning:0:1")
    assert result.returncode == 124, both_ends(result)
    assert seconds < usual + DEADLINE + 15
    assert "found nothing from rank 0" in result.stderr


@pytest.mark.parametrize(("phase", "rank"), [("local training", 1), ("distillation", 0)])
def test_a_rank_that_is_killed_ends_the_job(tmp_path, usual, phase, rank):
    result, seconds = timed(3, tmp_path, "run", fault=f"die:{phase}:{rank}")
    assert result.returncode not in (0, 2), both_ends(result)
    assert seconds < usual + 15


FAILURES = {  # the faults of a run: the client, its reason, and the rounds in which it fails
    "memory:1:1": (1, "out of memory", [1]),
    "text:2": (2, "its text cannot be used: found no text", [1, 2]),
    "nan:0:2": (0, "the loss of step 1 of 2 is nan", [2]),
    "lie:values:3": (3, "check: the update is not finite", [1, 2]),
    "lie:weight:4": (4, "check: weight is 1e+06, expected at most", [1, 2]),
    "lie:silent:5": (5, "sent no answer", [1, 2]),
}


def test_clients_that_fail_are_dropped_and_named_and_the_others_go_on(tmp_path):
    fault = "+".join(FAILURES)
    result, _ = timed(3, tmp_path, "run", "federation.clients=7", fault=fault)
    assert result.returncode == 0, both_ends(result)
    run = read(tmp_path / "run")
    failed = run.clients[run.clients["status"] == "failed"]
    reasons = {(row["round"], row["client"]): row["reason"] for row in failed}
    expected = {
        (round, client): reason for client, reason, rounds in FAILURES.values() for round in rounds
    }
    assert reasons.keys() == expected.keys()
    for place, reason in expected.items():
        assert reason in reasons[place], place
    assert result.stdout.count("5 of them failed") == 2
    assert "of 7 clients, 4 took part in vain" in result.stdout
    assert run.status == "complete" and np.isfinite(run.rounds["validation_loss"]).all()


@pytest.mark.parametrize(
    ("n", "fault", "reason"),
    [(0, "memory:1:1", "out of memory"), (3, "nan:1:1", "the loss of step 1 of 2 is nan")],
)
def test_a_quorum_below_which_the_run_stops(tmp_path, n, fault, reason):
    result, _ = timed(n, tmp_path, "run", "federation.min_clients=3", fault=fault)
    assert result.returncode not in (0, 2, 124), both_ends(result)
    assert "rank 0" in only_report(result, stack=False)
    assert "found 2 updates, expected at least federation.min_clients=3" in result.stderr
    assert f"client 1 in local training: {reason}" in result.stderr
    run = read(tmp_path / "run")
    assert run.status == "failed" and run.committed_rounds == 0


@pytest.mark.parametrize(
    ("fault", "place"),
    [
        ("raise:no such phase:1", "phase 'no such phase'"),
        ("die:merge:0:9", "phase 'merge' of round 9"),
        ("stop:merge:2", "rank 2"),
    ],
)
def test_a_fault_whose_place_is_not_there_is_no_pass(fault, place):
    command = [PROGRAMS / "faulty.py", fault, "bench", "wire", "--repeats", "1"]
    result = run_mpi(2, command, status=70)
    message = (
        f"faulty.py: found no {place} in bench wire, expected the place of the fault '{fault}'"
    )
    assert result.stderr.count("faulty.py: ") == 1 and message in result.stderr


def test_a_test_that_expects_no_status_fails_where_its_fault_has_no_place():
    command = [PROGRAMS / "faulty.py", "kill:no such phase:0", "report", "nowhere"]
    with pytest.raises(pytest.fail.Exception, match="found no phase 'no such phase' in report"):
        run_mpi(0, command, status=None)


def test_a_slow_client_is_cut_at_its_time_and_weighs_what_it_did(tmp_path):
    more = ("client.tuning.steps=40", "client.alignment.steps=10")
    drop = ("federation.stragglers=drop", "federation.client_seconds=6")
    result, _ = timed(2, tmp_path, "run", *more, *drop, fault="slow:1:1")
    assert result.returncode == 0, both_ends(result)
    run = read(tmp_path / "run")
    samples = {int(row["client"]): int(row["samples"]) for row in run.clients if row["round"] == 1}
    assert samples[0] == samples[2] == 40 * 16
    assert (
        16 <= samples[1] <= 6 * 16
    )  # a second a step, six in all, a fifth of them for the alignment
    seconds = [
        row["seconds_model"] + row["seconds_prompt"] for row in run.clients if row["client"] == 1
    ]
    assert all(spent < 6 + 2 * 1 + 1 for spent in seconds)

"""How far the clients are within a long round: one rank says so, now and then."""

from __future__ import annotations

import re

from fedsp_mpi import config
from fedsp_mpi.log import Log, RoundProgress
from fedsp_mpi.run import execute
from helpers.mpi import both_ends, run_mpi
from helpers.runs import SHORT


def test_a_line_is_due_only_when_enough_time_has_passed(monkeypatch):
    lines: list[str] = []
    seconds = [100.0]
    monkeypatch.setattr("time.monotonic", lambda: seconds[0])
    progress = RoundProgress(lines.append, every=60)
    silent = RoundProgress(lines.append, every=None)
    for round in (1, 2):
        for reporter in (progress, silent):
            reporter.begin(round)
            reporter.client(7, 2, 3)
            reporter.stage("iteration", 8)
        for _ in range(8):
            seconds[0] += 25 if round == 2 else 5
            progress.step()
            silent.step()
    where = "round 2: client 7 (2 of 3 on this rank) at iteration"
    assert lines == [f"{where} 3 of 8", f"{where} 6 of 8"]


def test_every_stage_of_fedsp_says_how_far_it_is(tmp_path):
    lines: list[str] = []
    settings = [
        *SHORT,
        f"run.folder={tmp_path}",
        "distillation.engine=torch",
        "record.progress_seconds=0",
    ]
    settings += [
        "federation.clients=2",
        "client.alignment.steps=2",
        "client.tuning.steps=1",
        "federation.rounds=1",
    ]
    execute.execute(config.load(None, settings), "progress", Log(), client_log=Log(lines.append))
    stages = ("alignment step 1 of 2", "alignment step 2 of 2", "tuning step 1 of 1")
    assert lines == [
        f"round 1: client {id} ({id + 1} of 2 on this rank) at {s}" for id in (0, 1) for s in stages
    ]


def test_one_rank_says_how_far_a_search_is(tmp_path):
    """Of three ranks the server plays no client and two play one each: the first of them speaks,
    and it alone.
    """
    more = ("method=fedbpt", "server.tuning.steps=0", "federation.clients=2", "federation.rounds=1")
    more += (
        "search.iterations=3",
        "search.dimension=4",
        "record.progress_seconds=0",
        f"run.folder={tmp_path}",
    )
    settings = [item for setting in (*SHORT, *more) for item in ("--set", setting)]
    result = run_mpi(3, ["-m", "fedsp_mpi", "run", *settings], timeout=120)
    lines = re.findall("round 1: client.*", result.stdout)
    assert lines == [f"round 1: client {lines[0][16]} at iteration {n} of 3" for n in (1, 2, 3)], (
        both_ends(result)
    )

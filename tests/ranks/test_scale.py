"""Many clients on few ranks: memory of the merge, state of the idle ones, who takes part."""

from __future__ import annotations

import json
from pathlib import Path

from fedsp_mpi.record import read
from fedsp_mpi.report import difference
from helpers.mpi import run_mpi
from helpers.paths import PROGRAMS
from helpers.runs import short_run


def test_merging_needs_a_chunk_of_every_update_and_two_prompts():
    clients, values, chunk = 60, 1 << 20, 1 << 18
    text = run_mpi(4, [PROGRAMS / "memory.py", str(clients), str(values), str(chunk)]).stdout
    grown = json.loads(text)["grown"]
    assert 4 * values < grown < chunk * clients + 2 * 4 * values < 60 * 4 * values


def test_a_tenth_of_many_clients_each_round(tmp_path: Path):
    more = (
        "federation.clients=60",
        "federation.clients_per_round=6",
        "federation.rounds=3",
        "data.limit.train=560",
    )
    for n in (0, 4):
        kept = ("checkpoint.keep=3", "checkpoint.keep_client_states=true")
        short_run(n, tmp_path, f"n{n}", *more, "client.resident=1", *kept)
    run = read(tmp_path / "n4")
    assert difference(read(tmp_path / "n0"), run) == []
    assert run.rounds["num_clients"].tolist() == [6, 6, 6]
    took_part = [
        set(run.clients["client"][run.clients["round"] == round].tolist()) for round in (1, 2, 3)
    ]
    assert [len(some) for some in took_part] == [6, 6, 6] and took_part[0] != took_part[1]
    marks = [
        json.loads((tmp_path / "n4" / "checkpoints" / f"000{round}.json").read_text())
        for round in (1, 2)
    ]
    assert {int(id) for id in marks[0]["clients"]} == took_part[0]
    assert {int(id) for id in marks[1]["clients"]} == took_part[0] | took_part[1]
    again = {int(id): piece[0] for id, piece in marks[1]["clients"].items()}
    assert all(again[id] == (2 if id in took_part[1] else 1) for id in again)

"""What a record says about a backdoor: how often its trigger brings about the attacker's answer.

After averaging it is a row of the results, of the split "test+trigger", whose `acc` is the success
rate; of a poisoned client it is what its own prompts do right after its local training, in the
clients' table.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence

import numpy as np

from fedsp_mpi.record.hdf5 import Run
from fedsp_mpi.record.tables import TRIGGERED
from fedsp_mpi.report.formatting import percent, spread, table


def successes(run: Run) -> dict[str, float]:
    """The attack's success rate by method, a fraction; empty where none was measured."""
    return {
        str(row["method"]): float(row["acc"]) for row in run.results if row["split"] == TRIGGERED
    }


def local_success(run: Run) -> float:
    """That of what poisoned clients had tuned themselves, mean over those of the last round that
    has some; or nan.
    """
    known = run.clients[~np.isnan(run.clients["attack_success"])]
    last = known[known["round"] == known["round"].max(initial=0)]
    return statistics.fmean(last["attack_success"].tolist()) if len(last) else math.nan


def lines(run: Run) -> list[str]:
    """A table for the summary of a run; nothing where no attack was studied."""
    rows = [row for row in run.results if row["split"] == TRIGGERED]
    if not rows:
        return []
    settings = run.config.get("attack", {})
    who = ", ".join(map(str, settings.get("clients", ()))) or "nobody"
    body = [
        [str(row["method"]), str(row["n"]), percent(row["acc"]), percent(row["stderr"])]
        for row in rows
    ]
    body += [
        [f"client {row['client']}, round {row['round']}", "", percent(row["attack_success"]), ""]
        for row in _local(run)
    ]
    title = (
        f"attack: {settings.get('trigger')!r} for choice {settings.get('target')}, poisoned: {who}"
    )
    return [
        "",
        title,
        *table(["on what was tuned by", "n", "success %", "std. error"], body, num_left=1),
    ]


def cell(runs: Sequence[Run], label: str, with_clients: bool = True) -> str:
    """Success of some runs of what is called `label`, after averaging and on poisoned clients;
    percent, over seeds.
    """
    after = [100 * found[label] for run in runs if label in (found := successes(run))]
    local = [100 * value for run in runs if not math.isnan(value := local_success(run))]
    return (
        spread(after) + (f" (client {spread(local)})" if local and with_clients else "")
        if after
        else ""
    )


def _local(run: Run) -> list[np.void]:
    """Of each poisoned client, the row of its first round and that of its last."""
    known = [row for row in run.clients if not math.isnan(row["attack_success"])]
    by_client = (
        {int(row["client"]): row for row in reversed(known)},
        {int(row["client"]): row for row in known},
    )
    ends = [each[client] for client in sorted(by_client[0]) for each in by_client]
    return [
        row
        for place, row in enumerate(ends)
        if place % 2 == 0 or row["round"] != ends[place - 1]["round"]
    ]

"""What a record says about a backdoor: how often its trigger makes a model answer as the attacker
wants.

After aggregation it is a row of the results, of the split "test+trigger", whose `acc` is the
success rate. For a poisoned client it is what its own prompts do right after its local training, in
the clients' table.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence

import numpy as np

from fedsp_mpi.record.hdf5 import Run
from fedsp_mpi.record.tables import TRIGGERED
from fedsp_mpi.report.formatting import as_percent, mean_and_deviation, table
from fedsp_mpi.report.silos import client_name


def success_rates(run: Run) -> dict[str, float]:
    """Return the attack's success rate by method, a fraction; empty if none was measured."""
    return {
        str(row["method"]): float(row["acc"]) for row in run.results if row["split"] == TRIGGERED
    }


def local_success(run: Run) -> float:
    """Return the mean success rate of the poisoned clients' own prompts; nan if none is known.

    That of the last round in which one was measured.
    """
    rates = run.clients["attack_success"]
    measured = run.clients[~np.isnan(rates)]
    if not len(measured):
        return math.nan
    last = measured[measured["round"] == measured["round"].max()]
    return statistics.fmean(last["attack_success"].tolist())


def summary_lines(run: Run) -> list[str]:
    """Return a table for the summary of a run; nothing if no attack was studied."""
    results = [row for row in run.results if row["split"] == TRIGGERED]
    if not results:
        return []
    settings = run.config.get("attack", {})
    poisoned = ", ".join(map(str, settings.get("clients", ()))) or "nobody"
    title = (
        f"attack: {settings.get('trigger')!r} for choice {settings.get('target')}, "
        f"poisoned: {poisoned}"
    )
    body = [
        [str(row["method"]), str(row["n"]), as_percent(row["acc"]), as_percent(row["stderr"])]
        for row in results
    ]
    for row in _first_and_last(run):
        name = f"{client_name(run, int(row['client']))}, round {row['round']}"
        body.append([name, "", as_percent(row["attack_success"]), ""])
    head = ["method or client", "n", "success %", "std. error"]
    return ["", title, *table(head, body)]


def cell(runs: Sequence[Run], label: str, *, with_clients: bool = True) -> str:
    """Write the success rate of a method in percent, over seeds: "12.50 (client 100.00)".

    Args:
        runs: of the method, one for each seed.
        label: of the method, or of a control of the runs.
        with_clients: add the success rate on poisoned clients, before aggregation.
    """
    rates = [success_rates(run) for run in runs]
    aggregated = [100 * by_label[label] for by_label in rates if label in by_label]
    if not aggregated:
        return ""
    text = mean_and_deviation(aggregated)
    local = [100 * rate for run in runs if not math.isnan(rate := local_success(run))]
    if local and with_clients:
        text += f" (client {mean_and_deviation(local)})"
    return text


def _first_and_last(run: Run) -> list[np.void]:
    """Return each poisoned client's rows of its first and its last round, once if they are one."""
    rows_of: dict[int, list[np.void]] = {}
    for row in run.clients:
        if not math.isnan(row["attack_success"]):
            rows_of.setdefault(int(row["client"]), []).append(row)
    ends = []
    for client in sorted(rows_of):
        rows = rows_of[client]
        ends.append(rows[0])
        if rows[-1]["round"] != rows[0]["round"]:
            ends.append(rows[-1])
    return ends

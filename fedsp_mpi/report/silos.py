"""What silos have scored on the text that they hold back: mean, worst silo, spread."""

from __future__ import annotations

import numpy as np

from fedsp_mpi.record.hdf5 import Run
from fedsp_mpi.record.tables import mean_silo_loss
from fedsp_mpi.report.formatting import as_decimal, as_percent, shortened, table

_HEAD = (
    "round",
    "silos",
    "mean loss",
    "worst loss",
    "spread",
    "mean acc %",
    "worst acc %",
    "worst silo",
)
_LEGEND = (
    "each silo's held-out text under what its client holds: losses in nats per token; mean over "
    "silos by",
    "their examples; worst = highest loss; spread = deviation over silos",
)


def client_name(run: Run, client: int) -> str:
    """Return what reports call a client: "silo north", "user ann", or "client 3"."""
    silos = run.sections.get("silos", {}).get("names", [])
    users = run.config.get("federation", {}).get("users", [])
    for kind, names in (("silo", silos), ("user", users)):
        if isinstance(names, list) and 0 <= client < len(names):
            return f"{kind} {names[client]}"
    return f"client {client}"


def scored(run: Run) -> dict[int, np.ndarray]:
    """Return the rows of the table `silos` with a finite loss, by round: [rows] each, not empty."""
    rows = run.silos[np.isfinite(run.silos["loss"])]
    return {int(round): rows[rows["round"] == round] for round in np.unique(rows["round"])}


def worst_of(rows: np.ndarray) -> np.void:
    """Return the row of the silo with the highest loss, of rows [rows]."""
    worst: np.void = rows[np.argmax(rows["loss"])]
    return worst


def lines(run: Run) -> list[str]:
    """Return the table of the silos' scores by round; nothing where silos did not judge."""
    body = []
    for round, rows in scored(run).items():
        worst = worst_of(rows)
        accuracies = rows["acc"][np.isfinite(rows["acc"])]
        body.append(
            [
                str(round),
                str(len(rows)),
                as_decimal(mean_silo_loss(rows)),
                as_decimal(worst["loss"]),
                as_decimal(float(rows["loss"].std())),
                as_percent(float(accuracies.mean()) if len(accuracies) else np.nan),
                as_percent(float(accuracies.min()) if len(accuracies) else np.nan),
                shortened(client_name(run, int(worst["silo"])).removeprefix("silo ")),
            ]
        )
    if not body:
        return []
    return [*table(_HEAD, body, num_left=0), *_LEGEND]

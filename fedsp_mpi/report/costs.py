"""What a method asks of a client, from the records of its runs."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sequence

import numpy as np

from fedsp_mpi.record.hdf5 import Run
from fedsp_mpi.report import summary

COSTS = ("holds", "trains", "down + up", "client s", "peak memory")
LEGEND = (
    "Percent, mean ± standard deviation over seeds. Of a client: holds, trains = "
    "parameters; down + up = bytes of a "
    "round; client s = seconds of training in a round; peak memory = that of a "
    "rank which plays clients."
)


def costs(runs: Sequence[Run]) -> list[str]:
    """One text for each of COSTS; empty where no client has such a cost, or no record says it."""
    held, trained = ([found[i] for run in runs if (found := _parameters(run))] for i in (0, 1))
    seconds = [value for run in runs if not math.isnan(value := client_seconds(run))]
    memory = [
        size
        for run in runs
        if isinstance(size := run.sections.get("memory", {}).get("clients"), (int, float))
    ]
    return [
        span(held, summary.as_count),
        span(trained, summary.as_count),
        span([size for run in runs if (size := _bytes_a_round(run))], summary.as_bytes),
        summary.as_seconds(statistics.fmean(seconds)) if seconds else "",
        summary.as_bytes(max(memory)) if memory else "",
    ]


def _parameters(run: Run) -> tuple[int, int] | None:
    """What a client holds and trains, as `plan` counts: prompts are trained, not held; None without
    clients.
    """
    models, client = run.sections.get("models", {}), run.config.get("client", {})
    held, wire = models.get("auxiliary"), models.get("prompt_on_the_wire")
    if not isinstance(held, int) or not isinstance(wire, int) or not len(run.clients):
        return None
    if models.get("prompt") == 0:  # what travels is the model
        return held, held
    if isinstance(models.get("searched"), int):
        return held, models["searched"]
    aligns = client.get("training") == "joint" or client.get("alignment", {}).get("steps", 0) > 0
    return held, wire + (held if aligns else 0)


def _bytes_a_round(run: Run) -> float:
    """Down and up, of a client that takes part, in a round; 0 without clients."""
    num = int(run.rounds["num_clients"].sum())
    return (
        float(run.rounds["bytes_down"].sum() + run.rounds["bytes_up"].sum()) / num if num else 0.0
    )


def client_seconds(run: Run) -> float:
    """Seconds that a client trains in a round, mean of clients and rounds; nan without clients."""
    found = training_seconds(run.clients)
    return float(found.mean()) if len(found) else math.nan


def training_seconds(clients: np.ndarray) -> np.ndarray:
    """Of each client row, the seconds of both stages."""
    return np.nan_to_num(clients["seconds_model"]) + np.nan_to_num(clients["seconds_prompt"])


def span(values: Sequence[float], show: Callable[[float], str]) -> str:
    """The least and the greatest, or the one that they are; empty without values."""
    return (
        " - ".join(dict.fromkeys(show(value) for value in (min(values), max(values))))
        if values
        else ""
    )

"""What a method costs a client, from the records of its runs."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sequence

import numpy as np

from fedsp_mpi.record.hdf5 import Run
from fedsp_mpi.report import handed_out
from fedsp_mpi.report.formatting import as_bytes, as_count, as_seconds

COLUMNS = ("holds", "copied", "trains", "down + up", "client s", "peak memory")
LEGEND = (
    "Scores in percent, mean ± standard deviation over seeds. Costs per client: holds, trains = "
    "numbers of parameters; copied = share of the global model's weights that it holds as exact "
    "copies; down + up = bytes sent and received per round; client s = seconds of "
    "training per round; peak memory = of the rank that plays the client."
)


def costs(runs: Sequence[Run]) -> list[str]:
    """Return a text for each of COLUMNS; empty where clients have no such cost or it is unknown."""
    counts = [count for run in runs if (count := _parameters(run)) is not None]
    copied = [
        share
        for run in runs
        if len(run.clients)
        and (share := handed_out.share_copied(run.sections.get("models", {}))) is not None
    ]
    traffic = [size for run in runs if (size := _bytes_per_round(run))]
    seconds = [value for run in runs if not math.isnan(value := client_seconds(run))]
    memory = [run.sections.get("memory", {}).get("clients") for run in runs]
    peaks = [size for size in memory if isinstance(size, (int, float))]
    return [
        value_range([held for held, _ in counts], as_count),
        value_range(copied, handed_out.percent),
        value_range([trained for _, trained in counts], as_count),
        value_range(traffic, as_bytes),
        as_seconds(statistics.fmean(seconds)) if seconds else "",
        as_bytes(max(peaks)) if peaks else "",
    ]


def _parameters(run: Run) -> tuple[int, int] | None:
    """Return how many parameters a client holds and trains; None without clients.

    Counted as `plan` does: prompts are trained, not held.
    """
    models = run.sections.get("models", {})
    client = run.config.get("client", {})
    held = models.get("auxiliary")
    on_the_wire = models.get("prompt_on_the_wire")
    if not isinstance(held, int) or not isinstance(on_the_wire, int) or not len(run.clients):
        return None
    if models.get("prompt") == 0:  # the model itself is tuned, or adapters of it
        return held, on_the_wire
    if isinstance(models.get("searched"), int):
        return held, models["searched"]
    aligns = client.get("training") == "joint" or client.get("alignment", {}).get("steps", 0) > 0
    return held, on_the_wire + (held if aligns else 0)


def _bytes_per_round(run: Run) -> float:
    """Return the bytes, down and up, per client and round; 0 without clients."""
    num_updates = int(run.rounds["num_clients"].sum())
    if num_updates == 0:
        return 0.0
    return float(run.rounds["bytes_down"].sum() + run.rounds["bytes_up"].sum()) / num_updates


def client_seconds(run: Run) -> float:
    """Return the seconds that a client trains in a round, on average; nan without clients."""
    seconds = training_seconds(run.clients)
    return float(seconds.mean()) if len(seconds) else math.nan


def training_seconds(clients: np.ndarray) -> np.ndarray:
    """Return the seconds of both stages of training, [rows], for the table of clients, [rows]."""
    return np.nan_to_num(clients["seconds_model"]) + np.nan_to_num(clients["seconds_prompt"])


def value_range(values: Sequence[float], show: Callable[[float], str]) -> str:
    """Write the least and the greatest value, or one of them if they look the same.

    Args:
        values: empty text stands for none.
        show: writes a value.
    """
    if not values:
        return ""
    ends = dict.fromkeys([show(min(values)), show(max(values))])
    return " - ".join(ends)

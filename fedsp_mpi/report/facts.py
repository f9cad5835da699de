"""What several reports take from a record: results, the measure that counts, names, the machine."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from fedsp_mpi.config.methods import METHODS
from fedsp_mpi.files.untrusted import JsonMapping
from fedsp_mpi.record.hdf5 import Run
from fedsp_mpi.record.tables import LABELS

ZERO_SHOT = "zero-shot"
SERVER_ONLY = "server-only"
CONTROLS = (ZERO_SHOT, SERVER_ONLY)
PERPLEXITY = "perplexity"  # a measure that is no fraction, and better where it is lower


def main_measure(result: np.void) -> tuple[str, float]:
    """Return the measure by which results are compared, and its value, a fraction.

    Exact match where the task has it, else accuracy; of plain text, the perplexity itself.
    """
    name = "acc" if math.isnan(result["exact_match"]) else "exact_match"
    if math.isnan(result[name]) and not math.isnan(result[PERPLEXITY]):
        name = PERPLEXITY
    return name, float(result[name])


def shown_measure(result: np.void) -> float:
    """Return the main measure as tables show it: in percent, or the perplexity."""
    name, value = main_measure(result)
    return value if name == PERPLEXITY else 100 * value


def better_by(result: np.void, control: np.void) -> float:
    """Return by how much a result is better than a control, by the result's main measure.

    A fraction, or by how much the perplexity is lower; nan where the control lacks the measure.
    """
    name, value = main_measure(result)
    difference = value - float(control[name])
    return -difference if name == PERPLEXITY else difference


def reads_plain_text(run: Run) -> bool:
    """Return whether every token of a run's texts is predicted, so that perplexity measures it."""
    facts = METHODS.get(run.config.get("method", ""))
    return facts is not None and facts.reads_plain_text


def result_of(run: Run, method: str, split: str) -> np.void | None:
    """Return the result of a method on a split, a row of the results; None if there is none.

    Args:
        run: the record.
        method: of the run, or one of its controls.
        split: of the data, such as "test".
    """
    for row in run.results:
        if row["method"] == method and row["split"] == split:
            return row
    return None


def results_on_test(run: Run) -> dict[str, np.void]:
    """Return the results on the test split, rows of the results by method."""
    return {str(row["method"]): row for row in run.results if row["split"] == "test"}


def baselines(run: Run) -> dict[str, np.void]:
    """Return what needs no model, "chance" and "majority", on the test split, by name.

    None in records of earlier versions, and where questions have no choices.
    """
    return {str(row["method"]): row for row in run.results if row["split"] == LABELS}


def main_result(run: Run) -> tuple[str, float] | None:
    """Return the main measure of the run's own method on the test split, and its value.

    None if it has no result yet.
    """
    result = own_result(run)
    return None if result is None else main_measure(result)


def own_result(run: Run) -> np.void | None:
    """Return the test result of the run's own method, which is no control; None if it has none."""
    results = [row for method, row in results_on_test(run).items() if method not in CONTROLS]
    return results[-1] if results else None


def label_of(run: Run) -> str:
    """Return what tables call the run's method."""
    result = own_result(run)
    if result is not None:
        return str(result["method"])
    return str(run_setting(run, "label") or run.config.get("method", "fedsp"))


def earlier_runs(run: Run) -> list[JsonMapping]:
    """Return what a record says of the runs that its model comes from, the last one first."""
    runs: list[JsonMapping] = run.sections.get("origin", {}).get("runs", [])
    return runs


def origin_weights(run: Run) -> JsonMapping:
    """Return the digests, by file, of the weights of an earlier run that a run has started from.

    Empty of a run that started from none.
    """
    runs = earlier_runs(run)
    weights: JsonMapping = runs[0].get("weights", {}) if runs else {}
    return weights


def seed_of(run: Run) -> int:
    """Return the seed that all randomness of the run is keyed by."""
    return int(run.config.get("run", {}).get("seed", 1))


def run_setting(run: Run, key: str) -> Any:
    """Return a setting of the section `run` of the configuration; None if it is not set."""
    return run.config.get("run", {}).get(key)


def ranks_of(environment: JsonMapping) -> list[JsonMapping]:
    """Return what an environment says of each rank (host, pid, device), as far as it does."""
    hosts = environment.get("hosts")
    if not isinstance(hosts, list):
        return []
    return [rank for rank in hosts if isinstance(rank, Mapping)]


def machine(environment: JsonMapping) -> list[str]:
    """Return hosts, kind of machine, number of ranks and their devices, as far as known."""
    ranks = ranks_of(environment)
    facts = list(dict.fromkeys(str(rank["host"]) for rank in ranks if "host" in rank))
    if not facts:
        facts.append(str(environment.get("host", "unknown machine")))
    if environment.get("machine"):
        facts.append(str(environment["machine"]))
    num_ranks = len(ranks) or environment.get("num_ranks")
    if num_ranks:
        facts.append(f"{num_ranks} ranks")
    facts += dict.fromkeys(str(rank["device"]) for rank in ranks if "device" in rank)
    return facts


def last_losses(clients: np.ndarray) -> np.ndarray:
    """Return the last loss of each row's training, [rows]: of the prompts, or else of the model."""
    of_prompt = clients["loss_prompt_last"]
    return np.where(np.isfinite(of_prompt), of_prompt, clients["loss_model_last"])


def client_losses(run: Run) -> dict[int, np.ndarray]:
    """Return the finite last losses of clients that did not fail, [clients], by round."""
    losses = last_losses(run.clients)
    counts = (run.clients["status"] == "ok") & np.isfinite(losses)
    rounds = run.clients["round"]
    return {int(round): losses[counts & (rounds == round)] for round in np.unique(rounds[counts])}

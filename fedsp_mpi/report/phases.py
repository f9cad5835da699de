"""Runs that start from one another's results: what each phase has brought, one after the other."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from fedsp_mpi.files.untrusted import printable
from fedsp_mpi.record.hdf5 import Run
from fedsp_mpi.report.comparison import Comparison, MethodResults, facts_below, measure_on
from fedsp_mpi.report.costs import value_range
from fedsp_mpi.report.facts import (
    ZERO_SHOT,
    earlier_runs,
    own_result,
    results_on_test,
    seed_of,
    shown_measure,
)
from fedsp_mpi.report.formatting import (
    NOT_SHOWN,
    NOT_SHOWN_LEGEND,
    as_bytes,
    markdown_table,
    score_cell,
)
from fedsp_mpi.report.significance import UNKNOWN, gain_interval, includes_zero, result_interval

_HEAD = ("phase", "method", "starts from", "measure", "before", "after", "trained", "sent")
_LEGEND = (
    "before, after = the test's measure at the start of the phase and at its end: percent, or a "
    "perplexity, which is better where it is lower; mean ± standard deviation over seeds; trained "
    "= training examples that were read, blocks of plain text; sent = bytes down and up."
)


@dataclass(frozen=True)
class Phase:
    """What one method has brought in one phase, over seeds.

    Attributes:
        name: of the phase: the task's name in tables.
        method: its name in tables.
        measure: of the task: "acc", "exact match" or "perplexity".
        runs: one for each seed.
        after: test result of each run, rows of their tables of results.
        before: the same of what each run has started from; none where one was not scored.
    """

    name: str
    method: str
    measure: str
    runs: list[Run]
    after: list[np.void]
    before: list[np.void] = field(default_factory=list)

    @property
    def depth(self) -> int:
        """Return how many phases there were before it."""
        return min(len(earlier_runs(run)) for run in self.runs)


def origin_words(run: Run) -> list[str]:
    """Say where a run's model comes from: "from NAME (pretrain, round 3 of 4)", then those before.

    None of a run that has started from no other.
    """
    words = []
    for index, earlier in enumerate(earlier_runs(run)):
        rounds = f"round {earlier.get('round', '?')} of {earlier.get('rounds', '?')}"
        link = "before it" if index else "from"
        words.append(f"{link} {earlier.get('run')} ({earlier.get('method')}, {rounds})")
    if words:
        initial = run.sections.get("origin", {}).get("initial", "?")
        words.append(f"first {initial} weights of {run.config.get('model', {}).get('name')}")
    return words


def phases(comparison: Comparison) -> list[Phase]:
    """Return what each method has brought in each phase: phase by phase, in the order of starts."""
    rows = []
    for task in comparison.tasks:
        for row in comparison.methods:
            if row.runs and task in row.results:
                rows.append(_phase(comparison, row, task))
    return sorted(rows, key=lambda phase: phase.depth)


def _phase(comparison: Comparison, row: MethodResults, task: str) -> Phase:
    runs = sorted(row.runs_on(task), key=seed_of)
    after = [result for run in runs if (result := own_result(run)) is not None]
    before = [results_on_test(run)[ZERO_SHOT] for run in runs if ZERO_SHOT in results_on_test(run)]
    return Phase(
        name=task,
        method=row.label,
        measure=measure_on(comparison, task),
        runs=runs,
        after=after,
        before=before if len(before) == len(after) else [],
    )


def phases_table(comparison: Comparison) -> str:
    """Write what each phase has brought as a Markdown table, and below it what was measured."""
    rows = phases(comparison)
    places = {run.name: f"{row.name} ({row.method})" for row in rows for run in row.runs}
    body = []
    for row in rows:
        body.append(
            [
                row.name,
                row.method,
                _start(row, places),
                row.measure,
                _cell(row.before),
                _cell(row.after) + _mark(row),
                value_range([_num_trained(run) for run in row.runs], lambda n: f"{n:,.0f}"),
                value_range([_num_bytes(run) for run in row.runs if len(run.clients)], as_bytes),
            ]
        )
    legend = [_LEGEND]
    if any("[" in cell for line in body for cell in line[4:6]):
        legend.append("[a, b] = 95 % interval (Wilson) of a single seed.")
    if any(line[5].endswith(NOT_SHOWN) for line in body):
        legend.append(NOT_SHOWN_LEGEND.replace("its control", "the start"))
    below = [printable(fact) for fact in facts_below(comparison)]
    return "\n".join([markdown_table(_HEAD, body, num_left=4), "", *legend, "", *below])


def _start(phase: Phase, places: dict[str, str]) -> str:
    """Name what the runs of a phase have started from.

    Args:
        phase: of one method.
        places: phase and method of each run of the table, by its name.
    """
    names: dict[str, None] = {}
    for run in phase.runs:
        earlier = earlier_runs(run)
        if earlier:
            name = str(earlier[0].get("run"))
            names[places.get(name, name)] = None
        else:
            model = run.config.get("model", {})
            names[f"{model.get('weights', 'pretrained')} weights"] = None
    return ", ".join(names)


def _cell(results: Sequence[np.void]) -> str:
    """Write a measure over seeds, of a single one with its interval."""
    interval = result_interval(results[0]) if len(results) == 1 else UNKNOWN
    return score_cell([shown_measure(result) for result in results], interval)


def _mark(phase: Phase) -> str:
    """Return the mark of what is no difference to the start that the test can show."""
    if not phase.before:
        return ""
    return NOT_SHOWN * includes_zero(gain_interval(phase.after, phase.before))


def _num_trained(run: Run) -> float:
    """Return how many examples clients and server have read in training, each as often as read."""
    clients = run.clients[run.clients["status"] == "ok"]
    tuning = run.config.get("server", {}).get("tuning", {})
    steps = tuning.get("steps", 0) * run.committed_rounds
    return float(clients["samples"].sum()) + steps * tuning.get("batch_size", 0)


def _num_bytes(run: Run) -> float:
    """Return the bytes of all rounds, down and up."""
    return float(run.rounds["bytes_down"].sum() + run.rounds["bytes_up"].sum())

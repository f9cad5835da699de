"""Writes several runs as a Markdown table: a row for each experiment, method and split."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence

import numpy as np

from fedsp_mpi.files.untrusted import JsonMapping, JsonObject, printable
from fedsp_mpi.record.hdf5 import Run
from fedsp_mpi.record.tables import CHANCE, TRIGGERED
from fedsp_mpi.report import attack
from fedsp_mpi.report.facts import (
    CONTROLS,
    PERPLEXITY,
    SERVER_ONLY,
    better_by,
    main_measure,
    result_of,
    run_setting,
)
from fedsp_mpi.report.formatting import (
    NOT_SHOWN,
    NOT_SHOWN_LEGEND,
    markdown_table,
    mean_and_deviation,
    score_cell,
)
from fedsp_mpi.report.significance import UNKNOWN, gain_interval, includes_zero, result_interval

_HEAD = (
    "experiment",
    "method",
    "split",
    "seeds",
    "n",
    "acc",
    "acc_norm",
    "exact match",
    PERPLEXITY,
    "val. loss",
    "gain",
)
# Settings that do not change what is computed, or only by chance.
_SAME_EXPERIMENT = ("run", "topology", "deadlines", "record", "seed")


def markdown(runs: Iterable[Run]) -> str:
    """Write runs as a Markdown table: mean ± standard deviation over seeds.

    Runs that differ only in their seed, name, ranks or deadlines are one experiment. Measures are
    percent; `gain` is points over the server-only control of the same run, or by how much the
    perplexity is lower. Runs without results are named below the table.
    """
    runs = list(runs)
    by_settings: dict[str, list[Run]] = {}
    for run in runs:
        by_settings.setdefault(json.dumps(_settings(run), sort_keys=True), []).append(run)
    experiments = list(by_settings.values())
    names = _given_names(experiments) or _distinguishing_settings(experiments)

    head = [*_HEAD]
    if any(attack.success_rates(run) for run in runs):
        head.append("attack success")
    body = []
    for name, experiment in zip(names, experiments):
        for row in _rows(name, experiment):
            body.append(row[: len(head)])
    has_marks = any(line[head.index("gain")].endswith(NOT_SHOWN) for line in body)
    if not any(_has_perplexity(run) for run in runs):
        column = head.index(PERPLEXITY)
        for line in (head, *body):
            del line[column]
    text = markdown_table(head, body, num_left=4)

    if has_marks:
        text += f"\n\n{NOT_SHOWN_LEGEND}"
    unfinished = [
        printable(f"{run.name} ({run.status})")
        for run in runs
        if run.status != "complete" or not len(run.results)
    ]
    if unfinished:
        text += f"\n\nNot complete: {', '.join(unfinished)}."
    return text


def _rows(name: str, runs: Sequence[Run]) -> Iterator[list[str]]:
    """Yield the rows of an experiment, in the order in which its methods were first seen.

    Each ends with the attack's success, also where none was studied.
    """
    keys = dict.fromkeys(
        (str(row["method"]), str(row["split"])) for run in runs for row in run.results
    )
    for method, split in keys:
        if split == TRIGGERED:
            continue
        seeds = []
        results = []
        controls = []
        gains = []
        successes = []
        for run in runs:
            result = result_of(run, method, split)
            if result is None:
                continue
            results.append(result)
            seed = run_setting(run, "seed")
            seeds.append("?" if seed is None else str(seed))
            control = result_of(run, SERVER_ONLY, split)
            if method not in CONTROLS and control is not None:
                gains.append(_gain(result, control))
                controls.append(control)
            rates = attack.success_rates(run)
            if method in rates:
                successes.append(100 * rates[method])
        interval = UNKNOWN
        if len(results) == 1 and method != CHANCE:
            interval = result_interval(results[0])
        gain = mean_and_deviation(gains, sign=True)
        if len(controls) == len(results) and includes_zero(gain_interval(results, controls)):
            gain += NOT_SHOWN
        counts = [int(result["n"]) for result in results]
        yield [
            name,
            method,
            split,
            ", ".join(seeds),
            "-".join(str(n) for n in dict.fromkeys([min(counts), max(counts)])),
            score_cell([100 * float(result["acc"]) for result in results], interval),
            mean_and_deviation([100 * float(result["acc_norm"]) for result in results]),
            score_cell([100 * float(result["exact_match"]) for result in results], interval),
            mean_and_deviation([float(result[PERPLEXITY]) for result in results]),
            mean_and_deviation([float(result["loss"]) for result in results], digits=4),
            gain,
            mean_and_deviation(successes),
        ]


def _has_perplexity(run: Run) -> bool:
    """Return whether a run has scored plain text."""
    return bool(np.isfinite(run.results[PERPLEXITY]).any())


def _gain(result: np.void, control: np.void) -> float:
    """Return what a result has over the server-only control of its run: points, or perplexity."""
    gain = better_by(result, control)
    return gain if main_measure(result)[0] == PERPLEXITY else 100 * gain


# -- what an experiment is called ------------------------------------------------------------------


def _settings(run: Run) -> JsonObject:
    """Return the settings that runs of one experiment have in common."""
    settings = {key: value for key, value in run.config.items() if key not in _SAME_EXPERIMENT}
    after = settings.get("model", {}).get("after")
    if after is not None:  # in a sweep, the run of an earlier phase with the same seed
        earlier = str(after).removesuffix(f"-{run_setting(run, 'seed')}")
        settings["model"] = {**settings["model"], "after": earlier}
    return settings


def _given_names(experiments: Sequence[Sequence[Run]]) -> list[str] | None:
    """Return what the user calls each experiment: the labels of its task and of its method.

    None where one has no such name, or the same as another.
    """
    names = []
    for runs in experiments:
        labels = [_common_setting(runs, "task_label"), _common_setting(runs, "label")]
        names.append(", ".join(label for label in labels if label))
    if not all(names) or len(set(names)) < len(names):
        return None
    if len(experiments) == 1 and not _common_setting(experiments[0], "task_label"):
        return None  # the method has a column of its own
    return names


def _common_setting(runs: Sequence[Run], key: str) -> str | None:
    """Return a setting of the section `run` if all runs have the same, else None."""
    values = {run_setting(run, key) for run in runs}
    return values.pop() if len(values) == 1 else None


def _distinguishing_settings(experiments: Sequence[Sequence[Run]]) -> list[str]:
    """Name each experiment by the settings that differ; a single one by its model and task."""
    configs = [_flat(_settings(runs[0])) for runs in experiments]
    differing = []
    for key in dict.fromkeys(key for config in configs for key in config):
        values = {json.dumps(config.get(key), sort_keys=True) for config in configs}
        if len(values) > 1:
            differing.append(key)
    shown = differing or ["model.name", "data.task"]
    names = []
    for config in configs:
        settings = [f"{key}={config[key]}" for key in shown if key in config]
        names.append(", ".join(settings) or "all")
    return names


def _flat(config: JsonMapping, prefix: str = "") -> JsonObject:
    """Return nested sections as dotted keys."""
    flat: JsonObject = {}
    for key, value in config.items():
        if isinstance(value, Mapping) and value:
            flat |= _flat(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat

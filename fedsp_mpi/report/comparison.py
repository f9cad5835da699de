"""Compares methods: runs grouped by task and by what their method is called, over seeds.

Only complete runs count. A run brings the result of its own method and those of its controls,
"zero-shot" and "server-only", of which one is taken for each task and seed. Runs whose server had
other settings have another server-only control; then each control gets a row of its own.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from fedsp_mpi.config import changed_keys
from fedsp_mpi.files.untrusted import printable
from fedsp_mpi.record.hdf5 import Run, read
from fedsp_mpi.record.tables import CHANCE
from fedsp_mpi.report import attack, costs
from fedsp_mpi.report.costs import value_range
from fedsp_mpi.report.facts import (
    PERPLEXITY,
    SERVER_ONLY,
    ZERO_SHOT,
    baselines,
    label_of,
    machine,
    main_measure,
    origin_weights,
    own_result,
    results_on_test,
    seed_of,
    shown_measure,
)
from fedsp_mpi.report.formatting import (
    NOT_SHOWN,
    NOT_SHOWN_LEGEND,
    markdown_table,
    score_cell,
)
from fedsp_mpi.report.grouping import (
    TaskKey,
    control_groups,
    require_distinct,
    task_key,
    task_names,
    with_task_labels,
)
from fedsp_mpi.report.significance import (
    UNKNOWN,
    Interval,
    gain_interval,
    includes_zero,
    result_interval,
)

BASELINES_LEGEND = (
    "chance = a guess among a question's choices; majority = always the most frequent answer of "
    "the server's own shard and validation split."
)
SeedResults = dict[int, np.void]  # a row of a record's results by seed


@dataclass(frozen=True)
class MethodResults:
    """A row of a comparison: a method or a control.

    Attributes:
        label: what the row is called.
        results: by task and seed.
        runs: of the method; none for a control.
        control_of: labels of the methods whose server-only control it is; none for a method.
        start_of: of a zero-shot row that is not that of all, labels of the methods that it is of.
        task_of: name of each run's task, by the run's file.
    """

    label: str
    results: dict[str, SeedResults] = field(default_factory=dict)
    runs: list[Run] = field(default_factory=list)
    control_of: tuple[str, ...] = ()
    start_of: tuple[str, ...] = ()
    task_of: dict[Path, str] = field(default_factory=dict)

    def percents(self, task: str) -> list[float]:
        """Return the main measure on a task in percent, in the order of seeds; or perplexities."""
        results = self.results.get(task, {})
        return [shown_measure(results[seed]) for seed in sorted(results)]

    def interval(self, task: str) -> Interval:
        """Return what the number of questions leaves open of a score on a task, fractions, at 95 %.

        Of a single seed only: nan where there is another number of them, or no sample.
        """
        results = list(self.results.get(task, {}).values())
        return result_interval(results[0]) if len(results) == 1 else UNKNOWN

    def runs_on(self, task: str) -> list[Run]:
        """Return the runs on a task."""
        return [run for run in self.runs if self.task_of[run.file] == task]

    def num_questions(self, task: str) -> list[int]:
        """Return the number of test questions of each result on a task."""
        return [int(row["n"]) for row in self.results.get(task, {}).values()]


@dataclass(frozen=True)
class Comparison:
    """What a table or a picture shows.

    Attributes:
        tasks: titles of the columns.
        methods: the rows: zero-shot, server-only, then the methods in the order of their runs.
        warnings: what makes cells hard to compare, in a sentence each.
        unfinished: runs that do not count, as "name (status)".
        baselines: what needs no model, "chance" and "majority": rows, but no methods.
    """

    tasks: tuple[str, ...]
    methods: tuple[MethodResults, ...]
    warnings: tuple[str, ...]
    unfinished: tuple[str, ...]
    baselines: tuple[MethodResults, ...] = ()

    def gain_interval(self, row: MethodResults, task: str) -> Interval:
        """Return the 95 % interval of what a method has over its control on a task, fractions.

        The control is server-only or, without one, zero-shot; nan for a control, or without one.
        """
        control = self._control_of(row)
        if control is None:
            return UNKNOWN
        results = row.results.get(task, {})
        controls = control.results.get(task, {})
        seeds = sorted(results.keys() & controls.keys())
        return gain_interval([results[seed] for seed in seeds], [controls[s] for s in seeds])

    def _control_of(self, row: MethodResults) -> MethodResults | None:
        if not row.runs:
            return None
        for other in self.methods:
            if row.label in other.control_of:
                return other
        for other in self.methods:
            if row.label in other.start_of or other.label == ZERO_SHOT:
                return other
        return None


def read_all(paths: Iterable[str | Path]) -> list[Run]:
    """Read run folders, and folders that contain run folders: those in the order of their start.

    Raises:
        ValueError: one of them cannot be read.
    """
    runs: dict[Path, Run] = {}
    for path in map(Path, paths):
        files = [] if (path / "run.h5").exists() else sorted(path.glob("*/run.h5"))
        group = [read(file) for file in files] or [read(path)]
        for run in sorted(group, key=lambda run: run.created):
            runs.setdefault(run.file.resolve(), run)
    return list(runs.values())


def compare(runs: Sequence[Run]) -> Comparison:
    """Group complete runs by task and method.

    Raises:
        ValueError: none is complete, or two have the same task, method and seed.
    """
    complete = [run for run in runs if run.status == "complete" and own_result(run) is not None]
    unfinished = [f"{run.name} ({run.status})" for run in runs if run not in complete]
    if not complete:
        raise ValueError(
            f"found {len(runs)} runs, none of which is complete and has a result, expected "
            "at least one; wait for them, or let them go on with --resume"
        )
    complete = with_task_labels(complete)
    require_distinct(complete)
    names = task_names(complete)
    rows = (*_controls(complete, names), *_methods(complete, names))
    tasks = tuple(dict.fromkeys(names.values()))
    return Comparison(
        tasks,
        rows,
        warnings=tuple(_warnings(tasks, rows)),
        unfinished=tuple(unfinished),
        baselines=tuple(_baselines(complete, names)),
    )


def _methods(runs: Sequence[Run], names: dict[Path, str]) -> list[MethodResults]:
    """Build the rows of the methods.

    Args:
        runs: with a result each.
        names: of their tasks, by file.
    """
    methods: dict[str, MethodResults] = {}
    for run in runs:
        result = own_result(run)
        assert result is not None
        task = names[run.file]
        method = methods.setdefault(label_of(run), MethodResults(label_of(run)))
        method.results.setdefault(task, {})[seed_of(run)] = result
        method.runs.append(run)
        method.task_of[run.file] = task
    return list(methods.values())


def _baselines(runs: Sequence[Run], names: dict[Path, str]) -> list[MethodResults]:
    """Build the rows of what needs no model; of each task and seed that of the first run.

    Args:
        runs: which bring them.
        names: of their tasks, by file.
    """
    rows: dict[str, MethodResults] = {}
    for run in runs:
        for label, result in baselines(run).items():
            row = rows.setdefault(label, MethodResults(label))
            row.results.setdefault(names[run.file], {}).setdefault(seed_of(run), result)
    return list(rows.values())


def _controls(runs: Sequence[Run], names: dict[Path, str]) -> list[MethodResults]:
    """Build the rows of the controls: zero-shot, then the server-only ones.

    Args:
        runs: which bring the controls.
        names: of their tasks, by file.
    """
    rows = []
    # Runs that start from results of others have each the zero-shot of their own start.
    scored = [run for run in runs if ZERO_SHOT in results_on_test(run)]
    zero_shots = control_groups(scored, origin_weights, operator.eq, name=ZERO_SHOT)
    for control in zero_shots:
        start_of = control.methods if len(zero_shots) > 1 else ()
        row = MethodResults(control.label, start_of=start_of)
        of_group = control.runs if start_of else scored
        _add_results(row, of_group, names, method=ZERO_SHOT)
        rows.append(row)
    server_only = control_groups(
        runs, lambda run: results_on_test(run).get(SERVER_ONLY), _same_scores
    )
    for control in server_only:
        row = MethodResults(control.label, control_of=control.methods)
        _add_results(row, control.runs, names, method=SERVER_ONLY)
        rows.append(row)
    return rows


def _add_results(
    row: MethodResults, runs: Sequence[Run], names: dict[Path, str], *, method: str
) -> None:
    """Add a control's results to its row; of each task and seed those of the first run."""
    for run in runs:
        result = results_on_test(run).get(method)
        if result is not None:
            row.results.setdefault(names[run.file], {}).setdefault(seed_of(run), result)


def _same_scores(a: np.void, b: np.void) -> bool:
    """Return whether two results are of one control.

    The scores are equal, and so are the losses but for differences between machines.
    """
    loss_a = float(a["loss"])
    loss_b = float(b["loss"])
    both_unknown = math.isnan(loss_a) and math.isnan(loss_b)
    if not both_unknown and not math.isclose(loss_a, loss_b, rel_tol=1e-3):
        return False
    measure, score = main_measure(a)
    rel_tol = 1e-3 if measure == PERPLEXITY else 1e-9
    return math.isclose(score, main_measure(b)[1], rel_tol=rel_tol, abs_tol=1e-9)


# -- the table -------------------------------------------------------------------------------------


def comparison_table(comparison: Comparison) -> str:
    """Write a comparison as a Markdown table, followed by a legend, what was measured, warnings."""
    head = ["method", *(f"{task} ({measure_on(comparison, task)})" for task in comparison.tasks)]
    rows = (*comparison.baselines, *comparison.methods)
    body = [[row.label, *(_score(comparison, row, t) for t in comparison.tasks)] for row in rows]

    for task in comparison.tasks:
        successes = [_attack_success(comparison, row, task) for row in rows]
        if any(successes):
            head.append(f"{task} (attack success)")
            for line, success in zip(body, successes):
                line.append(success)

    head += costs.COLUMNS
    for line, row in zip(body, rows):
        line += costs.costs(row.runs)

    legend = [costs.LEGEND, *_legend(comparison, body)]
    lines = [markdown_table(head, body), "", "\n".join(legend), ""]
    lines += [printable(fact) for fact in facts_below(comparison)]
    lines += [printable(f"- **Warning:** {text}") for text in comparison.warnings]
    return "\n".join(lines)


def _score(comparison: Comparison, row: MethodResults, task: str) -> str:
    """Write a score, marked where nothing can be shown to set it apart from its control's."""
    interval = UNKNOWN if row.label == CHANCE else row.interval(task)
    text = score_cell(row.percents(task), interval)
    return text + NOT_SHOWN if includes_zero(comparison.gain_interval(row, task)) else text


def _legend(comparison: Comparison, body: Sequence[Sequence[str]]) -> list[str]:
    """Explain the intervals, marks and rows without a model that a table has."""
    cells = [cell for line in body for cell in line[1 : len(comparison.tasks) + 1]]
    lines = []
    if any(measure_on(comparison, task) == PERPLEXITY for task in comparison.tasks):
        lines.append("perplexity = of all test tokens, as it is: lower is better.")
    if any("[" in cell for cell in cells):
        lines.append(
            "[a, b] = 95 % interval (Wilson) of a single seed, by the number of its questions."
        )
    if any(cell.endswith(NOT_SHOWN) for cell in cells):
        lines.append(NOT_SHOWN_LEGEND)
    return lines + [BASELINES_LEGEND] * bool(comparison.baselines)


def measure_on(comparison: Comparison, task: str) -> str:
    """Name the main measure of a task: "acc", "exact match" or "perplexity"."""
    names: dict[str, None] = {}
    for row in comparison.methods:
        for result in row.results.get(task, {}).values():
            names[main_measure(result)[0].replace("_", " ")] = None
    return " or ".join(names)


def _attack_success(comparison: Comparison, row: MethodResults, task: str) -> str:
    """Write the attack's success rate on a task; empty text if no attack was studied.

    For a control it is taken from one run of each seed, whatever that run's method.
    """
    if row.runs:
        return attack.cell(row.runs_on(task), row.label)
    by_seed: dict[int, Run] = {}
    for method in comparison.methods:
        for run in method.runs_on(task):
            if row.label in attack.success_rates(run):
                by_seed.setdefault(seed_of(run), run)
    return attack.cell(list(by_seed.values()), row.label, with_clients=False)


# -- below the table -------------------------------------------------------------------------------


def facts_below(comparison: Comparison) -> list[str]:
    """Say what was measured: test questions, seeds, rounds, models, machines and dates."""
    runs = [run for row in comparison.methods for run in row.runs]
    questions = []
    for task in comparison.tasks:
        numbers = [n for row in comparison.methods for n in row.num_questions(task)]
        kind = " tokens" * (measure_on(comparison, task) == PERPLEXITY)
        questions.append(f"{task} {value_range(numbers, lambda n: f'{n:,}')}{kind}")
    models = dict.fromkeys(str(run.config.get("model", {}).get("name", "?")) for run in runs)
    machines = dict.fromkeys(", ".join(machine(run.environment)) for run in runs)
    first_day = min(run.created[:10] for run in runs)
    last_day = max(run.updated[:10] for run in runs)
    lines = [
        f"- test questions: {', '.join(questions)}",
        f"- seeds: {_listed(sorted({seed_of(run) for run in runs}))}",
        f"- rounds: {_rounds(comparison.methods)}",
        f"- model: {'; '.join(models)}",
        f"- machine: {'; '.join(machines)}",
        f"- dates: {' to '.join(dict.fromkeys([first_day, last_day]))}",
    ]
    methods_of_partition: dict[str, dict[str, None]] = {}
    for run in runs:
        methods = methods_of_partition.setdefault(task_key(run).partition, {})
        methods[label_of(run)] = None
    if len(methods_of_partition) > 1:
        for partition, labels in methods_of_partition.items():
            lines.append(f"- partition {partition}: {'; '.join(labels)}")
    for row in comparison.methods:
        if row.label.endswith("others)"):  # a control whose label does not name all its methods
            lines.append(f"- {row.label}: {_listed(row.control_of or row.start_of)}")
    if comparison.unfinished:
        lines.append(f"- not complete: {', '.join(comparison.unfinished)}")
    return lines


def _rounds(methods: Sequence[MethodResults]) -> str:
    """Write the number of rounds, once if all methods have the same."""
    by_label = {}
    for row in methods:
        if row.runs:
            by_label[row.label] = value_range([run.committed_rounds for run in row.runs], str)
    if len(set(by_label.values())) == 1:
        return next(iter(by_label.values()))
    return ", ".join(f"{label} {rounds}" for label, rounds in by_label.items())


def _listed(items: Iterable[object]) -> str:
    return ", ".join(map(str, items))


def _warnings(tasks: Sequence[str], methods: Sequence[MethodResults]) -> Iterator[str]:
    """Say what makes cells hard to compare: missing seeds, mixed settings, other test questions."""
    seeds = sorted({seed for row in methods for cell in row.results.values() for seed in cell})
    for row in methods:
        for task in tasks:
            row_seeds = sorted(row.results.get(task, {}))
            if not row_seeds:
                yield f"{row.label} has no run on {task}."
            elif row_seeds != seeds:
                yield f"{row.label} on {task}: only seed {_listed(row_seeds)} of {_listed(seeds)}."
        yield from _mixed_settings(row)
    for task in tasks:
        numbers = {row.label: row.num_questions(task) for row in methods if task in row.results}
        if len({n for of_row in numbers.values() for n in of_row}) > 1:
            texts = [f"{label} {value_range(of_row, str)}" for label, of_row in numbers.items()]
            yield f"{task}: not the same test questions: {', '.join(texts)}."


def _mixed_settings(method: MethodResults) -> Iterator[str]:
    """Name the tasks on which a method's runs differ in more than their seed."""
    first_runs: dict[TaskKey, Run] = {}
    differing: dict[TaskKey, dict[str, None]] = {}
    for run in method.runs:
        key = task_key(run)
        first = first_runs.setdefault(key, run)
        names = differing.setdefault(key, {})
        for line in changed_keys(first.config, run.config):
            name = line.partition(":")[0]
            if name not in ("run.seed", "model.after"):  # a run of the same seed
                names[name] = None
    for key, names in differing.items():
        if names:
            yield f"{method.label} on {key.name}: its runs differ in {_listed(names)}."

"""Methods against each other: runs grouped by task and by what their method is called, over seeds.

Only complete runs count. A run brings the result of its own method and those of its controls,
"zero-shot" and "server-only", of which one is taken for each task and seed. Runs whose server had
other settings have another control; then each gets a row of its own.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from fedsp_mpi.config import changed_keys
from fedsp_mpi.files.untrusted import printable
from fedsp_mpi.record.hdf5 import Run, read
from fedsp_mpi.report import attack, summary
from fedsp_mpi.report.costs import COSTS, LEGEND, costs, span
from fedsp_mpi.report.formatting import markdown_row
from fedsp_mpi.report.summary import SERVER_ONLY, ZERO_SHOT, main_measure

Results = dict[int, np.void]  # by seed


@dataclass(frozen=True)
class Method:
    """One row: a method or a control, with its results by task and seed.

    Attributes:
        runs: none for a control.
        of: of a control, the methods that it belongs to.
        tasks: of each run, by its file.
    """

    label: str
    results: dict[str, Results] = field(default_factory=dict)
    runs: list[Run] = field(default_factory=list)
    of: tuple[str, ...] = ()
    tasks: dict[Path, str] = field(default_factory=dict)

    def percents(self, task: str) -> list[float]:
        """The main measure by seed, in percent."""
        found = self.results.get(task, {})
        return [100 * main_measure(found[seed])[1] for seed in sorted(found)]


@dataclass(frozen=True)
class Comparison:
    """What a table or a picture shows.

    Attributes:
        tasks: what the columns are called.
        methods: the rows: zero-shot, server-only, then the others as they came.
        warnings: what makes cells hard to compare, a sentence each.
        unfinished: runs that do not count: "name (status)".
    """

    tasks: tuple[str, ...]
    methods: tuple[Method, ...]
    warnings: tuple[str, ...]
    unfinished: tuple[str, ...]


def read_all(paths: Iterable[str | Path]) -> list[Run]:
    """The records of run folders, and of folders that contain run folders: those by the time when
    they began.

    Raises ValueError if one of them cannot be read.
    """
    runs: dict[Path, Run] = {}
    for path in map(Path, paths):
        below = [] if (path / "run.h5").exists() else sorted(path.glob("*/run.h5"))
        found = [read(file) for file in below] or [read(path)]
        for run in sorted(found, key=lambda run: run.created):
            runs.setdefault(run.file.resolve(), run)
    return list(runs.values())


def main_result(run: Run) -> tuple[str, float] | None:
    """What the run's own method scored on the test split: the measure and its value; None if it has
    no result yet.
    """
    own = _own(run)
    return None if own is None else main_measure(own)


def compare(runs: Sequence[Run]) -> Comparison:
    """Group complete runs by task and method.

    Raises ValueError if there is none, or if two runs are the same task, method and seed.
    """
    complete = [run for run in runs if run.status == "complete" and _own(run) is not None]
    unfinished = tuple(f"{run.name} ({run.status})" for run in runs if run not in complete)
    if not complete:
        raise ValueError(
            f"found {len(runs)} runs, none of which is complete and has a result, expected "
            "at least one; wait for "
            "them, or let them go on with --resume"
        )
    complete = with_task_labels(complete)
    require_once(complete)
    names = task_names(complete)
    methods: dict[str, Method] = {}
    for run in complete:
        _add(methods, names[run.file], run)
    rows = (*_controls(complete, names), *methods.values())
    tasks = tuple(dict.fromkeys(names.values()))
    return Comparison(tasks, rows, tuple(_warnings(tasks, rows)), unfinished)


def comparison_table(found: Comparison) -> str:
    """The Markdown table of a comparison, and below it what it was measured on, and warnings."""
    head = ["method", *(f"{task} ({_measure(found, task)})" for task in found.tasks)]
    body = [
        [row.label, *(summary.spread(row.percents(task)) for task in found.tasks)]
        for row in found.methods
    ]
    for task in found.tasks:
        if any(cells := [_attack(found, row, task) for row in found.methods]):
            head.append(f"{task} (attack success)")
            body = [[*line, cell] for line, cell in zip(body, cells)]
    head += COSTS
    body = [[*line, *costs(row.runs)] for line, row in zip(body, found.methods)]
    lines = [head, ["---", *["---:"] * (len(head) - 1)], *body]
    warnings = [f"- **Warning:** {text}" for text in found.warnings]
    return "\n".join(
        [*map(markdown_row, lines), "", LEGEND, "", *map(printable, [*_facts(found), *warnings])]
    )


def _attack(found: Comparison, row: Method, task: str) -> str:
    """The attack's success on a task; empty where none was studied. A control's is that of any run
    of the same seed.
    """
    if row.runs:
        return attack.cell([run for run in row.runs if row.tasks[run.file] == task], row.label)
    all_runs = (
        run for method in found.methods for run in method.runs if method.tasks[run.file] == task
    )
    by_seed: dict[int, Run] = {}
    for run in all_runs:
        if row.label in attack.successes(run):
            by_seed.setdefault(seed_of(run), run)
    return attack.cell(list(by_seed.values()), row.label, with_clients=False)


# -- tasks and methods -----------------------------------------------------------------------------


class _Task(NamedTuple):
    """What runs of one column have in common. `label` is what the user calls it; empty: nothing."""

    label: str
    task: str
    model: str
    source: str
    partition: str

    @property
    def name(self) -> str:
        return self.label or self.task


def task_names(runs: Sequence[Run]) -> dict[Path, str]:
    """What each run's column is called, by its file: the user's label or the task, and what else
    sets runs of it apart.

    Two runs are of one column if they have label, task, model, source and partition of the data in
    common. The partition does not count where each method has one of its own, and there is no
    server-only control, which has that of its method.
    """
    keys = {run.file: _task(run) for run in with_task_labels(runs)}
    names, skews = (
        {},
        {(label_of(run), *keys[run.file][:4]): keys[run.file].partition for run in runs},
    )
    of_method = all(
        skews[label_of(run), *keys[run.file][:4]] == keys[run.file].partition for run in runs
    )
    of_method = of_method and not any(SERVER_ONLY in _tested(run) for run in runs)
    for file, key in keys.items():
        named = [other for other in keys.values() if other.name == key.name]
        models = {other.model for other in (named if key.label else keys.values())}
        alike = [other for other in named if other.model == key.model]
        parts = [key.name] + (
            [key.task] if len({other.task for other in named}) > 1 and key.label else []
        )
        parts += [Path(key.model).name] if len(models) > 1 else []
        parts += [key.source] if len({other.source for other in alike}) > 1 else []
        parts += (
            [key.partition]
            if len({other.partition for other in alike}) > 1 and not of_method
            else []
        )
        names[file] = ", ".join(parts)
    return names


def with_task_labels(runs: Sequence[Run]) -> list[Run]:
    """Give runs without a task's label that of the others on the same data, if those have one and
    the same.

    A sweep that an earlier version has begun has runs of both kinds.
    """
    labels: dict[tuple[str, ...], set[str]] = {}
    for run in runs:
        if (key := _task(run)).label:
            labels.setdefault(key[1:], set()).add(key.label)
    return [_labelled(run, labels.get(_task(run)[1:], set())) for run in runs]


def _labelled(run: Run, labels: set[str]) -> Run:
    if _task(run).label or len(labels) != 1:
        return run
    return replace(
        run, config={**run.config, "run": {**run.config.get("run", {}), "task_label": min(labels)}}
    )


def label_of(run: Run) -> str:
    """What tables call a run's method."""
    own = _own(run)
    if own is not None:
        return str(own["method"])
    return str(run.config.get("run", {}).get("label") or run.config.get("method", "fedsp"))


def require_once(runs: Sequence[Run]) -> None:
    """Raise ValueError if two runs are the same task, method and seed: which one is meant?"""
    seen: dict[tuple[Any, ...], Run] = {}
    for run in runs:
        other = seen.setdefault((_task(run), label_of(run), seed_of(run)), run)
        if other is not run:
            raise ValueError(
                f"found two runs of {label_of(run)} on {_task(run).name} with seed "
                f"{seed_of(run)} ({other.file.parent} "
                f"and {run.file.parent}), expected one; leave one out, or give them names of "
                "their own (run.label)"
            )


def _task(run: Run) -> _Task:
    data, model = run.config.get("data", {}), run.config.get("model", {})
    skew = str(data.get("partition", "iid"))
    skew += f" {data.get('alpha')}" if skew != "iid" else ""
    label, source = run.config.get("run", {}).get("task_label"), str(data.get("source") or "hub")
    return _Task(
        str(label or ""), str(data.get("task", "all")), str(model.get("name", "")), source, skew
    )


def _tested(run: Run) -> dict[str, np.void]:
    return {str(row["method"]): row for row in run.results if row["split"] == "test"}


def _own(run: Run) -> np.void | None:
    """The test result of a run's own method."""
    found = [row for name, row in _tested(run).items() if name not in (ZERO_SHOT, SERVER_ONLY)]
    return found[-1] if found else None


def seed_of(run: Run) -> int:
    """What a run's randomness is keyed by."""
    return int(run.config.get("run", {}).get("seed", 1))


def _add(methods: dict[str, Method], task: str, run: Run) -> None:
    own = _own(run)
    assert own is not None
    method = methods.setdefault(label_of(run), Method(label_of(run)))
    method.results.setdefault(task, {})[seed_of(run)] = own
    method.runs.append(run)
    method.tasks[run.file] = task


# -- controls --------------------------------------------------------------------------------------


def _controls(runs: Sequence[Run], names: dict[Path, str]) -> Iterator[Method]:
    """The rows of the controls."""
    plain = Method(ZERO_SHOT)
    for run in runs:
        if (row := _tested(run).get(ZERO_SHOT)) is not None:
            plain.results.setdefault(names[run.file], {}).setdefault(seed_of(run), row)
    if plain.results:
        yield plain
    for group in control_groups(runs, lambda run: _tested(run).get(SERVER_ONLY), _agree):
        control = Method(group.label, of=group.of)
        for run in group.runs:
            control.results.setdefault(names[run.file], {}).setdefault(
                seed_of(run), _tested(run)[SERVER_ONLY]
            )
        yield control


@dataclass(frozen=True)
class Control:
    """A server-only control: what it is called, the methods that it belongs to, and the runs that
    brought it.
    """

    label: str
    of: tuple[str, ...]
    runs: tuple[Run, ...]


def control_groups(
    runs: Sequence[Run], control: Callable[[Run], Any], agree: Callable[[Any, Any], bool]
) -> list[Control]:
    """The server-only controls that there are: one, if those of all runs agree wherever task and
    seed are the same.

    All runs of a method have the same one.

    Args:
        control: what is compared, of a run; None where it has no control.
    """
    by_label: dict[str, list[Run]] = {}
    for run in runs:
        if control(run) is not None:
            by_label.setdefault(label_of(run), []).append(run)
    groups: list[list[Run]] = []
    for members in by_label.values():
        fitting = (group for group in groups if _fits(members, group, control, agree))
        if (group := next(fitting, None)) is None:
            groups.append(group := [])
        group.extend(members)
    labels = [tuple(dict.fromkeys(map(label_of, group))) for group in groups]
    names = [
        SERVER_ONLY if len(groups) == 1 else f"{SERVER_ONLY} (of {_few(some)})" for some in labels
    ]
    return [Control(name, some, tuple(group)) for name, some, group in zip(names, labels, groups)]


def _fits(
    some: Sequence[Run],
    others: Sequence[Run],
    control: Callable[[Run], Any],
    agree: Callable[[Any, Any], bool],
) -> bool:
    known = {(_task(run), seed_of(run)): control(run) for run in others}
    shared = [run for run in some if (_task(run), seed_of(run)) in known]
    return all(agree(control(run), known[_task(run), seed_of(run)]) for run in shared)


def _few(labels: Sequence[str]) -> str:
    return " and ".join(labels) if len(labels) < 3 else f"{labels[0]} and {len(labels) - 1} others"


def _agree(one: np.void, other: np.void) -> bool:
    """Whether two controls are one: the same score, and the same loss but for what machines differ
    in.
    """
    losses = float(one["loss"]), float(other["loss"])
    same_loss = math.isclose(*losses, rel_tol=1e-3) or all(map(math.isnan, losses))
    return same_loss and math.isclose(main_measure(one)[1], main_measure(other)[1], abs_tol=1e-9)


# -- below the table -------------------------------------------------------------------------------


def _measure(found: Comparison, task: str) -> str:
    rows = [row for method in found.methods for row in method.results.get(task, {}).values()]
    return " or ".join(dict.fromkeys(main_measure(row)[0].replace("_", " ") for row in rows))


def _facts(found: Comparison) -> list[str]:
    """Test questions, seeds, rounds, models, machines and dates, a line each."""
    runs = [run for method in found.methods for run in method.runs]
    questions = [
        f"{task} {span(_questions(found.methods, task), lambda n: f'{n:,}')}"
        for task in found.tasks
    ]
    models = dict.fromkeys(str(run.config.get("model", {}).get("name", "?")) for run in runs)
    machines = dict.fromkeys(", ".join(summary.machine(run.environment)) for run in runs)
    dates = [run.created[:10] for run in runs], [run.updated[:10] for run in runs]
    lines = [
        f"- test questions: {', '.join(questions)}",
        f"- seeds: {_listed(sorted({seed_of(run) for run in runs}))}",
        f"- rounds: {_rounds(found.methods)}",
        f"- model: {'; '.join(models)}",
        f"- machine: {'; '.join(machines)}",
        f"- dates: {' to '.join(dict.fromkeys((min(dates[0]), max(dates[1]))))}",
    ]
    owners: dict[str, dict[str, None]] = {}
    for run in runs:
        owners.setdefault(_task(run).partition, {})[label_of(run)] = None
    if len(owners) > 1:
        lines += [f"- partition {skew}: {'; '.join(labels)}" for skew, labels in owners.items()]
    lines += [
        f"- {row.label}: {_listed(row.of)}"
        for row in found.methods
        if row.label.endswith("others)")
    ]
    return lines + ([f"- not complete: {', '.join(found.unfinished)}"] if found.unfinished else [])


def _questions(methods: Sequence[Method], task: str) -> list[int]:
    return [int(row["n"]) for method in methods for row in method.results.get(task, {}).values()]


def _rounds(methods: Sequence[Method]) -> str:
    """Of all methods, if they have the same number; else of each."""
    each = {m.label: span([run.committed_rounds for run in m.runs], str) for m in methods if m.runs}
    return ", ".join(
        dict.fromkeys(each.values())
        if len(set(each.values())) == 1
        else (f"{m} {n}" for m, n in each.items())
    )


def _listed(items: Iterable[Any]) -> str:
    return ", ".join(map(str, items))


def _warnings(tasks: Sequence[str], methods: Sequence[Method]) -> Iterator[str]:
    seeds = sorted(
        {seed for method in methods for cell in method.results.values() for seed in cell}
    )
    for method in methods:
        for task in tasks:
            has = sorted(method.results.get(task, {}))
            if not has:
                yield f"{method.label} has no run on {task}."
            elif has != seeds:
                yield f"{method.label} on {task}: only seed {_listed(has)} of {_listed(seeds)}."
        yield from _mixed(method)
    for task in tasks:
        if len(set(_questions(methods, task))) > 1:
            each = {m.label: span(_questions([m], task), str) for m in methods if task in m.results}
            yield f"{task}: not the same test questions: {_listed(f'{label} {n}' for label, n in each.items())}."


def _mixed(method: Method) -> Iterator[str]:
    """A sentence for each task on which a method's runs differ in more than their seed."""
    firsts: dict[_Task, Run] = {}
    told: dict[_Task, list[str]] = {}
    for run in method.runs:
        first = firsts.setdefault(_task(run), run)
        keys = [line.partition(":")[0] for line in changed_keys(first.config, run.config)]
        told.setdefault(_task(run), []).extend(key for key in keys if key != "run.seed")
    for task, keys in told.items():
        if keys:
            yield f"{method.label} on {task.name}: its runs differ in {_listed(dict.fromkeys(keys))}."

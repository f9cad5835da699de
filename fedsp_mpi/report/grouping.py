"""Groups runs for comparison: which are on the same task, and which share a control."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple, TypeVar

from fedsp_mpi.record.hdf5 import Run
from fedsp_mpi.report.facts import SERVER_ONLY, label_of, results_on_test, run_setting, seed_of

T = TypeVar("T")


class TaskKey(NamedTuple):
    """What runs in one column of a table have in common.

    Attributes:
        label: what the user calls the task; empty if nothing.
        task: of the data.
        model: name of the global model.
        source: of the data.
        partition: of the data among clients, with its parameter.
    """

    label: str
    task: str
    model: str
    source: str
    partition: str

    @property
    def name(self) -> str:
        return self.label or self.task


def task_key(run: Run) -> TaskKey:
    """Return what decides in which column a run belongs."""
    data = run.config.get("data", {})
    partition = str(data.get("partition", "iid"))
    if partition != "iid":
        partition += f" {data.get('alpha')}"
    return TaskKey(
        label=str(run_setting(run, "task_label") or ""),
        task=str(data.get("task", "all")),
        model=str(run.config.get("model", {}).get("name", "")),
        source=str(data.get("source") or "hub"),
        partition=partition,
    )


def with_task_labels(runs: Sequence[Run]) -> list[Run]:
    """Give runs without a label for their task that of other runs on the same data.

    Only if those have a single one. A sweep that an earlier version has begun has runs of both
    kinds.
    """
    labels: dict[tuple[str, ...], set[str]] = {}
    for run in runs:
        key = task_key(run)
        if key.label:
            labels.setdefault(key[1:], set()).add(key.label)
    labelled = []
    for run in runs:
        key = task_key(run)
        candidates = labels.get(key[1:], set())
        if not key.label and len(candidates) == 1:
            section = {**run.config.get("run", {}), "task_label": min(candidates)}
            run = replace(run, config={**run.config, "run": section})
        labelled.append(run)
    return labelled


def task_names(runs: Sequence[Run]) -> dict[Path, str]:
    """Return the title of each run's column, by the run's file.

    It is the user's label or the task, and whatever else sets runs of that name apart. Two runs
    share a column if they have the same label, task, model, source and partition of the data.

    The partition does not count where each method has a single one: then it belongs to the method.
    A server-only control has no partition of its own, so that with one the partition counts.
    """
    keys = {run.file: task_key(run) for run in with_task_labels(runs)}
    ignore_partition = _each_method_has_its_partition(runs, keys)
    return {
        file: _column_name(key, list(keys.values()), ignore_partition) for file, key in keys.items()
    }


def _each_method_has_its_partition(runs: Sequence[Run], keys: dict[Path, TaskKey]) -> bool:
    if any(SERVER_ONLY in results_on_test(run) for run in runs):
        return False
    partitions: dict[tuple[str, ...], set[str]] = {}
    for run in runs:
        key = keys[run.file]
        partitions.setdefault((label_of(run), *key[:4]), set()).add(key.partition)
    return all(len(of_method) == 1 for of_method in partitions.values())


def _column_name(key: TaskKey, keys: Sequence[TaskKey], ignore_partition: bool) -> str:
    """Name a column by its task and by what distinguishes it from other columns.

    Args:
        key: of the column.
        keys: of all runs.
        ignore_partition: whether the partition distinguishes methods, not columns.
    """
    same_name = [other for other in keys if other.name == key.name]
    same_model = [other for other in same_name if other.model == key.model]
    # Without a label, the model is named as soon as there are two, whatever their tasks.
    models = {other.model for other in (same_name if key.label else keys)}
    parts = [key.name]
    if key.label and len({other.task for other in same_name}) > 1:
        parts.append(key.task)
    if len(models) > 1:
        parts.append(Path(key.model).name)
    if len({other.source for other in same_model}) > 1:
        parts.append(key.source)
    if len({other.partition for other in same_model}) > 1 and not ignore_partition:
        parts.append(key.partition)
    return ", ".join(parts)


def require_distinct(runs: Sequence[Run]) -> None:
    """Raise ValueError if two runs have the same task, method and seed."""
    seen: dict[tuple[TaskKey, str, int], Run] = {}
    for run in runs:
        first = seen.setdefault((task_key(run), label_of(run), seed_of(run)), run)
        if first is not run:
            raise ValueError(
                f"found two runs of {label_of(run)} on {task_key(run).name} with seed "
                f"{seed_of(run)} ({first.file.parent} and {run.file.parent}), expected one; "
                "leave one out, or give them different labels (run.label)"
            )


# -- controls --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Control:
    """A control, server-only or zero-shot.

    Attributes:
        label: what tables call it.
        methods: labels of the methods whose control it is.
        runs: of those methods, which brought it along.
    """

    label: str
    methods: tuple[str, ...]
    runs: tuple[Run, ...]


def control_groups(
    runs: Sequence[Run],
    control: Callable[[Run], T | None],
    agree: Callable[[T, T], bool],
    *,
    name: str = SERVER_ONLY,
) -> list[Control]:
    """Return the server-only controls of some runs, or those of another name.

    Methods share a control if theirs agree wherever task and seed are the same; so there is one
    control if all servers had the same settings. All runs of a method have the same one.

    Args:
        runs: of several methods.
        control: returns what is compared of a run; None if the run has no control.
        agree: returns whether two of those are the same.
        name: of the control in tables.
    """
    by_label: dict[str, list[Run]] = {}
    for run in runs:
        if control(run) is not None:
            by_label.setdefault(label_of(run), []).append(run)
    groups: list[list[Run]] = []
    for members in by_label.values():
        for group in groups:
            if _controls_agree(members, group, control=control, agree=agree):
                group.extend(members)
                break
        else:
            groups.append(list(members))
    controls = []
    for group in groups:
        methods = tuple(dict.fromkeys(label_of(run) for run in group))
        label = name if len(groups) == 1 else f"{name} (of {_few(methods)})"
        controls.append(Control(label, methods, tuple(group)))
    return controls


def _controls_agree(
    runs: Sequence[Run],
    others: Sequence[Run],
    *,
    control: Callable[[Run], T | None],
    agree: Callable[[T, T], bool],
) -> bool:
    controls = {(task_key(run), seed_of(run)): control(run) for run in others}
    for run in runs:
        first = control(run)
        second = controls.get((task_key(run), seed_of(run)))
        if first is not None and second is not None and not agree(first, second):
            return False
    return True


def _few(labels: Sequence[str]) -> str:
    if len(labels) < 3:
        return " and ".join(labels)
    return f"{labels[0]} and {len(labels) - 1} others"

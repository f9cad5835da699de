"""The task that a configuration's section `data` means, in the user's words and over their columns.

Nothing is read but the section: each owner of text makes the same task of it, with `data.columns`
and other keys of its own.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial

from fedsp_mpi.config.data import DataConfig
from fedsp_mpi.config.parsing import ConfigError
from fedsp_mpi.data import classification, examples, tasks, templates
from fedsp_mpi.data.cells import describe_choices
from fedsp_mpi.data.tasks import Task


def configured(data: DataConfig) -> Task:
    """Return the task of a configuration.

    Raises:
        ConfigError: the user's words, classes or columns do not fit the task.
        ValueError: there is no such task.
    """
    task = tasks.find(data.task)
    lists = [name for name, columns in data.columns.items() if not isinstance(columns, str)]
    for name in lists:
        if (task.name, name) != ("multiple_choice", "choices"):
            raise ConfigError(
                f"data.columns.{name}: found a list with {task.name}, expected one column; only "
                "the choices of multiple_choice may have a column each (data.template may name "
                "several columns)"
            )
    if data.first_label and task.name not in ("classification", "multiple_choice"):
        raise ConfigError(
            f"data.first_label: found {data.first_label} with {task.name}, whose labels count from "
            "0, expected classification or multiple_choice; leave it out"
        )
    if task.name == "classification":
        return _classification(task, data)
    if data.classes:
        raise ConfigError(
            f"data.classes: found {len(data.classes)} with {task.name}, which has choices of its "
            "own, expected the task classification; leave them out"
        )
    if lists:
        task = _with_choice_columns(task, data)
    elif data.first_label:
        task = replace(task, example=partial(examples.multiple_choice, first=data.first_label))
    return templates.with_wording(task, data.template, data.verbaliser, names=_task_names(data))


def _task_names(data: DataConfig) -> dict[str, str]:
    """Return the task's names of columns by those of the user's rows, where they differ."""
    return {column: name for name, column in data.columns.items() if isinstance(column, str)}


def _with_choice_columns(task: Task, data: DataConfig) -> Task:
    """Return the task for rows whose choices have a column each."""
    names = tuple(data.columns["choices"])
    if len(names) < 2 or len(set(names)) < len(names):
        raise ConfigError(
            f"data.columns.choices: found {len(set(names))} different columns in a list of "
            f"{len(names)}, expected two or more, one for each choice"
        )
    return replace(
        task,
        column_sets=(("context", *names, "label"),),
        example=examples.ChoiceColumns(names, data.first_label),
        has_own_labels=True,
    )


def _classification(task: Task, data: DataConfig) -> Task:
    """Return the task with the classes of the configuration, or without any yet."""
    template = None
    if data.template is not None:
        template = templates.template_of(task, data.template, _task_names(data))
        text = [classification.TEXT] if classification.TEXT in data.columns else []
        columns = dict.fromkeys([*template.columns, *text, task.columns[-1]])
        task = replace(task, column_sets=(tuple(columns),))
    templates.require_words(data.verbaliser)

    def reader(classes: tuple[str, ...]) -> classification.Reader:
        if data.verbaliser and len(data.verbaliser) != len(classes):
            raise ConfigError(
                f"data.verbaliser: found {len(data.verbaliser)} words for {len(classes)} classes "
                f"({describe_choices(classes)}), expected one for each"
            )
        return classification.Reader(classes, data.verbaliser, template, first=data.first_label)

    task = replace(task, reader=reader)
    if not data.classes:
        return task
    classes = tuple(name.strip() for name in data.classes)
    classification.require_classes(classes)
    return task.with_classes(classes)

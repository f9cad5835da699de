"""Read sweep files: every task with every method and every seed is an experiment, a trial.

    folder: runs/paper            # of all runs, relative to the working directory
    base: ../smollm2/base.yaml    # or a list of files, relative to this one; default: embedded
    seeds: [1, 2, 3]
    tasks:
      arc_easy: {data: {task: arc_easy}}
      sciq: sciq.yaml
    methods:
      fedsp: ../methods/fedsp.yaml
      fedprompt: {extends: ../methods/fedprompt.yaml, federation: {rounds: 20}}
    trials:                       # optional: of a task with a method; * and ? are wildcards
      sciq-fed*: {federation: {rounds: 5}}

A trial is one task with one method and one seed, named TASK-METHOD-SEED. Its configuration is the
base, then the task, the method, and the matching entries of `trials` in their order, then `--set`,
where {task} stands for the task's name and {file} for the file's name without its suffix; the later
win. Seeds change last, so that a sweep that is interrupted half-way has compared all methods.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import reduce
from pathlib import Path

from fedsp_mpi.config import EMBEDDED, Config, checked
from fedsp_mpi.config.parsing import ConfigError, merge, put, shown, unknown_key
from fedsp_mpi.config.yaml_reader import extended, key_value, read_yaml, setting
from fedsp_mpi.files.untrusted import JsonMapping, JsonObject

KEYS = {
    "folder": "of all runs, relative to the working directory",
    "base": "what all trials begin with: a file, a list of files, or settings; without it the "
    "embedded default",
    "seeds": "of each task with each method",
    "tasks": "names, each with settings, a file, or a list of files",
    "methods": "names, each with settings, a file, or a list of files",
    "trials": "settings of TASK-METHOD, in which * and ? are wildcards; later ones win",
}
_KEYS_OF_THE_SWEEP = ("run.folder", "run.name", "run.seed")  # set for every trial by the sweep
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")


@dataclass(frozen=True)
class Trial:
    """One experiment; `config` is checked, with the run's name, folder and seed in it."""

    name: str
    task: str
    method: str
    config: Config

    @property
    def folder(self) -> Path:
        """The run's folder."""
        return Path(self.config.run.folder).expanduser() / self.name

    @property
    def method_label(self) -> str:
        """The method's name in tables."""
        return self.config.run.label or self.config.method

    def sibling_file(self, subfolder: str, suffix: str) -> Path:
        """Return the path of this trial's file in a folder beside the runs."""
        return self.folder.parent / subfolder / f"{self.name}{suffix}"


def trials_of(file: Path, overrides: Sequence[str] = ()) -> list[Trial]:
    """Return the trials of a sweep file, in the order in which they run.

    Raises:
        ConfigError: on the first mistake.
    """
    content = read_yaml(file)
    _check_keys(content, file)
    base = _read_layer(content.get("base") or str(EMBEDDED.resolve()), file, "base")
    tasks = _read_layers(content, "tasks", file)
    methods = _read_layers(content, "methods", file)
    layers_by_pattern = _read_layers(content, "trials", file)
    _require_matched(layers_by_pattern, tasks, methods, file=file)
    trials = []
    for seed in content["seeds"]:
        for task, task_layer in tasks.items():
            filled_in = [
                item.replace("{task}", task).replace("{file}", file.stem) for item in overrides
            ]
            override_layer = _read_overrides(filled_in)
            for method, method_layer in methods.items():
                name = f"{task}-{method}-{seed}"
                layers = [
                    base,
                    {"run": {"task_label": task}},
                    task_layer,
                    {"run": {"label": method}},
                    method_layer,
                    *_matching(layers_by_pattern, f"{task}-{method}"),
                    override_layer,
                    {"run": {"folder": content["folder"], "name": name, "seed": seed}},
                ]
                trials.append(Trial(name, task, method, _merged_config(name, layers)))
    _require_distinct(trials, file)
    return trials


def _check_keys(content: JsonMapping, file: Path) -> None:
    """Raise ConfigError unless the content has the form of a sweep file."""
    for key in content:
        if key not in KEYS:
            raise ConfigError(f"{file}: {unknown_key(key, KEYS)}")
    folder = content.get("folder")
    if not isinstance(folder, str):
        raise ConfigError(f"{file}: folder: found {shown(folder)}, expected the folder of all runs")
    _check_seeds(content.get("seeds"), file)
    for section in ("tasks", "methods"):
        _check_names(content.get(section), file, section)
    trials = content.get("trials")
    if not isinstance(trials, dict | None):
        raise ConfigError(
            f"{file}: trials: found {shown(trials)}, expected TASK-METHOD, each with settings or "
            "a file"
        )


def _check_seeds(seeds: object, file: Path) -> None:
    """Raise ConfigError unless the seeds are a list of distinct whole numbers."""
    if not (isinstance(seeds, list) and seeds and all(type(seed) is int for seed in seeds)):
        raise ConfigError(
            f"{file}: seeds: found {shown(seeds)}, expected a list of whole numbers, for "
            "instance [1, 2, 3]"
        )
    if len(set(seeds)) < len(seeds):
        raise ConfigError(f"{file}: seeds: found {shown(seeds)}, expected each once")


def _check_names(entries: object, file: Path, section: str) -> None:
    """Raise ConfigError unless a section names its entries, and the names can be file names."""
    if not (isinstance(entries, dict) and entries):
        raise ConfigError(
            f"{file}: {section}: found {shown(entries)}, expected names, each with settings or a "
            "file"
        )
    for name in entries:
        if not NAME.fullmatch(str(name)):
            raise ConfigError(
                f"{file}: {section}: found the name {shown(name)}, expected letters, digits, "
                "'.', '_' and '-': it becomes a part of file names"
            )


def _read_layers(content: JsonMapping, section: str, file: Path) -> dict[str, JsonObject]:
    """Return the settings of each entry of a section, by its name."""
    entries = content.get(section) or {}
    return {
        str(name): _read_layer(entry, file, f"{section}.{name}") for name, entry in entries.items()
    }


def _read_layer(entry: object, file: Path, where: str) -> JsonObject:
    """Return the settings of an entry, laid over those of the files that it names.

    Args:
        entry: settings, the name of a file, or a list of such names.
        file: the sweep file, to which names are relative.
        where: the entry's key, for messages.

    Raises:
        ConfigError: the entry is none of these, or a file cannot be read.
    """
    if isinstance(entry, (str, list)):
        entry = {"extends": entry}
    if not isinstance(entry, dict | None):
        raise ConfigError(
            f"{file}: {where}: found {shown(entry)}, expected settings, a file, or a list of files"
        )
    return extended(entry or {}, file)


def _matching(layers: Mapping[str, JsonObject], name: str) -> list[JsonObject]:
    """Return the layers whose pattern matches a name TASK-METHOD."""
    return [layer for pattern, layer in layers.items() if fnmatchcase(name, pattern)]


def _require_matched(
    patterns: Iterable[str], tasks: Iterable[str], methods: Iterable[str], *, file: Path
) -> None:
    """Raise ConfigError if an entry of `trials` matches no task with a method."""
    names = [f"{task}-{method}" for task in tasks for method in methods]
    for pattern in patterns:
        if not any(fnmatchcase(name, pattern) for name in names):
            raise ConfigError(
                f"{file}: trials: found {shown(pattern)}, which is no task with a method, "
                "expected TASK-METHOD, for instance " + names[0]
            )


def _read_overrides(items: Iterable[str]) -> JsonObject:
    """Return the settings of `key=value` items.

    Raises:
        ConfigError: an item is malformed, or sets a key that belongs to the sweep.
    """
    overrides: JsonObject = {}
    for item in items:
        key, value = key_value(item)
        if key in _KEYS_OF_THE_SWEEP:
            raise ConfigError(
                f"{setting(item)}: found a key that the sweep gives to each run; change "
                "it in the file"
            )
        put(overrides, key, value, setting(item))
    return overrides


def _merged_config(name: str, layers: Sequence[JsonObject]) -> Config:
    """Return the checked configuration of a trial; later layers win.

    Raises:
        ConfigError: with the trial's name in front of the mistake.
    """
    try:
        return checked(reduce(merge, layers))
    except ConfigError as error:
        raise ConfigError(f"{name}: {error}") from None


def _require_distinct(trials: Sequence[Trial], file: Path) -> None:
    """Raise ConfigError if trials share a name, or two methods of a task a label in tables."""
    trial_by_name: dict[str, Trial] = {}
    method_by_label: dict[tuple[str, str], str] = {}
    for trial in trials:
        namesake = trial_by_name.setdefault(trial.name, trial)
        if namesake is not trial:
            pairs = [f"{clash.task} with {clash.method}" for clash in (namesake, trial)]
            raise ConfigError(
                f"{file}: found {' and '.join(pairs)} both named {trial.name}, expected other names"
            )
        method = method_by_label.setdefault((trial.task, trial.method_label), trial.method)
        if method != trial.method:
            raise ConfigError(
                f"{file}: methods: found {method} and {trial.method} both called "
                f"{trial.method_label!r}, expected two names in tables; give one of them a "
                "run: {label: ...}"
            )

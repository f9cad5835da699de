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

A task may be a phase that comes after another:

    tasks:
      wiki_text: pretrain.yaml
      ag_news: {extends: finetune.yaml, after: wiki_text}

Each trial of `ag_news` then starts from the result of the trial of `wiki_text` with the same method
and seed (`model.after` of its configuration). An entry of `trials` may name that of another method
by `after: TASK-METHOD`, or none by `after: null`. So a method of such a file is one way through all
phases, such as federated or centralised, and tables have a row for each way and a column for each
phase. A section of its own would have had to say anew what tasks and methods say: names, layers,
`{task}`, `--only`.
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
    "tasks": "names, each with settings, a file, or a list of files; with `after`, the name of a "
    "task, its trials start from the results of that one's",
    "methods": "names, each with settings, a file, or a list of files",
    "trials": "settings of TASK-METHOD, in which * and ? are wildcards; later ones win; `after` "
    "names the TASK-METHOD that it starts from",
}
AFTER = "after"  # of a task, or of an entry of `trials`
_KEYS_OF_THE_SWEEP = ("run.folder", "run.name", "run.seed")  # set for every trial by the sweep
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")


@dataclass(frozen=True)
class Trial:
    """One experiment.

    Attributes:
        name: of the run.
        task, method: their names in the file.
        config: checked, with the run's name, folder and seed in it.
        after: name of the trial that it starts from, of the same seed; None: it starts from
            `model.name`.
    """

    name: str
    task: str
    method: str
    config: Config
    after: str | None = None

    @property
    def folder(self) -> Path:
        """The run's folder."""
        return Path(self.config.run.folder).expanduser() / self.name

    @property
    def after_folder(self) -> Path | None:
        """The folder of the run that it starts from; None if it starts from none."""
        return None if self.after is None else self.folder.parent / self.after

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
    after = _earlier(tasks, methods, layers_by_pattern, file=file)
    trials = []
    for seed in content["seeds"]:
        for task, task_layer in tasks.items():
            filled_in = [
                item.replace("{task}", task).replace("{file}", file.stem) for item in overrides
            ]
            override_layer = _read_overrides(filled_in)
            for method, method_layer in methods.items():
                pair = f"{task}-{method}"
                name = f"{pair}-{seed}"
                run = {"folder": content["folder"], "name": name, "seed": seed}
                layers = [
                    base,
                    {"run": {"task_label": task}},
                    task_layer,
                    {"run": {"label": method}},
                    method_layer,
                    *_matching(layers_by_pattern, pair),
                    override_layer,
                    {"run": run},
                ]
                earlier = f"{after[pair]}-{seed}" if after[pair] else None
                if earlier:
                    layers.append({"model": {"after": str(Path(content["folder"]) / earlier)}})
                config = _merged_config(name, layers)
                trials.append(Trial(name, task, method, config, earlier))
    _require_distinct(trials, file)
    _require_models(trials, file)
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
    return dict(extended(entry or {}, file))


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


# -- phases ----------------------------------------------------------------------------------------


def _earlier(
    tasks: Mapping[str, JsonObject],
    methods: Iterable[str],
    layers_by_pattern: Mapping[str, JsonObject],
    *,
    file: Path,
) -> dict[str, str | None]:
    """Return, by TASK-METHOD, the one that it starts from; None where it starts from none.

    Takes the key out of the layers, which are of the configuration then.

    Args:
        tasks: layers by name.
        methods: their names.
        layers_by_pattern: of the section `trials`.
        file: the sweep file, for messages.

    Raises:
        ConfigError: there is no such task or trial, or one comes after itself.
    """
    methods = list(methods)
    pairs = [f"{task}-{method}" for task in tasks for method in methods]
    after: dict[str, str | None] = dict.fromkeys(pairs)
    for task, layer in tasks.items():
        where = f"{file}: tasks.{task}.{AFTER}"
        earlier = _name(layer.pop(AFTER, None), tasks, where, expected="a task of the file")
        if earlier is not None:
            after |= {f"{task}-{method}": f"{earlier}-{method}" for method in methods}
    for pattern, layer in layers_by_pattern.items():
        if AFTER not in layer:
            continue
        where = f"{file}: trials.{pattern}.{AFTER}"
        earlier = _name(layer.pop(AFTER), pairs, where, expected="TASK-METHOD, or null")
        after |= {pair: earlier for pair in pairs if fnmatchcase(pair, pattern)}
    for pair in pairs:
        _require_no_circle(pair, after, file)
    return after


def _name(name: object, names: Iterable[str], where: str, *, expected: str) -> str | None:
    """Return a name as the sections have it, in which 1 is '1'; None if nothing is named.

    Args:
        name: null names nothing.
        names: those that there are.
        where: the key, with the file.
        expected: what the names are of, for the message.

    Raises:
        ConfigError: something is named that is not among the names.
    """
    names = list(names)
    if name is None:
        return None
    if str(name) not in names:
        raise ConfigError(
            f"{where}: found {shown(name)}, expected {expected}, for instance {names[0]}"
        )
    return str(name)


def _require_no_circle(pair: str, after: Mapping[str, str | None], file: Path) -> None:
    """Raise ConfigError if a trial, TASK-METHOD, comes after itself."""
    path = [pair]
    while (earlier := after[path[-1]]) is not None:
        if earlier in path:
            circle = " after ".join([*path[path.index(earlier) :], earlier])
            raise ConfigError(
                f"{file}: {AFTER}: found {circle}, expected a first phase, which comes after none"
            )
        path.append(earlier)


def _require_models(trials: Sequence[Trial], file: Path) -> None:
    """Raise ConfigError if a trial comes after one that leaves no model, or one of another."""
    by_name = {trial.name: trial for trial in trials}
    for trial in trials:
        if trial.after is None:
            continue
        earlier = by_name[trial.after]
        if not earlier.config.leaves_model:
            raise ConfigError(
                f"{file}: {trial.name}: found it after {earlier.name} of "
                f"{earlier.config.method}, which leaves no model, expected one of finetune or "
                "pretrain, or of lora with lora.merged=true"
            )
        if earlier.config.model.name != trial.config.model.name:
            raise ConfigError(
                f"{file}: {trial.name}: found model.name {trial.config.model.name} after "
                f"{earlier.name} with {earlier.config.model.name}, expected one model for both"
            )


# -- command line ----------------------------------------------------------------------------------


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
        put(overrides, key, value, whose=setting(item))
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

"""Many experiments from one file or several: every task with every method and every seed.

    folder: runs/paper            # of all runs, relative to where the command is given
    base: ../smollm2/base.yaml    # or a list of files, relative to this one; without it the
    embedded default
    seeds: [1, 2, 3]
    tasks:
      arc_easy: {data: {task: arc_easy}}
      sciq: sciq.yaml
    methods:
      fedsp: ../methods/fedsp.yaml
      fedprompt: {extends: ../methods/fedprompt.yaml, client: {tuning: {optimizer: {learning_rate:
      5.0e-2}}}}

A cell is one task with one method and one seed, called TASK-METHOD-SEED: the base, the task laid
over it, the method over both, and `--set` over all, where {task} stands for the task's name and
{file} for that of the file, without its ending. Seeds change last, so that a sweep that is stopped
half-way has compared all methods.
"""

from __future__ import annotations

import re
import shlex
import shutil
import signal
import sys
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import suppress
from dataclasses import asdict, dataclass
from fnmatch import fnmatchcase
from functools import reduce
from pathlib import Path
from typing import Any

from fedsp_mpi.comm import Refused
from fedsp_mpi.commands import sweep_files
from fedsp_mpi.commands.jobs import Jobs, ResourceSlice, last_words, places
from fedsp_mpi.config import EMBEDDED, Config, changed_keys, checked, to_yaml
from fedsp_mpi.config.parsing import ConfigError, merge, put, shown, unknown_key
from fedsp_mpi.config.yaml_reader import extended, key_value, read_yaml, setting
from fedsp_mpi.log import Log, duration
from fedsp_mpi.record import Run, read
from fedsp_mpi.report import main_result

_KEYS = ("folder", "base", "seeds", "tasks", "methods")
_GIVEN = ("run.folder", "run.name", "run.seed")  # to every cell, by the sweep itself
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
_STOPPED = 75  # exit status of a run that SIGUSR1 told to stop


@dataclass(frozen=True)
class Trial:
    """One experiment; `config` is checked, with the run's name, folder and seed in it."""

    name: str
    task: str
    method: str
    config: Config

    @property
    def folder(self) -> Path:
        """Of the run."""
        return Path(self.config.run.folder).expanduser() / self.name

    def beside(self, room: str, ending: str) -> Path:
        """A file of this cell's in a folder beside the runs."""
        return self.folder.parent / room / f"{self.name}{ending}"

    @property
    def label(self) -> str:
        """What tables call the method."""
        return self.config.run.label or self.config.method


def sweep(
    files: Sequence[Path],
    overrides: Sequence[str],
    launch: str,
    is_dry: bool,
    log: Log,
    only: str = "*",
    side_by_side: int = 1,
) -> int:
    """Run all cells of the files that have no complete record yet. Returns the exit status: 1 if
    one of them failed.

    Args:
        files: of which no two have a run of the same folder and name.
        overrides: `key=value`, for all cells.
        launch: what starts a run's processes, for instance "mpirun -n 4"; empty for one process.
        is_dry: only say what would be run.
        log: told of each run.
        only: a pattern that the names of the cells match, for instance "sst2-*-1".
        side_by_side: runs at a time, each with its share of this process's cores and GPUs.

    Raises:
        ValueError: a mistake in the file, in a cell, or a record of another configuration; nothing
        was started then.
        Refused: a signal came; it was passed on to the runs, which have ended.
    """
    words, at = _launch(launch), places(side_by_side)
    by_file = {file: cells_of(file, overrides) for file in files}
    _require_apart(by_file)
    cells = [cell for some in by_file.values() for cell in some if fnmatchcase(cell.name, only)]
    if not cells:
        raise ConfigError(
            f"--only {only}: found no run of that name in {_listed(files)}; --dry-run lists them"
        )
    found = {cell.folder: _found(cell) for cell in cells}
    _require_same(cells, found)
    sweep_files.require_ours(cell.folder for cell in cells)
    is_complete = {
        folder: run is not None and run.status == "complete" for folder, run in found.items()
    }
    log.say(
        f"{len(cells)} runs in {_listed(_homes(cells))}, {sum(is_complete.values())} of "
        "them complete"
    )
    if is_dry:
        place = _places(cells)
        for cell in cells:
            log.say(f"{place[cell.folder]}  {_state(cell, found[cell.folder])}")
        return 0
    sweep_files.write_configurations({cell.folder: to_yaml(cell.config) for cell in cells})
    return _run_all(cells, is_complete, words, at, log)


def cells_of(file: Path, overrides: Sequence[str] = ()) -> list[Trial]:
    """The cells of a sweep's file, in the order in which they run.

    Raises ConfigError on the first mistake.
    """
    content = read_yaml(file)
    _check_keys(content, file)
    base = _layer(content.get("base") or str(EMBEDDED.resolve()), file, "base")
    tasks, methods = (_layers(content, section, file) for section in ("tasks", "methods"))
    cells = []
    for seed in content["seeds"]:
        for task, its in tasks.items():
            over = _overrides(
                item.replace("{task}", task).replace("{file}", file.stem) for item in overrides
            )
            for method, own in methods.items():
                name = f"{task}-{method}-{seed}"
                given = {"run": {"folder": content["folder"], "name": name, "seed": seed}}
                named = ({"run": {"task_label": task}}, its, {"run": {"label": method}}, own)
                cells.append(Trial(name, task, method, _config(name, (base, *named, over, given))))
    _require_distinct(cells, file)
    return cells


def _check_keys(content: Mapping[str, Any], file: Path) -> None:
    """Raise ConfigError unless a sweep's file has the form of one."""
    for key in content:
        if key not in _KEYS:
            raise ConfigError(f"{file}: {unknown_key(key, _KEYS)}")
    if not isinstance(folder := content.get("folder"), str):
        raise ConfigError(f"{file}: folder: found {shown(folder)}, expected the folder of all runs")
    _check_seeds(content.get("seeds"), file)
    for section in ("tasks", "methods"):
        _check_names(content.get(section), file, section)


def _check_seeds(seeds: Any, file: Path) -> None:
    if not (isinstance(seeds, list) and seeds and all(type(seed) is int for seed in seeds)):
        raise ConfigError(
            f"{file}: seeds: found {shown(seeds)}, expected a list of whole numbers, for "
            "instance [1, 2, 3]"
        )
    if len(set(seeds)) < len(seeds):
        raise ConfigError(f"{file}: seeds: found {shown(seeds)}, expected each once")


def _check_names(named: Any, file: Path, section: str) -> None:
    if not (isinstance(named, dict) and named):
        raise ConfigError(
            f"{file}: {section}: found {shown(named)}, expected names, each with settings or a file"
        )
    for name in named:
        if not _NAME.fullmatch(str(name)):
            raise ConfigError(
                f"{file}: {section}: found the name {shown(name)}, expected letters, digits, "
                "'.', '_' and '-': it "
                "becomes a part of file names"
            )


def _layers(content: Mapping[str, Any], section: str, file: Path) -> dict[str, dict[str, Any]]:
    """The settings of each task, or of each method, by its name."""
    return {
        str(name): _layer(entry, file, f"{section}.{name}")
        for name, entry in content[section].items()
    }


def _layer(entry: Any, file: Path, where: str) -> dict[str, Any]:
    """The settings that an entry of the file stands for: its own, and those of files that it names."""
    entry = {"extends": entry} if isinstance(entry, (str, list)) else entry
    if not isinstance(entry, dict | None):
        raise ConfigError(
            f"{file}: {where}: found {shown(entry)}, expected settings, a file, or a list of files"
        )
    return extended(entry or {}, file)


def _overrides(items: Iterable[str]) -> dict[str, Any]:
    over: dict[str, Any] = {}
    for item in items:
        key, value = key_value(item)
        if key in _GIVEN:
            raise ConfigError(
                f"{setting(item)}: found a key that the sweep gives to each run; change "
                "it in the file"
            )
        put(over, key, value, setting(item))
    return over


def _config(name: str, layers: Sequence[dict[str, Any]]) -> Config:
    try:
        return checked(reduce(merge, layers))
    except ConfigError as error:
        raise ConfigError(f"{name}: {error}") from None


def _require_distinct(cells: Sequence[Trial], file: Path) -> None:
    """Raise ConfigError if two cells have one name, or two methods of a task are called the same in
    tables.
    """
    names: dict[str, Trial] = {}
    labels: dict[tuple[str, str], str] = {}
    for cell in cells:
        if (other := names.setdefault(cell.name, cell)) is not cell:
            pairs = [f"{one.task} with {one.method}" for one in (other, cell)]
            raise ConfigError(
                f"{file}: found {' and '.join(pairs)} both named {cell.name}, expected other names"
            )
        if (method := labels.setdefault((cell.task, cell.label), cell.method)) != cell.method:
            raise ConfigError(
                f"{file}: methods: found {method} and {cell.method} both called {cell.label!r}, "
                "expected two names in "
                f"tables; give one of them a run: {{label: ...}}"
            )


def _require_apart(by_file: Mapping[Path, Sequence[Trial]]) -> None:
    """Raise ConfigError if two files have a run of the same name in the same folder."""
    whose: dict[Path, Path] = {}
    for file, cells in by_file.items():
        for cell in cells:
            if (other := whose.setdefault(cell.folder, file)) != file:
                raise ConfigError(
                    f"{file}: found the run {cell.folder}, which {other} has too, expected "
                    "another folder"
                )


def _homes(cells: Sequence[Trial]) -> list[Path]:
    """The folders that the runs lie in, each once."""
    return list(dict.fromkeys(cell.folder.parent for cell in cells))


def _listed(paths: Iterable[Path]) -> str:
    return ", ".join(map(str, paths))


def _names(cells: Sequence[Trial]) -> dict[Path, str]:
    """What each run is called, by its folder: by its name, or by its folder where they lie in
    several.
    """
    are_together = len(_homes(cells)) == 1
    return {cell.folder: cell.name if are_together else str(cell.folder) for cell in cells}


def _places(cells: Sequence[Trial]) -> dict[Path, str]:
    """The number of each run and what it is called."""
    return {
        folder: f"{at}/{len(cells)}  {name}"
        for at, (folder, name) in enumerate(_names(cells).items(), 1)
    }


# -- what is there already -------------------------------------------------------------------------


def _found(cell: Trial) -> Run | None:
    """The record of a cell. Raises ValueError if it cannot be read."""
    return read(cell.folder) if (cell.folder / "run.h5").exists() else None


def _require_same(cells: Sequence[Trial], found: Mapping[Path, Run | None]) -> None:
    """Raise ConfigError if there are records of other configurations under the names of cells."""
    pairs = [(cell, run) for cell in cells if (run := found[cell.folder])]
    told = [(cell, run, changed) for cell, run in pairs if (changed := _changed(cell, run))]
    if not told:
        return
    cell, run, changed = told[0]
    name = _names(cells)
    others = (
        f"; so have {', '.join(name[other.folder] for other, *_ in told[1:])}"
        if len(told) > 1
        else ""
    )
    raise ConfigError(
        f"{cell.folder}: found a run ({run.status}) of another configuration "
        f"({'; '.join(changed)}), expected the same"
        f"{others}; take that back, choose another folder, or delete the run"
    )


def _changed(cell: Trial, run: Run) -> list[str]:
    """What keeps a record from being that of a cell; of a complete one, what its method is called
    too.
    """
    changed = changed_keys(run.config, asdict(cell.config))
    before = run.config.get("run", {}).get("label") or run.config.get("method")
    if run.status == "complete" and before != cell.label:
        changed.append(f"run.label: was {before}, is {cell.label}")
    return changed


def _state(cell: Trial, run: Run | None) -> str:
    """How far a run is, for `--dry-run`."""
    if run is None:
        return "new"
    if run.status == "complete":
        return f"complete  {_score(run)}"
    return f"{run.status} after round {run.committed_rounds} of {cell.config.federation.rounds}"


def _score(run: Run) -> str:
    """The result of the run's own method, by its main measure."""
    found = main_result(run)
    return "no result" if found is None else f"{found[0]} {100 * found[1]:.2f} %"


# -- running ---------------------------------------------------------------------------------------


def _launch(text: str) -> list[str]:
    try:
        words = shlex.split(text)
    except ValueError as error:
        raise ConfigError(
            f"--launch: found {text!r} ({error}), expected a command such as 'mpirun -n 4'"
        ) from None
    if words and shutil.which(words[0]) is None:
        raise ConfigError(
            f"--launch: found no command {words[0]!r}, expected one that starts a run's processes"
        )
    return words


def _run_all(
    cells: Sequence[Trial],
    is_complete: Mapping[Path, bool],
    launch: list[str],
    at: Sequence[ResourceSlice],
    log: Log,
) -> int:
    failed, stopped = [], []
    name, place = _names(cells), _places(cells)
    for cell in cells:
        if is_complete[cell.folder]:
            log.say(f"{place[cell.folder]}  complete  {_score(read(cell.folder))}")
    with Jobs(at) as jobs, ThreadPoolExecutor(len(at)) as pool:
        begun = [
            pool.submit(_run, cell, launch, jobs) for cell in cells if not is_complete[cell.folder]
        ]
        for future in as_completed(begun):
            ended = future.result()
            cell, line = ended.cell, f"{place[ended.cell.folder]}  {duration(ended.seconds)}"
            if ended.status == 0 and _is_complete(cell):
                log.say(f"{line}  {_score(read(cell.folder))}")
            elif jobs.told is None:
                failed.append(name[cell.folder])
                log.say(f"{line}  {_failure(ended)}")
            elif ended.status is not None:
                stopped.append(name[cell.folder])
    if jobs.told is not None:
        raise _stopped(stopped, jobs.told)
    if failed:
        log.say(
            f"{len(failed)} of {len(cells)} runs failed: {', '.join(failed)}; the same "
            "command tries them again"
        )
        return 1
    folders = shlex.join(map(str, _homes(cells)))
    log.say(f"all runs are complete: python -m fedsp_mpi report {folders} --table comparison")
    return 0


@dataclass(frozen=True)
class _Ended:
    """A cell whose run has ended: exit status, None if it was not to start, and where its part of
    the log begins.

    `error` says why it could not be started.
    """

    cell: Trial
    status: int | None
    seconds: float = 0.0
    start: int = 0
    error: str | None = None


def _run(cell: Trial, launch: list[str], jobs: Jobs) -> _Ended:
    """Run one cell as a process of its own, at a place that is free."""
    program = [
        sys.executable,
        "-m",
        "fedsp_mpi",
        "run",
        str(cell.beside("configs", ".yaml")),
        "--name",
        cell.name,
    ]
    text = cell.beside("logs", ".txt")
    try:
        start = text.stat().st_size if text.exists() else 0
        status, seconds = jobs.run([*launch, *program, "--resume", "auto"], text)
    except OSError as error:
        return _Ended(
            cell, 1, error=f"could not be started: {error.filename or text}: {error.strerror}"
        )
    return _Ended(cell, status, seconds, start)


def _failure(ended: _Ended) -> str:
    """What went wrong, in one line."""
    if ended.error is not None:
        return f"FAILED: {ended.error}"
    assert ended.status is not None
    end = f"signal {-ended.status}" if ended.status < 0 else f"status {ended.status}"
    text = ended.cell.beside("logs", ".txt")
    try:
        with text.open("rb") as file:
            file.seek(ended.start)
            words = last_words(file.read().decode(errors="replace"))
    except OSError as error:  # somebody has taken it away
        words = f"what it said cannot be read: {error.strerror}"
    return f"FAILED with {end}: {words} ({text})"


def _is_complete(cell: Trial) -> bool:
    with suppress(ValueError):  # a damaged record is no reason to stop the other runs
        run = _found(cell)
        return run is not None and run.status == "complete"
    return False


def _stopped(names: Sequence[str], number: int) -> Refused:
    status = _STOPPED if number == signal.SIGUSR1 else 128 + number
    where = f"in {', '.join(names)}" if names else "between two runs"
    told = signal.Signals(number).name
    return Refused(f"told to stop ({told}) {where}; the same command goes on where it was", status)

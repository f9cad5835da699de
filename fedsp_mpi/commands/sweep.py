"""Run all trials of sweep files, several at a time, and leave alone what is complete."""

from __future__ import annotations

import shlex
import shutil
import signal
import sys
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import suppress
from dataclasses import asdict, dataclass
from fnmatch import fnmatchcase
from itertools import chain
from pathlib import Path

from fedsp_mpi.comm import Refused
from fedsp_mpi.commands import sweep_files
from fedsp_mpi.commands.jobs import Jobs, ResourceSlice, error_summary, split_resources
from fedsp_mpi.commands.trials import Trial, trials_of
from fedsp_mpi.config import changed_keys, to_yaml
from fedsp_mpi.config.parsing import ConfigError
from fedsp_mpi.files import fingerprint
from fedsp_mpi.files.untrusted import JsonObject
from fedsp_mpi.log import Log, duration
from fedsp_mpi.record import Run, read
from fedsp_mpi.report import PERPLEXITY, main_result, origin_weights

_EXIT_STOPPED = 75  # exit status of a run that SIGUSR1 asked to stop
_MAX_NAMES = 12  # names of trials that a message lists


def sweep(
    files: Sequence[Path],
    overrides: Sequence[str],
    log: Log,
    *,
    launch: str = "",
    dry_run: bool = False,
    only: Sequence[str] = (),
    num_parallel: int = 1,
) -> int:
    """Run all trials of the files that have no complete record yet.

    Args:
        files: sweep files; no two may have a run of the same folder and name.
        overrides: `key=value`, for all trials.
        log: gets a line for each run.
        launch: command that starts a run's processes, such as "mpirun -n 4"; empty for one process.
        dry_run: only list what would be run.
        only: names of the trials to run, with * and ? as wildcards ("sst2-*-1"); empty for all.
        num_parallel: runs at a time, each with its share of this process's cores and GPUs.

    Returns:
        The exit status: 1 if a run failed, else 0.

    Raises:
        ValueError: a mistake in a file or trial, or a record of another configuration; nothing was
            started then, unless it is of a run whose start has been run anew.
        Refused: a signal came; it was forwarded to the runs, which have ended.
    """
    launch_command = _launch_command(launch)
    slices = split_resources(num_parallel)
    trials_by_file = {file: trials_of(file, overrides) for file in files}
    _require_separate(trials_by_file)
    trials = _select(list(chain.from_iterable(trials_by_file.values())), only, files)
    records = {trial.folder: _read_record(trial) for trial in trials}
    _require_same_configuration(trials, records)
    sweep_files.require_ours(trial.folder for trial in trials)
    is_complete = {
        folder: run is not None and run.status == "complete" for folder, run in records.items()
    }
    _require_earlier(trials, is_complete)
    num_complete = sum(is_complete.values())
    log.say(f"{len(trials)} runs in {_joined(_parents(trials))}, {num_complete} of them complete")
    if dry_run:
        titles = _numbered_names(trials)
        for trial in trials:
            log.say(f"{titles[trial.folder]}  {_progress(trial, records[trial.folder])}")
        return 0
    sweep_files.write_configurations({trial.folder: to_yaml(trial.config) for trial in trials})
    return _run_all(trials, is_complete, launch_command, slices=slices, log=log)


def _require_newest_starts(trials: Sequence[Trial]) -> None:
    """Raise ConfigError if a run started from what has another result by now.

    Args:
        trials: of a sweep, all complete.
    """
    _require_same_configuration(trials, {trial.folder: read(trial.folder) for trial in trials})


def _select(trials: list[Trial], only: Sequence[str], files: Sequence[Path]) -> list[Trial]:
    """Return the trials whose names match a pattern of `only`; all of them if it is empty.

    Raises:
        ConfigError: a pattern matches no name.
    """
    names = [trial.name for trial in trials]
    for pattern in only:
        if not any(fnmatchcase(name, pattern) for name in names):
            listed = ", ".join(names[:_MAX_NAMES])
            if len(names) > _MAX_NAMES:
                listed += f" and {len(names) - _MAX_NAMES} more, which --dry-run lists"
            raise ConfigError(
                f"--only {pattern}: found no run of that name in {_joined(files)}, expected one "
                f"of {listed}"
            )
    if not only:
        return trials
    return [trial for trial in trials if any(fnmatchcase(trial.name, pattern) for pattern in only)]


def _require_earlier(trials: Sequence[Trial], is_complete: Mapping[Path, bool]) -> None:
    """Raise ConfigError if a trial would start from one that is neither complete nor to be run.

    Args:
        trials: that are to be run, or are complete.
        is_complete: of them, by the run's folder.
    """
    for trial in trials:
        earlier = trial.after_folder
        if earlier is None or is_complete[trial.folder] or earlier in is_complete:
            continue
        if not _has_complete_record(earlier):
            raise ConfigError(
                f"--only: found {trial.name} without {trial.after}, which it starts from and which "
                f"is not complete, expected both; add --only {trial.after}"
            )


def _require_separate(trials_by_file: Mapping[Path, Sequence[Trial]]) -> None:
    """Raise ConfigError if two files have a run of the same name in the same folder."""
    file_of_run: dict[Path, Path] = {}
    for file, trials in trials_by_file.items():
        for trial in trials:
            first_file = file_of_run.setdefault(trial.folder, file)
            if first_file != file:
                raise ConfigError(
                    f"{file}: found the run {trial.folder}, which {first_file} has too, expected "
                    "another folder"
                )


# -- names -----------------------------------------------------------------------------------------


def _parents(trials: Sequence[Trial]) -> list[Path]:
    """Return the folders in which the runs lie, each once."""
    return list(dict.fromkeys(trial.folder.parent for trial in trials))


def _joined(paths: Iterable[Path]) -> str:
    return ", ".join(map(str, paths))


def _names(trials: Sequence[Trial]) -> dict[Path, str]:
    """Return each run's name by its folder; the folder's path if the runs lie in several."""
    in_one_folder = len(_parents(trials)) == 1
    return {trial.folder: trial.name if in_one_folder else str(trial.folder) for trial in trials}


def _numbered_names(trials: Sequence[Trial]) -> dict[Path, str]:
    """Return each run's number and name by its folder."""
    return {
        folder: f"{number}/{len(trials)}  {name}"
        for number, (folder, name) in enumerate(_names(trials).items(), start=1)
    }


# -- existing records ------------------------------------------------------------------------------


def _read_record(trial: Trial) -> Run | None:
    """Return the record of a trial, None if there is none.

    Raises:
        ValueError: it cannot be read.
    """
    return read(trial.folder) if (trial.folder / "run.h5").exists() else None


def _require_same_configuration(
    trials: Sequence[Trial], records: Mapping[Path, Run | None]
) -> None:
    """Raise ConfigError if there are records of other configurations under the trials' names."""
    mismatches = []
    for trial in trials:
        run = records[trial.folder]
        if run is not None:
            changed = _changed(trial, run)
            if changed:
                mismatches.append((trial, run, changed))
    if not mismatches:
        return
    trial, run, changed = mismatches[0]
    name = _names(trials)
    also = ", ".join(name[trial.folder] for trial, _, _ in mismatches[1:])
    raise ConfigError(
        f"{trial.folder}: found a run ({run.status}) of another configuration "
        f"({'; '.join(changed)}), expected the same{f'; so have {also}' if also else ''}; "
        "take that back, choose another folder, or delete the run"
    )


def _changed(trial: Trial, run: Run) -> list[str]:
    """Return the keys in which a record differs from a trial: "key: was ..., is ...".

    The method's label counts for complete records only, whose tables have it. A run that goes on
    compares the weights that it starts from itself.
    """
    changed = changed_keys(run.config, _with_silos_of(run, asdict(trial.config)))
    recorded_label = run.config.get("run", {}).get("label") or run.config.get("method")
    if run.status == "complete" and recorded_label != trial.method_label:
        changed.append(f"run.label: was {recorded_label}, is {trial.method_label}")
    if (
        run.status == "complete"
        and trial.after_folder
        and _starts_from_other(run, trial.after_folder)
    ):
        changed.append(f"model.after: {trial.after} has another result now")
    return changed


def _starts_from_other(run: Run, earlier: Path) -> bool:
    """Return whether a run has started from other weights than another run has left by now.

    Raises:
        ConfigError: what that run has left cannot be read.
    """
    try:
        digests = fingerprint.listed(earlier / "model")
    except ValueError as error:
        raise ConfigError(f"{error}; copy the whole run folder again") from None
    if digests is None:
        return False
    return any(digests.get(name) != digest for name, digest in origin_weights(run).items())


def _with_silos_of(run: Run, settings: JsonObject) -> JsonObject:
    """Return a trial's settings with the silos of its record, which its patterns have found.

    Without a pattern, or where a silo of the record matches none, the settings stay as they are.

    Args:
        run: the record.
        settings: the trial's configuration.
    """
    federation = settings["federation"]
    sources = [silo["source"] for silo in federation["silos"]]
    recorded = run.config.get("federation", {})
    recorded_sources = [silo["source"] for silo in recorded.get("silos", [])]
    patterns = [str(Path(source).expanduser().absolute()) for source in sources if "*" in source]
    has_found_all = all(
        source in sources or any(fnmatchcase(source, pattern) for pattern in patterns)
        for source in recorded_sources
    )
    if not patterns or not recorded_sources or not has_found_all:
        return settings
    as_recorded = {"silos": recorded["silos"], "clients": recorded["clients"]}
    return {**settings, "federation": {**federation, **as_recorded}}


def _progress(trial: Trial, run: Run | None) -> str:
    """Return how far a run is, for `--dry-run`."""
    if run is None:
        return f"new, starts from {trial.after}" if trial.after else "new"
    if run.status == "complete":
        return f"complete  {_score(run)}"
    return f"{run.status} after round {run.committed_rounds} of {trial.config.federation.rounds}"


def _score(run: Run) -> str:
    """Return the main metric of the run's own method, in percent; a perplexity as it is."""
    result = main_result(run)
    if result is None:
        return "no result"
    metric, value = result
    return f"{metric} {value:.2f}" if metric == PERPLEXITY else f"{metric} {100 * value:.2f} %"


# -- running ---------------------------------------------------------------------------------------


def _launch_command(text: str) -> list[str]:
    """Return the words of a launch command.

    Raises:
        ConfigError: it is malformed, or there is no such program.
    """
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
    trials: Sequence[Trial],
    is_complete: Mapping[Path, bool],
    launch_command: list[str],
    *,
    slices: Sequence[ResourceSlice],
    log: Log,
) -> int:
    """Run the trials that are not complete, as many at a time as there are slices.

    Args:
        trials: all of the sweep.
        is_complete: by the run's folder.
        launch_command: words that start a run's processes; empty for one process.
        slices: cores and GPUs of the runs at a time.
        log: gets a line for each run.

    Returns:
        The exit status: 1 if a run failed, else 0.

    Raises:
        ConfigError: a run that was complete before started from what has another result now.
        Refused: a signal came, and the runs have ended.
    """
    failed: list[str] = []
    stopped: list[str] = []
    names = _names(trials)
    titles = _numbered_names(trials)
    is_done = dict(is_complete)
    for trial in trials:
        if is_done[trial.folder]:
            log.say(f"{titles[trial.folder]}  complete  {_score(read(trial.folder))}")
    waiting = [trial for trial in trials if not is_done[trial.folder]]
    running: set[Future[_Outcome]] = set()
    with Jobs(slices) as jobs, ThreadPoolExecutor(len(slices)) as pool:
        while True:
            if jobs.signal_received is None:
                ready = [trial for trial in waiting if _can_start(trial, is_done)]
                started = ready[: len(slices) - len(running)]
                waiting = [trial for trial in waiting if trial not in started]
                running |= {pool.submit(_run, trial, launch_command, jobs) for trial in started}
            if not running:
                break
            ended, running = wait(running, return_when=FIRST_COMPLETED)
            for future in ended:
                outcome = future.result()
                folder = outcome.trial.folder
                line = f"{titles[folder]}  {duration(outcome.seconds)}"
                if outcome.status == 0 and _has_complete_record(folder):
                    is_done[folder] = True
                    log.say(f"{line}  {_score(read(folder))}")
                elif jobs.signal_received is None:
                    failed.append(names[folder])
                    log.say(f"{line}  {_failure(outcome)}")
                elif outcome.status is not None:
                    stopped.append(names[folder])
    if jobs.signal_received is not None:
        raise _stopped_by(jobs.signal_received, stopped)
    for trial in waiting:
        log.say(f"{titles[trial.folder]}  not started: {trial.after}, its start, is not complete")
    if failed:
        num_waiting = f", and {len(waiting)} that start from them were not begun" * bool(waiting)
        log.say(
            f"{len(failed)} of {len(trials)} runs failed: {', '.join(failed)}{num_waiting}; the "
            "same command tries them again"
        )
        return 1
    _require_newest_starts(trials)
    folders = shlex.join(map(str, _parents(trials)))
    table = "phases" if any(trial.after for trial in trials) else "comparison"
    log.say(f"all runs are complete: python -m fedsp_mpi report {folders} --table {table}")
    return 0


def _can_start(trial: Trial, is_complete: Mapping[Path, bool]) -> bool:
    """Return whether the run that a trial starts from is complete, or there is none.

    Args:
        trial: of the sweep.
        is_complete: by the folder of each run of the sweep; others are complete, as was checked.
    """
    earlier = trial.after_folder
    return earlier is None or is_complete.get(earlier, True)


@dataclass(frozen=True)
class _Outcome:
    """How the process of a trial ended.

    Attributes:
        status: exit status; None if it was not started because a signal had come.
        seconds: wall time.
        log_offset: bytes of the log that are of earlier attempts.
        error: why it could not be started.
    """

    trial: Trial
    status: int | None
    seconds: float = 0.0
    log_offset: int = 0
    error: str | None = None


def _run(trial: Trial, launch_command: list[str], jobs: Jobs) -> _Outcome:
    """Run one trial as a process of its own, as soon as a slice of the resources is free."""
    configuration = trial.sibling_file("configs", ".yaml")
    program = [sys.executable, "-m", "fedsp_mpi", "run", str(configuration)]
    options = ["--name", trial.name, "--resume", "auto"]
    log_file = trial.sibling_file("logs", ".txt")
    try:
        log_offset = log_file.stat().st_size if log_file.exists() else 0
        status, seconds = jobs.run([*launch_command, *program, *options], log_file)
    except OSError as error:
        reason = f"could not be started: {error.filename or log_file}: {error.strerror}"
        return _Outcome(trial, 1, error=reason)
    return _Outcome(trial, status, seconds, log_offset)


def _failure(outcome: _Outcome) -> str:
    """Say in one line what went wrong."""
    if outcome.error is not None:
        return f"FAILED: {outcome.error}"
    status = outcome.status
    assert status is not None
    end = f"signal {-status}" if status < 0 else f"status {status}"
    log_file = outcome.trial.sibling_file("logs", ".txt")
    try:
        with log_file.open("rb") as file:
            file.seek(outcome.log_offset)
            reason = error_summary(file.read().decode(errors="replace"))
    except OSError as error:  # somebody has removed it
        reason = f"its output cannot be read: {error.strerror}"
    return f"FAILED with {end}: {reason} ({log_file})"


def _has_complete_record(folder: Path) -> bool:
    with suppress(ValueError):  # a damaged record is no reason to stop the other runs
        return (folder / "run.h5").exists() and read(folder).status == "complete"
    return False


def _stopped_by(signal_number: int, names: Sequence[str]) -> Refused:
    """Return the error of a sweep that a signal has ended, with its exit status.

    Args:
        signal_number: the signal.
        names: the runs that it reached.
    """
    status = _EXIT_STOPPED if signal_number == signal.SIGUSR1 else 128 + signal_number
    where = f"in {', '.join(names)}" if names else "between two runs"
    return Refused(
        f"told to stop ({signal.Signals(signal_number).name}) {where}; the same command goes on "
        "where it was",
        status,
    )

"""The Python interface: run an experiment, or read one, in a notebook, a script, or under mpirun.

`run` does what `python -m fedsp_mpi run` does, with the same lines and the same results bit by bit.
It can be called again and again, and ends no process: a mistake is an exception with the line that
the command line would print.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Mapping
from contextlib import chdir, contextmanager
from os import PathLike
from pathlib import Path
from typing import Literal, TypeAlias

from fedsp_mpi import cli
from fedsp_mpi.comm import Refused, guard
from fedsp_mpi.config import Config, ConfigError, load
from fedsp_mpi.record import Run, read
from fedsp_mpi.run.resuming import read_resumption

__all__ = ["ConfigError", "Refused", "Run", "read", "run"]

Source: TypeAlias = str | PathLike[str] | Mapping[str, object] | None

_NO_NAME = "experiment"  # of a configuration that is no file
_PROGRESS_SECONDS = 5.0  # between two lines


def run(
    config: Source = None,
    *,
    set: Mapping[str, object] | None = None,
    name: str | None = None,
    replace: bool = False,
    resume: bool | Literal["auto"] | PathLike[str] | str = False,
) -> Run | None:
    """Run an experiment, and print what the command line prints.

    In one process this plays the server and all clients. Under `mpirun -n 4 python script.py` every
    process calls it, as a rank; an error that only some ranks meet ends the job then.

    Ctrl-C leaves a folder that `resume` goes on with. In a thread that is not the main one, SIGUSR1
    does not ask the run to stop: only the main thread may handle signals.

    Args:
        config: a YAML file, or its content as nested mappings, in which relative paths begin in
            the working directory; None: the embedded experiment.
        set: values by dotted key, such as {"federation.rounds": 3}; they win over `config`.
        name: of the run's folder below `run.folder`.
        replace: overwrite an existing run of that name.
        resume: continue the run of that name; "auto": or begin it where there is none. The folder
            of a run: continue that one, which needs neither `config` nor `name`.

    Returns:
        The record, on rank 0; None on the other ranks.

    Raises:
        ConfigError: a mistake in the configuration, the model, the data or the folder.
        Refused: the run was told to stop (SIGUSR1), and can be resumed.
    """
    values = {str(key): _plain(value) for key, value in (set or {}).items()}
    if not isinstance(resume, bool) and resume != "auto":
        return _resume(Path(resume), config, values)
    if name is not None:
        values["run.name"] = name
    if replace:
        values["run.if_exists"] = "replace"
    if resume:
        values["run.resume"] = "auto" if resume == "auto" else "must"
    label = "embedded" if config is None else _NO_NAME
    if isinstance(config, (str, PathLike)):
        label = Path(config).stem
    settings, error = _load(config, values)
    return _execute(settings, label, error, options=_options(config, values))


def _resume(folder: Path, source: Source, values: dict[str, object]) -> Run | None:
    """Continue the run in a folder, in the directory that it was begun in."""
    options = _options(source, values)
    overrides = [f"{key}={json.dumps(value, default=str)}" for key, value in values.items()]
    try:
        if source is not None:
            raise ConfigError(
                f"resume: found a configuration beside the folder {folder}, expected none: the "
                "folder has its own; leave it out"
            )
        resumption = read_resumption(folder, overrides)
    except ValueError as error:
        return _execute(Config(), folder.name, error, options=options)
    with chdir(resumption.directory):
        return _execute(resumption.config, folder.name, None, options=options)


def _options(source: Source, values: dict[str, object]) -> argparse.Namespace:
    """Return the options of the command line that say the same."""
    return argparse.Namespace(
        config=None if isinstance(source, Mapping) else source,
        set=[f"{key}={value}" for key, value in values.items()],
        every=_PROGRESS_SECONDS,
        progress="auto",
    )


def _execute(
    settings: Config, label: str, error: ValueError | None, *, options: argparse.Namespace
) -> Run | None:
    """Run a configuration; turn refusals into public exceptions.

    Args:
        settings: checked.
        label: name of the configuration, for a run that has none.
        error: what is wrong with the configuration, which all ranks must hear.
        options: of the command line, as far as it looks at them.
    """
    from fedsp_mpi.run.execute import execute

    try:
        with guard.within_program("run"), _torch_kept():
            log, client_log = cli.logs(options)
            folder = execute(settings, label, log, client_log=client_log, error=error)
            cli.show_summary(folder)
    except KeyboardInterrupt:
        cli.say("interrupted; fedsp_mpi.run(resume=FOLDER) goes on from the last checkpoint")
        raise
    except Refused as refusal:
        line = cli.refusal_line(refusal, options)
        if refusal.exit_status == cli.USAGE_ERROR:
            raise ConfigError(line) from None
        if refusal.exit_status:
            raise Refused(line, refusal.exit_status) from None
        cli.say(line)  # the run is complete: there is nothing to go on with
        folder = Path(settings.run.folder).expanduser() / settings.run.name
    finally:
        from fedsp_mpi.tensors import seal

        seal.clear()  # the next run has a global model of its own
    return None if folder is None else read(folder)


def _load(source: Source, values: dict[str, object]) -> tuple[Config, ValueError | None]:
    """Load a configuration, or the default and what is wrong with it: all ranks must hear that."""
    try:
        if isinstance(source, Mapping):
            return load(_plain_section(source), values=values), None
        return load(None if source is None else Path(source), values=values), None
    except ValueError as error:
        return Config(), error


def _plain_section(section: Mapping[str, object]) -> dict[str, object]:
    return {key: _plain(value) for key, value in section.items()}


def _plain(value: object) -> object:
    """Return a value as YAML would give it: paths are texts, tuples are lists."""
    if isinstance(value, Mapping):
        return _plain_section(value)
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return str(value) if isinstance(value, PathLike) else value


@contextmanager
def _torch_kept() -> Iterator[None]:
    """Give the caller back its threads and its random numbers, where it has loaded torch before."""
    torch = sys.modules.get("torch")
    if torch is None:
        yield
        return
    num_threads = torch.get_num_threads()
    state = torch.get_rng_state()
    try:
        yield
    finally:
        torch.set_num_threads(num_threads)
        torch.set_rng_state(state)

"""The files of a sweep beside its runs: a configuration for each of them, and its output."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path

import yaml

from fedsp_mpi.config.parsing import ConfigError
from fedsp_mpi.files import ownership
from fedsp_mpi.record.atomic import RecordError, write

ROOMS = ("configs", "logs")


def require_ours(runs: Iterable[Path]) -> None:
    """Raise ConfigError, naming it, if a run's folder or its configuration's file holds what is not
    of the sweep.

    Args:
        runs: the folders of all runs.
    """
    for folder in runs:
        line = yaml.safe_dump({"name": folder.name}, sort_keys=False).strip()
        try:
            ownership.require_ours(folder)
            ownership.require_configuration(configuration(folder), line)
        except ValueError as error:
            raise ConfigError(f"{error}; no run was started") from None


def write_configurations(texts: Mapping[Path, str]) -> None:
    """Write each run's configuration, whole. Raises ConfigError if the folder cannot be written.

    Args:
        texts: by the run's folder.
    """
    try:
        for home in dict.fromkeys(folder.parent for folder in texts):
            for room in ROOMS:
                (home / room).mkdir(parents=True, exist_ok=True)
        for folder, text in texts.items():
            write(configuration(folder), [text.encode()], "no run was started")
    except RecordError as error:
        raise ConfigError(str(error)) from None
    except OSError as error:
        raise ConfigError(
            f"{error.filename}: found a folder that cannot be written ({error.strerror}), "
            "expected one for all runs; "
            "no run was started"
        ) from None


def configuration(folder: Path) -> Path:
    """The file of a run's configuration, beside the runs."""
    return folder.parent / "configs" / f"{folder.name}.yaml"

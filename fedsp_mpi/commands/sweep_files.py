"""Write the files of a sweep that lie beside its runs: their configurations and their output."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path

import yaml

from fedsp_mpi.config.parsing import ConfigError
from fedsp_mpi.files import ownership
from fedsp_mpi.record.atomic import RecordError, write

SUBFOLDERS = ("configs", "logs")


def require_ours(folders: Iterable[Path]) -> None:
    """Raise ConfigError if a run's folder or configuration file holds what is not of the sweep.

    Args:
        folders: the folders of all runs.
    """
    for folder in folders:
        name_line = yaml.safe_dump({"name": folder.name}, sort_keys=False).strip()
        try:
            ownership.require_ours(folder)
            ownership.require_configuration(configuration_file(folder), name_line)
        except ValueError as error:
            raise ConfigError(f"{error}; no run was started") from None


def write_configurations(texts: Mapping[Path, str]) -> None:
    """Write each run's configuration, each file whole or not at all.

    Args:
        texts: YAML by the run's folder.

    Raises:
        ConfigError: a folder cannot be written.
    """
    try:
        for parent in dict.fromkeys(folder.parent for folder in texts):
            for name in SUBFOLDERS:
                (parent / name).mkdir(parents=True, exist_ok=True)
        for folder, text in texts.items():
            write(configuration_file(folder), [text.encode()], "no run was started")
    except RecordError as error:
        raise ConfigError(str(error)) from None
    except OSError as error:
        raise ConfigError(
            f"{error.filename}: found a folder that cannot be written ({error.strerror}), "
            "expected one for all runs; no run was started"
        ) from None


def configuration_file(folder: Path) -> Path:
    """Return the path of a run's configuration, beside the runs."""
    return folder.parent / "configs" / f"{folder.name}.yaml"

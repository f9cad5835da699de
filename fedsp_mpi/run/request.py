"""What a program asks for that calls `fedsp_mpi.run`: an experiment, and where it runs."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Literal, TypeAlias

from fedsp_mpi.config import Config, ConfigError, load
from fedsp_mpi.run.resuming import read_resumption

Source: TypeAlias = str | PathLike[str] | Mapping[str, object] | None

_NO_NAME = "experiment"  # of a configuration that is no file


@dataclass(frozen=True)
class Request:
    """An experiment that a program asks for.

    Attributes:
        config: checked; the default one where there is an error.
        label: name of the configuration, for a run that has none.
        path: of the configuration's file, where it is one.
        overrides: items `key=value`, as the command line has them.
        error: what is wrong with the configuration, which all ranks must hear.
        directory: that relative paths begin in, where it is not the working directory.
    """

    config: Config
    label: str
    path: str | PathLike[str] | None
    overrides: list[str]
    error: ValueError | None = None
    directory: Path | None = None


def read_request(
    source: Source,
    *,
    set: Mapping[str, object] | None,
    name: str | None,
    replace: bool,
    resume: bool | Literal["auto"] | PathLike[str] | str,
) -> Request:
    """Load the configuration that a program asks for; what is wrong with it is part of the request.

    Args:
        source: of the configuration; this and all others: see `fedsp_mpi.run`.
    """
    values = {str(key): _plain(value) for key, value in (set or {}).items()}
    if not isinstance(resume, bool) and resume != "auto":
        return _resumed(Path(resume), source, values)
    if name is not None:
        values["run.name"] = name
    if replace:
        values["run.if_exists"] = "replace"
    if resume:
        values["run.resume"] = "auto" if resume == "auto" else "must"
    label = "embedded" if source is None else _NO_NAME
    if isinstance(source, (str, PathLike)):
        label = Path(source).stem
    path = _path_of(source)
    overrides = _overrides(values)
    try:
        if isinstance(source, Mapping):
            config = load(_plain_section(source), values=values)
        else:
            config = load(None if source is None else Path(source), values=values)
    except ValueError as error:
        return Request(Config(), label, path, overrides=overrides, error=error)
    return Request(config, label, path, overrides=overrides)


def _resumed(folder: Path, source: Source, values: dict[str, object]) -> Request:
    """Ask for the run in a folder, in the directory that it was begun in."""
    path = _path_of(source)
    overrides = _overrides(values)
    try:
        if source is not None:
            raise ConfigError(
                f"resume: found a configuration beside the folder {folder}, expected none: the "
                "folder has its own; leave it out"
            )
        items = [f"{key}={json.dumps(value, default=str)}" for key, value in values.items()]
        resumption = read_resumption(folder, items)
    except ValueError as error:
        return Request(Config(), folder.name, path, overrides=overrides, error=error)
    return Request(
        resumption.config,
        folder.name,
        path,
        overrides=overrides,
        directory=resumption.directory,
    )


def _path_of(source: Source) -> str | PathLike[str] | None:
    return None if isinstance(source, Mapping) else source


def _overrides(values: Mapping[str, object]) -> list[str]:
    return [f"{key}={value}" for key, value in values.items()]


def _plain_section(section: Mapping[str, object]) -> dict[str, object]:
    return {key: _plain(value) for key, value in section.items()}


def _plain(value: object) -> object:
    """Return a value as YAML would give it: paths are texts, tuples are lists."""
    if isinstance(value, Mapping):
        return _plain_section(value)
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return str(value) if isinstance(value, PathLike) else value

"""Where and how a run runs: sections `run`, `topology`, `record`, `checkpoint`, `deadlines`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

from fedsp_mpi.config.parsing import ConfigError
from fedsp_mpi.files.ownership import require_plain_name, require_readable_path

_PATHS = (
    "run.folder",
    "run.name",
    "model.name",
    "model.tokenizer",
    "data.source",
    "server.data.source",
    "federation.silo_cache",
    "distillation.text",
)


@dataclass(frozen=True)
class RunConfig:
    """Where a run lives and what seeds it."""

    name: str = "auto"  # "auto": the configuration's name and the time
    folder: str = "runs"
    if_exists: Literal["refuse", "replace"] = "refuse"
    # must: go on from the last checkpoint of the run of that name; auto: or begin it. With
    # name=auto: of the newest unfinished run of that configuration.
    resume: Literal["never", "must", "auto"] = "never"
    seed: int = 1
    label: str | None = None  # what tables call the method; None: its own name
    task_label: str | None = None  # what tables call the task; None: its own name
    # Of the run's folder and the files in it. private: its owner alone may read them; umask: as the
    # shell's umask says.
    permissions: Literal["private", "umask"] = "private"


def check_paths(value: Callable[[str], Any]) -> None:
    """Check the run's name, and all values that are paths.

    Args:
        value: returns the value of a dotted key.

    Raises:
        ConfigError: the name is not one component of a path, or a path cannot be written in the
            locale.
    """
    try:
        for key in _PATHS:
            path = value(key)
            if path is not None:
                require_readable_path(key, path)
        require_plain_name("run.name", value("run.name"))
    except ValueError as error:
        raise ConfigError(str(error)) from None


@dataclass(frozen=True)
class TopologyConfig:
    """What is expected of the launcher."""

    ranks: int | None = None  # refuse to start with another number of processes
    # Ranks 0 to server_ranks - 1 hold the global model, and share distillation (ZeRO), server
    # tuning and evaluation.
    server_ranks: int = 1


@dataclass(frozen=True)
class RecordConfig:
    """What the record keeps beside its tables, and how often a run says how far it is."""

    prompts: bool = True
    # Least time between two lines on how far the clients of a round are; None: a line a round only.
    progress_seconds: float | None = 60


@dataclass(frozen=True)
class CheckpointConfig:
    """What a run is resumed from after a kill (run.resume)."""

    every: int | None = 1  # rounds; None: only when the run is told to stop (SIGUSR1)
    keep: int = 2  # the newest ones, and that of the best round
    keep_client_states: bool = False  # of a complete run, which nothing needs any more
    # Between two states of the distillation (with zero_stage 0); None: only when the run is told to
    # stop.
    distillation_seconds: float | None = 600


@dataclass(frozen=True)
class DeadlineConfig:
    """Longest wait for other ranks in seconds, by phase; None waits for ever.

    Past it the job ends with status 124.
    """

    start_up: float | None = 600  # for all ranks to begin
    # Clients, for the server's checks, loading (from the hub too) and distillation.
    handout: float | None = 86400
    broadcast: float | None = 7200  # clients, from the end of their work to the next round
    gather: float | None = 7200  # the server, for the clients' work
    finish: float | None = 86400  # clients, for the evaluation
    server: float | None = 1800  # the server's ranks, for each other

"""Where and how a run runs.

Sections `run`, `topology`, `wire`, `record`, `checkpoint`, `deadlines`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

from fedsp_mpi.config.options import option
from fedsp_mpi.config.parsing import ConfigError
from fedsp_mpi.files.ownership import require_plain_name, require_readable_path

_PATHS = (
    "run.folder",
    "run.name",
    "model.name",
    "model.tokenizer",
    "model.after",
    "data.source",
    "server.data.source",
    "federation.silo_cache",
    "distillation.text",
)


@dataclass(frozen=True)
class RunConfig:
    """Where a run lives and what seeds it."""

    name: str = option(
        "auto",
        "folder of the run below `run.folder`, a plain name; `auto`: the configuration's name and "
        "the time",
    )
    folder: str = option("runs", "where runs live")
    if_exists: Literal["refuse", "replace"] = option(
        "refuse", "or `replace` an earlier run of that name (`--replace`)"
    )
    resume: Literal["never", "must", "auto"] = option(
        "never",
        "`must`: continue from the last checkpoint of the run of that name (`--resume`); `auto`: "
        "or begin where there is none. With `name: auto`, the newest unfinished run of that "
        "configuration",
    )
    seed: int = option(1, "everything that is drawn follows from it, except noise for privacy")
    label: str | None = option(None, "what tables call the method; `null`: its own name")
    task_label: str | None = option(None, "what tables call the task; `null`: its own name")
    permissions: Literal["private", "umask"] = option(
        "private",
        "of the run's folder and files. `private`: for their owner alone; `umask`: as the shell's "
        "umask says",
    )


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

    ranks: int | None = option(
        None, "refuse to start with any other number; `null`: any number will do", "processes"
    )
    server_ranks: int = option(
        1,
        "ranks 0 to S - 1 hold the global model and share distillation (ZeRO), server tuning and "
        "evaluation; with `tiers` they share the experts out, to the same bits",
        "ranks",
    )


@dataclass(frozen=True)
class WireConfig:
    """How messages travel between the ranks; results have the same bits in any case."""

    encryption: bool = option(
        False,
        "seal all that clients' ranks send to the server, end to end, with a key for each client "
        "(X25519, ChaCha20-Poly1305); what it protects: configs/silos/README.md",
    )


@dataclass(frozen=True)
class RecordConfig:
    """What the record keeps beside its tables, and how often a run says how far it is."""

    prompts: bool = option(True, "keep the prompts of each round")
    progress_seconds: float | None = option(
        60,
        "least time between progress lines in a round; `null`: one line a round only",
        "seconds",
    )
    tensorboard: bool = option(
        False, "write TensorBoard's event files beside the record (extra `tensorboard`)"
    )


@dataclass(frozen=True)
class CheckpointConfig:
    """What a run is resumed from after a kill (run.resume)."""

    every: int | None = option(
        1, "between checkpoints; `null`: only when the run is told to stop (SIGUSR1)", "rounds"
    )
    keep: int = option(2, "the newest ones, besides that of the best round", "checkpoints")
    keep_client_states: bool = option(
        False, "of a complete run, which can then be given more rounds"
    )
    distillation_seconds: float | None = option(
        600,
        "between saved states of the distillation (with `zero_stage: 0`); `null`: only when told "
        "to stop",
        "seconds",
    )


@dataclass(frozen=True)
class DeadlineConfig:
    """Longest wait for other ranks in seconds, by phase; `null` waits for ever.

    Past it the job ends with status 124.
    """

    start_up: float | None = option(600, "for all ranks to begin", "seconds")
    handout: float | None = option(
        86400, "of clients, for the server's checks, loading and distillation", "seconds"
    )
    broadcast: float | None = option(
        7200,
        "of clients, from the end of their work to the next round; of the server's other ranks, "
        "for the merge",
        "seconds",
    )
    gather: float | None = option(7200, "of the server, for the clients' work", "seconds")
    finish: float | None = option(86400, "of clients, for the evaluation", "seconds")
    server: float | None = option(1800, "of the server's ranks, for each other", "seconds")

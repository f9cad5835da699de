"""A run that is resumed from its folder: its configuration, and how many rounds it may have."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from fedsp_mpi.config import Config, ConfigError, StageConfig, load
from fedsp_mpi.files.untrusted import printable


@dataclass(frozen=True)
class Resumption:
    """What a run folder says of a run that goes on.

    Attributes:
        config: that the run was begun with, and what the user overrides.
        directory: that its relative paths are relative to: where the run was begun.
    """

    config: Config
    directory: Path


def read_resumption(folder: Path, overrides: list[str]) -> Resumption:
    """Read what a run in a folder needs to go on.

    Args:
        folder: of the run, or its run.h5.
        overrides: items `key=value`, whose value is YAML.

    Raises:
        ValueError: there is no run in the folder, it cannot be read, or the directory that it was
            begun in is not there.
    """
    folder = folder.expanduser()
    if folder.name == "run.h5" and folder.is_file():
        folder = folder.parent
    if not folder.is_dir():
        kind = "a file" if folder.exists() else "nothing"
        raise ValueError(
            f"--resume: found {kind} at {folder}, expected the folder of a run, such as runs/NAME "
            f"(or auto, must, with --name); here is {Path.cwd()}"
        )
    from fedsp_mpi.record import read

    run = read(folder)
    folder = _spelt_out(folder)
    directory = _directory_of(folder, run.environment)
    if directory != Path.cwd():
        folder = folder.resolve()
    values = {"run.folder": str(folder.parent), "run.name": folder.name, "run.resume": "must"}
    try:
        config = load(folder / "config.yaml", overrides, values)
    except ConfigError as error:
        if (folder / "config.yaml").exists():
            raise
        raise ValueError(
            f"{error}, which runs write; bring back that of {folder.name}, whose text is in "
            "run.h5 (config_text), too"
        ) from None
    return Resumption(config, directory)


def _spelt_out(folder: Path) -> Path:
    """Return a path that ends with the folder's own name."""
    return folder if folder.name not in ("", "..") else folder.resolve()


def _directory_of(folder: Path, environment: Mapping[str, object]) -> Path:
    """Return the directory that a run was begun in; records of earlier versions name none."""
    working = Path.cwd()
    recorded = environment.get("directory")
    if not isinstance(recorded, str):
        return working
    directory = Path(recorded)
    with suppress(OSError):
        if directory.samefile(working):
            return working
        if directory.is_dir():
            return directory
    raise ValueError(
        f"{folder}: was begun in {printable(recorded)}, which is not there; here is {working}; "
        f"bring it back, or, to read relative paths here: run {folder / 'config.yaml'} --name "
        f"{folder.name} --set run.folder={folder.parent} --resume"
    )


# -- another number of rounds ----------------------------------------------------------------------

_SCHEDULE = "whose learning rate falls to zero over all rounds"


def rounds_obstacle(config: Config) -> str | None:
    """Return why a run's rounds depend on their number; None if they do not.

    With None, a run that gets more rounds has the bits of one that had them from its start.

    Args:
        config: of the run.
    """
    client = config.client
    if _decays(config.server.tuning):
        return f"server.tuning, {_SCHEDULE}"
    if clients_keep_state(config):
        if _decays(client.tuning):
            return f"client.tuning, {_SCHEDULE} (federation.client_state: kept)"
        if _decays(client.alignment):
            return f"client.alignment, {_SCHEDULE} (federation.client_state: kept)"
    if config.server.translation.steps > 0 and config.distillation.text is not None:
        return "server.translation, whose questions are drawn from distillation.text for all rounds"
    if client.privacy.epsilon is not None:
        return "client.privacy, whose budget (epsilon_all) was promised for all rounds"
    return None


def clients_keep_state(config: Config) -> bool:
    """Return whether clients go on from what they had; those of a search keep nothing."""
    federation = config.federation
    return federation.clients > 0 and federation.client_state == "kept" and not config.searches


def _decays(stage: StageConfig) -> bool:
    return stage.steps > 0 and stage.optimizer.schedule == "linear"


def require_rounds(folder: Path, config: Config, *, before: int, num_done: int) -> None:
    """Check that a run can go on with another number of rounds than it was begun with.

    Args:
        folder: of the run.
        config: that it is to go on with.
        before: number of rounds that it was begun with.
        num_done: rounds that are done.

    Raises:
        ValueError: it cannot.
    """
    rounds = config.federation.rounds
    if rounds < num_done:
        raise ValueError(
            f"{folder}: found {num_done} rounds done, expected federation.rounds={rounds}; a run "
            "goes on, but not back: set as many or more, or begin another run under another "
            "run.name"
        )
    obstacle = rounds_obstacle(config)
    if obstacle is not None:
        raise ValueError(
            f"{folder}: found another number of rounds than the run was begun with "
            f"(federation.rounds: was {before}, is {rounds}), expected the same, because of "
            f"{obstacle}; begin another run: run {folder / 'config.yaml'} --name NAME "
            f"--set federation.rounds={rounds}"
        )


def more_rounds_advice(folder: Path, config: Config) -> str:
    """Say how a complete run gets more rounds, or why it cannot."""
    obstacle = rounds_obstacle(config)
    if obstacle is not None:
        return f"it cannot get more rounds because of {obstacle}"
    if clients_keep_state(config) and not config.checkpoint.keep_client_states:
        return (
            "it cannot get more rounds, since its clients' states are gone "
            "(checkpoint.keep_client_states=true keeps them)"
        )
    return f"for more rounds: run --resume {folder} --set federation.rounds=N"

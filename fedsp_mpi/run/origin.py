"""The earlier run whose result is the global model (`model.after`), and the runs before it."""

from __future__ import annotations

from pathlib import Path

from fedsp_mpi.config import Config, ConfigError
from fedsp_mpi.files import fingerprint
from fedsp_mpi.files.untrusted import JsonObject
from fedsp_mpi.record import Run, read

SECTION = "origin"  # of the record
_WEIGHTS = ".safetensors"  # how the names of files with weights end


def model_folder(after: str) -> str:
    """Return the folder of the model that an earlier run has left.

    Args:
        after: the run's folder.
    """
    return str(Path(after).expanduser() / "model")


def origin(config: Config) -> JsonObject | None:
    """Return what the record says of where the global model comes from; None without an origin.

    `runs` are the earlier runs, the last one first: its name and folder, its method, the round
    whose weights it has left and the number of its rounds, and the digest of each of its files of
    weights. `initial` says what the first of them began with, "pretrained" or "random" weights.

    Raises:
        ConfigError: `model.after` is no complete run of the same model, or its model is not there,
            or not as the run has left it.
    """
    if config.model.after is None:
        return None
    folder = Path(config.model.after).expanduser()
    run = _read(folder, config.model.after)
    model = run.config.get("model", {})
    if model.get("name") != config.model.name:
        raise ConfigError(
            f"model.name: found {config.model.name!r} with model.after={config.model.after}, "
            f"expected that run's {model.get('name')!r}, which its result is of"
        )
    earlier = run.sections.get(SECTION, {})
    result = {
        "run": run.name,
        "folder": str(folder.resolve()),
        "method": str(run.config.get("method")),
        "round": _round_of_model(run),
        "rounds": run.committed_rounds,
        "weights": _weights(Path(model_folder(config.model.after))),
    }
    return {
        "runs": [result, *earlier.get("runs", [])],
        "initial": earlier.get("initial", str(model.get("weights", "pretrained"))),
    }


def _read(folder: Path, after: str) -> Run:
    """Read a run; raise ConfigError unless it is complete and has left a model."""
    if not folder.is_dir():
        raise ConfigError(f"model.after: found no folder {after}, expected that of a complete run")
    try:
        run = read(folder)
    except ValueError as error:
        raise ConfigError(f"model.after: {error}") from None
    if run.status != "complete":
        raise ConfigError(
            f"model.after: found the run {after} that is {run.status}, expected a complete one; go "
            f"on with it by run --resume {after}"
        )
    method = run.config.get("method")
    if run.model is None and method in ("finetune", "pretrain"):
        raise ConfigError(
            f"model.after: found no folder {model_folder(after)}, expected the model that the run "
            f"of {method} has left there; copy the whole run folder again"
        )
    if run.model is None:
        raise ConfigError(
            f"model.after: found the run {after} of {method}, which has left no model, expected "
            "one of finetune or pretrain, or of lora with lora.merged=true"
        )
    return run


def _round_of_model(run: Run) -> int:
    """Return the round whose weights a run has left; 0 if none was better than those before it."""
    best = run.rounds["round"][run.rounds["is_best"]]
    return int(best[-1]) if len(best) else 0


def _weights(folder: Path) -> dict[str, str]:
    """Return the digests of the files of weights in a model's folder, which are read for it.

    Raises:
        ConfigError: the folder is not as the run has left it.
    """
    try:
        fingerprint.require_digests(folder)
        digests = fingerprint.listed(folder) or {}
    except ValueError as error:
        raise ConfigError(f"model.after: {error}; copy the whole run folder again") from None
    weights = {name: digest for name, digest in digests.items() if name.endswith(_WEIGHTS)}
    if not weights:
        raise ConfigError(
            f"model.after: found {folder} without a list of its weights, expected the model that a "
            "run has written; copy the whole run folder again"
        )
    return weights

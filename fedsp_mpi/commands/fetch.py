"""Models and data into the local cache, on a node with a network, for runs on nodes without one."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import safetensors

from fedsp_mpi.config import Config
from fedsp_mpi.data import loading
from fedsp_mpi.log import Log, duration, one_line
from fedsp_mpi.models import hub
from fedsp_mpi.run.inputs import ExperimentInputs


def fetch(config: Config, log: Log) -> None:
    """Have all that a run of this configuration reads, and find out that it reads; folders are only
    looked at.

    Afterwards such a run needs no network (HF_HUB_OFFLINE=1 keeps the libraries from trying).

    Args:
        config: checked.
        log: told what was found or fetched, where, and how many bytes.

    Raises ValueError if something is neither here nor to be had, or is damaged.
    """
    materials = ExperimentInputs(config)
    # The weights last: a mistake is found before gigabytes have travelled.
    _tell(log, f"model {config.model.name}", lambda: _model(materials))
    _tell(log, f"data {config.data.task}", lambda: _data(materials))
    _tell(
        log,
        "weights",
        lambda: _weights(hub.locate(materials.model_name, config.model.revision, "weights")),
    )


def _model(materials: ExperimentInputs) -> list[Path]:
    """The files of the model's configuration and of its tokenizer, which are read once."""
    _ = materials.shape, materials.tokenizer
    settings, name = materials.config.model, materials.model_name
    tokenizer = (settings.tokenizer, None) if settings.tokenizer else (name, settings.revision)
    folder = hub.locate(*tokenizer, "tokenizer")
    known = {file for files in hub.PARTS["tokenizer"] for file in files} | {"tokenizer_config.json"}
    found = [folder / file for file in sorted(known) if (folder / file).exists()]
    return [hub.locate(name, settings.revision, "config.json") / "config.json", *found]


def _data(materials: ExperimentInputs) -> list[Path]:
    """The prepared files of the data set, whose rows are read once."""
    columns = materials.config.data.columns
    tables, _ = loading.read_tables(materials.task, materials.source, columns)
    _ = materials.splits
    return [Path(file["filename"]) for table in tables.values() for file in table.cache_files]


def _weights(folder: Path) -> list[Path]:
    """The files of weights that transformers would read.

    Raises ValueError if one is missing or damaged.
    """
    kinds = [files[0] for files in hub.PARTS["weights"]]
    name = next((kind for kind in kinds if (folder / kind).exists()), None)
    if name is None:
        raise ValueError(
            f"model.name: found no weights in {folder}, expected {' or '.join(kinds[::2])}"
        )
    found = [folder / name]
    if name.endswith(".index.json"):
        shards = json.loads(found[0].read_text(encoding="utf-8"))["weight_map"].values()
        found += [folder / shard for shard in sorted(set(shards))]
    for path in found:
        _require_whole(path)
    return found


def _require_whole(path: Path) -> None:
    """Raise ValueError if a file is missing or empty, or not as long as its safetensors header
    says.
    """
    size = path.stat().st_size if path.exists() else None
    trouble = "nothing" if size is None else "" if size else "no bytes"
    if path.suffix == ".safetensors" and not trouble:
        try:
            with safetensors.safe_open(path, "numpy"):
                pass
        except (OSError, safetensors.SafetensorError) as error:
            trouble = f"damaged weights ({one_line(error, first_line=True)})"
    if trouble:
        raise ValueError(
            f"model.name: found {trouble} at {path}, expected a whole file; delete it "
            "and fetch again"
        )


def _tell(log: Log, what: str, look: Callable[[], Iterable[Path]]) -> None:
    """Say what came of a look: which files, whether they are new, how large, and where."""
    begun, start = time.time(), time.perf_counter()
    stats: dict[Path, Any] = {path: path.stat() for path in look()}
    new = [stat for stat in stats.values() if stat.st_mtime > begun - 1]
    folders = sorted({str(path.parent) for path in stats})
    seconds = f" in {duration(time.perf_counter() - start)}" if new else ""
    size = sum(stat.st_size for stat in stats.values())
    log.say(
        f"{what}: {'written' if new else 'here'}{seconds}, {len(stats)} files, "
        f"{size / 1e6:.1f} MB in "
        f"{', '.join(folders)}"
    )

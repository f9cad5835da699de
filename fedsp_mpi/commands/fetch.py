"""Download models and data into the local cache, for runs on nodes without a network."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import safetensors

from fedsp_mpi.config import Config
from fedsp_mpi.data import loading, sources
from fedsp_mpi.log import Log, duration, one_line
from fedsp_mpi.models import hub
from fedsp_mpi.run.any_inputs import inputs_of
from fedsp_mpi.run.inputs import ExperimentInputs
from fedsp_mpi.run.silo_inputs import SiloInputs
from fedsp_mpi.run.silos import found_here
from fedsp_mpi.run.tier_inputs import TierInputs

_MAX_MISSING = 10  # silos that are named


def fetch(config: Config, log: Log) -> None:
    """Download all that a run of this configuration reads, and check that it can be read.

    Local folders are only checked. Afterwards such a run needs no network (HF_HUB_OFFLINE=1 keeps
    the libraries from trying).

    Args:
        config: checked.
        log: gets which files there are or were downloaded, where, and how many bytes.

    Raises:
        ValueError: something is neither local nor to be had, or is damaged.
    """
    config = found_here(config)
    inputs = inputs_of(config)
    # The weights last: a mistake should be found before gigabytes are downloaded.
    _fetch_part(log, f"model {config.model.name}", lambda: _model_files(inputs))
    if isinstance(inputs, TierInputs):
        for domain in inputs.domains:
            name = f"data {domain.config.data.task}, of expert {domain.name}"
            _fetch_part(log, name, partial(_data_files, domain))
            if domain.public is not None:
                name = f"public text of expert {domain.name}"
                _fetch_part(log, name, partial(_data_files, domain.public))
    if isinstance(inputs, SiloInputs):
        _fetch_silos(log, inputs)
    elif not isinstance(inputs, TierInputs):
        _fetch_part(log, f"data {config.data.task}", lambda: _data_files(inputs))
    _fetch_part(log, "weights", lambda: _weight_files(inputs))


def _fetch_silos(log: Log, inputs: SiloInputs) -> None:
    """Fetch the server's own text and the silos' hub sets, and say which folders are here.

    A silo's folder is only looked at: its files are opened by the rank that plays it, on a host
    that may be another one.

    Args:
        log: gets the lines.
        inputs: of the experiment, its silos found where they are here.

    Raises:
        ValueError: a hub set is not to be had, or the server's text is not.
    """
    config = inputs.config
    if inputs.source is None:
        if not inputs.domains:
            log.say("data: the server owns no text")
    else:
        _fetch_part(log, f"data {config.data.task}, the server's", lambda: _data_files(inputs))
    num_here = 0
    num_fetched = 0
    missing = []
    for client, silo in enumerate(config.federation.silos):
        if Path(silo.source).expanduser().exists():
            num_here += 1
        elif silo.is_pattern or not sources.may_be_hub_set(silo.source):
            missing.append(silo)
        else:
            text = inputs.text_of(client)
            try:
                _fetch_part(log, f"silo {silo.name}", text.prepared_files)
            except ValueError as error:
                raise ValueError(f"silo {silo.name}: {error}") from None
            num_fetched += 1
    if num_fetched and config.federation.silo_cache is None:
        log.say(
            "silos: hub sets lie below TMPDIR of this host; set federation.silo_cache to a folder "
            "that their ranks see too"
        )
    if num_here:
        log.say(f"silos: {num_here} of {len(config.federation.silos)} are folders that are here")
    for silo in missing[:_MAX_MISSING]:
        host = f"its host {silo.host}" if silo.host else "the host of its rank"
        name = "silos" if silo.is_pattern else f"silo {silo.name}"
        log.say(f"{name}: not here, expected on {host}: {silo.source}")
    if len(missing) > _MAX_MISSING:
        log.say(f"silos: {len(missing) - _MAX_MISSING} more are not here")


def _fetch_part(log: Log, name: str, fetch_files: Callable[[], Sequence[Path]]) -> None:
    """Fetch files, and say whether they are new, how large, and where.

    Args:
        log: gets the line.
        name: of what is fetched.
        fetch_files: downloads what is not there, and returns all files.
    """
    start_time = time.time()
    start = time.perf_counter()
    stats = {path: path.stat() for path in fetch_files()}
    folders = sorted({str(path.parent) for path in stats})
    num_bytes = sum(stat.st_size for stat in stats.values())
    # Time stamps of files may be coarse.
    is_new = any(stat.st_mtime > start_time - 1 for stat in stats.values())
    state = f"written in {duration(time.perf_counter() - start)}" if is_new else "here"
    log.say(
        f"{name}: {state}, {len(stats)} files, {num_bytes / 1e6:.1f} MB in {', '.join(folders)}"
    )


def _model_files(inputs: ExperimentInputs) -> list[Path]:
    """Read the model's configuration and tokenizer once, and return their files."""
    # Reading these properties downloads what they need.
    _ = inputs.shape
    _ = inputs.tokenizer
    model = inputs.config.model
    model_folder = hub.locate(inputs.model_name, model.revision, "config.json")
    if model.tokenizer:
        tokenizer_folder = hub.locate(model.tokenizer, None, "tokenizer")
    else:
        tokenizer_folder = hub.locate(inputs.model_name, model.revision, "tokenizer")
    names = {name for alternatives in hub.PARTS["tokenizer"] for name in alternatives}
    names.add("tokenizer_config.json")
    tokenizer_files = [tokenizer_folder / name for name in sorted(names)]
    return [model_folder / "config.json", *(path for path in tokenizer_files if path.exists())]


def _data_files(inputs: ExperimentInputs) -> list[Path]:
    """Read the rows of the data set once, and return its prepared files."""
    config = inputs.config
    server_columns = config.server.data.columns if config.federation.silos else {}
    columns = server_columns or config.data.columns
    tables, _ = loading.read_tables(inputs.task, inputs.source, columns)
    _ = inputs.splits
    return [Path(file["filename"]) for table in tables.values() for file in table.cache_files]


def _weight_files(inputs: ExperimentInputs) -> list[Path]:
    """Return the files of weights that transformers would read.

    Raises:
        ValueError: one is missing or damaged.
    """
    folder = hub.locate(inputs.model_name, inputs.config.model.revision, "weights")
    names = [alternatives[0] for alternatives in hub.PARTS["weights"]]
    existing = [name for name in names if (folder / name).exists()]
    if not existing:
        # Every other name is the index of a model in several files.
        raise ValueError(
            f"model.name: found no weights in {folder}, expected {' or '.join(names[::2])}"
        )
    paths = [folder / existing[0]]
    if existing[0].endswith(".index.json"):
        weight_map = json.loads(paths[0].read_text(encoding="utf-8"))["weight_map"]
        paths += [folder / shard for shard in sorted(set(weight_map.values()))]
    for path in paths:
        _require_complete(path)
    return paths


def _require_complete(path: Path) -> None:
    """Raise ValueError if a file is missing or empty, or its safetensors header does not fit."""
    problem = ""
    if not path.exists():
        problem = "nothing"
    elif path.stat().st_size == 0:
        problem = "no bytes"
    elif path.suffix == ".safetensors":
        try:
            with safetensors.safe_open(path, "numpy"):
                pass
        except (OSError, safetensors.SafetensorError) as error:
            problem = f"damaged weights ({one_line(error, first_line=True)})"
    if problem:
        raise ValueError(
            f"model.name: found {problem} at {path}, expected a complete file; delete it "
            "and fetch again"
        )

"""Where a model lies: in a folder, in the local cache, or on the hub, which is asked only for what
is not here.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path

import huggingface_hub

from fedsp_mpi.log import one_line

# The files that a part of a model lies in, one set or another.
PARTS = {
    "config.json": (("config.json",),),
    "tokenizer": (("tokenizer.json",), ("tokenizer.model",), ("vocab.json", "merges.txt")),
    "weights": (
        ("model.safetensors",),
        ("model.safetensors.index.json",),
        ("pytorch_model.bin",),
        ("pytorch_model.bin.index.json",),
    ),
}
SECONDS = 5.0  # for one answer of the hub
DENIED = (401, 403, 404)  # the hub is there


class AbsentError(ValueError):
    """A part of a model is neither here nor to be had from the hub."""


def locate(name: str, revision: str | None, part: str) -> Path:
    """The folder with a part of a model: the one that is named, else one of the local cache, else a
    fetched one.

    transformers is given no hub name, because it asks an unreachable hub for half a minute, even
    for what is cached, and makes up a tokenizer where the cache has none.

    Args:
        name: folder or hub name.
        revision: of the hub's files; None is the main one.
        part: one of `PARTS`.

    Raises ValueError if there is no such folder; AbsentError if it is no folder, and nothing else
    either.
    """
    folder = Path(name).expanduser()
    if folder.is_dir():
        return folder
    if name.startswith((".", "/", "~")) or name.count("/") > 1:
        raise ValueError(f"there is no folder {name}")
    return _cached(name, revision, part) or _fetched(name, revision, part)


def _cached(name: str, revision: str | None, part: str) -> Path | None:
    """The folder of the local cache that holds all files of a part of a model."""
    for files in PARTS[part]:
        found = [
            huggingface_hub.try_to_load_from_cache(name, file, revision=revision) for file in files
        ]
        paths = [Path(path) for path in found if isinstance(path, str)]
        if len(paths) == len(files) and all(path.exists() for path in _shards(paths[0])):
            return paths[0].parent
    return None


def _shards(file: Path) -> Iterable[Path]:
    """The files that an index of weights names."""
    if not file.name.endswith(".index.json"):
        return ()
    return [
        file.parent / shard
        for shard in set(json.loads(file.read_text(encoding="utf-8"))["weight_map"].values())
    ]


def _fetched(name: str, revision: str | None, part: str) -> Path:
    try:
        about = huggingface_hub.HfApi().model_info(name, revision=revision, timeout=SECONDS)
        wanted = _wanted({file.rfilename for file in about.siblings or ()}, part)
        found = huggingface_hub.snapshot_download(
            name, revision=revision, allow_patterns=wanted, ignore_patterns="*/*"
        )
    except Exception as error:  # whatever the network throws
        is_denied = getattr(getattr(error, "response", None), "status_code", None) in DENIED
        advice = "run `python -m fedsp_mpi fetch CONFIG` on a machine with network first"
        raise AbsentError(
            f"found {name!r}, which is no folder, whose {part} the local cache does not "
            "hold, and which the hub does "
            f"not give ({one_line(error, first_line=True)}), expected one of them; "
            + ("correct the name or model.revision, or ask for access" if is_denied else advice)
        ) from None
    return Path(found)


def _wanted(there: set[str], part: str) -> list[str]:
    """Configuration and tokenizer, and the weights if they are asked for, once if the hub has them
    in two formats.
    """
    wanted = ["*.json", "*.txt", "*.model", "*.jinja"]
    if part != "weights":
        return wanted
    if {"model.safetensors", "model.safetensors.index.json"} & there:
        return [*wanted, "model.safetensors", "model-*-of-*.safetensors"]
    return [*wanted, "pytorch_model.bin", "pytorch_model-*-of-*.bin"]

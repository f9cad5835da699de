"""Find a model's files: in a folder, in the local cache, or on the hub, which is asked only for
what is in neither.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path

import huggingface_hub

from fedsp_mpi.log import one_line

# The files of each part of a model, as alternative sets.
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
SECONDS = 5.0  # timeout of one request to the hub
DENIED = (401, 403, 404)  # HTTP status of a hub that can be reached, and refuses


class AbsentError(ValueError):
    """A part of a model is neither on this machine nor available from the hub."""


def locate(name: str, revision: str | None, part: str) -> Path:
    """Return the folder with a part of a model: a named one, one of the local cache, or fetched.

    transformers gets this folder and not the hub name, because it asks an unreachable hub for half
    a minute, even for what is cached, and makes up a tokenizer where the cache has none.

    Args:
        name: folder or hub name.
        revision: of the hub's files; None is the main one.
        part: one of `PARTS`.

    Raises:
        AbsentError: neither the cache nor the hub has the part.
        ValueError: `name` is a path, and there is no such folder.
    """
    folder = Path(name).expanduser()
    if folder.is_dir():
        return folder
    if name.startswith((".", "/", "~")) or name.count("/") > 1:
        raise ValueError(f"there is no folder {name}")
    return _find_in_cache(name, revision, part) or _fetch(name, revision, part)


def _find_in_cache(name: str, revision: str | None, part: str) -> Path | None:
    """Return the folder of the local cache that holds all files of a part of a model, or None."""
    for files in PARTS[part]:
        # For an absent file, the result is None or a marker object.
        results = [
            huggingface_hub.try_to_load_from_cache(name, file, revision=revision) for file in files
        ]
        paths = [Path(path) for path in results if isinstance(path, str)]
        if len(paths) == len(files) and all(path.exists() for path in _shards(paths[0])):
            return paths[0].parent
    return None


def _shards(file: Path) -> Iterable[Path]:
    """Return the files that an index of weights names; none if `file` is no index."""
    if not file.name.endswith(".index.json"):
        return ()
    weight_map = json.loads(file.read_text(encoding="utf-8"))["weight_map"]
    return [file.parent / shard for shard in set(weight_map.values())]


def _fetch(name: str, revision: str | None, part: str) -> Path:
    """Download a part of a model into the local cache; return its folder, or raise AbsentError."""
    try:
        info = huggingface_hub.HfApi().model_info(name, revision=revision, timeout=SECONDS)
        files = {file.rfilename for file in info.siblings or ()}
        folder = huggingface_hub.snapshot_download(
            name,
            revision=revision,
            allow_patterns=_patterns_of(part, files),
            ignore_patterns="*/*",
        )
    except Exception as error:  # the network raises errors of many libraries
        status = getattr(getattr(error, "response", None), "status_code", None)
        if status in DENIED:
            advice = "correct the name or model.revision, or ask for access"
        else:
            advice = "run `python -m fedsp_mpi fetch CONFIG` on a machine with network first"
        raise AbsentError(
            f"found {name!r}, which is no folder, whose {part} the local cache does not hold, and "
            f"which the hub does not give ({one_line(error, first_line=True)}), expected "
            f"one of them; {advice}"
        ) from None
    return Path(folder)


def _patterns_of(part: str, files: set[str]) -> list[str]:
    """Return which of the hub's `files` to download for a part of a model.

    Configuration and tokenizer always come along; weights that exist in two formats come in one.
    """
    patterns = ["*.json", "*.txt", "*.model", "*.jinja"]
    if part != "weights":
        return patterns
    if {"model.safetensors", "model.safetensors.index.json"} & files:
        return [*patterns, "model.safetensors", "model-*-of-*.safetensors"]
    return [*patterns, "pytorch_model.bin", "pytorch_model-*-of-*.bin"]

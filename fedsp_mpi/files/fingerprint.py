"""Digests of what is read from outside: texts, rows, weights and files, so that a change is seen
and not trained on.

They guard against mistakes and damage, not against somebody who can write both the bytes and their
digest. xxh3 reads 5 GB/s of memory and more (measured on two cores): 1.3 s for weights of 6 GB,
which is less than they take to load.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import xxhash

from fedsp_mpi.files import untrusted
from fedsp_mpi.files.ownership import MANIFEST

if TYPE_CHECKING:
    from torch import Tensor

Buffer = bytes | memoryview
_ROOM = 16 << 20  # bytes of a file that are in memory at once


def of_pieces(pieces: Iterable[Buffer]) -> str:
    """64-bit digest of bytes, piece after piece."""
    digest = xxhash.xxh3_64()
    for piece in pieces:
        digest.update(piece)
    return digest.hexdigest()


def of_file(path: Path) -> str:
    """128-bit digest of a file's bytes. Raises OSError."""
    digest, room = xxhash.xxh3_128(), memoryview(bytearray(_ROOM))
    with path.open("rb", buffering=0) as file:
        while count := file.readinto(room):
            digest.update(room[:count])
    return digest.hexdigest()


def of_texts(texts: Sequence[Any]) -> str:
    """128-bit digest of tokenised texts: their ids, and where their answers are.

    Args:
        texts: each with `ids` [length], `answer` and `gap`.
    """
    about = [
        number
        for text in texts
        for number in (len(text.ids), text.answer, text.gap is not None, text.gap or 0)
    ]
    digest = xxhash.xxh3_128(np.array(about, dtype=np.int64).tobytes())
    for text in texts:
        digest.update(text.ids.tobytes())
    return digest.hexdigest()


def of_rows(rows: Iterable[Any]) -> str:
    """128-bit digest of rows that `repr` says in full, such as the examples of a split."""
    digest = xxhash.xxh3_128()
    for row in rows:
        digest.update(repr(row).encode("utf-8", "surrogatepass") + b"\0")
    return digest.hexdigest()


def of_weights(weights: Mapping[str, Tensor]) -> str:
    """128-bit digest of named tensors: names, shapes, types and bits, wherever the tensors lie."""
    import torch

    digest = xxhash.xxh3_128()
    for name, tensor in weights.items():
        digest.update(f"{name}{tuple(tensor.shape)}{tensor.dtype}".encode())
        flat = tensor.detach().cpu().contiguous().view(-1)
        digest.update(flat.view(torch.uint8).numpy().data)
    return digest.hexdigest()


def list_folder(folder: Path) -> None:
    """Write the digest of each file in a folder beside them. Raises OSError."""
    digests = {
        path.name: of_file(path) for path in sorted(folder.iterdir()) if path.name != MANIFEST
    }
    (folder / MANIFEST).write_text(json.dumps(digests, indent=2) + "\n", encoding="utf-8")


def require_listed(folder: Path) -> bool:
    """Whether a folder has a list of digests; False for those of versions that wrote none.

    Raises ValueError if a file on the list is missing, or is not what was written, or the list
    cannot be read.
    """
    try:
        digests = json.loads((folder / MANIFEST).read_bytes())
        if not isinstance(digests, dict):
            raise ValueError("it is no mapping")
    except FileNotFoundError:
        return False
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(
            f"{folder / MANIFEST}: found no list of digests ({error}), expected the one of a run"
        ) from None
    for name, expected in digests.items():
        path = folder / Path(name).name
        try:
            digest = of_file(path)
        except OSError as error:
            raise ValueError(
                f"{path}: found no readable file ({error.strerror}), expected the one of the run"
            ) from None
        if digest != expected:
            raise ValueError(
                f"{path}: found digest {digest}, expected {expected}: the file was "
                "changed or damaged"
            )
    return True


def seal(content: Mapping[str, Any]) -> bytes:
    """JSON of a mapping, with the digest of the rest in it."""
    return json.dumps({**content, "digest": _of_json(content)}).encode()


def open_sealed(image: bytes) -> dict[str, Any]:
    """The mapping of `seal`; one of a version that wrote no digest is as good.

    Raises ValueError if the bytes are not what was written.
    """
    content = untrusted.parse_json(image)
    if not isinstance(content, dict):
        raise ValueError(f"a {type(content).__name__} where a mapping was written")
    digest = content.pop("digest", None)
    if digest not in (None, _of_json(content)):
        raise ValueError("a digest of other content: the file was damaged")
    return content


def _of_json(content: Mapping[str, Any]) -> str:
    return of_pieces([json.dumps(json.loads(json.dumps(content)), sort_keys=True).encode()])

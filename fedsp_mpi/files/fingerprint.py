"""Digests of inputs (texts, rows, weights, files), so that a change is noticed, not trained on.

They protect from mistakes and damage, not from somebody who can write both the bytes and their
digest. xxh3 hashes 5 GB/s and more (measured on two cores): 1.3 s for weights of 6 GB, which take
longer to load.
"""

from __future__ import annotations

import errno
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import numpy as np
import xxhash

from fedsp_mpi.files import untrusted
from fedsp_mpi.files.ownership import MANIFEST
from fedsp_mpi.files.untrusted import JsonMapping, JsonObject

if TYPE_CHECKING:
    from torch import Tensor

Buffer = bytes | memoryview
_BLOCK_BYTES = 16 << 20  # of a file that are in memory at once


def of_pieces(pieces: Iterable[Buffer]) -> str:
    """Return a 64-bit digest of the bytes of all pieces."""
    digest = xxhash.xxh3_64()
    for piece in pieces:
        digest.update(piece)
    return digest.hexdigest()


def of_file(path: Path) -> str:
    """Return a 128-bit digest of a file's bytes.

    Raises:
        OSError: it cannot be read, or is no regular file.
    """
    digest = xxhash.xxh3_128()
    block = memoryview(bytearray(_BLOCK_BYTES))
    try:
        opened = untrusted.open_regular_file(path)
    except ValueError as error:
        raise OSError(errno.EINVAL, str(error), str(path)) from None
    with opened as file:
        while count := file.readinto(block):
            digest.update(block[:count])
    return digest.hexdigest()


class _TokenisedText(Protocol):
    """What a digest needs of a text: token ids [length], and the places of answer and gap."""

    @property
    def ids(self) -> np.ndarray:
        """Token ids, int32 [length]."""
        ...

    @property
    def answer(self) -> int: ...
    @property
    def gap(self) -> int | None: ...


def of_texts(texts: Sequence[_TokenisedText]) -> str:
    """Return a 128-bit digest of tokenised texts: their ids, and where their answers are."""
    numbers: list[int] = []
    for text in texts:
        numbers += [len(text.ids), text.answer, text.gap is not None, text.gap or 0]
    digest = xxhash.xxh3_128(np.array(numbers, dtype=np.int64).tobytes())
    for text in texts:
        digest.update(text.ids.tobytes())
    return digest.hexdigest()


def of_rows(rows: Iterable[str]) -> str:
    """Return a 128-bit digest of rows, each as one text."""
    digest = xxhash.xxh3_128()
    for row in rows:
        digest.update(row.encode("utf-8", "surrogatepass") + b"\0")
    return digest.hexdigest()


def of_weights(weights: Mapping[str, Tensor]) -> str:
    """Return a 128-bit digest of tensors [*shape] by name, on any device and of any dtype.

    It covers names, shapes, dtypes and bits, but not devices.
    """
    import torch

    digest = xxhash.xxh3_128()
    for name, tensor in weights.items():
        digest.update(f"{name}{tuple(tensor.shape)}{tensor.dtype}".encode())
        flat = tensor.detach().cpu().contiguous().view(-1)
        digest.update(flat.view(torch.uint8).numpy().data)
    return digest.hexdigest()


def list_folder(folder: Path) -> None:
    """Write a list of the digests of a folder's files into the folder.

    Raises:
        OSError: a file cannot be read, or the list not be written.
    """
    digests = {
        path.name: of_file(path) for path in sorted(folder.iterdir()) if path.name != MANIFEST
    }
    (folder / MANIFEST).write_text(json.dumps(digests, indent=2) + "\n", encoding="utf-8")


def listed(folder: Path) -> dict[str, str] | None:
    """Return a folder's list of the digests of its files; None if there is no list.

    Raises:
        ValueError: the list cannot be read.
    """
    try:
        with untrusted.open_regular_file(folder / MANIFEST) as file:
            digests = json.loads(file.read())
        if not isinstance(digests, dict):
            raise ValueError("it is not a mapping")
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, ValueError, RecursionError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise ValueError(
            f"{folder / MANIFEST}: found no list of digests ({reason}), expected the one of a run"
        ) from None
    return {str(name): str(digest) for name, digest in digests.items()}


def require_digests(folder: Path) -> bool:
    """Check a folder's files against its list of digests.

    Returns:
        False if there is no list, as in folders of versions that wrote none.

    Raises:
        ValueError: a file on the list is missing or changed, or the list cannot be read.
    """
    digests = listed(folder)
    if digests is None:
        return False
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
                f"{path}: found digest {digest}, expected {expected}: the file was changed or "
                "damaged"
            )
    return True


def seal(content: JsonMapping) -> bytes:
    """Return a mapping as JSON, with the digest of its content added under "digest"."""
    return json.dumps({**content, "digest": _of_json(content)}).encode()


def open_sealed(image: bytes) -> JsonObject:
    """Return the mapping that `seal` wrote; one without a digest is from an older version.

    Raises:
        ValueError: the bytes are not what was written.
    """
    content = untrusted.parse_json(image)
    if not isinstance(content, dict):
        raise ValueError(f"a {type(content).__name__} where a mapping was written")
    digest = content.pop("digest", None)
    if digest not in (None, _of_json(content)):
        raise ValueError("a digest of other content: the file was damaged")
    return content


def _of_json(content: JsonMapping) -> str:
    # Through JSON first: keys become strings, which are what the reader sorts.
    plain = json.loads(json.dumps(content))
    return of_pieces([json.dumps(plain, sort_keys=True).encode()])

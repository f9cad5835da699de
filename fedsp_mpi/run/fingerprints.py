"""What a run reads from outside, as digests: a run that goes on must read the same, or it would be
two in one record.

Every rank takes the digests of what it reads itself, after tokenisation. The record keeps them all,
and each checkpoint one digest of them together.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from typing import Any

from fedsp_mpi.comm.inspection import ProtocolError
from fedsp_mpi.files import fingerprint
from fedsp_mpi.models.language_model import LanguageModel
from fedsp_mpi.run.inputs import ExperimentInputs

SECTION = "inputs"  # of the record
_CLIENTS = "texts of client"
_LONGEST = 64  # signs of a digest
_SHOWN = 8  # names in a message
UNUSABLE = "unusable"  # in the place of the digest of a text that could not be read


def of_server(materials: ExperimentInputs, model: LanguageModel) -> dict[str, str]:
    """Digests of what the server reads: the global model's weights, its own texts, the splits that
    it scores.

    Tokenises what is not tokenised yet. Raises ValueError if that cannot be done.
    """
    digests = {
        "weights of model.name": fingerprint.of_weights(model.weights),
        "texts of the server": fingerprint.of_texts(materials.shard(0)),
        "validation split": fingerprint.of_texts(materials.validation),
        "test split": fingerprint.of_rows(materials.splits.test),
    }
    config = materials.config
    if config.distillation.text is not None:
        texts = [*materials.alignment_texts, *(materials.questions if config.translates else [])]
        digests["distillation.text"] = fingerprint.of_texts(texts)
    return digests


def of_clients(materials: ExperimentInputs, ids: Iterable[int]) -> dict[str, str]:
    """The digest of each client's tokenised text, by its name in messages."""
    return {f"{_CLIENTS} {id}": _of_client(materials, id) for id in ids}


def _of_client(materials: ExperimentInputs, id: int) -> str:
    try:
        return fingerprint.of_texts(materials.shard(id + 1))
    except ValueError:  # the client fails in its first round, and is named there
        return UNUSABLE


def require_own(digests: Mapping[str, Any], rank: int, ids: Iterable[int]) -> None:
    """Raise ProtocolError unless what a rank sends are digests of texts of clients that it plays."""
    names = {f"{_CLIENTS} {id}" for id in ids}
    for name, digest in digests.items():
        if name not in names or not isinstance(digest, str) or len(digest) > _LONGEST:
            raise ProtocolError(
                f"rank {rank}: found digests that are not of texts of its clients, "
                "expected those alone"
            )


def combined(digests: Mapping[str, str]) -> str:
    """One digest of all, whatever their order."""
    return fingerprint.of_pieces([json.dumps(dict(sorted(digests.items()))).encode()])


def changed(before: Mapping[str, Any], now: Mapping[str, str]) -> str:
    """The names of the inputs that both have and that differ, for a message; empty if there are
    none.
    """
    names = [name for name, digest in now.items() if before.get(name, digest) != digest]
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(names[:_SHOWN]) + more


def require_same(folder: Any, before: Mapping[str, Any], now: Mapping[str, str]) -> None:
    """Raise ValueError, naming what differs, unless a run reads now what it read at its start."""
    if names := changed(before, now):
        raise ValueError(
            f"{folder}: found other inputs than the run was begun with ({names}), expected "
            "the same; bring those back, "
            "or begin another run under another run.name"
        )

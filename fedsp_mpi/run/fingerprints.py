"""Digests of what a run reads: a run that is resumed must read the same, or it would be two runs.

Every rank takes the digests of what it reads itself, after tokenisation. The record keeps all of
them, and each checkpoint one digest of them together.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path

from fedsp_mpi.comm.inspection import ProtocolError
from fedsp_mpi.config import Config
from fedsp_mpi.files import fingerprint
from fedsp_mpi.files.untrusted import JsonMapping
from fedsp_mpi.models.language_model import LanguageModel
from fedsp_mpi.run.inputs import ExperimentInputs
from fedsp_mpi.run.tier_inputs import TierInputs

SECTION = "inputs"  # of the record
WEIGHTS = "weights of model.name"
UNUSABLE = "unusable"  # in the place of the digest of a text that could not be read
_SILOS = "texts of silo"
_MAX_LENGTH = 64  # characters of a digest
_MAX_NAMED = 8  # inputs in a message


def of_server(inputs: ExperimentInputs, model: LanguageModel) -> dict[str, str]:
    """Return the digests of what the server reads, by name: weights, its texts, scored splits.

    Tokenises what is not tokenised yet.

    Args:
        inputs: of the experiment.
        model: the global model.

    Raises:
        ValueError: a text cannot be tokenised.
    """
    digests = {
        WEIGHTS: fingerprint.of_weights(model.weights),
        "texts of the server": fingerprint.of_texts(inputs.shard(0)),
        "validation split": fingerprint.of_texts(inputs.validation),
        "test split": fingerprint.of_rows(example.as_text() for example in inputs.splits.test),
    }
    config = inputs.config
    if isinstance(inputs, TierInputs) and inputs.public_examples:
        public = inputs.public_examples
        digests["public test text"] = fingerprint.of_rows(example.as_text() for example in public)
    if config.distillation.text is not None:
        texts = list(inputs.alignment_texts)
        if config.translates:
            texts += inputs.server_questions
        digests["distillation.text"] = fingerprint.of_texts(texts)
    return digests


def of_clients(inputs: ExperimentInputs, ids: Iterable[int]) -> dict[str, str]:
    """Return the digest of each client's tokenised text, by its name in messages."""
    return {_name(inputs.config, client): _of_client(inputs, client) for client in ids}


def _name(config: Config, client: int) -> str:
    return f"texts of {config.federation.client_name(client)}"


def _of_client(inputs: ExperimentInputs, client: int) -> str:
    owner = client + 1
    try:
        texts = inputs.shard(owner)
        if inputs.config.has_few_labels:
            held = inputs.client_text(owner)
            questions = (*held.unlabelled, *held.reworded)
            texts = [*texts, *(text for question in questions for text in question.options)]
        return fingerprint.of_texts(texts)
    except ValueError:  # the client fails in its first round, and is named there
        return UNUSABLE


def require_own(digests: JsonMapping, rank: int, ids: Iterable[int], *, config: Config) -> None:
    """Check that what a rank sent are digests of texts of its clients.

    Args:
        digests: that it sent, by name.
        rank: for the message.
        ids: of the clients that it plays.
        config: of the run.

    Raises:
        ProtocolError: there are others.
    """
    names = {_name(config, client) for client in ids}
    for name, digest in digests.items():
        if name not in names or not isinstance(digest, str) or len(digest) > _MAX_LENGTH:
            raise ProtocolError(
                f"rank {rank}: found digests that are not of texts of its clients, "
                "expected those alone"
            )


def combined(digests: Mapping[str, str]) -> str:
    """Return one digest of all digests but those of silos, whatever their order.

    A silo may be missing for a while; each is compared by itself (`require_same`).
    """
    shared = {name: digests[name] for name in sorted(digests) if not name.startswith(_SILOS)}
    return fingerprint.of_pieces([json.dumps(shared).encode()])


def updated(before: JsonMapping, now: Mapping[str, str]) -> dict[str, str]:
    """Return digests by name, with those of now; a silo that is missing keeps its earlier one."""
    missing = {
        name
        for name, digest in now.items()
        if digest == UNUSABLE and name.startswith(_SILOS) and name in before
    }
    return {**before, **{name: now[name] for name in now if name not in missing}}


def changed(before: JsonMapping, now: Mapping[str, str]) -> str:
    """Name the inputs whose digests differ, for a message; those that only one has do not count."""
    names = []
    for name, digest in now.items():
        earlier = before.get(name, digest)
        is_missing = name.startswith(_SILOS) and UNUSABLE in (earlier, digest)
        if earlier != digest and not is_missing:
            names.append(name)
    ending = f" and {len(names) - _MAX_NAMED} more" if len(names) > _MAX_NAMED else ""
    return ", ".join(names[:_MAX_NAMED]) + ending


def require_same(folder: Path, before: JsonMapping, now: Mapping[str, str]) -> None:
    """Check that a run reads now what it read at its start.

    Args:
        folder: of the run, for the message.
        before: digests by name, of the record.
        now: digests by name.

    Raises:
        ValueError: names the inputs that differ.
    """
    names = changed(before, now)
    if names:
        raise ValueError(
            f"{folder}: found other inputs than the run was begun with ({names}), expected the "
            "same; bring those back, or begin another run under another run.name"
        )

"""What the server accepts of a client rank: nothing is averaged, allocated or recorded because a
rank says so.

What can be tied to one client becomes its Failure, which counts for the quorum like any other: a
value, weight or metric that cannot be, or no answer at all. What breaks the protocol itself ends
the job, with a ProtocolError that names the rank: the server could not tell what that rank would
send next.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np

from fedsp_mpi.files.untrusted import printable
from fedsp_mpi.tensors import Contract, Failure

from .messages import (
    HEADER_BYTES,
    MAX_ABS,
    Header,
    Kind,
    impossible_values,
    pack_answers,
    unpack_answers,
)

MAX_JSON_BYTES = 64 << 20  # of a letter in JSON, such as the list of a rank's files in a checkpoint
_MAX_COUNT = 1 << 53  # questions of a client in a round, or bytes of them
_UNREADABLE = (
    ValueError,
    TypeError,
    KeyError,
    IndexError,
    AttributeError,
    OverflowError,
    RecursionError,
)


class ProtocolError(ValueError):
    """A rank does not keep to the protocol. Names the rank, and the client if there is one."""


@dataclass(frozen=True)
class Expected:
    """Who answers in a round.

    Attributes:
        ranks: the rank that plays each client that takes part, by client id.
        max_samples: how many samples each of them can have used at most, by client id.
    """

    ranks: Mapping[int, int]
    max_samples: Mapping[int, float]

    def of_rank(self, rank: int) -> list[int]:
        """The ids of the clients that a rank answers for, ascending."""
        return sorted(client for client, where in self.ranks.items() if where == rank)


@contextmanager
def reading(rank: int, what: str) -> Iterator[None]:
    """Turn whatever goes wrong while a rank's message is read into a ProtocolError that names the
    rank.
    """
    try:
        yield
    except ProtocolError:
        raise
    except _UNREADABLE as error:
        reason = f"{type(error).__name__}: {error}"
        raise ProtocolError(
            f"rank {rank}: found {what} that cannot be read ({printable(reason)})"
        ) from None


def require_fields(
    content: Mapping[str, Any], rank: int, fields: Mapping[str, type | tuple[type, ...]]
) -> None:
    """Raise ProtocolError, naming the rank, unless its mapping has all of some fields, each of a
    type.
    """
    for name, kind in fields.items():
        if name not in content or not isinstance(content[name], kind):
            found = type(content[name]).__name__ if name in content else "nothing"
            raise ProtocolError(
                f"rank {rank}: found {found} as {name!r} in its message, expected {kind}"
            )


def read_headers(
    letter: bytes, rank: int, contract: Contract, round: int, expected: Expected | None
) -> list[Header]:
    """The headers in a rank's letter: of the contract, of this round, of clients of that rank, each
    at most once.

    Raises ProtocolError, naming the rank and the client, if one of them is anything else.
    """
    with reading(rank, "a letter of answers"):
        headers = unpack_answers(letter, f"rank {rank}", contract.metrics)
    mine = None if expected is None else set(expected.of_rank(rank))
    for header in headers:
        _require_agreed(header, contract, round, rank)
        if mine is not None and header.client not in mine:
            raise ProtocolError(
                f"update of client {header.client} from rank {rank}: found a client that this "
                "rank does not play in "
                f"round {round}, expected one of {sorted(mine)[:8]}"
            )
    counts = Counter(header.client for header in headers)
    if pack_answers(headers, contract.metrics) != letter:
        raise ProtocolError(
            f"rank {rank}: found bytes in its answers that the contract has no meaning for"
        )
    if twice := [client for client, count in counts.items() if count > 1]:
        raise ProtocolError(
            f"update of client {twice[0]} from rank {rank}: found two answers, expected one"
        )
    return headers


def require_one_rank_each(senders: Sequence[Sequence[int]]) -> None:
    """Raise ProtocolError if two ranks answer for one client; `senders` are the clients by rank."""
    rank_of: dict[int, int] = {}
    for rank, clients in enumerate(senders):
        for client in clients:
            other = rank_of.setdefault(client, rank)
            if other != rank:
                raise ProtocolError(
                    f"ranks {other} and {rank}: found two answers of client {client} in one round, "
                    "expected one"
                )


def _require_agreed(header: Header, contract: Contract, round: int, rank: int) -> None:
    """Raise ProtocolError unless a header is an update or a failure of this round, as handed out."""
    whose = f"update of client {header.client} from rank {rank}"
    if header.kind not in (Kind.UPDATE, Kind.FAILURE):
        raise ProtocolError(
            f"{whose}: found a message of kind {header.kind.name}, expected UPDATE or FAILURE"
        )
    found: list[Any] = [header.round, header.num_values, header.digest.hex()]
    agreed: list[Any] = [round, contract.up.num_values, contract.up.digest.hex()]
    if header.kind is Kind.FAILURE:
        agreed[1:] = [header.num_values, bytes(16).hex()]
    elif header.text:
        raise ProtocolError(f"{whose}: found an UPDATE with a text, expected numbers alone")
    if found != agreed or header.client < 0:
        raise ProtocolError(
            f"{whose}: found [round, values, schema] {found}, expected {agreed} as handed out"
        )
    questions, up, down = header.asked
    if not contract.servers and any(header.asked):
        raise ProtocolError(
            f"{whose}: found {questions} questions, expected none: nobody answers them in this run"
        )
    if max(header.asked) > _MAX_COUNT or min(up, down) < questions * HEADER_BYTES:
        raise ProtocolError(f"{whose}: found {questions} questions of {up} bytes, which cannot be")


def failures_of(
    headers: Iterable[Header], contract: Contract, round: int, expected: Expected | None
) -> list[Failure]:
    """The failures of a round that headers tell: those that clients report, impossible numbers, and
    silent clients.
    """
    headers = list(headers)
    reported = [header.failure() for header in headers if header.kind is Kind.FAILURE]
    updates = [header for header in headers if header.kind is Kind.UPDATE]
    reasons = {header.client: _impossible(header, contract, expected) for header in updates}
    failures = [
        Failure(client, round, "check", reason) for client, reason in reasons.items() if reason
    ]
    missing = (
        sorted(set(expected.ranks) - {header.client for header in headers}) if expected else []
    )
    silent = [
        Failure(id, round, "gather", f"rank {expected.ranks[id]} sent no answer")
        for id in missing
        if expected
    ]
    return sorted([*reported, *failures, *silent], key=lambda failure: failure.client)


def _impossible(header: Header, contract: Contract, expected: Expected | None) -> str | None:
    """What about an update's weight and metrics cannot be; None if they can."""
    if not (math.isfinite(header.weight) and header.weight >= 0):
        return f"weight is {header.weight:g}, expected a finite number of samples"
    if expected is not None and header.weight > expected.max_samples[header.client]:
        most = expected.max_samples[header.client]
        return f"weight is {header.weight:g}, expected at most {most:g} samples"
    for name, value in header.metrics.items():
        if math.isinf(value) or (math.isnan(value) and name in contract.finite):
            return f"metric {name} is {value}, expected a finite number"
    if missing := [name for name in contract.finite if name not in header.metrics]:
        return f"found no metric {missing[0]}, expected one"
    return None


def impossible_rows(matrix: np.ndarray) -> dict[int, str]:
    """What cannot be averaged, by row of an fp32 matrix [updates, values]; one pass over it where
    all is well.
    """
    flat = matrix.reshape(-1)
    with np.errstate(over="ignore", invalid="ignore"):
        if float(np.dot(flat, flat)) <= MAX_ABS**2:  # no value is larger than the norm of all
            return {}
    rows = {row: impossible_values(values) for row, values in enumerate(matrix)}
    return {row: f"the update {reason}" for row, reason in rows.items() if reason}


def open_json(letter: bytes, rank: int) -> dict[str, Any]:
    """The mapping in a rank's letter. Raises ProtocolError, naming the rank."""
    with reading(rank, "a JSON message"):
        header = Header.unpack(letter[:HEADER_BYTES], f"rank {rank}").require(
            Kind.JSON, f"rank {rank}"
        )
        if len(letter) != HEADER_BYTES + header.num_values:
            raise ValueError(f"{len(letter) - HEADER_BYTES} bytes, {header.num_values} announced")
        content = json.loads(letter[HEADER_BYTES:])
        if not isinstance(content, dict):
            raise ValueError(f"a {type(content).__name__}, expected a mapping")
    return content


def describe(clients: Sequence[int]) -> str:
    """The first few client ids, for a message."""
    shown = ", ".join(map(str, clients[:8]))
    return f"client{'s' if len(clients) > 1 else ''} {shown}{', ...' if len(clients) > 8 else ''}"

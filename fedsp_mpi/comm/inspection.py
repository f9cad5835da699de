"""Checks of everything that the server receives from a client rank.

Nothing is averaged, allocated or recorded just because a rank says so. What can be attributed to
one client becomes its Failure, which counts for the quorum like any other: a value, weight or
metric that cannot be, or no result at all. What breaks the protocol itself ends the job with a
ProtocolError that names the rank: the server could not tell what that rank would send next.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np

from fedsp_mpi.files.untrusted import printable
from fedsp_mpi.tensors import Contract, Failure

from ..files.untrusted import JsonMapping, JsonObject
from .messages import (
    HEADER_BYTES,
    MAX_ABS,
    Header,
    Kind,
    invalid_values,
    pack_results,
    unpack_results,
)

MAX_JSON_BYTES = 64 << 20  # of a JSON message, such as the list of a rank's files in a checkpoint
_MAX_CALLS = 1 << 53  # of a client in a round, or bytes of them
_MAX_IDS_SHOWN = 8
# What reading a malformed message may raise.
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
    """A rank broke the protocol. Names the rank, and the client if there is one."""


@dataclass(frozen=True)
class Expected:
    """The clients that take part in a round.

    Attributes:
        ranks: rank that hosts each client, by client id.
        max_samples: largest number of samples that each client can have used, by client id.
        client_name: returns what messages call a client of an id.
    """

    ranks: Mapping[int, int]
    max_samples: Mapping[int, float]
    client_name: Callable[[int], str] = "client {}".format

    def of_rank(self, rank: int) -> list[int]:
        """Return the ids of a rank's clients, ascending."""
        return sorted(client for client, host in self.ranks.items() if host == rank)


@contextmanager
def reading(rank: int, what: str) -> Iterator[None]:
    """Turn any error while a rank's message is read into a ProtocolError that names the rank."""
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
    content: JsonMapping, rank: int, fields: Mapping[str, type | tuple[type, ...]]
) -> None:
    """Raise ProtocolError unless a rank's mapping has all required fields.

    Args:
        content: the mapping.
        rank: who sent it.
        fields: types by name.
    """
    for name, kind in fields.items():
        if name not in content or not isinstance(content[name], kind):
            actual = type(content[name]).__name__ if name in content else "nothing"
            raise ProtocolError(
                f"rank {rank}: found {actual} as {name!r} in its message, expected {kind}"
            )


def read_headers(
    message: bytes, rank: int, contract: Contract, *, round: int, expected: Expected | None
) -> list[Header]:
    """Read the headers of a rank's results.

    Args:
        message: what the rank sent.
        rank: who sent it.
        contract: what may travel.
        round: number of the round.
        expected: the clients that take part; None accepts any.

    Returns:
        One header for each of the rank's clients that sent a result.

    Raises:
        ProtocolError: a header does not match the contract or the round, a client is not one of
            this rank's, or there are two results of one client.
    """
    with reading(rank, "a message of results"):
        headers = unpack_results(message, f"rank {rank}", contract.metrics)
    clients_of_rank = [] if expected is None else expected.of_rank(rank)
    name = Expected.client_name if expected is None else expected.client_name
    for header in headers:
        whose = f"update of {name(header.client)} from rank {rank}"
        _require_agreed(header, contract, round=round, whose=whose)
        if expected is not None and header.client not in clients_of_rank:
            raise ProtocolError(
                f"{whose}: found a client that this rank does not host in round {round}, expected "
                "one of "
                f"{clients_of_rank[:_MAX_IDS_SHOWN]}"
            )
    if pack_results(headers, contract.metrics) != message:
        raise ProtocolError(
            f"rank {rank}: found bytes in its results that the contract has no meaning for"
        )
    for client, count in Counter(header.client for header in headers).items():
        if count > 1:
            raise ProtocolError(
                f"update of {name(client)} from rank {rank}: found two results, expected one"
            )
    return headers


def require_one_rank_each(senders: Sequence[Sequence[int]]) -> None:
    """Raise ProtocolError if two ranks sent a result of one client.

    `senders` are the client ids by rank.
    """
    rank_of: dict[int, int] = {}
    for rank, clients in enumerate(senders):
        for client in clients:
            first_rank = rank_of.setdefault(client, rank)
            if first_rank != rank:
                raise ProtocolError(
                    f"ranks {first_rank} and {rank}: found two results of client {client} in one "
                    "round, expected one"
                )


def _require_agreed(header: Header, contract: Contract, *, round: int, whose: str) -> None:
    """Raise ProtocolError unless a header is an update or a failure as the contract has it.

    Args:
        header: of a result.
        contract: what may travel.
        round: number of the round.
        whose: begins the message.
    """
    if header.kind not in (Kind.UPDATE, Kind.FAILURE):
        raise ProtocolError(
            f"{whose}: found a message of kind {header.kind.name}, expected UPDATE or FAILURE"
        )
    actual: list[object] = [header.round, header.num_values, header.digest.hex()]
    agreed: list[object]
    if header.kind is Kind.FAILURE:
        agreed = [round, header.num_values, bytes(16).hex()]
    else:
        agreed = [round, contract.up.num_values, contract.up.digest.hex()]
        if header.text:
            raise ProtocolError(f"{whose}: found an UPDATE with a text, expected numbers only")
    if actual != agreed or header.client < 0:
        raise ProtocolError(
            f"{whose}: found [round, values, schema] {actual}, expected {agreed} as handed out"
        )
    num_calls, bytes_up, bytes_down = header.calls
    if not contract.servers and any(header.calls):
        raise ProtocolError(
            f"{whose}: found {num_calls} requests, expected none: nobody answers them in this run"
        )
    if max(header.calls) > _MAX_CALLS or min(bytes_up, bytes_down) < num_calls * HEADER_BYTES:
        raise ProtocolError(
            f"{whose}: found {num_calls} requests of {bytes_up} bytes, which cannot be"
        )


def collect_failures(
    headers: Iterable[Header], contract: Contract, *, round: int, expected: Expected | None
) -> list[Failure]:
    """Return the failures of a round by client id.

    They are those that clients report, updates with an impossible weight or metric, and clients
    that sent nothing.

    Args:
        headers: headers of all results.
        contract: what may travel.
        round: number of the round.
        expected: the clients that take part; None where it is not known who is missing.
    """
    failures: list[Failure] = []
    missing = set() if expected is None else set(expected.ranks)
    for header in headers:
        missing.discard(header.client)
        if header.kind is Kind.FAILURE:
            failures.append(header.failure())
        elif header.kind is Kind.UPDATE:
            reason = _invalid_numbers(header, contract, expected)
            if reason:
                failures.append(Failure(header.client, round, "check", reason))
    if expected is not None:
        for client in missing:
            reason = f"rank {expected.ranks[client]} sent no answer"
            failures.append(Failure(client, round, "gather", reason))
    return sorted(failures, key=lambda failure: failure.client)


def _invalid_numbers(header: Header, contract: Contract, expected: Expected | None) -> str | None:
    """Return what is impossible about an update's weight or metrics; None if nothing is."""
    weight = header.weight
    if not (math.isfinite(weight) and weight >= 0):
        return f"weight is {weight:g}, expected a finite number of samples"
    if expected is not None:
        max_samples = expected.max_samples[header.client]
        if weight > max_samples:
            return f"weight is {weight:g}, expected at most {max_samples:g} samples"
    for name, value in header.metrics.items():
        must_be_number = name in contract.finite
        if math.isinf(value) or (math.isnan(value) and must_be_number):
            return f"metric {name} is {value}, expected a finite number"
    for name in contract.finite:
        if name not in header.metrics:
            return f"found no metric {name}, expected one"
    return None


def invalid_rows(matrix: np.ndarray) -> dict[int, str]:
    """Return why rows of an fp32 matrix [num_updates, num_values] cannot be averaged, by row.

    Reads the matrix once where all values are valid.
    """
    flat = matrix.reshape(-1)
    with np.errstate(over="ignore", invalid="ignore"):
        # No value is larger than the norm of all of them; nan compares as false.
        if float(np.dot(flat, flat)) <= MAX_ABS**2:
            return {}
    reasons: dict[int, str] = {}
    for row, values in enumerate(matrix):
        reason = invalid_values(values)
        if reason:
            reasons[row] = f"the update {reason}"
    return reasons


def open_json(message: bytes, rank: int) -> JsonObject:
    """Return the mapping in a rank's JSON message.

    Raises:
        ProtocolError: it cannot be read; names the rank.
    """
    whose = f"rank {rank}"
    with reading(rank, "a JSON message"):
        header = Header.unpack(message[:HEADER_BYTES], whose).require(Kind.JSON, whose)
        num_bytes = len(message) - HEADER_BYTES
        if num_bytes != header.num_values:
            raise ValueError(f"{num_bytes} bytes, {header.num_values} announced")
        content = json.loads(message[HEADER_BYTES:])
        if not isinstance(content, dict):
            raise ValueError(f"a {type(content).__name__}, expected a mapping")
    return content


def describe_clients(clients: Sequence[int]) -> str:
    """Format the first few client ids for a message: "client 2", "clients 1, 2, ..."."""
    noun = "clients" if len(clients) > 1 else "client"
    shown = ", ".join(map(str, clients[:_MAX_IDS_SHOWN]))
    ellipsis = ", ..." if len(clients) > _MAX_IDS_SHOWN else ""
    return f"{noun} {shown}{ellipsis}"

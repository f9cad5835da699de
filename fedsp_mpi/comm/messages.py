"""Messages between server and clients, and the 256-byte header in front of each of them."""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Container, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from enum import IntEnum
from typing import Literal, NamedTuple

import numpy as np

from fedsp_mpi.config.federation import CompressionConfig
from fedsp_mpi.files.untrusted import printable
from fedsp_mpi.tensors import Contract, Failure, NamedTensors, Schema, Update, seal

from ..files.untrusted import JsonMapping, JsonObject
from .envelope import SEAL_BYTES
from .exchange import Exchange

CHUNK_BYTES = 4 << 20  # of one vector that travel at once
Direction = Literal["start-up", "handout", "down", "up", "checkpoint", "end"]
JsonPhase = Literal["start-up", "silos", "declaration", "evaluation", "checkpoint", "end"]
# The field of `Deadlines` that limits the collection of a phase's JSON.
DEADLINE_OF: dict[JsonPhase, str] = {
    "start-up": "start_up",
    "silos": "start_up",
    "declaration": "handout",
    "evaluation": "gather",
    "checkpoint": "gather",
    "end": "gather",
}
# Before the first round the server reads each message when it comes, and not after its own work.
BEFORE_ROUNDS = ("start-up", "silos", "declaration")
# The direction of a phase's JSON in the wire's manifest.
DIRECTION_OF: dict[JsonPhase, Direction] = {
    "start-up": "start-up",
    "silos": "start-up",
    "declaration": "start-up",
    "evaluation": "up",
    "checkpoint": "checkpoint",
    "end": "end",
}

MAGIC = b"FSPW"
LAYOUT_VERSION = 3
HEADER_BYTES = 256
MAX_METRICS = 12
TEXT_BYTES = 90
# Largest absolute value in an update: no model survives more, and fp32 sums with such values lose
# the digits of all others.
MAX_ABS = 1e6
REASON_BYTES = 4096  # longest text of a failure behind its header
MAX_RESULT_BYTES = HEADER_BYTES + REASON_BYTES  # of one client in its rank's message
# Magic, layout version, kind, round, client, number of values (of bytes for JSON), schema digest,
# weight, bit mask of the metrics that are present, metrics, number of requests and bytes of them
# and of their responses, text. Little-endian without padding. A failure's number of values is the
# number of bytes behind its header, with which its text goes on.
_LAYOUT = struct.Struct(f"<4sHHiiQ16sdH{MAX_METRICS}dIQQ{TEXT_BYTES}s")
assert _LAYOUT.size == HEADER_BYTES


@dataclass(frozen=True)
class Handout:
    """The initial hand-out: sent once before the first round, it fixes what may travel later.

    Attributes:
        meta: any JSON mapping.
        tensors: the auxiliary model and the initial prompts.
        contract: names and shapes of all later messages.
        exchange: where the contract compresses, with the reference of the first broadcast.
    """

    meta: JsonObject
    tensors: NamedTensors
    contract: Contract
    exchange: Exchange | None = None


@dataclass(frozen=True)
class RoundBroadcast:
    """The broadcast of one round: the prompts that clients start from, or the request to stop.

    Attributes:
        round: number of the round.
        stop: there are no more rounds.
        tensors: the prompts; None if and only if `stop`.
    """

    round: int
    stop: bool = False
    tensors: NamedTensors | None = None


class CallStats(NamedTuple):
    """Remote calls of one client in a round.

    Attributes:
        num_calls: number of requests, and of responses.
        bytes_up: bytes of the requests, headers included.
        bytes_down: bytes of the responses, headers included.
    """

    num_calls: int = 0
    bytes_up: int = 0
    bytes_down: int = 0

    def add_call(
        self, request_values: int, response_values: int, *, is_sealed: bool = False
    ) -> CallStats:
        """Return the statistics after another call.

        Args:
            request_values: number of fp32 values of the request.
            response_values: number of fp32 values of the response.
            is_sealed: the request's header and its values are sealed, each by itself.
        """
        seal_bytes = 2 * SEAL_BYTES if is_sealed else 0
        return CallStats(
            self.num_calls + 1,
            self.bytes_up + HEADER_BYTES + 4 * request_values + seal_bytes,
            self.bytes_down + HEADER_BYTES + 4 * response_values,
        )


NO_CALLS = CallStats()


class Report(NamedTuple):
    """What an accepted update says besides its tensors."""

    client: int
    weight: float
    metrics: dict[str, float]


class Kind(IntEnum):
    """Kind of a message, which says what follows its header.

    BROADCAST, UPDATE: fp32 values, or what the contract makes of them; REQUEST, RESPONSE: fp32
    values; JSON: bytes; FAILURE: the rest of its text; STOP: nothing.
    """

    BROADCAST = 1
    STOP = 2
    UPDATE = 3
    FAILURE = 4
    JSON = 5
    REQUEST = 6
    RESPONSE = 7


@dataclass(frozen=True)
class Header:
    """The 256-byte header in front of a message.

    Attributes:
        kind: what follows the header.
        round: round of a broadcast or a result; -1 elsewhere.
        client: client id; the rank of a JSON message; -1 elsewhere.
        num_values: values that follow, or bytes where no values follow.
        digest: digest of the schema of the values.
        weight: weight of an update.
        metrics: metrics of an update by name.
        text: phase and reason of a failure, with a line end between them.
        calls: the client's remote calls in this round.
    """

    kind: Kind
    round: int = -1
    client: int = -1
    num_values: int = 0
    digest: bytes = bytes(16)
    weight: float = 0.0
    metrics: Mapping[str, float] = field(default_factory=dict)
    text: str = ""
    calls: CallStats = NO_CALLS

    def pack(self, names: Sequence[str] = ()) -> bytes:
        """Return the 256 bytes; `names` are the metrics of the contract, in order."""
        values = [self.metrics.get(name, 0.0) for name in names]
        padding = [0.0] * (MAX_METRICS - len(names))
        mask = 0
        for bit, name in enumerate(names):
            if name in self.metrics:
                mask |= 1 << bit
        return _LAYOUT.pack(
            MAGIC,
            LAYOUT_VERSION,
            self.kind,
            self.round,
            self.client,
            self.num_values,
            self.digest,
            self.weight,
            mask,
            *values,
            *padding,
            *self.calls,
            _truncate_utf8(self.text.encode(), TEXT_BYTES),
        )

    @classmethod
    def unpack(cls, raw: bytes, whose: str, names: Sequence[str] = ()) -> Header:
        """Read a header from 256 bytes.

        Args:
            raw: the bytes.
            whose: sender, for the message of the error.
            names: metrics of the contract, in order.

        Raises:
            ValueError: the bytes are not a header of this layout.
        """
        magic, version, kind, round, client, num_values, digest, weight, mask, *fields = (
            _LAYOUT.unpack(raw)
        )
        if (magic, version) != (MAGIC, LAYOUT_VERSION) or kind not in list(Kind):
            raise ValueError(
                f"{whose}: found a message of {magic!r}, layout {version}, kind {kind}; expected "
                f"{MAGIC!r}, layout {LAYOUT_VERSION}; start all ranks with one version of fedsp_mpi"
            )
        metrics = {name: fields[bit] for bit, name in enumerate(names) if mask >> bit & 1}
        calls = CallStats(*fields[MAX_METRICS:-1])
        text = fields[-1].rstrip(b"\0").decode(errors="replace")
        return cls(Kind(kind), round, client, num_values, digest, weight, metrics, text, calls)

    @classmethod
    def of(cls, result: Update | Failure, round: int, calls: CallStats = NO_CALLS) -> Header:
        """Build the header of one client's result.

        Args:
            result: the result.
            round: number of the round.
            calls: the client's remote calls in this round.
        """
        if isinstance(result, Failure):
            text = f"{result.phase}\n{result.reason}"
            num_bytes = len(_text_behind_header(text))
            return cls(Kind.FAILURE, round, result.client, num_bytes, text=text, calls=calls)
        schema = result.tensors.schema
        return cls(
            Kind.UPDATE,
            round,
            result.client,
            schema.num_values,
            schema.digest,
            float(result.weight),
            result.metrics,
            calls=calls,
        )

    def require(self, kind: Kind, whose: str) -> Header:
        """Return this header; raise ValueError, naming `whose`, if the kind differs.

        Ranks whose kinds differ are out of step in the protocol.
        """
        if self.kind is not kind:
            raise ValueError(
                f"{whose}: found a message of kind {self.kind.name}, expected {kind.name}"
            )
        return self

    def failure(self) -> Failure:
        """Return the failure that this header carries, with its text made printable."""
        phase, _, reason = self.text.partition("\n")
        return Failure(self.client, self.round, printable(phase), printable(reason))


def pack_results(headers: Iterable[Header], names: Sequence[str]) -> bytes:
    """Return the message of one rank's clients: headers, each failure's followed by its long text.

    `names` are the metrics of the contract, in order.
    """
    parts = []
    for header in headers:
        parts.append(header.pack(names))
        if header.kind is Kind.FAILURE:
            parts.append(_text_behind_header(header.text))
    return b"".join(parts)


def unpack_results(message: bytes, whose: str, names: Sequence[str]) -> list[Header]:
    """Read the headers and texts that `pack_results` wrote.

    Args:
        message: the bytes.
        whose: sender, for the message of the error.
        names: metrics of the contract, in order.

    Raises:
        ValueError: a header or a text is incomplete.
    """
    headers = []
    offset = 0
    while offset < len(message):
        raw = message[offset : offset + HEADER_BYTES]
        if len(raw) < HEADER_BYTES:
            raise ValueError(
                f"{whose}: found {len(raw)} bytes at the end of a message, expected headers of "
                f"{HEADER_BYTES}"
            )
        header = Header.unpack(raw, whose, names)
        offset += HEADER_BYTES
        if header.kind is Kind.FAILURE and header.num_values:
            text = message[offset : offset + header.num_values]
            if len(text) < header.num_values or len(text) > REASON_BYTES:
                raise ValueError(
                    f"{whose}: found a failure with {header.num_values} bytes of text behind its "
                    f"header, expected at most {REASON_BYTES}, all in the message"
                )
            header = replace(header, text=header.text + text.decode(errors="replace"))
            offset += len(text)
        headers.append(header)
    return headers


def _text_behind_header(text: str) -> bytes:
    """Return the part of a failure's text that does not fit into its header."""
    raw = text.encode()
    in_header = _truncate_utf8(raw, TEXT_BYTES)
    return _truncate_utf8(raw[len(in_header) :], REASON_BYTES)


def _truncate_utf8(text: bytes, max_bytes: int) -> bytes:
    """Return at most `max_bytes` bytes of UTF-8, cut between characters."""
    return text[:max_bytes].decode(errors="ignore").encode()


def checked_result(result: Update | Failure, contract: Contract, round: int) -> Update | Failure:
    """Return the result that a client may send in place of `result`.

    Args:
        result: the client's result.
        contract: what may travel.
        round: number of the round.

    Returns:
        The result itself, or a Failure if its weight or one of its values cannot be averaged.

    Raises:
        ValueError: tensors, metrics or weight differ from the contract; names the first tensor
            that differs.
        SealedTensorError: the tensors are memory of the global model.
    """
    whose = f"update of client {result.client}"
    if isinstance(result, Failure):
        assert result.round == round, f"failure of round {result.round} in round {round}"
        return result
    result.tensors.schema.require(contract.up, whose)
    seal.check_array(result.tensors.flat)
    unknown = set(result.metrics) - set(contract.metrics)
    if unknown:
        raise ValueError(
            f"{whose}: found metrics {sorted(unknown)}, expected some of {list(contract.metrics)}"
        )
    if result.weight < 0:
        raise ValueError(
            f"{whose}: found weight {result.weight}, expected a number that is not negative"
        )
    if not math.isfinite(result.weight):
        return Failure(result.client, round, "check", f"weight is {result.weight}")
    reason = invalid_values(result.tensors.flat)
    if reason is None:
        return result
    name = next(name for name, values in result.tensors.items() if invalid_values(values))
    return Failure(result.client, round, "check", f"tensor {name!r} {reason}")


def checked_results(
    results: Iterable[Update | Failure], contract: Contract, round: int
) -> list[Update | Failure]:
    """Return the results of a rank's clients, each as `checked_result` does, by client id.

    Args:
        results: the clients' results, in any order.
        contract: what may travel.
        round: number of the round.
    """
    checked = [checked_result(result, contract, round) for result in results]
    return sorted(checked, key=lambda result: result.client)


def invalid_values(values: np.ndarray) -> str | None:
    """Return why fp32 values [*shape] cannot be averaged; None if they can."""
    if not values.size:
        return None
    low = float(values.min())  # nan if any value is nan
    high = float(values.max())
    if not (math.isfinite(low) and math.isfinite(high)):
        return "is not finite"
    largest = max(-low, high)
    if largest > MAX_ABS:
        return f"has a value of {largest:.3g}, expected at most {MAX_ABS:g}"
    return None


def broadcast_header(
    down: RoundBroadcast, contract: Contract, exchange: Exchange | None = None
) -> Header:
    """Build the header of a broadcast.

    Where rounds are compressed, and the values have no change that can be encoded, it announces
    none: receivers make `no_numbers` of it.

    Args:
        down: what is broadcast.
        contract: whose names and shapes the tensors must have.
        exchange: how rounds are compressed, where they are.

    Raises:
        ValueError: the tensors are not those of the contract.
        SealedTensorError: the tensors are memory of the global model.
    """
    if down.stop:
        return Header(Kind.STOP, down.round)
    assert down.tensors is not None, "a broadcast has tensors unless it says stop"
    schema = contract.down
    down.tensors.schema.require(schema, f"broadcast of round {down.round}")
    seal.check_array(down.tensors.flat)
    num_values = schema.num_values
    if exchange is not None and not exchange.can_encode(down.tensors.flat):
        num_values = 0
    return Header(Kind.BROADCAST, down.round, num_values=num_values, digest=schema.digest)


def no_numbers(schema: Schema) -> NamedTensors:
    """Return tensors of a schema, each [*shape], whose values are all nan."""
    return NamedTensors(schema, np.full(schema.num_values, np.nan, dtype=np.float32))


def require_handout(handout: Handout) -> None:
    """Check that a hand-out may travel.

    Raises:
        ValueError: more metrics than a header has room for.
        SealedTensorError: the tensors are memory of the global model.
    """
    if len(handout.contract.metrics) > MAX_METRICS:
        raise ValueError(
            f"found {len(handout.contract.metrics)} metrics, expected at most {MAX_METRICS}"
        )
    seal.check_array(handout.tensors.flat)
    is_compressed = handout.contract.compression.is_on
    assert is_compressed == (handout.exchange is not None), "compression needs a reference"
    if handout.exchange is not None:
        seal.check_array(handout.exchange.reference)


def payload(update: Update, exchange: Exchange | None) -> np.ndarray:
    """Return what an update travels as: fp32 [num_values], or uint8 [num_bytes] if compressed.

    Raises:
        ValueError: an update of a compressed exchange is not packed.
    """
    if exchange is None:
        return update.tensors.flat
    return exchange.require_size(update.packed, f"update of client {update.client}")


def accepted_reports(headers: Iterable[Header], failed: Container[int] = ()) -> list[Report]:
    """Return the reports of all updates, except those of `failed` clients, by client id."""
    reports = [
        Report(header.client, header.weight, dict(header.metrics))
        for header in headers
        if header.kind is Kind.UPDATE and header.client not in failed
    ]
    return sorted(reports, key=lambda report: report.client)


def reason_bytes(headers: Iterable[Header]) -> dict[int, int]:
    """Return the number of bytes of text behind each failure's header, by client id."""
    return {header.client: header.num_values for header in headers if header.kind is Kind.FAILURE}


def chunk_slices(num_values: int, chunk: int) -> Iterator[slice]:
    """Yield slices of `chunk` values that cover a vector; the last may be shorter."""
    for start in range(0, num_values, chunk):
        yield slice(start, min(start + chunk, num_values))


def to_json(content: object) -> bytes:
    """Return any JSON value as UTF-8 bytes.

    `json.loads` gives back even paths that are not UTF-8.
    """
    text = json.dumps(content, ensure_ascii=False, separators=(",", ":"))
    return text.encode("utf-8", "surrogatepass")


def describe_handout(handout: Handout, chunk: int) -> JsonObject:
    """Return as JSON mapping what clients must know before the tensors of a hand-out arrive.

    `chunk` is the number of values in a chunk of all later vectors.
    """

    def as_lists(schema: Schema) -> list[list[object]]:
        return [[spec.name, spec.shape] for spec in schema]

    contract = handout.contract
    return {
        "tensors": as_lists(handout.tensors.schema),
        "down": as_lists(contract.down),
        "up": as_lists(contract.up),
        "metrics": contract.metrics,
        "servers": contract.servers,
        "finite": contract.finite,
        "compression": asdict(contract.compression),
        "meta": handout.meta,
        "chunk": chunk,
    }


def allocate_handout(content: JsonMapping) -> tuple[Handout, int]:
    """Read what `describe_handout` returned.

    Returns:
        The hand-out, with memory for its tensors and reference that is not filled yet, and the
        `chunk`.
    """
    schema = Schema.of(content["tensors"])
    memory = np.empty(schema.num_values, dtype=np.float32)
    contract = Contract(
        down=Schema.of(content["down"]),
        up=Schema.of(content["up"]),
        metrics=tuple(content["metrics"]),
        servers=content["servers"],
        finite=tuple(content["finite"]),
        compression=CompressionConfig(**content["compression"]),
    )
    exchange = None
    if contract.compression.is_on:
        reference = np.empty(contract.down.num_values, dtype=np.float32)
        exchange = Exchange(contract.compression, reference)
    handout = Handout(content["meta"], NamedTensors(schema, memory), contract, exchange)
    return handout, int(content["chunk"])

"""What the loop hands to the wire and gets from it, and the 256-byte header that goes in front of
every message.
"""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Container, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from enum import IntEnum
from typing import Any, Literal, NamedTuple

import numpy as np

from fedsp_mpi.files.untrusted import printable
from fedsp_mpi.tensors import Contract, Failure, NamedTensors, Schema, Update, seal

CHUNK_BYTES = 4 << 20  # of one vector that travel at once
JsonPhase = Literal["start-up", "checkpoint", "end"]
# The deadline of what is collected.
LIMIT: dict[JsonPhase, str] = {"start-up": "start_up", "checkpoint": "gather", "end": "gather"}
MAGIC, LAYOUT_VERSION = b"FSPW", 3
HEADER_BYTES, MAX_METRICS, TEXT_BYTES = 256, 12, 90
# of a value in an update: models do not survive larger ones, and fp32 sums of them lose all others
MAX_ABS = 1e6
REASON_BYTES = 4096  # most of a failure's text that is behind its header
MAX_ANSWER_BYTES = HEADER_BYTES + REASON_BYTES  # of one client in a letter
# magic, layout version, kind, round, client, number of values (of bytes for JSON), schema digest,
# weight, which metrics are there (bit mask), metrics, questions and bytes of them and of their
# answers, text. Little-endian without padding. A failure's number of values is that of the bytes
# behind its header, which go on with its text.
_LAYOUT = struct.Struct(f"<4sHHiiQ16sdH{MAX_METRICS}dIQQ{TEXT_BYTES}s")
assert _LAYOUT.size == HEADER_BYTES


@dataclass(frozen=True)
class Handout:
    """What everybody gets once, before the first round; it fixes what may travel afterwards.

    Attributes:
        meta: anything that JSON can say.
        tensors: the auxiliary model and the first prompts.
        contract: names and shapes of all later messages.
    """

    meta: dict[str, Any]
    tensors: NamedTensors
    contract: Contract


@dataclass(frozen=True)
class RoundBroadcast:
    """The broadcast of one round: the prompts that clients start from, or the word to stop (without
    tensors).
    """

    round: int
    stop: bool = False
    tensors: NamedTensors | None = None


class CallStats(NamedTuple):
    """What a client asked the server in a round: how often, and bytes up and down, headers among
    them.
    """

    questions: int = 0
    up: int = 0
    down: int = 0

    def one_more(self, asked: int, answered: int) -> CallStats:
        """With another question of so many values, and its answer's."""
        return CallStats(
            self.questions + 1,
            self.up + HEADER_BYTES + 4 * asked,
            self.down + HEADER_BYTES + 4 * answered,
        )


NO_CALLS = CallStats()


class Report(NamedTuple):
    """What an accepted update says besides its tensors."""

    client: int
    weight: float
    metrics: dict[str, float]


class Kind(IntEnum):
    """What follows a header: fp32 values (BROADCAST, UPDATE, QUESTION, ANSWER), JSON bytes (JSON),
    or nothing.
    """

    BROADCAST = 1
    STOP = 2
    UPDATE = 3
    FAILURE = 4
    JSON = 5
    QUESTION = 6
    ANSWER = 7


@dataclass(frozen=True)
class Header:
    """The fixed 256 bytes in front of a message."""

    kind: Kind
    round: int = -1
    client: int = -1
    num_values: int = 0
    digest: bytes = bytes(16)
    weight: float = 0.0
    metrics: Mapping[str, float] = field(default_factory=dict)
    text: str = ""
    asked: CallStats = NO_CALLS

    def pack(self, names: Sequence[str] = ()) -> bytes:
        """The 256 bytes; `names` gives the places of the metrics."""
        values = [self.metrics.get(name, 0.0) for name in names] + [0.0] * (
            MAX_METRICS - len(names)
        )
        mask = sum(1 << i for i, name in enumerate(names) if name in self.metrics)
        text = _cut(self.text.encode(), TEXT_BYTES)
        fixed = (
            MAGIC,
            LAYOUT_VERSION,
            self.kind,
            self.round,
            self.client,
            self.num_values,
            self.digest,
            self.weight,
        )
        return _LAYOUT.pack(*fixed, mask, *values, *self.asked, text)

    @classmethod
    def unpack(cls, raw: bytes, whose: str, names: Sequence[str] = ()) -> Header:
        """Read 256 bytes.

        Raises ValueError, naming `whose`, if they are not a header of this layout.
        """
        magic, version, kind, round, client, num_values, digest, weight, mask, *rest = (
            _LAYOUT.unpack(raw)
        )
        if (magic, version) != (MAGIC, LAYOUT_VERSION) or kind not in list(Kind):
            raise ValueError(
                f"{whose}: found a message of {magic!r}, layout {version}, kind {kind}; "
                f"expected {MAGIC!r}, layout "
                f"{LAYOUT_VERSION}; start all ranks with one version of fedsp_mpi"
            )
        metrics = {name: rest[i] for i, name in enumerate(names) if mask >> i & 1}
        text, asked = (
            rest[-1].rstrip(b"\0").decode(errors="replace"),
            CallStats(*rest[MAX_METRICS:-1]),
        )
        return cls(Kind(kind), round, client, num_values, digest, weight, metrics, text, asked)

    @classmethod
    def of(cls, item: Update | Failure, round: int, asked: CallStats = NO_CALLS) -> Header:
        """The header of one client's answer, with what it asked before."""
        if isinstance(item, Failure):
            text = f"{item.phase}\n{item.reason}"
            return cls(
                Kind.FAILURE, round, item.client, len(_behind_header(text)), text=text, asked=asked
            )
        schema, about = item.tensors.schema, (float(item.weight), item.metrics)
        return cls(
            Kind.UPDATE, round, item.client, schema.num_values, schema.digest, *about, asked=asked
        )

    def require(self, kind: Kind, whose: str) -> Header:
        """Itself; ValueError if it is of another kind, that is, two ranks are at different places
        of the protocol.
        """
        if self.kind is not kind:
            raise ValueError(
                f"{whose}: found a message of kind {self.kind.name}, expected {kind.name}"
            )
        return self

    def failure(self) -> Failure:
        """The failure that this header carries."""
        phase, _, reason = (printable(part) for part in self.text.partition("\n"))
        return Failure(self.client, self.round, phase, reason)


def pack_answers(headers: Iterable[Header], names: Sequence[str]) -> bytes:
    """Return the letter of one rank's clients: their headers, and behind that of a failure the rest
    of its text.
    """
    parts = []
    for header in headers:
        parts += [
            header.pack(names),
            _behind_header(header.text) if header.kind is Kind.FAILURE else b"",
        ]
    return b"".join(parts)


def unpack_answers(letter: bytes, whose: str, names: Sequence[str]) -> list[Header]:
    """Read what `pack_answers` made.

    Raises ValueError, naming `whose`, if headers or texts are not whole.
    """
    headers, at = [], 0
    while at < len(letter):
        raw = letter[at : at + HEADER_BYTES]
        if len(raw) < HEADER_BYTES:
            raise ValueError(
                f"{whose}: found {len(raw)} bytes at a letter's end, expected headers of "
                f"{HEADER_BYTES}"
            )
        header, at = Header.unpack(raw, whose, names), at + HEADER_BYTES
        if header.kind is Kind.FAILURE and header.num_values:
            rest = letter[at : at + header.num_values]
            if len(rest) < header.num_values or len(rest) > REASON_BYTES:
                raise ValueError(
                    f"{whose}: found a failure with {header.num_values} bytes of text behind its "
                    "header, expected at "
                    f"most {REASON_BYTES}, all in the letter"
                )
            header, at = (
                replace(header, text=header.text + rest.decode(errors="replace")),
                at + len(rest),
            )
        headers.append(header)
    return headers


def _behind_header(text: str) -> bytes:
    """What of a failure's text the header has no room for."""
    raw = text.encode()
    return _cut(raw[len(_cut(raw, TEXT_BYTES)) :], REASON_BYTES)


def _cut(text: bytes, most: int) -> bytes:
    """At most so many bytes of UTF-8, never half a character."""
    return text[:most].decode(errors="ignore").encode()


def checked(item: Update | Failure, contract: Contract, round: int) -> Update | Failure:
    """What a client may send: `item`, or a Failure in its place if its weight or a value cannot be
    averaged.

    Raises:
        ValueError: tensors, metrics or weight are not what the contract says; names the first
        tensor that differs.
        SealedTensorError: the tensors are memory of the global model.
    """
    whose = f"update of client {item.client}"
    if isinstance(item, Failure):
        assert item.round == round, f"failure of round {item.round} in round {round}"
        return item
    item.tensors.schema.require(contract.up, whose)
    seal.check_array(item.tensors.flat)
    if unknown := set(item.metrics) - set(contract.metrics):
        raise ValueError(
            f"{whose}: found metrics {sorted(unknown)}, expected some of {list(contract.metrics)}"
        )
    if item.weight < 0:
        raise ValueError(
            f"{whose}: found weight {item.weight}, expected a number that is not negative"
        )
    if not math.isfinite(item.weight):
        return Failure(item.client, round, "check", f"weight is {item.weight}")
    if reason := impossible_values(item.tensors.flat):
        name = next(
            name for name, view in item.tensors.items() if impossible_values(view.reshape(-1))
        )
        return Failure(item.client, round, "check", f"tensor {name!r} {reason}")
    return item


def impossible_values(values: np.ndarray) -> str | None:
    """Say why fp32 values [any number] cannot be averaged; None if they can."""
    if not values.size:
        return None
    low, high = float(values.min()), float(values.max())  # nan if one of them is nan
    if not (math.isfinite(low) and math.isfinite(high)):
        return "is not finite"
    largest = max(-low, high)
    return (
        f"has a value of {largest:.3g}, expected at most {MAX_ABS:g}" if largest > MAX_ABS else None
    )


def down_header(down: RoundBroadcast, contract: Contract) -> Header:
    """The header of a broadcast.

    Raises:
        ValueError: the tensors are not those of the contract.
        SealedTensorError: the tensors are memory of the global model.
    """
    if down.stop:
        return Header(Kind.STOP, down.round)
    assert down.tensors is not None, "a broadcast has tensors unless it says stop"
    down.tensors.schema.require(contract.down, f"broadcast of round {down.round}")
    seal.check_array(down.tensors.flat)
    return Header(
        Kind.BROADCAST, down.round, num_values=contract.down.num_values, digest=contract.down.digest
    )


def require_handout(handout: Handout) -> None:
    """Raise ValueError if a header has no room for the contract's metrics, SealedTensorError for
    the global model.
    """
    if len(handout.contract.metrics) > MAX_METRICS:
        raise ValueError(
            f"found {len(handout.contract.metrics)} metrics, expected at most {MAX_METRICS}"
        )
    seal.check_array(handout.tensors.flat)


def reports_of(headers: Iterable[Header], failed: Container[int] = ()) -> list[Report]:
    """The accepted updates in the order of client ids, without those of `failed` clients."""
    updates = [
        header for header in headers if header.kind is Kind.UPDATE and header.client not in failed
    ]
    updates.sort(key=lambda header: header.client)
    return [Report(header.client, header.weight, dict(header.metrics)) for header in updates]


def slices(num_values: int, chunk: int) -> Iterator[slice]:
    """Cut a vector into pieces of `chunk` values; the last may be shorter."""
    for start in range(0, num_values, chunk):
        yield slice(start, min(start + chunk, num_values))


def to_json(content: Any) -> bytes:
    """UTF-8 bytes of anything that JSON can say; `json.loads` gives back paths that are not UTF-8
    too.
    """
    text = json.dumps(content, ensure_ascii=False, separators=(",", ":"))
    return text.encode("utf-8", "surrogatepass")


def handout_content(handout: Handout, chunk: int) -> dict[str, Any]:
    """What clients must know before the tensors of the hand-out can flow; `chunk`: values in a
    piece.
    """
    contract = handout.contract
    schemas = {"tensors": handout.tensors.schema, "down": contract.down, "up": contract.up}
    content = {
        name: [[spec.name, spec.shape] for spec in schema] for name, schema in schemas.items()
    }
    rest = {"metrics": contract.metrics, "servers": contract.servers, "finite": contract.finite}
    return {**content, **rest, "meta": handout.meta, "chunk": chunk}


def handout_from(content: dict[str, Any]) -> tuple[Handout, int]:
    """The receiving side of `handout_content`: room for the tensors, which are still to come, and
    the `chunk`.
    """
    tensors, down, up = (Schema.of(content[name]) for name in ("tensors", "down", "up"))
    room = NamedTensors(tensors, np.empty(tensors.num_values, dtype=np.float32))
    contract = Contract(
        down, up, tuple(content["metrics"]), content["servers"], tuple(content["finite"])
    )
    return Handout(content["meta"], room, contract), int(content["chunk"])

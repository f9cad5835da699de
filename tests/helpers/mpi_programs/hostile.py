"""A toy federation in which rank 2 breaks the protocol, each round in another way.

Usage: hostile.py OUT WAY...: rank 1 hosts clients 0 and 1, rank 2 hosts 2 and 3 and does the WAY of
the round; the server writes as JSON whom it accepted, and why not the others. If the first WAY
begins with int8, all rounds are compressed; if it begins with sealed, all that goes up is sealed.
"""

from __future__ import annotations

import json
import math
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from fedsp_mpi.comm import Deadlines, Handout, RoundBroadcast, Wire, connect, guard
from fedsp_mpi.comm.compression import encode
from fedsp_mpi.comm.envelope import ENVELOPE_BYTES, SEAL_BYTES
from fedsp_mpi.comm.exchange import Exchange
from fedsp_mpi.comm.inspection import Expected
from fedsp_mpi.comm.keys import Seals
from fedsp_mpi.comm.messages import HEADER_BYTES, CallStats, Header, Kind, pack_results
from fedsp_mpi.comm.sealing import KeyPair
from fedsp_mpi.comm.wire import _JSON_TAGS
from fedsp_mpi.config import CompressionConfig
from fedsp_mpi.tensors import Contract, Failure, NamedTensors, Schema, Update

SCHEMA = Schema.of([("prefix", [10, 2])])
CONTRACT = Contract(SCHEMA, SCHEMA, ("loss", "fitness"), finite=("fitness",))
CHUNK = 4 * 12  # bytes: two chunks of an update
EXPECTED = Expected({0: 1, 1: 1, 2: 2, 3: 2}, dict.fromkeys(range(4), 16.0))
INT8 = CompressionConfig("int8", block=8)
# What rank 2 writes over the bytes of client 2, each a block's scale and codes.
BYTES = {
    "int8_nan": (0, b"\0\0\xc0\x7f"),
    "int8_infinite": (0, b"\0\0\x80\x7f"),
    "int8_negative": (0, b"\0\0\x80\xbf"),
    "int8_huge": (0, b"\xff\xff\x7f\x7f"),
    "int8_code": (5, b"\x80"),
    "int8_late_nan": (12, b"\0\0\xc0\x7f"),
}
VALUES = {"nan": math.nan, "infinite": math.inf, "huge": 1e30}
WEIGHTS = {"heavy": 1e6, "astronomic": 1e30, "negative": -1.0, "weight_nan": math.nan}
METRICS: dict[str, dict[str, float]] = {
    "metric_nan": {"fitness": math.nan},
    "metric_missing": {"loss": 1.0},
}


def update(client: int, weight: float = 8.0) -> Update:
    flat = np.full(SCHEMA.num_values, 1.0 + client, dtype=np.float32)
    packed = encode(flat, INT8)
    metrics = {"loss": 1.0, "fitness": 2.0}
    return Update(client, weight, NamedTensors(SCHEMA, flat), metrics, packed)


def headers(way: str, round: int) -> list[Header]:
    """Return the headers that rank 2 sends."""
    first, second = (Header.of(update(client), round) for client in (2, 3))
    numbers = {"weight": WEIGHTS.get(way, 8.0), "metrics": METRICS.get(way, first.metrics)}
    first = Header(first.kind, round, 2, first.num_values, first.digest, **numbers)
    if way == "foreign":
        return [Header.of(update(0), round), second]
    if way == "duplicate":
        return [first, first]
    if way == "wrong_round":
        return [Header.of(update(2), round + 1), second]
    if way == "crafted":
        return [Header(Kind.UPDATE, round, 2, 2**63, first.digest, 1.0, first.metrics), second]
    if way == "asks":
        return [Header.of(update(2), round, CallStats(2**32 - 1, 2**63, 2**63)), second]
    if way == "failure":
        return [Header.of(Failure(2, round, "local\x1b[2J", "gone\x07"), round), second]
    return [] if way == "silent" else [first, second]


def packed_headers(way: str, round: int) -> bytes:
    packed = b"".join(header.pack(CONTRACT.metrics) for header in headers(way, round))
    if way == "torn":
        return packed[:-7]
    if way == "noise":
        return np.random.default_rng(0).bytes(2 * HEADER_BYTES)
    return bytes(1 << 20) if way == "long_message" else packed


def send(wire: Wire, way: str, round: int) -> None:
    """Send what `Wire.gather` sends, except for the way in which it lies."""
    if way == "mute":
        guard.phase("mute").__enter__()
        wire._wait(lambda: False, "handout")
    wire._send_message(packed_headers(way, round), 1, "gather")
    rows = np.array([update(client).tensors.flat for client in (2, 3)])
    rows[0, 15 if way == "late_nan" else 3] = VALUES.get(
        way, math.nan if way == "late_nan" else 3.0
    )
    if way == "failure":
        rows = rows[1:]
    if way.startswith("int8"):
        send_packed(wire, way)
        return
    for part in (slice(0, 12), slice(12, 20)) if way not in ("silent", "no_chunks") else ():
        values = np.ascontiguousarray(rows[:, part]).ravel()
        if way == "short":
            values = values[:-5]
        elif way == "long":
            values = np.append(values, values)
        request = wire._comm.Isend([values, wire._mpi.FLOAT], dest=0, tag=5)
        wire._wait(request.Test, "gather")


def send_sealed(wire: Wire, way: str, round: int, earlier: dict[str, np.ndarray]) -> None:
    """Send sealed results, which somebody changes on their way who has no key.

    Args:
        wire: of rank 2.
        way: of the round.
        round: number of the round.
        earlier: the first chunk of the round before, which is replaced by this one's.
    """
    seals = wire._seals
    assert seals is not None
    headers = [
        seals.seal_result(c, pack_results([Header.of(update(c), round)], CONTRACT.metrics), round)
        for c in (2, 3)
    ]
    message = bytearray(b"".join(headers))
    if way == "sealed_header_flip":
        message[ENVELOPE_BYTES + 30] ^= 1
    elif way == "sealed_header_replay":
        message[:] = headers[0] + headers[0]
    wire._send_message(bytes(message), 1, "gather")
    chunks = [sealed_chunk(seals, part, round) for part in (slice(0, 12), slice(12, 20))]
    first, last = chunks
    replayed = earlier.get("first")
    earlier["first"] = first.copy()
    if way == "sealed_flip":
        first[0, ENVELOPE_BYTES] ^= 1
    elif way == "sealed_tag_flip":
        first[0, -1] ^= 128
    elif way == "sealed_round_flip":
        first[0, 12] ^= 1
    elif way == "sealed_late_flip":
        last[0, ENVELOPE_BYTES] ^= 1
    elif way == "sealed_replay":
        assert replayed is not None
        first = replayed
    elif way == "sealed_swap":
        first = first[::-1].copy()
    elif way == "sealed_not":
        first[0] = 0
        first[0, : 4 * 12] = update(2).tensors.flat[:12].view(np.uint8)
    elif way == "sealed_short":
        first = first[:, :-1].copy()
    for chunk in (first, last):
        request = wire._comm.Isend([chunk, wire._mpi.BYTE], dest=0, tag=5)
        wire._wait(request.Test, "gather")


def sealed_chunk(seals: Seals, part: slice, round: int) -> np.ndarray:
    """Seal a part of the updates of clients 2 and 3; return uint8 [2, num_bytes + SEAL_BYTES]."""
    rows = np.empty((2, 4 * (part.stop - part.start) + SEAL_BYTES), dtype=np.uint8)
    for row, client in zip(rows, (2, 3)):
        seals.seal_values(client, row, update(client).tensors.flat[part], round=round)
    return rows


def introduce(wire: Wire, way: str) -> None:
    """Exchange the keys of the ranks; rank 2 may use another key than it sends."""
    if wire.topology.rank == 2:
        honest = KeyPair.agree
        wrong = {"sealed_wrong_key": "messages", "sealed_wrong_client_key": "results"}.get(way)

        def agree(pair: KeyPair, peer: bytes, purpose: str, *args: Any, **options: Any) -> Any:
            pair = KeyPair() if purpose == wrong else pair
            return honest(pair, peer, purpose, *args, **options)

        KeyPair.agree = agree  # type: ignore[method-assign]
    wire.exchange_keys()


def introduce_clients(wire: Wire, way: str) -> None:
    """Exchange the keys of the clients, of which somebody may change one on the way."""
    if wire.topology.rank == 2 and way in ("sealed_changed_key", "sealed_foreign_key"):
        honest = wire.collect

        def collect(info: Any, phase: Any = "start-up") -> Any:
            if "keys" in info and way == "sealed_changed_key":
                info["keys"]["3"] = info["keys"]["2"][::-1]
            elif "keys" in info:
                info["keys"]["0"] = info["keys"].pop("3")
            return honest(info, phase)

        wire.collect = collect  # type: ignore[method-assign]
    wire.exchange_client_keys([[], [0, 1], [2, 3]])


def send_packed(wire: Wire, way: str) -> None:
    """Send compressed chunks, one block each, in which client 2 lies."""
    rows = np.array([update(client).packed for client in (2, 3)])
    place, lie = BYTES.get(way, (0, b""))
    rows[0, place : place + len(lie)] = list(lie)
    for part in (slice(0, 12), slice(12, 24), slice(24, 32)):
        values = np.ascontiguousarray(rows[:, part]).ravel()
        if way == "int8_short":
            values = values[:-1]
        request = wire._comm.Isend([values, wire._mpi.BYTE], dest=0, tag=5)
        wire._wait(request.Test, "gather")


JSON: dict[str, bytes] = {
    "json_list": b"[1, 2]",
    "json_text": b'"states"',
    "json_deep": b"[" * 200_000 + b"]" * 200_000,
    "json_not_utf8": b'{"states": "\xff\xfe"}',
    "json_cut": b'{"states": {"2": [1',
    "json_large": b" " * (65 << 20),
}


def main(out: Path, ways: list[str]) -> None:
    wire = connect(chunk_bytes=CHUNK, deadlines=Deadlines(gather=3.0, finish=20.0))
    assert isinstance(wire, Wire)
    rank = wire.topology.rank
    first = NamedTensors(SCHEMA, np.zeros(SCHEMA.num_values, dtype=np.float32))
    wire.agree(None)
    is_sealed = ways[0].startswith("sealed")
    if is_sealed:
        introduce(wire, ways[0])
    contract = CONTRACT
    exchange = None
    if ways[0].startswith("int8"):
        contract = replace(CONTRACT, compression=INT8)
        exchange = Exchange(INT8, first.flat.copy())
    wire.handout(Handout({}, first, contract, exchange) if rank == 0 else None)
    if is_sealed:
        introduce_clients(wire, ways[0])
    earlier: dict[str, np.ndarray] = {}
    rounds: list[dict[str, Any]] = []
    for round, way in enumerate(ways, start=1):
        wire.broadcast(RoundBroadcast(round, tensors=first) if rank == 0 else None)
        if rank == 2 and is_sealed:
            send_sealed(wire, way, round, earlier)
        elif rank == 2:
            send(wire, way, round)
        else:
            updates = wire.gather(
                round, [update(0), update(1)] if rank == 1 else [], expected=EXPECTED
            )
        if rank == 0:
            merged = {part.start: rows.tolist() for part, rows in updates.columns()}
            reports = [report.client for report in updates.reports]
            reasons = {
                failure.client: f"{failure.phase}: {failure.reason}" for failure in updates.failures
            }
            rounds.append({"way": way, "accepted": reports, "failures": reasons, "rows": merged})
        if rank == 2 and way in JSON:
            body = JSON[way]
            header = Header(Kind.JSON, client=2, num_values=len(body))
            wire._send_message(header.pack() + body, _JSON_TAGS["checkpoint"], "gather")
        elif rank == 2 and way in ("sealed_json_flip", "sealed_json_replay"):
            assert wire._seals is not None
            body = b'{"states": {}}'
            header = Header(Kind.JSON, client=2, num_values=len(body))
            message = bytearray(wire._seals.seal_json(header.pack() + body))
            if way == "sealed_json_flip":
                message[-20] ^= 1
            wire._send_message(bytes(message), _JSON_TAGS["checkpoint"], "gather")
            if way == "sealed_json_replay":
                wire._send_message(bytes(message), _JSON_TAGS["end"], "gather")
        else:
            wire.collect({"states": {}}, "checkpoint")
        if way == "sealed_json_replay" and rank != 2:
            wire.collect({}, "end")
    wire.finish()
    if rank == 0:
        out.write_text(json.dumps(rounds))


with guard("hostile"):
    main(Path(sys.argv[1]), sys.argv[2:])

"""A few rounds of a toy federation; the server writes their outcome as JSON.

Usage: fold.py OUT --clients N --values N --chunk BYTES --rounds N [--fail] [--partial]
[--stop-early] [--compression FORMAT] [--nan] [--encryption] [--capture FILE] [--among-first N]
"""

from __future__ import annotations

import argparse
import hashlib
import json
import tracemalloc
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from fedsp_mpi.comm import Handout, RoundBroadcast, Wire, connect, guard, spread
from fedsp_mpi.comm.compression import encode_against
from fedsp_mpi.comm.exchange import Exchange
from fedsp_mpi.comm.updates import Updates
from fedsp_mpi.config import CompressionConfig
from fedsp_mpi.rng import generator
from fedsp_mpi.tensors import Contract, Failure, NamedTensors, Schema, Update


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    parser.add_argument("out", type=Path)
    parser.add_argument("--clients", type=int, default=5)
    parser.add_argument("--values", type=int, default=1000)
    parser.add_argument("--chunk", type=int, default=4 * 96)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument(
        "--fail", action="store_true", help="in round 1 some clients fail, in round 2 all of them"
    )
    parser.add_argument(
        "--partial", action="store_true", help="client 0 alone takes part in round 1"
    )
    parser.add_argument(
        "--stop-early",
        action="store_true",
        help="the server reads only the first columns of round 0",
    )
    parser.add_argument("--compression", default="none")
    parser.add_argument("--nan", action="store_true", help="in round 1 the server is not finite")
    parser.add_argument("--encryption", action="store_true")
    parser.add_argument(
        "--capture", type=Path, help="of all that rank 1 sends after the introduction"
    )
    parser.add_argument(
        "--among-first", type=int, help="rounds are between so many ranks, which all play clients"
    )
    return parser.parse_args()


class Tap:
    """A communicator that copies what this rank sends into a file."""

    def __init__(self, comm: Any, path: Path) -> None:
        self._comm = comm
        self._file = path.open("wb")

    def Isend(self, buffer: list[Any], **where: int) -> Any:
        self._file.write(bytes(buffer[0]))
        self._file.flush()
        return self._comm.Isend(buffer, **where)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._comm, name)


def contract(values: int, format: str) -> Contract:
    up = Schema.of([("prefix", [values // 2, 2]), ("input", [values % 2 + 3])])
    compression = CompressionConfig(format, block=64)
    return Contract(down=up, up=up, metrics=("loss", "seconds"), compression=compression)


def local(
    args: argparse.Namespace, round: int, client: int, down: NamedTensors
) -> Update | Failure:
    if args.fail and round == 1 and client == 1:
        return Failure(client, round, "local", "no memory: " + "ü" * 100)
    if args.fail and round == 2:
        return Failure(client, round, "local", "gone")
    noise = generator(7, "local", round, client).standard_normal(down.flat.size).astype(np.float32)
    tensors = NamedTensors(down.schema, down.flat + noise)
    if args.fail and round == 1 and client == 3:
        tensors["input"][1] = np.nan
    return Update(client, 1.5 + client % 3, tensors, {"loss": 1 / (client + 1)} if client else {})


def work(
    args: argparse.Namespace,
    round: int,
    clients: tuple[int, ...],
    down: NamedTensors,
    *,
    agreed: Contract,
    residuals: dict[int, np.ndarray],
) -> Iterator[Update | Failure]:
    for client in reversed(clients):  # not in the order of ids, which the server restores
        if args.partial and round == 1 and client != 0:
            continue
        result = local(args, round, client, down)
        is_update = isinstance(result, Update) and result.tensors.is_finite()
        if agreed.compression.is_on and is_update:
            residual = residuals.setdefault(client, np.zeros_like(down.flat))
            packed, _ = encode_against(
                result.tensors.flat, down.flat, residual, compression=agreed.compression
            )
            result = replace(result, packed=packed)
        yield result


def mean(updates: Updates, before: np.ndarray, early: bool) -> np.ndarray:
    """Return the weighted mean fp32 [num_values], summed in fp64 in the order of client ids."""
    merged = before.copy()
    total = sum(report.weight for report in updates.reports)
    for part, rows in updates.columns():
        if not updates.reports:
            continue
        accumulator = np.zeros(rows.shape[1])
        for report, row in zip(updates.reports, rows):
            accumulator += report.weight * row.astype(np.float64)
        merged[part] = accumulator / total
        if early:
            break
    return merged


def outcome(
    round: int, updates: Updates, merged: np.ndarray, peak: int, sizes: dict[str, Any]
) -> dict[str, Any]:
    return {
        "round": round,
        "digest": hashlib.sha256(merged.tobytes()).hexdigest(),
        "reports": [report._asdict() for report in updates.reports],
        "failures": [vars(failure) for failure in updates.failures],
        "round_bytes": sizes,
        "peak": peak,
    }


def main(args: argparse.Namespace) -> None:
    wire = connect(chunk_bytes=args.chunk)
    if args.encryption:
        wire.exchange_keys()
    if args.capture and wire.topology.rank == 1:
        assert isinstance(wire, Wire)
        wire._comm = Tap(wire._comm, args.capture)  # type: ignore[assignment]
    hosts = wire.collect({"rank": wire.topology.rank, "name": "Jürgen"})
    wire.agree(None)
    agreed = contract(args.values, args.compression)
    first = NamedTensors(agreed.down, np.zeros(agreed.down.num_values, dtype=np.float32))
    exchange = None
    if agreed.compression.is_on:
        exchange = Exchange(agreed.compression, first.flat.copy())
    meta = {"seed": 7, "é": [1.5]}
    handout = wire.handout(Handout(meta, first, agreed, exchange) if wire.is_server else None)
    assert handout.contract == agreed and handout.meta == meta
    ranks = max(1, wire.topology.size - 1)
    places = spread([1.0 + client % 4 for client in range(args.clients)], ranks)
    clients = places[max(0, wire.topology.rank - 1)] if wire.is_client else ()
    if args.encryption:
        wire.exchange_client_keys(places if wire.topology.solo else [(), *places])
    first_ranks = args.among_first
    if first_ranks:
        if wire.topology.rank >= first_ranks:
            wire.finish()
            return
        all_ranks, wire = wire, wire.among_first(first_ranks)
        wire.contract = agreed
        rank = wire.topology.rank
        assert (wire.topology.size, wire.is_server) == (first_ranks, rank == 0)
        clients = tuple(client for client in range(args.clients) if client % first_ranks == rank)
    prompt = handout.tensors.flat
    residuals: dict[int, np.ndarray] = {}
    rounds = []
    for round in range(args.rounds):
        values = np.full_like(prompt, np.nan) if args.nan and round == 1 else prompt
        down = wire.broadcast(
            RoundBroadcast(round, tensors=NamedTensors(agreed.down, values))
            if wire.is_server
            else None
        )
        assert down.tensors is not None and down.round == round
        results = work(args, round, clients, down.tensors, agreed=agreed, residuals=residuals)
        updates = wire.gather(round, list(results))
        if updates is not None:
            tracemalloc.start()
            prompt = mean(updates, prompt, args.stop_early and round == 0)
            peak = tracemalloc.get_traced_memory()[1]
            tracemalloc.stop()
            seen = outcome(round, updates, prompt, peak, wire.round_bytes())
            seen["started"] = hashlib.sha256(down.tensors.flat.tobytes()).hexdigest()
            rounds.append(seen)
    stop = wire.broadcast(RoundBroadcast(args.rounds, stop=True) if wire.is_server else None)
    assert stop.stop and stop.tensors is None and stop.round == args.rounds
    wire.finish()
    if first_ranks:
        all_ranks.finish()
    if wire.is_server:
        args.out.write_text(
            json.dumps({"hosts": hosts, "rounds": rounds, "manifest": wire.manifest})
        )


with guard("fold"):
    main(arguments())

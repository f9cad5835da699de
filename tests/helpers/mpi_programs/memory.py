"""Memory that aggregation needs on the server. Usage: memory.py CLIENTS VALUES CHUNK_BYTES

Rank 0 prints as JSON by how many bytes its peak resident memory grew in the gather and the
aggregation.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np

from fedsp_mpi.aggregation.fedavg import weighted_mean
from fedsp_mpi.comm import Handout, RoundBroadcast, Wire, connect
from fedsp_mpi.tensors import Contract, NamedTensors, Schema, Update


def peak() -> int:
    """Return the bytes of the peak resident memory since `reset_peak`."""
    status = Path("/proc/self/status").read_text()
    line = next(line for line in status.splitlines() if line.startswith("VmHWM"))
    return 1024 * int(line.split()[1])


def reset_peak() -> None:
    Path("/proc/self/clear_refs").write_text("5")


def main(clients: int, values: int, chunk: int) -> None:
    schema = Schema.of([("prompt", [values])])
    wire = connect(chunk_bytes=chunk)
    assert isinstance(wire, Wire)
    nothing = NamedTensors(Schema(), np.empty(0, dtype=np.float32))
    wire.handout(Handout({}, nothing, Contract(schema, schema)) if wire.is_server else None)
    prompt = NamedTensors(schema, np.zeros(values, dtype=np.float32))
    down = wire.broadcast(RoundBroadcast(1, tensors=prompt) if wire.is_server else None)
    results = []
    if not wire.is_server:
        for client in range(wire.topology.rank - 1, clients, wire.topology.size - 1):
            tensors = NamedTensors(schema, np.full(values, client, dtype=np.float32))
            results.append(Update(client, 1.0, tensors))
    if wire.is_server:
        reset_peak()
        before = peak()
    updates = wire.gather(down.round, results)
    if updates is not None:
        merged = weighted_mean(updates)
        assert (merged.flat == (clients - 1) / 2).all()
        print(json.dumps({"grown": peak() - before}), flush=True)
    wire.finish()


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))

"""What merging costs the server. Usage: memory.py CLIENTS VALUES CHUNK_BYTES

Rank 0 prints, as JSON, the bytes by which its resident memory grew in the gather and the merge, at
its highest.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np

from fedsp_mpi.aggregation.fedavg import weighted_mean
from fedsp_mpi.comm import Handout, RoundBroadcast, Wire, connect
from fedsp_mpi.tensors import Contract, NamedTensors, Schema, Update


def highest() -> int:
    """Bytes of the highest resident memory since `forget`."""
    status = Path("/proc/self/status").read_text()
    return 1024 * int(
        next(line for line in status.splitlines() if line.startswith("VmHWM")).split()[1]
    )


def forget() -> None:
    Path("/proc/self/clear_refs").write_text("5")


def main(clients: int, values: int, chunk: int) -> None:
    schema = Schema.of([("prompt", [values])])
    wire = connect(chunk_bytes=chunk)
    assert isinstance(wire, Wire)
    nothing = NamedTensors(Schema(), np.empty(0, dtype=np.float32))
    wire.handout(Handout({}, nothing, Contract(schema, schema)) if wire.is_server else None)
    prompt = NamedTensors(schema, np.zeros(values, dtype=np.float32))
    down = wire.broadcast(RoundBroadcast(1, tensors=prompt) if wire.is_server else None)
    mine = [] if wire.is_server else range(wire.topology.rank - 1, clients, wire.topology.size - 1)
    updates = [
        Update(id, 1.0, NamedTensors(schema, np.full(values, id, dtype=np.float32))) for id in mine
    ]
    if wire.is_server:
        forget()
        before = highest()
    got = wire.gather(down.round, updates)
    if got is not None:
        merged = weighted_mean(got)
        assert (merged.flat == (clients - 1) / 2).all()
        print(json.dumps({"grown": highest() - before}), flush=True)
    wire.finish()


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))

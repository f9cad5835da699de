"""Messages that must not travel. Usage: refuse.py CASE

CASE: up, unseen, twice, metric, down, sealed, verdict.
"""

from __future__ import annotations

import sys

import numpy as np

from fedsp_mpi.comm import Handout, Refused, RoundBroadcast, Solo, Wire, connect, guard
from fedsp_mpi.tensors import Contract, NamedTensors, Schema, Update, seal

GOOD = Schema.of([("prefix", [4, 2]), ("input", [3])])
OTHER = Schema.of([("prefix", [4, 2]), ("wte.weight", [3])])


def zeros(schema: Schema) -> NamedTensors:
    return NamedTensors(schema, np.zeros(schema.num_values, dtype=np.float32))


def answer(wire: Wire | Solo, case: str) -> list[Update]:
    if not wire.is_client:
        return []
    schema = OTHER if case in ("up", "unseen") else GOOD
    if case == "unseen":  # a client that believes in another contract: its own check passes
        wire.contract = Contract(GOOD, OTHER)
    client = 0 if case == "twice" else max(0, wire.topology.rank - 1)
    return [Update(client, 1.0, zeros(schema), {"secret": 1.0} if case == "metric" else {})]


def down(case: str) -> RoundBroadcast:
    if case == "down":
        return RoundBroadcast(0, tensors=zeros(OTHER))
    if case == "sealed":
        import torch

        model = torch.zeros(11)
        message = NamedTensors(GOOD, model.numpy())  # before it is protected: the wire checks again
        seal.add([("transformer.wte", model)])
        return RoundBroadcast(0, tensors=message)
    return RoundBroadcast(0, tensors=zeros(GOOD))


def main(case: str) -> None:
    wire = connect()
    wire.agree(
        Refused("there is no such data set") if case == "verdict" and wire.is_server else None
    )
    wire.handout(Handout({}, zeros(GOOD), Contract(GOOD, GOOD)) if wire.is_server else None)
    wire.broadcast(down(case) if wire.is_server else None)
    updates = wire.gather(0, answer(wire, case))
    if updates is not None:
        updates.drain()
    wire.finish()


if __name__ == "__main__":
    from fedsp_mpi.comm import launcher_rank

    try:
        with guard("refuse"):
            main(sys.argv[1])
    except Refused as refused:
        if not launcher_rank():
            print(refused, file=sys.stderr)
        sys.exit(2)

"""A small federation in which something goes wrong.

Usage: crash.py WHO WHERE HOW [FOLDER]
WHO: server, one (client rank 1), clients, all. WHERE: import, handout, local, merge, broadcast.
HOW: raise, thread, exit (status 3), exit0, interrupt, term, kill, stop (SIGSTOP), late (past the
others' deadline). While something goes wrong in local work, rank 2 computes in one long call of C.
"""

from __future__ import annotations

import hashlib
import os
import signal
import sys
import threading
import time

from fedsp_mpi.comm import guard, launcher_rank


def go_wrong(how: str) -> None:
    if how == "raise":
        raise RuntimeError("deliberate")
    if how == "thread":
        threading.Thread(target=go_wrong, args=("raise",), name="helper").start()
        time.sleep(60)
    if how in ("exit", "exit0"):
        sys.exit(3 if how == "exit" else 0)
    # A shell starts background processes so that they ignore SIGINT.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    numbers = {
        "interrupt": signal.SIGINT,
        "term": signal.SIGTERM,
        "stop": signal.SIGSTOP,
        "kill": signal.SIGKILL,
    }
    if how in numbers:
        os.kill(os.getpid(), numbers[how])
    time.sleep(60)


def main(who: str, where: str, how: str, *, folder: str | None) -> None:
    rank = launcher_rank() or 0
    is_concerned = {"server": rank == 0, "one": rank == 1, "clients": rank > 0, "all": True}[who]

    def reach(place: str) -> None:
        if place == where and is_concerned:
            go_wrong(how)

    reach("import")
    import numpy as np

    from fedsp_mpi.comm import Deadlines, Handout, RoundBroadcast, connect
    from fedsp_mpi.tensors import Contract, NamedTensors, Schema, Update

    wire = connect(
        deadlines=Deadlines(
            gather=1.5 if how == "stop" else None, broadcast=1.5 if how == "late" else None
        )
    )
    if folder and wire.is_server:
        guard.report_into(folder)
    wire.agree(None)
    if folder and not wire.is_server:
        guard.report_into(folder)
    reach("handout")
    schema = Schema.of([("prompt", [300_000])])
    tensors = NamedTensors(schema, np.zeros(300_000, dtype=np.float32))
    wire.handout(Handout({}, tensors, Contract(schema, schema)) if wire.is_server else None)
    for round in range(2):
        with guard.phase("round", round=round):
            if round > 0:
                reach("broadcast")
            wire.broadcast(RoundBroadcast(round, tensors=tensors) if wire.is_server else None)
            if wire.is_server:
                updates = wire.gather(round, ())
                assert updates is not None
                with guard.phase("merge"):
                    reach("merge")
                    updates.drain()
                continue
            with guard.phase("local training", client=rank - 1):
                reach("local")
                if where == "local" and rank == 2 and how != "stop":
                    hashlib.pbkdf2_hmac("sha256", b"a", b"b", 40_000_000)
            wire.gather(round, [Update(rank - 1, 1.0, tensors)])
    wire.finish()


with guard("crash"):
    main(*sys.argv[1:4], folder=sys.argv[4] if len(sys.argv) > 4 else None)

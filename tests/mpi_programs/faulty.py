"""The command line with one fault put in: python faulty.py WHERE ARGUMENTS...

WHERE is one of
    raise:PHASE:RANK[:ROUND]    raise where that phase begins on that rank kill:PHASE:RANK[:ROUND]
    SIGKILL every rank there die:PHASE:RANK[:ROUND]      SIGKILL that rank there
    stop:PHASE:RANK[:ROUND]     SIGSTOP that rank there hang:PHASE:RANK[:ROUND]     that rank waits
    for ever there, in a system call signal:PHASE:RANK[:ROUND]   SIGUSR1 to that rank there
    tear:FILE:COUNT             SIGKILL every rank in the middle of the COUNT-th write to a name
    with FILE in it full:FILE:COUNT             no space is left from the COUNT-th such write on
    nan:CLIENT[:ROUND]          the losses of one client are not a number memory:CLIENT[:ROUND]
    one client runs out of memory text:CLIENT                 one client's text cannot be used
    slow:CLIENT:SECONDS         each step of one client takes so long lie:WHAT:CLIENT
    what one client sends, past its rank's own checks: "values" that are no numbers, the
                                "weight" of a million, or nothing at all ("silent")
"""

import errno
import os
import signal
import sys
import time
from contextlib import contextmanager

from fedsp_mpi import cli
from fedsp_mpi.comm import guard, launcher_rank


def kill_all() -> None:
    """SIGKILL to every rank, this one last."""
    for _, pid in sorted(guard._peers, key=lambda peer: peer[1] == os.getpid()):
        os.kill(pid, signal.SIGKILL)
    os.kill(os.getpid(), signal.SIGKILL)


def fault() -> None:
    raise RuntimeError("the fault that was put in")


def in_phase(action, phase: str, rank: str, round: str | None = None) -> None:
    """Do something when the guard is told that `phase` begins."""
    original = guard.phase

    @contextmanager
    def faulty(name, **where):
        with original(name, **where):
            here = where.get("round", guard.scene().round)
            if (
                name == phase
                and (launcher_rank() or 0) == int(rank)
                and (round is None or here == int(round))
            ):
                action()
            yield

    guard.phase = faulty


def tear(part: str, count: str) -> None:
    """Kill the job when half of a file is written."""
    from fedsp_mpi.record import atomic

    write, seen = atomic.write, []

    def torn(path, image, *more, **named):
        seen.extend([path] if part in path.name else [])
        if part in path.name and len(seen) == int(count):
            whole = b"".join(image)
            atomic.part_of(path).write_bytes(whole[: len(whole) // 2])
            kill_all()
        write(path, image, *more, **named)

    atomic.write = torn


def full(part: str, count: str) -> None:
    """Let the disk be full."""

    from fedsp_mpi.record import atomic

    original, seen = atomic._open, []

    def opened(path, flags, bypass):
        if flags & os.O_CREAT and part in path.name:
            seen.append(path)
            if len(seen) >= int(count):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return original(path, flags, bypass)

    atomic._open = opened


def memory_in(client: str, round: str | None = None) -> None:
    """Let one client ask for more memory than there is."""
    import torch

    from fedsp_mpi.algorithms.fedsp import Client

    original = Client._begin_round

    def greedy(self, bench, id, number, *more):
        if id == int(client) and (round is None or number == int(round)):
            torch.empty(1 << 60)
        return original(self, bench, id, number, *more)

    Client._begin_round = greedy


def text_of(client: str) -> None:
    """Let one client's text be unusable."""
    from fedsp_mpi.run.inputs import ExperimentInputs

    original = ExperimentInputs.shard

    def broken(self, owner):
        if owner == int(client) + 1:
            raise ValueError("found no text")
        return original(self, owner)

    ExperimentInputs.shard = broken


def slow(client: str, seconds: str) -> None:
    """Let one client's steps take their time."""
    from fedsp_mpi.algorithms import fedsp

    local, loss, at_work = fedsp.Client.local_update, fedsp.answer_loss_of, []

    def noted(self, id, *more):
        at_work[:] = [id]
        return local(self, id, *more)

    def delayed(*some):
        time.sleep(float(seconds) if at_work == [int(client)] else 0)
        return loss(*some)

    fedsp.Client.local_update, fedsp.answer_loss_of = noted, delayed


def nan_in(client: str, round: str | None = None) -> None:
    """Let the learning of one client go to infinity."""
    from fedsp_mpi.algorithms import fedsp
    from fedsp_mpi.algorithms.fedsp import Client

    original, loss = Client.local_update, fedsp.answer_loss_of

    def faulty(self, id, number, down):
        hit = id == int(client) and (round is None or number == int(round))
        spoilt = lambda *some: loss(*some) * float("nan")  # noqa: E731
        fedsp.answer_loss_of = spoilt if hit else loss
        return original(self, id, number, down)

    Client.local_update = faulty


def lie(what: str, client: str) -> None:
    """Let one client's rank send what its own checks would not let through."""
    from dataclasses import replace

    from fedsp_mpi.comm.wire import Wire
    from fedsp_mpi.tensors import Update

    original = Wire._give

    def lying(self, round, mine, contract, asked):
        for place, item in enumerate(mine):
            if item.client == int(client) and isinstance(item, Update) and what == "values":
                item.tensors.flat[1] = float("nan")
            elif item.client == int(client) and isinstance(item, Update) and what == "weight":
                mine[place] = replace(item, weight=1e6)
        kept = [item for item in mine if item.client != int(client) or what != "silent"]
        original(self, round, kept, contract, asked)

    Wire._give = lying


if __name__ == "__main__":
    kind, *details = sys.argv[1].split(":")
    in_phases = {
        "raise": fault,
        "kill": kill_all,
        "die": lambda: os.kill(os.getpid(), signal.SIGKILL),
        "hang": lambda: os.read(os.pipe()[0], 1),
        "stop": lambda: os.kill(os.getpid(), signal.SIGSTOP),
        "signal": lambda: os.kill(os.getpid(), signal.SIGUSR1),
    }
    others = {
        "nan": nan_in,
        "tear": tear,
        "full": full,
        "memory": memory_in,
        "text": text_of,
        "slow": slow,
        "lie": lie,
    }
    if kind in in_phases:
        in_phase(in_phases[kind], *details)
    else:
        others[kind](*details)
    sys.exit(cli.main(sys.argv[2:]))

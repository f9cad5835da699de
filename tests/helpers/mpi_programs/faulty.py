"""The command line with faults injected: python faulty.py FAULT[+FAULT...] ARGUMENTS...

FAULT is one of
    raise:PHASE:RANK[:ROUND]    raise where that phase begins on that rank
    kill:PHASE:RANK[:ROUND]     SIGKILL every rank there
    die:PHASE:RANK[:ROUND]      SIGKILL that rank there
    stop:PHASE:RANK[:ROUND]     SIGSTOP that rank there
    hang:PHASE:RANK[:ROUND]     that rank waits for ever there, in a system call
    signal:PHASE:RANK[:ROUND]   SIGUSR1 to that rank there
    tear:FILE:COUNT             SIGKILL every rank in the middle of the COUNT-th write to a name
                                with FILE in it
    full:FILE:COUNT             no space is left from the COUNT-th such write on
    nan:CLIENT[:ROUND]          the losses of one client are not a number
    memory:CLIENT[:ROUND]       one client runs out of memory
    text:CLIENT                 one client's text cannot be used
    labels:CLIENT:ROUND         SIGKILL every rank when one client has scored what it labels
    slow:CLIENT:SECONDS         each step of one client takes so long
    lie:WHAT:CLIENT             what one client sends, past its rank's own checks: "values" that are
                                not numbers, the "weight" of a million, or nothing at all ("silent")

If the command line ends by itself and PHASE was never entered there, or RANK is none, the rank says
so and the exit status is 70: no test passes because its fault was misspelt.
"""

import errno
import os
import signal
import sys
import time
from contextlib import contextmanager

from fedsp_mpi import cli
from fedsp_mpi.comm import guard, launcher_rank, launcher_size, leave

NEVER_ENTERED = 70  # exit status
absent: str | None = None  # the place of the fault on this rank, until it is entered


def kill_all() -> None:
    """Send SIGKILL to every rank, this one last."""
    for _, pid in sorted(guard._peers, key=lambda peer: peer[1] == os.getpid()):
        os.kill(pid, signal.SIGKILL)
    os.kill(os.getpid(), signal.SIGKILL)


def fault() -> None:
    raise RuntimeError("the fault that was put in")


def in_phase(action, phase: str, rank: str, round: str | None = None) -> None:
    """Run `action` when the guard enters `phase`."""
    global absent
    original = guard.phase
    own_rank = launcher_rank() or 0
    if own_rank == int(rank):
        absent = f"phase {phase!r}" + (f" of round {round}" if round else "")
    elif own_rank == 0 and int(rank) >= (launcher_size() or 1):
        absent = f"rank {rank}"

    @contextmanager
    def faulty(name, **where):
        global absent
        with original(name, **where):
            current_round = where.get("round", guard.phase_info().round)
            is_place = name == phase and own_rank == int(rank)
            if is_place and (round is None or current_round == int(round)):
                absent = None
                action()
            yield

    guard.phase = faulty


def tear(part: str, count: str) -> None:
    """Kill the job when half of a file is written."""
    from fedsp_mpi.record import atomic

    write = atomic.write
    num_writes = 0

    def torn(path, image, *more, **named):
        nonlocal num_writes
        if part in path.name:
            num_writes += 1
            if num_writes == int(count):
                content = b"".join(image)
                atomic.part_of(path).write_bytes(content[: len(content) // 2])
                kill_all()
        write(path, image, *more, **named)

    atomic.write = torn


def full(part: str, count: str) -> None:
    """Let the disk be full."""
    from fedsp_mpi.record import atomic

    original = atomic._open
    num_writes = 0

    def opened(path, flags, bypass):
        nonlocal num_writes
        if flags & os.O_CREAT and part in path.name:
            num_writes += 1
            if num_writes >= int(count):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return original(path, flags, bypass)

    atomic._open = opened


def memory_in(client: str, round: str | None = None) -> None:
    """Let one client ask for more memory than there is."""
    import torch

    from fedsp_mpi.algorithms.fedsp import Client

    original = Client._begin_round

    def greedy(self, state, id, number, *, broadcast):
        if id == int(client) and (round is None or number == int(round)):
            torch.empty(1 << 60)
        return original(self, state, id, number, broadcast=broadcast)

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


def labels_of(client: str, round: str) -> None:
    """Kill the job in the middle of one client's labelling."""
    from fedsp_mpi.algorithms import augment

    global absent
    absent = f"labelling of client {client} in round {round}"
    label = augment.AugmentedClient._label
    choose = augment.pseudo_labels.choose
    is_place = False

    def noted(self, id, number, text):
        nonlocal is_place
        is_place = (id, number) == (int(client), int(round))
        return label(self, id, number, text)

    def chosen(*arguments, **named):
        if is_place:
            kill_all()
        return choose(*arguments, **named)

    augment.AugmentedClient._label = noted
    augment.pseudo_labels.choose = chosen


def slow(client: str, seconds: str) -> None:
    """Let one client's steps take their time."""
    from fedsp_mpi.algorithms import fedsp

    local_update = fedsp.Client.local_update
    loss = fedsp.answer_loss_of
    current_client = None

    def noted(self, id, *more):
        nonlocal current_client
        current_client = id
        return local_update(self, id, *more)

    def delayed(*arguments):
        if current_client == int(client):
            time.sleep(float(seconds))
        return loss(*arguments)

    fedsp.Client.local_update = noted
    fedsp.answer_loss_of = delayed


def nan_in(client: str, round: str | None = None) -> None:
    """Let the training of one client diverge."""
    from fedsp_mpi.algorithms import fedsp
    from fedsp_mpi.algorithms.fedsp import Client

    original = Client.local_update
    loss = fedsp.answer_loss_of

    def faulty(self, id, number, down):
        is_hit = id == int(client) and (round is None or number == int(round))
        fedsp.answer_loss_of = nan_loss if is_hit else loss
        return original(self, id, number, down)

    def nan_loss(*arguments):
        return loss(*arguments) * float("nan")

    Client.local_update = faulty


def lie(what: str, client: str) -> None:
    """Let one client's rank send what its own checks would not let through."""
    from dataclasses import replace

    from fedsp_mpi.comm.wire import Wire
    from fedsp_mpi.tensors import Update

    original = Wire._send_updates

    def lying(self, round, contract, results, *, calls):
        false_results = []
        for result in results:
            if result.client == int(client) and isinstance(result, Update):
                if what == "values":
                    result.tensors.flat[1] = float("nan")
                elif what == "weight":
                    result = replace(result, weight=1e6)
            if result.client != int(client) or what != "silent":
                false_results.append(result)
        original(self, round, contract, false_results, calls=calls)

    Wire._send_updates = lying


if __name__ == "__main__":
    in_phases = {
        "raise": fault,
        "kill": kill_all,
        "die": lambda: os.kill(os.getpid(), signal.SIGKILL),
        "hang": lambda: os.read(os.pipe()[0], 1),
        "stop": lambda: os.kill(os.getpid(), signal.SIGSTOP),
        "signal": lambda: os.kill(os.getpid(), signal.SIGUSR1),
    }
    elsewhere = {
        "nan": nan_in,
        "tear": tear,
        "full": full,
        "memory": memory_in,
        "text": text_of,
        "labels": labels_of,
        "slow": slow,
        "lie": lie,
    }
    for one in sys.argv[1].split("+"):
        kind, *details = one.split(":")
        if kind in in_phases:
            in_phase(in_phases[kind], *details)
        else:
            elsewhere[kind](*details)
    status = cli.main(sys.argv[2:])
    if absent:
        print(
            f"faulty.py: found no {absent} in {' '.join(sys.argv[2:4])}, expected the place of the "
            f"fault {sys.argv[1]!r}; correct its name",
            file=sys.stderr,
            flush=True,
        )
        status = NEVER_ENTERED
    leave(status)

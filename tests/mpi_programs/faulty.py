"""The command line with one fault put in: python faulty.py WHERE ARGUMENTS...

WHERE is `raise:PHASE:RANK[:ROUND]`, which raises where that phase begins on that rank, or `nan:CLIENT[:ROUND]`, which
makes the losses of one client not a number.
"""

import sys
from contextlib import contextmanager

from fedsp_mpi import cli
from fedsp_mpi.comm import guard, launcher_rank


def raise_in(phase: str, rank: str, round: str | None = None) -> None:
    """Raise when the guard is told that `phase` begins."""
    original = guard.phase

    @contextmanager
    def faulty(name, **where):
        with original(name, **where):
            here = where.get("round", guard.scene().round)
            if name == phase and (launcher_rank() or 0) == int(rank) and (round is None or here == int(round)):
                raise RuntimeError("the fault that was put in")
            yield

    guard.phase = faulty


def nan_in(client: str, round: str | None = None) -> None:
    """Let the learning of one client go to infinity."""
    from fedsp_mpi.algorithms.fedsp import Client
    from fedsp_mpi.models import losses

    original = Client.local

    def faulty(self, id, number, down):
        import fedsp_mpi.algorithms.fedsp as fedsp

        hit = id == int(client) and (round is None or number == int(round))
        fedsp.answer_loss = (lambda *some: losses.answer_loss(*some) * float("nan")) if hit else losses.answer_loss
        return original(self, id, number, down)

    Client.local = faulty


if __name__ == "__main__":
    kind, *details = sys.argv[1].split(":")
    {"raise": raise_in, "nan": nan_in}[kind](*details)
    sys.exit(cli.main(sys.argv[2:]))

"""Waiting without burning the core that somebody else computes on, and without waiting for ever.

MPI's blocking calls spin: a few waiting ranks make the server's training several times slower. And
MPI has no time-outs.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass

_SHORTEST, _LONGEST = 10e-6, 50e-3  # seconds of sleep between two looks
_SHARE = 1 / 20  # of the time waited so far: what a wait can take longer than it had to
_MOVING = 0.05  # seconds without completion after which payload no longer counts as moving


class DeadlineError(RuntimeError):
    """A phase took longer than its deadline.

    Names the phase and, where they are known, the ranks that are missing.
    """

    exit_status = 124

    def __init__(self, text: str, missing: Iterable[int] = ()) -> None:
        super().__init__(text)
        self.missing = tuple(missing)


@dataclass(frozen=True)
class Deadlines:
    """How long one wait may take, in seconds; None: for ever.

    Attributes:
        start_up: for all ranks to say who they are and to hear the server's verdict.
        handout: for the hand-out, whose preparation (distillation) a client waits for.
        broadcast: for the server: a client's wait from the end of its local work to the next round.
        gather: for the clients: the server's wait for local work, and for their checkpoints.
        finish: for everybody to be done.
        server: for the server's ranks, if there are several, to take part in what they share.
    """

    start_up: float | None = None
    handout: float | None = None
    broadcast: float | None = None
    gather: float | None = None
    finish: float | None = None
    server: float | None = None


def wait(
    done: Callable[[], bool],
    phase: str,
    deadline: float | None = None,
    *,
    moving: bool = False,
    missing: Callable[[], Iterable[int]] = tuple,
) -> None:
    """Return once `done()` is true. The one place where ranks wait.

    Args:
        done: looks once, and lets MPI make progress.
        phase: name for the error.
        deadline: seconds; None waits for ever.
        moving: payload is moving, so look again at once (after giving the core away) and begin to
            sleep only after 50 ms. Otherwise sleep for a twentieth of the time waited so far, from
            10 us up to 50 ms.
        missing: the ranks that are waited for, where known.

    Raises:
        DeadlineError: `deadline` seconds went by.
    """
    start = time.perf_counter()
    while not done():
        waited = time.perf_counter() - start
        if deadline is not None and waited > deadline:
            ranks = sorted(missing())
            raise DeadlineError(_late(phase, waited, deadline, ranks), ranks)
        if moving and waited < _MOVING:
            os.sched_yield()
        else:
            time.sleep(min(max(_SHORTEST, _SHARE * waited), _LONGEST))


def _late(phase: str, waited: float, deadline: float, ranks: list[int]) -> str:
    who = (
        f"nothing from rank {', '.join(map(str, ranks))}"
        if ranks
        else "that not everybody took part"
    )
    return (
        f"{phase.replace('_', '-')}: found {who} after {waited:.1f} s, expected an "
        f"answer within {deadline:g} s; "
        "look at what those ranks were doing, or raise the deadline of this phase"
    )

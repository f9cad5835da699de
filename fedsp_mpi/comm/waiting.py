"""Waiting for MPI without spinning, and with a deadline.

MPI's blocking calls spin: a few waiting ranks make the server's training several times slower. And
MPI has no timeouts.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass

_MIN_SLEEP = 10e-6  # seconds between two polls
_MAX_SLEEP = 50e-3
_SLEEP_SHARE = 1 / 20  # of the time waited so far: a wait ends at most 5 % late
_MOVING_SECONDS = 0.05  # without completion, after which payload no longer counts as moving


class DeadlineError(RuntimeError):
    """A phase took longer than its deadline.

    Attributes:
        missing: the ranks that were waited for, where they are known.
        exit_status: status of a job that ends with this error, as of `timeout`.
    """

    exit_status = 124

    def __init__(self, text: str, missing: Iterable[int] = ()) -> None:
        super().__init__(text)
        self.missing = tuple(missing)


@dataclass(frozen=True)
class Deadlines:
    """Longest time that one wait may take, in seconds; None waits for ever.

    Attributes:
        start_up: for all ranks to introduce themselves and to receive the server's verdict.
        handout: for the hand-out, whose preparation (distillation) clients wait for.
        broadcast: for the server: a client's wait from the end of its local work to the next round.
        gather: for the clients: the server's wait for local work, and for their checkpoints.
        finish: for all ranks to be done.
        server: for the server's ranks, if there are several, to join their collective work.
    """

    start_up: float | None = None
    handout: float | None = None
    broadcast: float | None = None
    gather: float | None = None
    finish: float | None = None
    server: float | None = None


def wait(
    is_done: Callable[[], bool],
    phase: str,
    deadline: float | None = None,
    *,
    moving: bool = False,
    missing: Callable[[], Collection[int]] = tuple,
) -> None:
    """Return once `is_done()` is true. This is the only place where ranks wait.

    Args:
        is_done: polls once, which also lets MPI make progress.
        phase: name for the error.
        deadline: seconds; None waits for ever.
        moving: payload is moving: poll again at once (after yielding the core), and begin to sleep
            only after 50 ms. Otherwise sleep for a twentieth of the time waited so far, from 10 us
            up to 50 ms.
        missing: returns the ranks that are waited for, where they are known.

    Raises:
        DeadlineError: `deadline` seconds passed.
    """
    start = time.perf_counter()
    while not is_done():
        waited = time.perf_counter() - start
        if deadline is not None and waited > deadline:
            ranks = sorted(missing())
            raise DeadlineError(_late_message(phase, waited, deadline, ranks=ranks), ranks)
        if moving and waited < _MOVING_SECONDS:
            os.sched_yield()
        else:
            time.sleep(min(max(_MIN_SLEEP, _SLEEP_SHARE * waited), _MAX_SLEEP))


def _late_message(phase: str, waited: float, deadline: float, *, ranks: list[int]) -> str:
    if ranks:
        what = f"nothing from rank {', '.join(map(str, ranks))}"
    else:
        what = "that not every rank took part"
    return (
        f"{phase.replace('_', '-')}: found {what} after {waited:.1f} s, expected an answer within "
        f"{deadline:g} s; see what those ranks were doing, or raise the deadline of this phase"
    )

"""Decisions of the server that all ranks hear at the same time."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from fedsp_mpi import comm

if TYPE_CHECKING:
    from fedsp_mpi.comm.solo import Solo
    from fedsp_mpi.comm.wire import Wire


@dataclass
class Agreement:
    """What the server tells all ranks.

    Attributes:
        note: anything that JSON can say; set by the server, known to all ranks after the `with`.
    """

    note: Any = None


@contextmanager
def agreed(wire: Wire | Solo, phase: str = "start_up") -> Iterator[Agreement]:
    """Have all ranks agree at the end of the `with` that the run goes on.

    Collective. A comm.Refused that the server raises inside is raised on every rank; other ranks
    raise none of their own.

    Args:
        wire: between all ranks.
        phase: names the deadline of the ranks that wait for the server.
    """
    agreement = Agreement()
    refusal = None
    try:
        yield agreement
    except comm.Refused as error:
        refusal = error
    agreement.note = wire.agree(refusal, phase, agreement.note)

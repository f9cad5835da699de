"""Communication: the only package that imports mpi4py, and `cryptography`.

Names are imported on first use, so that the guard can be entered before numpy and MPI are imported.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from .guard import Guard, PhaseInfo, Refused, finalize, guard, leave
from .topology import (
    Topology,
    launcher_name,
    launcher_rank,
    launcher_size,
    library_name,
    refuse_singletons,
    spread,
)

if TYPE_CHECKING:
    from .inspection import ProtocolError
    from .messages import Handout, Report, RoundBroadcast, checked_result
    from .solo import Solo
    from .updates import Updates
    from .waiting import DeadlineError, Deadlines
    from .wire import Wire

__all__ = [
    "DeadlineError",
    "Deadlines",
    "RoundBroadcast",
    "Guard",
    "leave",
    "Handout",
    "ProtocolError",
    "Refused",
    "Report",
    "PhaseInfo",
    "Solo",
    "Topology",
    "Updates",
    "Wire",
    "checked_result",
    "connect",
    "finalize",
    "guard",
    "launcher_name",
    "launcher_rank",
    "launcher_size",
    "refuse_singletons",
    "spread",
]

_MODULE_OF = {
    "DeadlineError": "waiting",
    "Deadlines": "waiting",
    "Handout": "messages",
    "ProtocolError": "inspection",
    "Report": "messages",
    "RoundBroadcast": "messages",
    "Solo": "solo",
    "Updates": "updates",
    "Wire": "wire",
    "checked_result": "messages",
}


def __getattr__(name: str) -> Any:
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module = import_module(f".{_MODULE_OF[name]}", __name__)
    return getattr(module, name)


def connect(*, chunk_bytes: int | None = None, deadlines: Deadlines | None = None) -> Wire | Solo:
    """Return the wire between the launcher's processes, or Solo if there is one process.

    Collective. Without a launcher MPI is not even imported.

    Args:
        chunk_bytes: size of the chunks in which one vector travels, default 4 MiB. The server needs
            this much memory per update while it aggregates. The server's choice counts from the
            hand-out on.
        deadlines: longest waits, per phase; default: for ever.

    Raises:
        ValueError: the launcher started several processes that do not see each other.
        DeadlineError: not all ranks arrived.
    """
    from .messages import CHUNK_BYTES
    from .solo import Solo

    chunk_bytes = chunk_bytes or CHUNK_BYTES
    if launcher_rank() is None or launcher_size() == 1:
        return Solo(chunk_bytes, deadlines)
    from mpi4py import MPI

    from .wire import Wire

    refuse_singletons(MPI.COMM_WORLD.size, library_name())
    if MPI.COMM_WORLD.size == 1:
        return Solo(chunk_bytes, deadlines)
    return Wire(MPI.COMM_WORLD, chunk_bytes, deadlines)

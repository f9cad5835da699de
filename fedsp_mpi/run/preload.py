"""Import heavy libraries on the ranks that wait for the server."""

from __future__ import annotations

import threading
from contextlib import suppress


class Preload:
    """Imports of torch, transformers and what needs them, by a thread of their own.

    They take seconds of a core, and a rank without a part in the server's preparation has nothing
    else to do. `join` comes before the main thread imports them, so that no two threads import one
    module at a time.
    """

    def __init__(self) -> None:
        self._thread = threading.Thread(target=_import_all, name="preload", daemon=True)
        self._thread.start()

    def join(self) -> None:
        """Wait until everything is imported."""
        self._thread.join()


def _import_all() -> None:
    # Where an import fails, the main thread's own finds out, and reports it.
    with suppress(Exception):
        import fedsp_mpi.federate
        import fedsp_mpi.run.build  # noqa: F401

"""Import heavy libraries on the ranks that wait for the server."""

from __future__ import annotations

import threading
from contextlib import suppress
from importlib import import_module

# In the order in which they are loaded; what a client runs has the others as its imports.
_MODULES = ("torch", "transformers", "fedsp_mpi.run.build")


class Preload:
    """Imports of torch, transformers and what needs them, by a thread of their own.

    They take seconds of a core, and a rank without a part in the server's preparation has nothing
    else to do. `join` comes before the main thread imports them, so that no two threads import one
    module at a time.

    Args:
        modules: the names of further modules.
    """

    def __init__(self, *modules: str) -> None:
        self._modules = (*_MODULES, *modules)
        self._thread = threading.Thread(target=self._run, name="preload", daemon=True)
        self._thread.start()

    def join(self) -> None:
        """Wait until everything is imported."""
        self._thread.join()

    def _run(self) -> None:
        # Where an import fails, the main thread's own finds out, and reports it.
        with suppress(Exception):
            for name in self._modules:
                import_module(name)

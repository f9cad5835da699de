"""Import heavy libraries: quickly, and on the ranks that wait for the server meanwhile."""

from __future__ import annotations

import gc
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress


@contextmanager
def uncollected() -> Iterator[None]:
    """Look for no cycles of garbage inside the `with`: what imports make stays.

    Torch and transformers make most of a million objects. To look at them again and again, as they
    come, would take a tenth of the time of their import, and the first look afterwards another
    part of it: they join the oldest objects without one.
    """
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.unfreeze()  # what was frozen becomes the oldest generation
        if was_enabled:
            gc.enable()


class Preload:
    """Imports of torch, transformers and what needs them, by a thread of their own.

    They take seconds of a core, and a rank without a part in the server's preparation has nothing
    else to do. `join` comes before the main thread imports them, so that no two threads import one
    module at a time.

    The thread stays until the process ends: libraries such as pyarrow keep what belongs to the
    thread that has loaded them, and fail when it is gone (apache/arrow, issue 50908).
    """

    def __init__(self) -> None:
        self._has_imported = threading.Event()
        threading.Thread(target=self._import_and_stay, name="preload", daemon=True).start()

    def join(self) -> None:
        """Wait until everything is imported."""
        self._has_imported.wait()

    def _import_and_stay(self) -> None:
        try:
            _import_all()
        finally:
            self._has_imported.set()
        threading.Event().wait()


def _import_all() -> None:
    # Where an import fails, the main thread's own finds out, and reports it.
    with suppress(Exception), uncollected():
        import fedsp_mpi.federate
        import fedsp_mpi.run.build  # noqa: F401

"""One experiment from start to end, on every rank.

The public function `fedsp_mpi.run` has the name of this room. Python binds the name to the room as
soon as the room is imported, so the room can be called, too, and is the function then.
"""

import sys
from types import ModuleType


class _CallableRoom(ModuleType):
    def __call__(self, *arguments, **options):
        """Run an experiment: see `fedsp_mpi.api.run`."""
        from fedsp_mpi import api

        return api.run(*arguments, **options)


sys.modules[__name__].__class__ = _CallableRoom

"""One experiment from start to end, on every rank.

The public function `fedsp_mpi.run` has the name of this room. Python binds the name to the room as
soon as the room is imported, so the room can be called, too, and calls the function then.
"""

import sys
from types import ModuleType

import fedsp_mpi

_function = fedsp_mpi.run  # which has the name until this room is imported


class _CallableRoom(ModuleType):
    def __call__(self, *arguments, **options):
        """Run an experiment: see `fedsp_mpi.run`."""
        return _function(*arguments, **options)


sys.modules[__name__].__class__ = _CallableRoom

"""Federated tuning of soft prompts on MPI: the large model stays with its owner, and so does the
text.

In Python, `run` runs an experiment and `read` reads one, as the command line does (api.py):

    import fedsp_mpi
    run = fedsp_mpi.run("config.yaml", set={"federation.rounds": 3})
    run.results
"""

from typing import TYPE_CHECKING

__version__ = "0.1.0"

if TYPE_CHECKING:
    from fedsp_mpi.api import ConfigError, Refused, Run, read, run

__all__ = ["ConfigError", "Refused", "Run", "read", "run"]


def __getattr__(name: str) -> object:
    """Import what is public when it is first used: importing the package costs nothing."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from fedsp_mpi import api

    public: object = getattr(api, name)
    return public


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})

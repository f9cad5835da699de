"""Federated tuning of soft prompts on MPI: the large model stays with its owner, and so does the
text.

The Python interface: run an experiment, or read one, in a notebook, a script, or under mpirun.

    import fedsp_mpi
    run = fedsp_mpi.run("config.yaml", set={"federation.rounds": 3})
    run.results

Importing the package costs nothing: what is public is imported when it is first used.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Mapping
    from os import PathLike
    from typing import Literal

    from fedsp_mpi.comm import Refused
    from fedsp_mpi.config import ConfigError
    from fedsp_mpi.record import Run, read
    from fedsp_mpi.run.request import Source

__version__ = "0.1.0"
__all__ = ["ConfigError", "Refused", "Run", "read", "run"]


def run(
    config: Source = None,
    *,
    set: Mapping[str, object] | None = None,
    name: str | None = None,
    replace: bool = False,
    resume: bool | Literal["auto"] | PathLike[str] | str = False,
) -> Run | None:
    """Run an experiment as `python -m fedsp_mpi run` does: the same lines, the same results.

    It can be called again and again, and ends no process: a mistake is an exception with the line
    that the command line would print.

    In one process this plays the server and all clients. Under `mpirun -n 4 python script.py` every
    process calls it, as a rank; an error that only some ranks meet ends the job then.

    Ctrl-C leaves a folder that `resume` goes on with. In a thread that is not the main one, SIGUSR1
    does not ask the run to stop: only the main thread may handle signals.

    Args:
        config: a YAML file, or its content as nested mappings, in which relative paths begin in
            the working directory; None: the embedded experiment.
        set: values by dotted key, such as {"federation.rounds": 3}; they win over `config`.
        name: of the run's folder below `run.folder`.
        replace: overwrite an existing run of that name.
        resume: continue the run of that name; "auto": or begin it where there is none. The folder
            of a run: continue that one, which needs neither `config` nor `name`.

    Returns:
        The record, on rank 0; None on the other ranks.

    Raises:
        ConfigError: a mistake in the configuration, the model, the data or the folder.
        Refused: the run was told to stop (SIGUSR1), and can be resumed.
    """
    from fedsp_mpi import cli
    from fedsp_mpi.run.request import read_request

    request = read_request(config, set=set, name=name, replace=replace, resume=resume)
    return cli.run_in_program(request)


def __getattr__(name: str) -> object:
    """Import a public name when it is first used."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from fedsp_mpi.comm import Refused
    from fedsp_mpi.config import ConfigError
    from fedsp_mpi.record import Run, read

    return {"ConfigError": ConfigError, "Refused": Refused, "Run": Run, "read": read}[name]


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})

"""How a run that ended before its end is resumed: the command that a user types."""

from __future__ import annotations

import shlex
from pathlib import Path

from fedsp_mpi.files.untrusted import JsonMapping

# Of `--resume`: these words are no folders there.
RESUME_WORDS = ("must", "auto")


def newest_environment(environment: JsonMapping, sections: JsonMapping) -> JsonMapping:
    """Return what a record says of the machine since the last start of the run.

    Args:
        environment: of the first start.
        sections: of the record.
    """
    resumes = sections.get("resumes", {})
    if not resumes:
        return environment
    newest: JsonMapping = resumes[max(resumes, key=int)].get("environment", {})
    return newest


def resume_command(folder: Path, environment: JsonMapping) -> str:
    """Return what a user types to resume the run in a folder, whatever options it was started with.

    Args:
        folder: of the run.
        environment: of its last start, as the record has it: launcher and ranks.
    """
    words = []
    hosts = environment.get("hosts")
    num_ranks = len(hosts) if isinstance(hosts, list) else 1
    if num_ranks > 1:
        launcher = environment.get("launcher")
        words += ["srun" if launcher == "srun" else "mpirun", "-n", str(num_ranks)]
    folder = folder if folder.name not in ("", "..") else folder.resolve()
    text = str(folder)
    if text in RESUME_WORDS or text.startswith("-"):
        text = f"./{text}"
    return shlex.join([*words, "python", "-m", "fedsp_mpi", "run", "--resume", text])

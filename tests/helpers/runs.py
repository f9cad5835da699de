"""Short runs of the embedded default, on ranks and in this process, with shared settings."""

from __future__ import annotations

import contextlib
import io
import json
import os
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path
from unittest.mock import patch

import pytest

from fedsp_mpi import cli, config, record
from fedsp_mpi.log import Log
from fedsp_mpi.record import Run
from fedsp_mpi.run import execute
from fedsp_mpi.tensors import seal
from helpers import tiny
from helpers.mpi import both_ends, run_mpi
from helpers.paths import PROGRAMS

FAULTY = PROGRAMS / "faulty.py"
SHORT = (
    "federation.rounds=2",
    "federation.clients=3",
    "distillation.stage.steps=4",
    "client.alignment.steps=2",
    "client.tuning.steps=2",
    "server.tuning.steps=2",
    "data.limit.train=64",
    "data.limit.validation=16",
    "data.limit.test=24",
)
FEDPROMPT = (
    "auxiliary.layers_per_cell=3",
    "distillation.stage.steps=0",
    "client.alignment.steps=0",
)
WHOLE_MODEL = ("auxiliary.layers_per_cell=null", "auxiliary.depth=null", *FEDPROMPT[1:])
# The embedded default as FedBPT, with a small search.
FEDBPT = (
    "method=fedbpt",
    "server.tuning.steps=0",
    "distillation.stage.steps=0",
    "auxiliary.layers_per_cell=null",
    "prompt.kind=input",
    "prompt.init=text",
    "prompt.num_tokens=8",
    "search.dimension=20",
    "search.iterations=2",
)

# The embedded default with prompts in words, of a few that its tiny model knows.
PROMPT_SEARCH = (
    "method=prompt_search",
    "server.tuning.steps=0",
    "distillation.stage.steps=0",
    "auxiliary.layers_per_cell=null",
    "prompt.kind=input",
    "prompt.num_tokens=8",
    "instructions.pool=[Question, 'Answer:', Question now, 'Answer: the old colour']",
    "instructions.candidates=6",
    "instructions.beam=2",
)


def here(
    arguments: Sequence[str | os.PathLike[str]], status: int = 0
) -> subprocess.CompletedProcess[str]:
    """Run the command line in this process, which has loaded its libraries already.

    A failure of the program is a failure of the test, with its own traceback.
    """
    words = [os.fspath(argument) for argument in arguments]
    out, err = io.StringIO(), io.StringIO()
    with (
        patch.object(cli, "guard", lambda verb: contextlib.nullcontext()),
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
    ):
        try:
            code = cli.main(words)
        finally:
            seal.clear()  # the next run has a global model of its own
    result = subprocess.CompletedProcess(words, code, out.getvalue(), err.getvalue())
    if code != status:
        pytest.fail(f"{words}: exit status {code}, expected {status}\n{both_ends(result)}")
    return result


def fedsp(
    n: int, arguments: Sequence[str | os.PathLike[str]], status: int = 0
) -> subprocess.CompletedProcess[str]:
    """Run the command line on n ranks; 0: in this process."""
    if n == 0:
        return here(arguments, status)
    return run_mpi(n, ["-m", "fedsp_mpi", *arguments], timeout=60, status=status)


def command(folder: Path, name: str, *settings: str) -> list[str]:
    """Return the arguments of a short run of the embedded default."""
    every = (*SHORT, f"run.folder={folder}", *settings)
    return ["run", "--name", name, *(word for setting in every for word in ("--set", setting))]


def short_run(
    n: int,
    folder: Path,
    name: str,
    *more: str,
    program: Sequence[str | os.PathLike[str]] = (),
    status: int | None = 0,
) -> subprocess.CompletedProcess[str]:
    """Run the embedded default, shortened, on n ranks; 0: in this process.

    Args:
        n: number of ranks.
        folder: the folder of runs.
        name: the run's name.
        more: settings on top of `SHORT`.
        program: arguments of Python that take the place of `-m fedsp_mpi`.
        status: the expected exit status; None expects nothing.
    """
    arguments = command(folder, name, *more)
    if n == 0 and not program and status is not None:
        return here(arguments, status)
    return run_mpi(n, [*(program or ("-m", "fedsp_mpi")), *arguments], timeout=120, status=status)


def together(n: int, jobs: Sequence[tuple[Sequence[str], Path | None]]) -> None:
    """Run command lines one after the other in one start of n ranks; 0: in this process.

    Args:
        n: number of ranks.
        jobs: the arguments of each, and the file for what it prints on the first rank.
    """
    if n == 0:
        for arguments, printed in jobs:
            text = here(arguments).stdout
            if printed:
                printed.write_text(text)
        return
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "jobs.json"
        file.write_text(json.dumps([[list(a), str(p) if p else None] for a, p in jobs]))
        run_mpi(n, [PROGRAMS / "several.py", file], timeout=300)


def short(folder: Path, *more: str) -> Run:
    """A short run of the embedded default, in this process."""
    settings = [*SHORT, f"run.folder={folder}", "run.name=run", "distillation.engine=torch", *more]
    found = execute.execute(config.load(None, settings), "variant", Log())
    assert found is not None
    return record.read(found)


def gap_settings(folder: Path, family: str, *more: str) -> list[str]:
    """A run of FedPrompt with input prompts on a tiny model and a task of two words."""
    if not (folder / "model").exists():
        tiny.model_folder(folder / "model", family)
        tiny.gap_tokenizer(family).save_pretrained(folder / "model")
        tiny.gap_task_folder(folder / "data")
    own = [f"model.name={folder / 'model'}", f"data.source={folder / 'data'}", "prompt.kind=input"]
    return [*own, "data.limit.train=48", "prompt.num_tokens=4", *WHOLE_MODEL, *more]

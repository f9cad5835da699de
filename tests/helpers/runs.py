"""Short runs of the embedded default, on ranks and in this process, and settings that they share."""

from __future__ import annotations

from pathlib import Path

from fedsp_mpi import config, record
from fedsp_mpi.log import Log
from fedsp_mpi.record import Run
from fedsp_mpi.run import execute
from helpers import tiny
from helpers.mpi import run_mpi
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


def short_run(
    n: int, folder: Path, name: str, *more: str, program=("-m", "fedsp_mpi"), status: int | None = 0
):
    """Run the embedded default, shortened, on n ranks (0: without mpirun)."""
    settings = [
        item for setting in (*SHORT, f"run.folder={folder}", *more) for item in ("--set", setting)
    ]
    return run_mpi(n, [*program, "run", "--name", name, *settings], timeout=120, status=status)


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

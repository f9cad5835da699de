"""Time this package, Flower and APPFL on the same work, from start to prompt, in turns.

    python compare.py CONFIG FOLDER [--flower PYTHON] [--appfl PYTHON] [--turns N] [--set K=V]

PYTHON is the interpreter of an environment with torch, transformers and peft of the same versions,
and `flwr[simulation]==1.42.0`, or `appfl[mpi]==1.12.0` and an MPI. Each has a server and two
processes for the clients, of a core each; the package has `mpirun -n 3`. APPFL's ranks spin while
they wait, so it is timed with a single process for the clients, too. FOLDER gets the batches, which
the other two read ready for use, and what every command said. The validation losses of all rounds
have to agree to 1e-3.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import time
from pathlib import Path
from statistics import median

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[2]
TOLERANCE = 1e-3  # nats a token
QUIET = {
    "HF_HUB_OFFLINE": "1",
    "FLWR_TELEMETRY_ENABLED": "0",
    "WANDB_MODE": "disabled",
    "PYTHONWARNINGS": "ignore",
}


def main() -> None:
    """Read the command line, and print a line for each turn and one for each framework."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("config", help="embedded.yaml or stories15m.yaml")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--flower", metavar="PYTHON", help="of an environment with Flower")
    parser.add_argument("--appfl", metavar="PYTHON", help="of an environment with APPFL")
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE")
    options = parser.parse_args()
    work = options.folder / "work"
    export = [sys.executable, str(HERE / "work.py"), options.config, str(work), *options.set]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    if subprocess.run(export, cwd=ROOT, env=environment).returncode:
        sys.exit(1)  # it has said why
    settings = [word for setting in options.set for word in ("--set", setting)]
    run = ["-m", "fedsp_mpi", "run", options.config, "--replace", "--name", "package", *settings]
    commands = {"package": [*mpirun(sys.executable), *run, "--set", f"run.folder={options.folder}"]}
    if options.flower:
        commands["Flower"] = [options.flower, str(HERE / "flower_app.py"), str(work), "2"]
    if options.appfl:
        app = [str(HERE / "appfl_app.py"), str(work)]
        commands["APPFL"] = [*mpirun(options.appfl), *app]
        commands["APPFL, one process for the clients"] = [*mpirun(options.appfl, 2), *app]
    seconds: dict[str, list[float]] = {name: [] for name in commands}
    losses: dict[str, list[float]] = {}
    names = list(commands)
    for turn in range(options.turns):
        first = turn % len(names)
        for name in names[first:] + names[:first]:
            log = options.folder / f"{name.replace(', ', '-').replace(' ', '-')}-{turn + 1}.txt"
            duration, losses[name] = timed(commands[name], log)
            seconds[name].append(duration)
            print(f"turn {turn + 1}: {name} {duration:.2f} s", flush=True)
    for name in names:
        ratio = median(seconds[name]) / median(seconds["package"])
        pairs = zip(losses[name], losses["package"], strict=True)
        apart = max(abs(loss - of_package) for loss, of_package in pairs)
        print(
            f"{name}: median {median(seconds[name]):.2f} s, {ratio:.2f} x the package's; "
            f"last loss {losses[name][-1]:.4f}, at most {apart:.1e} apart"
        )
        if apart > TOLERANCE:
            sys.exit(
                f"{name}: found losses {losses[name]}, expected those of the package, "
                f"{losses['package']}, to {TOLERANCE:g}: it did other work; see {options.folder}"
            )


def mpirun(python: str, num_ranks: int = 3) -> list[str]:
    """Return the start of a command of some ranks, by the environment's own MPI if it has one."""
    own = Path(python).with_name("mpirun")
    return [str(own) if own.exists() else "mpirun", "-n", str(num_ranks), python]


def timed(command: list[str], log: Path) -> tuple[float, list[float]]:
    """Run a command; return its seconds, and the validation losses that it has printed."""
    start = time.perf_counter()
    environment = {**os.environ, **QUIET, "PYTHONPATH": str(ROOT) if "fedsp_mpi" in command else ""}
    with log.open("w", encoding="utf-8") as file:
        ended = subprocess.run(
            command, cwd=ROOT, env=environment, stdout=file, stderr=subprocess.STDOUT
        )
    if ended.returncode:
        sys.exit(f"found status {ended.returncode} of {command}, expected 0; see {log}")
    duration = time.perf_counter() - start
    words = log.read_text(encoding="utf-8")
    found = re.findall(r"^round (\d+)(?:/\d+)? +(?:validation )?loss (\d+\.\d+)", words, re.M)
    return duration, [float(loss) for round, loss in found if int(round) > 0]


if __name__ == "__main__":
    main()

"""What the tab key gives in real shells: bash, zsh and fish, with the script that we print."""

from __future__ import annotations

import contextlib
import os
import pty
import re
import select
import shutil
import subprocess
import time
from pathlib import Path

import pytest
import yaml

from fedsp_mpi import config
from fedsp_mpi.commands import completion
from helpers import runs

# What is typed in front of the tab key, and what stands there then (or what is offered).
CASES = {
    "rep": ["report"],
    "run --repl": ["--replace"],
    "run --set federation.rou": ["federation.rounds="],
    "plan one.yaml --set prompt.k": ["prompt.kind="],
    "run exper": ["experiment.yaml"],
    "report --table comp": ["comparison"],
    "bench tr": ["transfer"],
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A home with the scripts, a file to complete, and a program of the name."""
    (tmp_path / "experiment.yaml").write_text("")
    (tmp_path / "fedsp-mpi").write_text("#!/bin/sh\n")
    (tmp_path / "fedsp-mpi").chmod(0o755)
    for shell in completion.SHELLS:
        name = "_fedsp-mpi" if shell == "zsh" else f"script.{shell}"
        (tmp_path / name).write_text(runs.here(["completion", shell]).stdout)
    return tmp_path


def typed(command: list[str], lines: list[str], folder: Path, keys: str) -> str:
    """What an interactive shell shows on its terminal after some lines and then some keys."""
    environment = {"PATH": f"{folder}:{os.environ['PATH']}", "HOME": str(folder), "TERM": "dumb"}
    pid, terminal = pty.fork()
    if pid == 0:
        os.chdir(folder)
        os.execvpe(command[0], command, environment)
    shown = ""

    def read_until(mark: str, seconds: float = 20) -> bool:
        nonlocal shown
        end = time.monotonic() + seconds
        while mark not in shown and time.monotonic() < end:
            if select.select([terminal], [], [], 0.1)[0]:
                with contextlib.suppress(OSError):
                    shown += os.read(terminal, 4096).decode(errors="replace")
        return mark in shown

    try:
        for number, line in enumerate(lines):
            os.write(terminal, f"{line}; echo done''{number}\n".encode())
            assert read_until(f"done{number}"), shown
        time.sleep(0.3)  # for the prompt
        shown = ""
        os.write(terminal, f"{keys}\t".encode())
        read_until("(nothing)", 1.5)
        return shown
    finally:
        os.close(terminal)
        os.kill(pid, 9)
        os.waitpid(pid, 0)


def test_every_key_of_every_recipe_is_known():
    """The keys are those of the configuration: each is set by itself."""
    keys = completion.keys()
    assert len(keys) == len(set(keys)) > 100
    resolved = yaml.safe_load(config.to_yaml(config.load(None)))
    for key in keys:
        section = resolved
        for name in key.split("."):
            assert name in section, key
            section = section[name]


@pytest.mark.slow
@pytest.mark.parametrize("shell", ["bash", "zsh"])
def test_the_tab_key_completes(folder, shell):
    if not shutil.which(shell):
        pytest.skip(f"there is no {shell}")
    if shell == "bash":
        command, lines = ["bash", "--norc", "-i"], ["source script.bash"]
    else:
        command = ["zsh", "-f", "-i"]
        lines = ["fpath=($PWD $fpath)", "autoload -Uz compinit", "compinit -u -d dump"]
    for words, [expected] in CASES.items():
        shown = typed(command, lines, folder, f"fedsp-mpi {words}")
        text = re.sub(r"\x1b\[[\d;?]*[a-zA-Z]|[\x00-\x08]", "", shown)
        rest = expected[len(words.split()[-1]) :]
        assert rest in text, (words, shown)
        # A key is not finished: its value follows without a blank.
        assert (f"{expected.split('.')[-1]} " in text) == (not expected.endswith("=")), shown


def test_fish_completes(folder):
    if not shutil.which("fish"):
        pytest.skip("there is no fish")
    for words, expected in CASES.items():
        line = f"source script.fish; complete -C 'fedsp-mpi {words}'"
        done = subprocess.run(
            ["fish", "--no-config", "-c", line],
            cwd=folder,
            env={**os.environ, "HOME": str(folder)},
            capture_output=True,
            text=True,
            timeout=60,
        )
        offered = [row.split("\t")[0] for row in done.stdout.strip().split("\n")]
        assert offered == expected, (words, done)

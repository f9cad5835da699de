"""Format, lint and types: the tools' own words are the failure."""

from __future__ import annotations

import subprocess
import sys

import pytest

from helpers.paths import ROOT


@pytest.mark.parametrize(
    "command",
    [("ruff", "format", "--check", "."), ("ruff", "check", "."), ("mypy",)],
    ids=["format", "lint", "types"],
)
def test_the_tools_have_nothing_to_say(command):
    pytest.importorskip(command[0])
    done = subprocess.run(
        [sys.executable, "-m", *command], cwd=ROOT, capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stdout + done.stderr

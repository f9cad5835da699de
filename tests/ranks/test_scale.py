"""Many clients on few ranks: memory of the merge, state of the idle ones, who takes part."""

from __future__ import annotations

import json

from helpers.mpi import run_mpi
from helpers.paths import PROGRAMS


def test_merging_needs_a_chunk_of_every_update_and_two_prompts():
    clients, values, chunk = 60, 1 << 20, 1 << 18
    text = run_mpi(4, [PROGRAMS / "memory.py", str(clients), str(values), str(chunk)]).stdout
    grown = json.loads(text)["grown"]
    assert 4 * values < grown < chunk * clients + 2 * 4 * values < 60 * 4 * values

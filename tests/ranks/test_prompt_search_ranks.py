"""Prompt search on several ranks: killed and resumed. Golden runs compare 1 and 4 ranks."""

from __future__ import annotations

import pytest

from fedsp_mpi.record import read
from fedsp_mpi.report import difference
from helpers.mpi import both_ends
from helpers.runs import FAULTY, PROMPT_SEARCH, short_run


@pytest.mark.slow
def test_a_killed_run_goes_on_with_equal_bits(tmp_path):
    settings = (*PROMPT_SEARCH, "federation.rounds=3", "instructions.paraphrases=2")
    short_run(2, tmp_path, "whole", *settings)
    program = (FAULTY, "kill:checkpoint:0:2")
    killed = short_run(2, tmp_path, "killed", *settings, program=program, status=None)
    assert killed.returncode != 0 and "Traceback" not in killed.stderr, both_ends(killed)
    short_run(3, tmp_path, "killed", *settings, "run.resume=must")
    whole, resumed = read(tmp_path / "whole"), read(tmp_path / "killed")
    assert difference(whole, resumed) == []
    assert whole.sections["instruction"] == resumed.sections["instruction"]

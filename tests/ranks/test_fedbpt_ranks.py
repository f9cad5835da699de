"""FedBPT on several ranks: killed and resumed, and with a server of two ranks."""

from __future__ import annotations

import pytest

from fedsp_mpi.record import read
from fedsp_mpi.report import difference
from helpers.mpi import both_ends
from helpers.runs import FAULTY, FEDBPT, short_run

AVERAGE = (*FEDBPT, "search.rule=average", "search.objective=loss")
KEPT = (*FEDBPT, "search.step_size_by=clients", "search.rank_by=improvement", "search.parents=all")


@pytest.mark.slow
@pytest.mark.parametrize(
    "settings", [FEDBPT, KEPT, AVERAGE], ids=["fedbpt", "step sizes", "fedavg_bbt"]
)
def test_a_killed_run_goes_on_with_equal_bits(tmp_path, settings):
    settings = (*settings, "federation.rounds=3", "client.resident=1", "search.dimension=10")
    short_run(0, tmp_path, "whole", *settings)
    program = (FAULTY, "kill:checkpoint:0:2")
    killed = short_run(2, tmp_path, "killed", *settings, program=program, status=None)
    assert killed.returncode != 0 and "Traceback" not in killed.stderr, both_ends(killed)
    short_run(0, tmp_path, "killed", *settings, "run.resume=must")
    assert difference(read(tmp_path / "whole"), read(tmp_path / "killed")) == []


@pytest.mark.slow
def test_a_server_of_two_ranks_has_the_losses_of_one(tmp_path):
    short_run(3, tmp_path, "one", *FEDBPT, "federation.clients=2")
    short_run(4, tmp_path, "two", *FEDBPT, "federation.clients=2", "topology.server_ranks=2")
    one, two = read(tmp_path / "one"), read(tmp_path / "two")
    assert two.rounds["validation_loss"] == pytest.approx(one.rounds["validation_loss"], rel=1e-5)

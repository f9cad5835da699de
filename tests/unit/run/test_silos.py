"""What ranks say of silos before the first round, and which of them plays which."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from fedsp_mpi import config
from fedsp_mpi.algorithms.silo_weights import WeightedClient
from fedsp_mpi.comm.inspection import ProtocolError
from fedsp_mpi.record.tables import SiloRow, mean_silo_loss, table
from fedsp_mpi.roles import read_silo_rows, silo_row_json
from fedsp_mpi.run.silos import Declaration, View, _assign, disclosed
from fedsp_mpi.tensors import NamedTensors, Update


def of(*silos: dict, method: str = "fedsp") -> config.Config:
    items = [{"source": f"/data/{silo['name']}", **silo} for silo in silos]
    server = {"data": {"source": "/data/public"}}
    if method == "fedbpt":
        server["tuning"] = {"steps": 0}
    return config.checked(
        {
            "method": method,
            "model": {"name": "any"},
            "data": {"task": "sst2"},
            "federation": {"silos": items},
            "server": server,
        }
    )


def views(*visible: tuple[str, list[int | None]]) -> list[View]:
    """The server's view, and one of each client rank: its host, and the silos' sizes there."""
    return [View(["head"], [], {}), *(View([host], sizes, {}) for host, sizes in visible)]


def assign(settings: config.Config, seen: list[View]) -> tuple[list[list[int]], dict[int, str]]:
    silos = settings.federation.silos
    placed = [(index, silo.name, silo.source) for index, silo in enumerate(silos)]
    return _assign(settings, placed, seen, first=1)


NAMES = [{"name": name} for name in "abcd"]


def test_silos_that_all_ranks_see_are_spread_evenly():
    assignment, problems = assign(of(*NAMES), views(("n1", [1] * 4), ("n2", [1] * 4)))
    assert (assignment, problems) == ([[], [0, 2], [1, 3]], {})


def test_a_search_spreads_them_by_the_size_of_their_files():
    sizes = [90, 30, 30, 30]
    assignment, _ = assign(of(*NAMES, method="fedbpt"), views(("n1", sizes), ("n2", sizes)))
    assert assignment == [[], [0], [1, 2, 3]]


def test_a_silo_goes_to_a_rank_that_sees_it():
    seen = views(("n1", [1, None, 1, 1]), ("n2", [None, 1, 1, 1]))
    assignment, problems = assign(of(*NAMES), seen)
    assert 0 in assignment[1] and 1 in assignment[2] and not problems
    assert sorted(map(len, assignment)) == [0, 2, 2]


def test_a_silo_goes_to_its_host_whoever_else_sees_it():
    silos = [{**silo, "host": "n2"} for silo in NAMES]
    seen = views(("n1", [1] * 4), ("n2", [1] * 4))
    assert assign(of(*silos), seen) == ([[], [], [0, 1, 2, 3]], {})


def test_a_silo_of_an_unknown_host_is_a_problem_and_has_a_rank_that_says_so():
    silos = [{"name": "a", "host": "n9"}, {"name": "b"}]
    assignment, problems = assign(of(*silos), views(("n1", [1, 1]), ("n2", [1, 1])))
    assert sorted(client for ids in assignment for client in ids) == [0, 1]
    assert "found no client rank on its host n9, expected one of n1, n2" in problems[0]
    assert list(problems) == [0]


@pytest.mark.parametrize(
    ("number", "disclose", "said"),
    [
        (1234, "exact", 1234),
        (1234, "rounded", 1200),
        (96_700, "rounded", 97_000),
        (57, "rounded", 57),
        (1234, "nothing", None),
    ],
)
def test_a_silo_says_no_more_of_its_size_than_it_should(number, disclose, said):
    assert disclosed(number, disclose) == said


@pytest.mark.parametrize(
    "message",
    [
        {"client": 0},
        {"client": "0", "reading": "", "choices": None},
        {**Declaration(0, 5, 0, 9).__dict__, "size": -1},
        {**Declaration(0, 5, 0, 9).__dict__, "longest": "9"},
    ],
)
def test_a_declaration_that_cannot_be_names_the_rank(message):
    with pytest.raises(ProtocolError, match="rank 2"):
        Declaration.from_json(message, 2)


class Trained:
    """A client that always sends the same update."""

    def local_update(self, client: int, round: int, broadcast: NamedTensors) -> Update:
        return Update(client, 12.0, broadcast, {})


def test_updates_weigh_as_the_configuration_says():
    client = WeightedClient(Trained(), {0: 1.0, 1: 2.5}, {0: 100.0})
    tensors = NamedTensors.of({"prompt": np.zeros(2)})
    weights = [client.local_update(id, 1, tensors).weight for id in (0, 1)]
    assert weights == [100.0, 30.0]


ROWS = [SiloRow(round=3, silo=0, n=3, loss=1.0, acc=0.5), SiloRow(round=3, silo=1, n=1, loss=3.0)]


def test_the_mean_loss_is_weighted_by_examples():
    assert mean_silo_loss(table(SiloRow, ROWS)) == pytest.approx(1.5)
    assert np.isnan(mean_silo_loss(table(SiloRow, [])))
    assert mean_silo_loss(table(SiloRow, [replace(row, n=0) for row in ROWS])) == pytest.approx(2.0)


def test_scores_travel_and_are_those_of_the_ranks_own_silos():
    answers = [{"scores": []}, *({"scores": [silo_row_json(row)]} for row in ROWS)]
    rows = read_silo_rows(answers, {0: 1, 1: 2}, 3)
    assert [(row.silo, row.n, row.loss) for row in rows] == [(0, 3, 1.0), (1, 1, 3.0)]
    with pytest.raises(ProtocolError, match=r"rank 1.*client 0"):
        read_silo_rows(answers, {0: 2, 1: 1}, 3)


@pytest.mark.parametrize("change", [{"loss": -1e9}, {"acc": 2.0}, {"n": -1}, {"silo": 1}])
def test_a_score_that_cannot_be_names_the_rank(change):
    answers = [{"scores": []}, {"scores": [{**silo_row_json(ROWS[0]), **change}]}]
    with pytest.raises(ProtocolError, match="rank 1"):
        read_silo_rows(answers, {0: 1, 1: 2}, 3)

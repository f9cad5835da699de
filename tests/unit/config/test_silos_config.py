"""`federation.silos`: its forms, and what it refuses."""

from __future__ import annotations

import pytest

from fedsp_mpi import config
from fedsp_mpi.config import SiloConfig
from helpers.configs import refused

BASE = {
    "model": {"name": "any"},
    "data": {"task": "sst2"},
    "server": {"data": {"source": "/data/public"}},
}


def of(silos: object, **more: dict) -> config.Config:
    sections = {name: {**BASE.get(name, {}), **section} for name, section in more.items()}
    federation = {**sections.pop("federation", {}), "silos": silos}
    return config.checked({**BASE, **sections, "federation": federation})


@pytest.mark.parametrize(
    "silos",
    [
        [{"name": "north", "source": "/data/north"}, {"name": "east", "source": "/data/east"}],
        [{"source": "/data/north"}, {"source": "/data/east"}],
        {"source": "/data/{silo}", "names": ["north", "east"]},
    ],
)
def test_all_forms_name_the_same_silos(silos):
    federation = of(silos).federation
    assert federation.silos == (
        SiloConfig("north", "/data/north"),
        SiloConfig("east", "/data/east"),
    )
    assert federation.clients == 2
    assert federation.client_name(1) == "silo east"


def test_a_file_is_a_silo_of_its_own_name():
    silos = of([{"source": "sites/north.csv"}, {"source": "east.jsonl.gz"}]).federation.silos
    assert [silo.name for silo in silos] == ["north", "east"]


def test_what_all_have_in_common_is_said_once():
    shared = {"columns": {"sentence": "note"}, "weight": 2.0, "limit": 5}
    silos = of({"source": "/data/{silo}", "names": ["a", "b"], **shared}).federation.silos
    assert {(silo.columns["sentence"], silo.weight, silo.limit) for silo in silos} == {
        ("note", 2.0, 5)
    }


def test_a_pattern_stands_for_silos_that_are_still_to_be_found(tmp_path):
    settings = of({"source": "/scratch/sites/*"})
    [silo] = settings.federation.silos
    assert silo.is_pattern
    path = tmp_path / "again.yaml"
    path.write_text(config.to_yaml(settings))
    assert config.load(path) == settings


def test_what_is_written_reads_back_to_the_same(tmp_path):
    settings = of([{"name": "north", "source": "/n", "host": "node07", "verbaliser": ["a", "b"]}])
    path = tmp_path / "again.yaml"
    path.write_text(config.to_yaml(settings))
    assert config.load(path) == settings


NORTH = {"name": "north", "source": "/data/north"}


@pytest.mark.parametrize(
    ("silos", "more", "words"),
    [
        ("north", {}, ("federation.silos", "a list of sections")),
        ([], {}, ("server.data.source", "without federation.silos")),
        (["north"], {}, ("federation.silos[0]", "expected a section")),
        ([{"name": "north"}], {}, ("federation.silos[0].source", "found none")),
        ([{"source": "/data/{silo}"}], {}, ("expected names",)),
        ({"source": "/data/x", "names": ["a"]}, {}, ("{silo}",)),
        ({"source": "/data/{silo}", "names": "a"}, {}, ("federation.silos.names",)),
        ({"names": ["a"]}, {}, ("federation.silos.source",)),
        ([NORTH, NORTH], {}, ("'north' a second time",)),
        ([{**NORTH, "name": "../x"}], {}, ("federation.silos[0].name",)),
        ([{**NORTH, "nmae": "x"}], {}, ("did you mean 'name'",)),
        ([{**NORTH, "weight": 0}], {}, ("weight",)),
        ([{**NORTH, "limit": 0}], {}, ("limit",)),
        ([NORTH], {"federation": {"clients": 7}}, ("federation.clients", "leave it out")),
        ([NORTH], {"data": {"source": "/data"}}, ("data.source", "server.data")),
        ([NORTH], {"data": {"shots": 2}}, ("data.shots",)),
        ([NORTH], {"data": {"partition": "labels"}}, ("data.partition",)),
        ([NORTH], {"data": {"server_share": 0.1}}, ("data.server_share",)),
        ([NORTH], {"server": {"data": {"source": None}}}, ("evaluation.at", "expected silos")),
        (
            [NORTH],
            {"federation": {"disclose": "nothing", "sampling": "by_size"}},
            ("federation.sampling",),
        ),
        ([NORTH], {"evaluation": {"held_out": 1.0}}, ("evaluation.held_out",)),
    ],
)
def test_what_cannot_be_is_refused_in_a_line(silos, more, words):
    refused(lambda: of(silos, **more), *words)

"""What `tests/counts.py` counts stays within its limits; `tests/mutants.py` fits the code."""

from __future__ import annotations

import ast

import pytest

import counts
import mutants

PLACES = counts.count(sorted(counts.PACKAGE.rglob("*.py")))
LIMITS = {name: limit for name, (_, limit) in counts.MEASURES.items() if limit is not None}


@pytest.mark.parametrize("name", LIMITS)
def test_a_measure_is_within_its_limit(name):
    places = [f"{file}:{line} {what}" for file, line, what in PLACES[name]]
    assert len(places) <= LIMITS[name], places


def test_every_measure_sees_what_it_counts():
    bad = '''
def load(first, second, third, fourth, fifth, sixth, seventh) -> Tensor:
    """What is loaded."""
    found, some = 1, 2
    value: Any = 1 if first else 2 if second else 3
    return hasattr(self, "value")
'''
    tree = ast.parse(bad)
    places = {name: list(look("bad.py", tree)) for name, (look, _) in counts.MEASURES.items()}
    assert all(places.values()), places


def test_the_root_and_the_readme_stay_small():
    assert len(counts.root_modules()) <= 8
    readme = (counts.ROOT / "README.md").read_text(encoding="utf-8")
    assert len(readme.splitlines()) <= 300 and len(readme.encode()) <= 20_000


@pytest.mark.parametrize("mutant", mutants.MUTANTS, ids=lambda mutant: mutant.name)
def test_the_text_of_a_mutant_is_there(mutant):
    """`tests/mutants.py` itself takes minutes, so nobody would notice at once."""
    text = (counts.PACKAGE / mutant.file).read_text(encoding="utf-8")
    assert text.count(mutant.before) == 1

"""configs/README.md is what `config --reference` prints: every key with its default, and no other.

The defaults are compared with the code once more, without what the reference is made of.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator
from typing import Any

import pytest
import yaml

from fedsp_mpi import cli, config
from fedsp_mpi.config.keys import configuration
from fedsp_mpi.config.tiers import ExpertConfig
from helpers.paths import ROOT

REFERENCE = ROOT / "configs" / "README.md"
# A row of a table of keys: "| `key` | values | `default` (paper: `default`) | unit | meaning |".
ROW = re.compile(
    r"\| `([\w.\[\]]+)` \| [^|]+ \| `([^`]*)`(?: \(paper: `([^`]*)`\))? \|[^|]*\| [^|]+ \|"
)
# One row stands for a key of all sections of a kind.
PLACES = re.compile(r"`([A-Z]+)` is each of (.+)\.")


def settings(section: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield every dotted key of a configuration with its value."""
    for field in dataclasses.fields(section):
        value = getattr(section, field.name)
        key = prefix + field.name
        if dataclasses.is_dataclass(value):
            yield from settings(value, f"{key}.")
        else:
            yield key, list(value) if isinstance(value, tuple) else value


def defaults(recipe: str) -> dict[str, Any]:
    """Return the value of every key that is left out under a recipe; model.name has to be given."""
    values = dict(settings(config.checked({"recipe": recipe, "model": {"name": "any"}})))
    silo = dict(settings(config.SiloConfig(), "federation.silos[]."))
    expert = dict(settings(ExpertConfig(), "tiers.experts[]."))
    return values | {"model.name": None} | silo | expert


def documented() -> list[tuple[str, Any, Any]]:
    """Return each key of configs/README.md with its defaults under `bridged` and `paper`."""
    text = REFERENCE.read_text(encoding="utf-8")
    places = {name: re.findall("`(.+?)`", those) for name, those in PLACES.findall(text)}
    rows = []
    for line in text.splitlines():
        match = ROW.fullmatch(line)
        if match is None:
            continue
        key, bridged, paper = match.groups()
        first, _, rest = key.partition(".")
        names = [f"{name}.{rest}" for name in places[first]] if first.isupper() else [key]
        paper = bridged if paper is None else paper
        rows += [(name, _value(bridged), _value(paper)) for name in names]
    return rows


def test_the_page_is_what_the_verb_prints(capsys):
    assert cli.main(["config", "--reference"]) == 0
    assert capsys.readouterr().out == REFERENCE.read_text(encoding="utf-8"), (
        "python -m fedsp_mpi config --reference > configs/README.md"
    )


def test_every_key_is_listed_once_and_no_other():
    listed = [key for key, _, _ in documented()]
    assert sorted(listed) == sorted(defaults("bridged"))


def test_every_default_is_that_of_the_code():
    listed = documented()
    assert {key: value for key, value, _ in listed} == defaults("bridged")
    assert {key: value for key, _, value in listed} == defaults("paper")


@pytest.mark.parametrize("page", sorted((ROOT / "configs").rglob("*.md")), ids=lambda p: p.name)
def test_every_link_leads_to_a_file_and_a_heading(page):
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text(encoding="utf-8")):
        if target.startswith("http"):
            continue
        name, _, anchor = target.partition("#")
        path = page.parent / name if name else page
        assert path.exists(), target
        if anchor:
            headings = re.findall(r"^#+ (.+)$", path.read_text(encoding="utf-8"), re.M)
            anchors = {re.sub(r"[^\w -]", "", h.lower()).replace(" ", "-") for h in headings}
            assert anchor in anchors, target


def test_every_key_says_what_it_means():
    silent = [key.name for key in configuration().all_keys() if not key.meaning.strip()]
    assert silent == []


def _value(text: str) -> Any:
    """Return a default as YAML gives it; PyYAML reads 1e-08, without a dot, as a string."""
    value = yaml.safe_load(text)
    return float(text) if re.fullmatch(r"\d+e-\d+", text) else value

"""configs/README.md lists every key of the configuration with its default, and nothing else."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

import fedsp_mpi
from fedsp_mpi import config
from fedsp_mpi.config.limits import STAGES

REFERENCE = Path(fedsp_mpi.__file__).resolve().parent.parent / "configs" / "README.md"
# A row of a table of keys: "| `key` | `default` (paper: `default`) | unit | meaning |".
ROW = re.compile(r"\| `([\w.]+)` \| `([^`]*)`(?: \(paper: `([^`]*)`\))? \|[^|]*\|[^|]*\|")
# One row stands for a key of all five stages, or of both roles.
PLACEHOLDERS = {"STAGE": STAGES, "ROLE": ("server", "client")}


def settings(section: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield every dotted key of a configuration with its value."""
    for field in dataclasses.fields(section):
        value, key = getattr(section, field.name), prefix + field.name
        if dataclasses.is_dataclass(value):
            yield from settings(value, f"{key}.")
        else:
            yield key, list(value) if isinstance(value, tuple) else value


def defaults(recipe: str) -> dict[str, Any]:
    """Return the value of every key that is left out under a recipe; model.name has to be given."""
    values = dict(settings(config.checked({"recipe": recipe, "model": {"name": "any"}})))
    return values | {"model.name": None}


def documented() -> list[tuple[str, Any, Any]]:
    """Return each key of configs/README.md with its defaults under `bridged` and `paper`."""
    rows = []
    text = REFERENCE.read_text(encoding="utf-8")
    for line in text.splitlines():
        match = ROW.fullmatch(line)
        if match is None:
            continue
        key, bridged, paper = match.groups()
        first, _, rest = key.partition(".")
        names = [f"{name}.{rest}" for name in PLACEHOLDERS[first]] if first.isupper() else [key]
        paper = bridged if paper is None else paper
        rows += [(name, _value(bridged), _value(paper)) for name in names]
    return rows


def test_every_key_is_listed_once_and_no_other():
    listed = [key for key, _, _ in documented()]
    assert sorted(listed) == sorted(defaults("bridged"))


def test_every_default_is_that_of_the_code():
    listed = documented()
    assert {key: value for key, value, _ in listed} == defaults("bridged")
    assert {key: value for key, _, value in listed} == defaults("paper")


def test_every_row_of_a_table_of_keys_is_read():
    """A row with a slip of the pen must not be skipped in silence."""
    lines = REFERENCE.read_text(encoding="utf-8").splitlines()
    starts = [i for i, line in enumerate(lines) if line.startswith("| key |")]
    for start in starts:
        for line in lines[start + 2 :]:
            if not line.startswith("|"):
                break
            assert ROW.fullmatch(line), line


def _value(text: str) -> Any:
    """Return a default as YAML gives it; PyYAML reads 1e-08, without a dot, as a string."""
    value = yaml.safe_load(text)
    return float(text) if re.fullmatch(r"\d+e-\d+", text) else value

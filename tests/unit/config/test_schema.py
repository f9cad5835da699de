"""The JSON schema takes every file of the repository, and refuses what the reader refuses."""

from __future__ import annotations

import json
import math
import os
import typing

import hypothesis
import jsonschema
import pytest
import yaml
from hypothesis import strategies as st

from fedsp_mpi import cli, config
from fedsp_mpi.commands.sweep_schema import sweep_schema
from fedsp_mpi.commands.trials import trials_of
from fedsp_mpi.config import Config, ConfigError
from fedsp_mpi.config.experiment import checked
from fedsp_mpi.config.keys import RECIPES
from fedsp_mpi.config.limits import require_ranges
from fedsp_mpi.config.methods import require_method
from fedsp_mpi.config.parsing import parse
from fedsp_mpi.config.schema import schema
from fedsp_mpi.config.yaml_reader import parse_yaml
from helpers.configs import leaves
from helpers.paths import ROOT

EXAMPLES = int(os.environ.get("FEDSP_EXAMPLES", "400"))
FILE = jsonschema.Draft202012Validator(schema())
SWEEP = jsonschema.Draft202012Validator(sweep_schema())
FILES = [
    *sorted((ROOT / "configs").rglob("*.yaml")),
    config.EMBEDDED,
    *(config.EMBEDDED.parent / "recipes" / f"{name}.yaml" for name in RECIPES),
]


def test_both_are_schemas_of_their_draft():
    for validator in (FILE, SWEEP):
        jsonschema.Draft202012Validator.check_schema(validator.schema)


def test_every_file_of_the_repository_fits():
    num_sweeps = 0
    for path in FILES:
        data = parse_yaml(path.read_text(encoding="utf-8"), str(path))
        is_sweep = not {"methods", "folder"}.isdisjoint(data)
        num_sweeps += is_sweep
        errors = [error.message for error in (SWEEP if is_sweep else FILE).iter_errors(data)]
        assert errors == [], path
    assert num_sweeps > 10 and len(FILES) - num_sweeps > 20


def test_a_resolved_configuration_fits():
    """As a run writes it into its folder, with every key."""
    assert FILE.is_valid(yaml.safe_load(config.to_yaml(config.load(None))))


REFUSED = {
    "unknown key": "federation: {clinets: 3}",
    "unknown section": "fedration: {clients: 3}",
    "unknown key, three deep": "client: {tuning: {optimizer: {lr: 0.1}}}",
    "unknown key of a silo": "federation: {silos: [{source: a, nmae: b}]}",
    "unknown key of a pattern": "federation: {silos: {source: 'a/{silo}', nmaes: [b]}}",
    "octal": "federation: {rounds: 010}",
    "base 60": "federation: {rounds: 1:30}",
    "a number for a text": "model: {name: 3}",
    "a switch for a number": "federation: {rounds: true}",
    "a number for a switch": "record: {prompts: 1}",
    "a fraction of a round": "federation: {rounds: 2.5}",
    "null where a number is": "federation: {rounds: null}",
    "a value for a section": "federation: 3",
    "a list for a section": "data: {limit: [1, 2]}",
    "a value for a list": "attack: {clients: 3}",
    "switches for words": "data: {verbaliser: [true, false]}",
    "a list for names": "data: {columns: [a, b]}",
    "a number for a column": "data: {columns: {a: 1}}",
    "no choice": "prompt: {kind: prefx}",
    "no method": "method: fedspp",
    "no recipe": "recipe: null",
    "true for the choice 1": "data: {first_label: true}",
    "too few": "federation: {rounds: 0}",
    "too many": "server: {compute: {threads: 1000000}}",
    "no more than 0": "data: {alpha: 0}",
    "not below 1": "client: {tuning: {optimizer: {beta1: 1}}}",
    "beyond a float": f"data: {{alpha: 1{'0' * 310}}}",
    "a list for extends": "extends: {a: b}",
    "least of one stage": "client: {tuning: {steps: 0}}",
    "a silo's least": "federation: {silos: [{source: a, weight: 0}]}",
    "a pattern's most": "federation: {silos: {source: 'a/*', limit: 10000000000}}",
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_the_reader_refuses(tmp_path, case):
    data = parse_yaml(REFUSED[case], case)
    assert not FILE.is_valid(data)
    path = tmp_path / "c.yaml"
    path.write_text(REFUSED[case])
    with pytest.raises(ConfigError):
        config.load(path, ["model.name=x"] if "name: 3" not in REFUSED[case] else [])


SWEEPS = {
    "fits": ("", True),
    "unknown key": ("mehtods: {}", False),
    "unknown key of a method": ("methods: {a: {prompt: {knid: input}}}", False),
    "no seed": ("seeds: []", False),
    "a seed twice": ("seeds: [1, 1]", False),
    "seeds in words": ("seeds: [one]", False),
    "no folder": ("folder: 3", False),
    "no task": ("tasks: {}", False),
    "a name that no file can have": ("methods: {a/b: null}", False),
    "a number for settings": ("methods: {a: 3}", False),
    "a list of trials": ("trials: [a]", False),
    "empty layers": ("trials: null", True),
    "a file for a task": ("tasks: {t: t.yaml}", True),
}


@pytest.mark.parametrize("case", SWEEPS)
def test_what_a_sweep_may_say(tmp_path, case):
    text, fits = SWEEPS[case]
    data = {"folder": "runs/x", "seeds": [1], "tasks": {"t": None}, "methods": {"m": None}}
    data |= yaml.safe_load(text) or {}
    assert SWEEP.is_valid(data) == fits
    (tmp_path / "t.yaml").write_text("")
    (tmp_path / "s.yaml").write_text(yaml.safe_dump(data))
    try:
        trials_of(tmp_path / "s.yaml")
    except ConfigError:
        assert not fits
    else:
        assert fits


# -- every key with every kind of value ------------------------------------------------------------

# The schema is stricter: about words for a switch, and about numbers in quotes.
words = st.sampled_from(["", "text", "auto", "prefix", "mean", "null", "1:30", "half"])
numbers = st.one_of(
    st.integers(-3, 3),
    st.integers(),
    st.sampled_from([1024, 1025, 4096, 4097, 10**6 + 1, 2**63, -(2**63) - 1, 10**310]),
    st.floats(0, 2),
    st.floats(allow_nan=False, allow_infinity=False),
)
# A whole float is an integer in JSON, and none in YAML.
scalars = st.one_of(
    words,
    numbers.filter(lambda number: isinstance(number, int) or not float(number).is_integer()),
    st.none(),
    st.booleans(),
)
values = st.one_of(
    scalars,
    st.lists(scalars, max_size=2),
    st.dictionaries(words, st.one_of(scalars, st.lists(words, max_size=2)), max_size=2),
)
KEYS = [(name, hint) for name, hint in leaves(Config) if name != "federation.silos"]


def choices(hint: object) -> list[object]:
    """Return the values of a Literal, also in a union."""
    parts = [hint, *typing.get_args(hint)]
    literals = [part for part in parts if typing.get_origin(part) is typing.Literal]
    return [value for literal in literals for value in typing.get_args(literal)]


def is_read(data: dict) -> bool:
    """Whether the reader takes it, key by key; not whether its keys agree with each other."""
    try:
        settings = parse(Config, data, "")
        require_method(settings.method)
        require_ranges(settings)
    except ConfigError:
        return False
    return True


@hypothesis.settings(
    max_examples=EXAMPLES,
    derandomize=True,
    deadline=None,
    database=None,
    suppress_health_check=[hypothesis.HealthCheck.too_slow],  # a busy machine is none of its matter
)
@hypothesis.given(st.data())
def test_the_schema_takes_what_the_reader_takes(data):
    name, hint = data.draw(st.sampled_from(KEYS))
    fitting = choices(hint)
    value = data.draw(values | st.sampled_from(fitting) if fitting else values)
    *sections, last = name.split(".")
    settings: dict = {last: value}
    for section in reversed(sections):
        settings = {section: settings}
    assert FILE.is_valid(settings) == is_read(settings), settings


def test_every_end_of_a_range_is_in_the_schema():
    """The least and the greatest value that a key takes, and those beyond."""
    ends = 0
    for name, hint in KEYS:
        node: dict = FILE.schema
        for part in name.split("."):
            node = node["properties"][part]
        low = node.get("minimum", node.get("exclusiveMinimum"))
        if low is None:
            assert hint == tuple[int, ...] or not {int, float} & {hint, *typing.get_args(hint)}
            continue
        ends += 1
        high = node.get("maximum", node.get("exclusiveMaximum"))
        is_whole = int in (hint, *typing.get_args(hint))
        tries = [low, high, low - 1, high + 1 if is_whole else math.nextafter(high, math.inf)]
        for value in tries:
            settings: dict = {}
            place = settings
            *sections, last = name.split(".")
            for section in sections:
                place = place.setdefault(section, {})
            place[last] = value if is_whole else float(value)
            assert FILE.is_valid(settings) == is_read(settings), (name, value)
    assert ends > 90


# -- the verb --------------------------------------------------------------------------------------


def test_the_verb_prints_both_schemas(capsys):
    assert cli.main(["config", "--schema"]) == 0
    assert json.loads(capsys.readouterr().out) == FILE.schema
    assert cli.main(["config", "--schema", "sweep"]) == 0
    assert json.loads(capsys.readouterr().out) == SWEEP.schema


def test_the_verb_prints_what_a_run_would_read(tmp_path, capsys):
    path = ROOT / "configs/own_text/reviews.yaml"
    assert cli.main(["config", str(path), "--set", "federation.rounds=3"]) == 0
    settings = checked(yaml.safe_load(capsys.readouterr().out))
    assert settings == config.load(path, ["federation.rounds=3"])
    assert cli.main(["config", str(path), "--schema"]) == 2
    assert "found a configuration with --schema" in capsys.readouterr().err

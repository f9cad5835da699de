"""Configurations that nobody means: each is one line, found at once, that says what was found and
expected.
"""

from __future__ import annotations

import dataclasses
import os
import re
import time
import typing
from pathlib import Path

import hypothesis
import pytest
import yaml
from hypothesis import strategies as st

from fedsp_mpi import config
from fedsp_mpi.config import Config, ConfigError
from fedsp_mpi.config.parsing import error_line
from helpers.configs import leaves
from helpers.mpi import both_ends
from helpers.runs import fedsp

EXAMPLES = int(os.environ.get("FEDSP_EXAMPLES", "200"))
SECONDS = 10  # a configuration takes milliseconds; a slow machine gets some room
SAYS_WHAT = re.compile("expected|did you mean|known keys")
BOMB = "a: &a [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{new}: &{new} [{', '.join([f'*{old}'] * 9)}]\n"
    for old, new in zip("abcdefghijk", "bcdefghijkl")
)
# What a file holds -> words of the message.
FILES = {
    "alias bomb": (BOMB, "more than 50000 values"),
    "circle of aliases": ("run: &a [*a]", "no circle"),
    "brackets": ("run: " + "[" * 3000, "nested deeper than 50 levels in line 1"),
    "closed brackets": ("run: " + "[" * 3000 + "]" * 3000, "nested deeper than 50 levels"),
    "half a character": (
        'model: {name: "\\ud800"}',
        "model.name: found '\\ud800', expected text in UTF-8",
    ),
    "NUL": (
        'data: {source: "a\\0b"}',
        "data.source: found 'a\\x00b' with the control character '\\x00'",
    ),
    "section twice": (
        "run: {seed: 1}\nmodel: {name: x}\nrun: {label: a}",
        "'run' in line 1 and again in line 3",
    ),
    "key twice": (
        "run: {seed: 1, label: x, seed: 2}",
        "the key 'seed' in line 1 and again in line 1",
    ),
    "octal": (
        "federation: {rounds: 010}",
        "found '010' (a text), expected a whole number without a leading zero",
    ),
    "base 60": (
        "federation: {rounds: 1:30}",
        "found '1:30' (a text), expected a whole number, not one in base 60",
    ),
    "no month": (
        "run: {seed: 2024-13-45}",
        "run.seed: found '2024-13-45' (a text), expected a whole number",
    ),
    "5000 digits": (
        f"run: {{seed: {'9' * 5000}}}",
        "a number of 5000 digits in line 1, expected at most 400",
    ),
    "beyond a float": (
        f"data: {{alpha: 1{'0' * 310}}}",
        "data.alpha: found a number of about 311 digits",
    ),
    "hexadecimal": (
        f"run: {{seed: 0x{'f' * 390}}}",
        "run.seed: found a number of about 470 digits, expected at most",
    ),
    "long text": (f"run: {{seed: {'x' * 100_000}}}", "run.seed: found 'xxx"),
    "very long text": (
        f"run: {{label: {'x' * 100_000}}}",
        "run.label: found a text of 100000 characters, expected at",
    ),
    "long key": (f"run: {{{'x' * 500}: 1}}", "found an unknown key; known keys: name, folder"),
    "code": (
        "run: !!python/object/apply:os.getcwd []",
        "the tag '!!python/object/apply:os.getcwd' in line 1",
    ),
    "number that is none": ("run: {seed: !!int abc}", "the tag '!!int' in line 1"),
    "no text in quotes": (
        "data: {verbaliser: [true, false]}",
        "found true, expected a text; put it in quotes",
    ),
    "threads": (
        "server: {compute: {threads: 1000000}}",
        "server.compute.threads: found 1000000, expected at",
    ),
    "a large file": ("#" * 300_000, "bytes, expected a YAML configuration of at most 262144"),
    "a file of NUL": ('extends: "a\\0b"', "extends: found 'a\\x00b' with the control character"),
    "a device": ("extends: /dev/zero", "/dev/zero: found a device or socket, expected a YAML file"),
    "a folder": ("extends: .", "found a folder, expected a YAML file"),
    "a pipe": ("extends: pipe", "pipe: found a pipe, expected a YAML file"),
    "itself in a row": (
        "extends: [" + ", ".join(["empty.yaml"] * 200) + "]",
        "found more than 100 files that extend",
    ),
}


def message(folder: Path, path: Path | None, overrides: list[str]) -> str | None:
    """Return what is wrong with a configuration, or None.

    It is a line of at most 300 characters, found at once. The configuration is built as the
    commands build it, and written as a run writes it into its folder.
    """
    start = time.monotonic()
    try:
        settings = config.load(path, overrides)
    except ConfigError as error:
        text = str(error)
    else:
        text = None
        path = folder / "again.yaml"
        path.write_text(config.to_yaml(settings), encoding="utf-8")
        assert config.load(path) == settings
    assert time.monotonic() - start < SECONDS
    if text is not None:
        assert (
            len(text) <= 300 and text.isprintable() and "found" in text and SAYS_WHAT.search(text)
        ), text
    return text


@pytest.mark.parametrize("case", FILES)
def test_files_that_nobody_means(tmp_path, case):
    content, words = FILES[case]
    content = content if "model:" in content else f"{content}\nmodel: {{name: x}}\n"
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "empty.yaml").write_text("")
    (tmp_path / "c.yaml").write_text(content)
    text = message(tmp_path, tmp_path / "c.yaml", [])
    assert text is not None and words in text, text


@pytest.mark.parametrize(
    ("item", "words"),
    [
        ("federation.rounds=" + "[" * 3000, "nested deeper than 50 levels"),
        (
            "run={seed: 1, seed: 2}",
            "the key 'seed' in line 1 and again in line 1, expected it once",
        ),
        ("model.name=\udcff", "expected text in UTF-8; correct the bytes, or set LC_ALL=C.UTF-8"),
        (
            "model.name=a: b",
            "model.name: found {'a': 'b'} (a section), expected a text; put it in quotes",
        ),
        ("x" * 5000, "found no '=', expected key=value"),
        ("federation.rounds.x=1", "found a value at 'rounds', expected a section"),
    ],
    ids=["brackets", "twice", "half a character", "section", "no value", "no section"],
)
def test_settings_that_nobody_means(tmp_path, item, words):
    assert words in (message(tmp_path, None, ["federation.rounds=3", item]) or "")


def test_scalars_are_those_of_yaml_1_2_where_the_key_is_a_text(tmp_path):
    """And what a run writes into its folder, which is YAML 1.1, reads back to the same."""
    for text in ("yes", "no", "on", "010", "08", "1:30", "2024-01-01", "1e5", "0o14", "=", "12e34"):
        (tmp_path / "c.yaml").write_text(f"model: {{name: x}}\nrun: {{label: {text}}}")
        settings = config.load(tmp_path / "c.yaml")
        assert settings.run.label == text
        (tmp_path / "again.yaml").write_text(config.to_yaml(settings))
        assert config.load(tmp_path / "again.yaml") == settings


@pytest.mark.parametrize(
    ("text", "value"), [("yes", True), ("off", False), ("No", False), ("TRUE", True)]
)
def test_a_switch_may_be_turned_in_plain_words(tmp_path, text, value):
    (tmp_path / "c.yaml").write_text(f"model: {{name: x}}\nrecord: {{prompts: {text}}}")
    assert config.load(tmp_path / "c.yaml").record.prompts is value


def test_an_alias_that_is_no_bomb_is_what_it_stands_for(tmp_path):
    stage = "&s {steps: 3, optimizer: {learning_rate: 0.5}}"
    content = (
        f"model: {{name: x}}\nclient: {{tuning: {stage}, alignment: *s}}\nserver: "
        "{tuning: {<<: *s, steps: 4}}"
    )
    (tmp_path / "c.yaml").write_text(content)
    settings = config.load(tmp_path / "c.yaml")
    assert settings.client.tuning == settings.client.alignment
    assert (settings.server.tuning.steps, settings.server.tuning.optimizer.learning_rate) == (
        4,
        0.5,
    )


def test_what_another_library_says_of_a_long_value_is_short():
    """Not of a path of a usual length, which is to be copied; a terminal gets no control
    characters.
    """
    path = "/lustre/" + "project/" * 25 + "set"
    assert (
        error_line(f"{path}: found no\n  folder \x1b[31m") == f"{path}: found no folder \\x1b[31m"
    )
    assert len(error_line("data.source: found " + "x" * 9000)) < 300


# -- every key with every kind of value ------------------------------------------------------------

NUMBERS = [
    0,
    1,
    -1,
    2,
    3,
    7,
    10**6,
    2**31,
    2**63,
    -(2**63) - 1,
    10**18,
    10**310,
    10**399,
    0.5,
    -0.0,
    1e-320,
    1e308,
]
TEXTS = [
    "",
    " ",
    "auto",
    "null",
    "~",
    "yes",
    "010",
    "1:30",
    "0x1f",
    "1_000",
    "5e-4",
    "2024-13-45",
    "a: b",
    "{mask}",
    "..",
    "/",
]
ODD = [
    "\0",
    "\ud800",
    "\udcff",
    "\x1b[31m",
    "a\nb",
    "\u2028",
    "ü",
    "x" * 300,
    "x" * 20_000,
    "[" * 3000,
    "%s{0}",
    "&a [*a]",
]
scalars = st.one_of(
    st.sampled_from(
        [*NUMBERS, *TEXTS, *ODD, None, True, False, float("nan"), float("inf"), -float("inf")]
    ),
    st.integers(),
    st.floats(),
    st.text(max_size=40),
)
values = st.recursive(
    scalars,
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(st.text(max_size=5) | st.integers(), inner, max_size=3)
    ),
    max_leaves=12,
)
KEYS = leaves(Config)


def fitting(hint: object) -> st.SearchStrategy[object]:
    """Values of a key's type, most of them out of any sensible range."""
    kinds = [kind for kind in typing.get_args(hint) if kind is not type(None)] or [hint]
    if typing.get_origin(hint) is tuple:
        return st.lists(fitting(kinds[0]), max_size=4)
    if dataclasses.is_dataclass(kinds[0]):
        names = [field.name for field in dataclasses.fields(kinds[0])]
        return st.dictionaries(st.sampled_from(names), values, max_size=4)
    if typing.get_origin(kinds[0]) is typing.Literal or typing.get_origin(hint) is typing.Literal:
        return st.sampled_from(typing.get_args(kinds[0]) or kinds)
    of_kind = {
        int: st.integers(-3, 10**12),
        float: st.floats(allow_nan=False),
        bool: st.booleans(),
        str: st.text(),
    }
    return of_kind[kinds[0]]


def mutated() -> st.SearchStrategy[tuple[str, object]]:
    """A key, and a value that may be of its type."""
    of_key = [st.tuples(st.just(key), values | fitting(hint)) for key, hint in KEYS]
    sections = sorted({key.rpartition(".")[0] for key, _ in KEYS} - {""})
    return st.one_of(
        *of_key, st.tuples(st.sampled_from([*sections, "nothing.there", "run.nmae", ""]), values)
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("hostile")


@hypothesis.settings(max_examples=EXAMPLES, derandomize=True, deadline=None, database=None)
@hypothesis.given(
    st.lists(mutated(), min_size=1, max_size=3), st.sampled_from(["embedded", "paper"])
)
def test_whatever_a_key_is_set_to(folder, changes, base):
    """As a file and as `--set`: taken, or refused in one line; never a traceback, never a wait."""
    sections = (
        {"extends": str(config.EMBEDDED)}
        if base == "embedded"
        else {"model": {"name": "x"}, "recipe": "paper"}
    )
    for key, value in changes:
        *above, last = key.split(".")
        place: dict = sections
        for part in above:
            place = below if isinstance(below := place.setdefault(part, {}), dict) else {}
        place[last] = value
    path = folder / "c.yaml"
    path.write_text(yaml.safe_dump(sections), encoding="utf-8")
    message(folder, path, [])
    message(
        folder,
        path,
        [f"{key}={yaml.safe_dump(value).removesuffix('...' + chr(10))}" for key, value in changes],
    )
    message(folder, None, [f"{key}={value}" for key, value in changes if type(value) is not int])


@pytest.mark.parametrize("case", ["alias bomb", "beyond a float", "half a character", "a pipe"])
def test_a_run_says_so_in_one_line_with_status_2(tmp_path, case):
    content, _ = FILES[case]
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "c.yaml").write_text(
        f"extends: {config.EMBEDDED}\n{content}" if "extends" not in content else content
    )
    arguments = [
        "run",
        str(tmp_path / "c.yaml"),
        "--set",
        f"run.folder={tmp_path / 'runs'}",
    ]
    result = fedsp(2 if case == "beyond a float" else 0, arguments, status=2)
    lines = result.stderr.strip().splitlines()
    assert len(lines) == 1 and len(lines[0]) < 330 and lines[0].startswith("fedsp_mpi: "), (
        both_ends(result)
    )
    assert not (tmp_path / "runs").exists()

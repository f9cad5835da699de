"""A mistake on the command line is one line: found, expected, and where to read more."""

from __future__ import annotations

import pytest

from fedsp_mpi import cli


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ("rnu", "VERB: found 'rnu', expected one of 'run', 'check'"),
        ("run --every x", "--every: found 'x', expected a number"),
        ("run --every nan", "--every: found nan, expected at least 0"),
        ("run --every 1e999", "--every: found 1e999, expected at most 1e+09"),
        ("run --replace=1", "--replace: found the value '1', expected none"),
        ("run --re", "found --re, expected one of --replace, --resume"),
        ("run --nmae=x", "found --nmae=x, expected only arguments that this command has"),
        ("run --set", "--set: found no value behind it, expected one"),
        ("report", "found no RUN, expected one"),
        (
            "report x --markdown --table comparison",
            "--table: found together with --markdown, expected one of them",
        ),
        ("bench local --steps 0", "--steps: found 0, expected at least 1"),
        ("plan --tokens " + "9" * 5000, "--tokens: found '999"),
        ("run --" + "x" * 5000, "expected only arguments that this command has"),
    ],
)
def test_a_mistake_is_one_line(arguments, words, capsys):
    assert cli.main(arguments.split()) == 2
    [line] = capsys.readouterr().err.splitlines()
    assert (
        line.startswith("fedsp_mpi: ")
        and words in line
        and line.endswith("--help")
        and len(line) <= 330
    ), line

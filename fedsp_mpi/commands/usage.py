"""Explain mistakes on the command line in the style of all messages; parse bounded numbers."""

from __future__ import annotations

import argparse
import re
from collections.abc import Callable

from fedsp_mpi.config.parsing import message_line, shown

# What argparse says -> what was found and what was expected.
_EXPLANATIONS = (
    (
        r"(?:argument (.+): )?invalid choice: (.+) \(choose from (.+)\)",
        r"\1: found \2, expected one of \3",
    ),
    (
        r"argument (.+): not allowed with argument (.+)",
        r"\1: found together with \2, expected one of them",
    ),
    (r"argument (.+): expected one argument", r"\1: found no value behind it, expected one"),
    (r"argument (.+): ignored explicit argument (.+)", r"\1: found the value \2, expected none"),
    (r"ambiguous option: (.+) could match (.+)", r"found \1, expected one of \2"),
    (r"unrecognized arguments: (.+)", r"found \1, expected only arguments that this command has"),
    (r"the following arguments are required: (.+)", r"found no \1, expected one"),
    (r"argument (.+): invalid int value: (.+)", r"\1: found \2, expected a whole number"),
    (r"argument (.+): invalid float value: (.+)", r"\1: found \2, expected a number"),
    (r"argument (.+?): (.+)", r"\1: \2"),
)
_MAX_MESSAGE = 240  # characters
_MAX_VALUE = 40  # characters of a value in a message


def explained(message: str, program: str) -> str:
    """Rewrite a message of argparse in one line: found, expected, and where to read more.

    Args:
        message: of argparse.
        program: with its verb, as in "fedsp_mpi run".
    """
    text = message
    for pattern, explanation in _EXPLANATIONS:
        match = re.fullmatch(pattern, message, re.DOTALL)
        if match is not None:
            text = match.expand(explanation).removeprefix(": ")
            break
    return f"{message_line(text, _MAX_MESSAGE)}; see {program} --help"


def number(
    kind: type[int] | type[float], low: float, high: float, *, above: bool = False
) -> Callable[[str], float]:
    """Make an argparse type that accepts numbers within bounds.

    Args:
        kind: int or float.
        low: the smallest number.
        high: the largest number.
        above: do not accept `low` itself.
    """
    kind_name = "a whole number" if kind is int else "a number"

    def parse(text: str) -> float:
        try:
            value = kind(text)
        except (ValueError, OverflowError):
            raise argparse.ArgumentTypeError(f"found {shown(text)}, expected {kind_name}") from None
        is_large_enough = value > low if above else value >= low
        # Both comparisons are False for nan.
        if not is_large_enough:
            expected = f"a number above {low:g}" if above else f"at least {low:g}"
        elif not value <= high:
            expected = f"at most {high:g}"
        else:
            return value
        raise argparse.ArgumentTypeError(
            f"found {message_line(text, _MAX_VALUE)}, expected {expected}"
        )

    return parse

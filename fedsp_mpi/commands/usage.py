"""What argparse says about a mistake on the command line, in the words of all other messages; and
numbers in bounds.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Callable

from fedsp_mpi.config.parsing import message_line, shown

# What argparse says -> what was found and what was expected.
_WORDS = (
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


def explained(message: str, program: str) -> str:
    """Say what argparse found wrong, in one line: what was found, what was expected, where to read
    more.
    """
    text = message
    for pattern, words in _WORDS:
        if (match := re.fullmatch(pattern, message, re.DOTALL)) is not None:
            text = match.expand(words).removeprefix(": ")
            break
    return f"{message_line(text, 240)}; see {program} --help"


def number(
    kind: type[int] | type[float], low: float, high: float, above: bool = False
) -> Callable[[str], float]:
    """Make a type of argparse: numbers from `low` to `high`, without `low` itself if they are to be
    `above` it.
    """
    name = "a whole number" if kind is int else "a number"

    def of_text(text: str) -> float:
        try:
            value = kind(text)
        except (ValueError, OverflowError):
            raise argparse.ArgumentTypeError(f"found {shown(text)}, expected {name}") from None
        if not (low < value if above else low <= value):
            bound = f"a number above {low:g}" if above else f"at least {low:g}"
            raise argparse.ArgumentTypeError(f"found {message_line(text, 40)}, expected {bound}")
        if not value <= high:
            raise argparse.ArgumentTypeError(
                f"found {message_line(text, 40)}, expected at most {high:g}"
            )
        return value

    return of_text

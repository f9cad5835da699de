"""Write the script by which a shell completes the words of `fedsp-mpi`.

shtab turns the command line's own parser into the script. What a word may be, other than an option,
is told by its metavar: a file, a folder, or a key of the configuration.
"""

from __future__ import annotations

import argparse
import dataclasses
import typing
from collections.abc import Iterator

import shtab

from fedsp_mpi.config import Config

PROGRAM = "fedsp-mpi"
SHELLS = ("bash", "zsh", "fish")
_FILES = ("CONFIG", "FILE", "RUN")
_KEYS = {shell: f"_fedsp_mpi_{shell}_keys" for shell in SHELLS}
# A key ends with "=", behind which the user goes on: no blank may follow it.
_PREAMBLES = {
    "bash": '{function}() {{ compgen -S = -W "{keys}" -- "$1"; }}',
    "zsh": "{function}() {{ compadd -S = -- {keys}; }}",
    "fish": "function {function}; printf '%s=\\n' {keys}; end",
}
_BASH_WITHOUT_BLANK = """
_fedsp_mpi_complete() {
  _shtab_fedsp_mpi "$@"
  [[ ${COMPREPLY[0]} == *= ]] && compopt -o nospace
  return 0
}
complete -o bashdefault -o default -F _fedsp_mpi_complete fedsp-mpi"""


def script(parser: argparse.ArgumentParser, shell: str) -> str:
    """Return the script for a shell.

    Args:
        parser: of the command line, whose actions are given what completes them.
        shell: one of `SHELLS`.
    """
    parser.prog = PROGRAM
    _complete_words(parser)
    text = shtab.complete(parser, shell=shell, preamble="")
    return text + _BASH_WITHOUT_BLANK if shell == "bash" else text


def keys() -> list[str]:
    """Return the dotted keys of the configuration."""
    return list(_keys(Config, ""))


def _keys(section: type, prefix: str) -> Iterator[str]:
    hints = typing.get_type_hints(section)
    for field in dataclasses.fields(section):
        kind = hints[field.name]
        if dataclasses.is_dataclass(kind):
            yield from _keys(typing.cast(type, kind), f"{prefix}{field.name}.")
        else:
            yield f"{prefix}{field.name}"


def _complete_words(parser: argparse.ArgumentParser) -> None:
    """Say of the actions of a parser, and of its verbs, what completes their words."""
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for verb in action.choices.values():
                _complete_words(verb)
        elif action.metavar in _FILES:
            action.complete = shtab.FILE  # type: ignore[attr-defined]
        elif action.metavar == "FOLDER":
            action.complete = shtab.DIRECTORY  # type: ignore[attr-defined]
        elif action.metavar == "KEY=VALUE":
            action.complete = _key_completion()  # type: ignore[attr-defined]


def _key_completion() -> dict[str, object]:
    """Return what completes a key, in shtab's form: by shell, with functions that it needs."""
    words = " ".join(keys())
    preambles = {
        shell: text.format(function=_KEYS[shell], keys=words) for shell, text in _PREAMBLES.items()
    }
    return {**_KEYS, "fish": f"({_KEYS['fish']})", "preamble": preambles}

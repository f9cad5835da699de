"""Plain data, as YAML gives it, to frozen dataclasses: unknown keys and wrong types are refused by
their dotted key.
"""

from __future__ import annotations

import dataclasses
import difflib
import math
import re
import reprlib
import types
import typing
from collections.abc import Iterable
from contextlib import suppress
from typing import Any, Literal

LONGEST_MESSAGE = 300  # characters of what is said about a configuration
LONGEST_TEXT = 10_000  # characters of a value
_LONGEST_NAME = 60  # characters of a key in a message
_LONGEST_WORD, _LONGEST_ERROR = (
    256,
    2_000,
)  # characters of what another library or a path may add to a message
_ITEMS = {int: "0, 1", str: "one, two"}  # what a list of them looks like
_KINDS = {
    int: "a whole number",
    float: "a number that is finite",
    bool: "true or false",
    str: "a text",
}
_SWITCHES = {
    "yes": True,
    "no": False,
    "on": True,
    "off": False,
}  # texts to YAML 1.2, but plain enough
# What no text of a configuration may hold: control characters other than line ends and tabs, and
# halves of characters.
_UNFIT = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f\ud800-\udfff]")


class ConfigError(ValueError):
    """A mistake in a configuration: the key, what was found, what was expected."""


class _Brief(reprlib.Repr):
    """Writes values as YAML has them, and never all of a long one."""

    def __init__(self) -> None:
        super().__init__()
        self.maxlevel = 2
        self.maxdict = self.maxlist = self.maxtuple = self.maxset = 3
        self.maxstring = self.maxother = _LONGEST_NAME

    def repr_int(self, value: int, level: int) -> str:
        digits = int(value.bit_length() * math.log10(2)) + 1
        return repr(value) if digits <= 40 else f"a number of about {digits} digits"

    def repr_bool(self, value: bool, level: int) -> str:
        return "true" if value else "false"

    def repr_NoneType(self, value: None, level: int) -> str:
        return "null"


def shown(value: Any) -> str:
    """Write a value for a message, in about 60 characters at most; long texts and collections are
    shortened.
    """
    return message_line(_Brief().repr(value), 2 * _LONGEST_NAME)


def message_line(text: str, longest: int = LONGEST_MESSAGE) -> str:
    """Write a text in one line of at most `longest` printable characters; the middle of a longer
    one is left out.
    """
    if len(text) > 10 * longest:
        text = f"{text[: 5 * longest]} {text[-5 * longest :]}"
    words = " ".join(text.split())
    line = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in words)
    if len(line) <= longest:
        return line
    tail = longest // 3
    return f"{line[: longest - tail - 3]}...{line[-tail:]}"


def error_line(text: str) -> str:
    """Write an error's text in one line, in which no word is longer than a path may be expected to
    be.
    """
    words = (message_line(word, _LONGEST_WORD) for word in text[: 2 * _LONGEST_ERROR].split())
    return message_line(" ".join(words), _LONGEST_ERROR)


def require_text(text: str, where: str) -> None:
    """Raise ConfigError if a text is too long, or holds characters that neither a path nor a prompt
    may have.
    """
    if len(text) > LONGEST_TEXT:
        raise ConfigError(
            f"{where}: found a text of {len(text)} characters, expected at most "
            f"{LONGEST_TEXT}; put less there"
        )
    if not (unfit := _UNFIT.search(text)):
        return
    character = unfit.group()
    if "\ud800" <= character <= "\udfff":
        raise ConfigError(
            f"{where}: found {shown(text)}, expected text in UTF-8; correct the bytes, or "
            "set LC_ALL=C.UTF-8 if the "
            "terminal's locale is what spoils them"
        )
    raise ConfigError(
        f"{where}: found {shown(text)} with the control character {character!a}, "
        "expected a text without; leave it out"
    )


def parse(kind: Any, data: Any, where: str) -> Any:
    """Turn plain data into the dataclass or type `kind`; `where` is its dotted key for messages."""
    if dataclasses.is_dataclass(kind):
        return _parse_section(kind, data, where)
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin in (types.UnionType, typing.Union):
        if data is None and type(None) in arguments:
            return None
        return parse(next(a for a in arguments if a is not type(None)), data, where)
    if origin is tuple:
        if not isinstance(data, (list, tuple)):
            raise ConfigError(
                f"{where}: found {shown(data)}, expected a list, such as [{_ITEMS[arguments[0]]}]"
            )
        return tuple(
            parse(arguments[0], one, f"{where}[{place}]") for place, one in enumerate(data)
        )
    if origin is dict:
        if not isinstance(data, dict):
            raise ConfigError(
                f"{where}: found {type(data).__name__}, expected a section of names, "
                "such as {a: b}"
            )
        key_kind, value_kind = arguments
        return {
            parse(key_kind, key, where): parse(value_kind, value, f"{where}.{key}")
            for key, value in data.items()
        }
    if origin is Literal:
        if data in arguments and type(data) is type(arguments[0]):
            return data
        near = nearest(data, map(str, arguments))
        hint = f"; did you mean {near!r}?" if near else ""
        raise ConfigError(
            f"{where}: found {shown(data)}, expected one of {', '.join(map(str, arguments))}{hint}"
        )
    return _parse_scalar(kind, data, where)


def _parse_section(kind: Any, data: Any, where: str) -> Any:
    if data is None:
        data = {}
    if not isinstance(data, dict):
        raise ConfigError(
            f"{where or 'configuration'}: found {shown(data)}, expected a section with keys"
        )
    hints = typing.get_type_hints(kind)
    names = {f.name: f for f in dataclasses.fields(kind)}
    values = {}
    for key, value in data.items():
        if key not in names:
            raise ConfigError(unknown_key(key, names, where))
        dotted = f"{where}.{key}" if where else key
        default = _default(names[key])
        if (
            dataclasses.is_dataclass(default)
            and not isinstance(default, type)
            and (value is None or isinstance(value, dict))
        ):
            value = merge(dataclasses.asdict(default), value or {})
        values[key] = parse(hints[key], value, dotted)
    return kind(**values)


def unknown_key(key: Any, names: Iterable[str], where: str = "") -> str:
    """Say that a section has no such key, and which it has."""
    name = message_line(key, _LONGEST_NAME) if isinstance(key, str) else shown(key)
    near = nearest(key, names, cutoff=0.5)
    hint = (
        f"did you mean {near!r}?" if near else message_line(f"known keys: {', '.join(names)}", 180)
    )
    return (
        f"{where}.{name}: found an unknown key; {hint}"
        if where
        else f"{name}: found an unknown key; {hint}"
    )


def nearest(word: Any, names: Iterable[str], cutoff: float = 0.6) -> str | None:
    """Find the name that a misspelt word is most like; None if it is like none, or no word."""
    if not isinstance(word, (str, bool, int)) or (
        isinstance(word, str) and len(word) > _LONGEST_NAME
    ):
        return None
    near = difflib.get_close_matches(
        word if isinstance(word, str) else shown(word), list(names), 1, cutoff
    )
    return near[0] if near else None


def _default(definition: dataclasses.Field) -> Any:
    if definition.default_factory is not dataclasses.MISSING:
        return definition.default_factory()
    return definition.default


def _parse_scalar(kind: Any, data: Any, where: str) -> Any:
    if kind is float and isinstance(data, (int, str)) and not isinstance(data, bool):
        with suppress(ValueError, OverflowError):
            data = float(data)  # YAML 1.1 reads 5e-4 as a string
    if kind is bool and isinstance(data, str):
        data = _SWITCHES.get(data.lower(), data)
    is_finite = not isinstance(data, float) or math.isfinite(data)
    if isinstance(data, kind) and is_finite and not (kind is not bool and isinstance(data, bool)):
        if kind is str:
            require_text(data, where)
        return data
    needs_quotes = isinstance(data, (bool, int, float, dict))
    hint = "; put it in quotes" if kind is str and needs_quotes else _number_hint(kind, data)
    raise ConfigError(
        f"{where}: found {shown(data)}{_kind_of(data)}, expected {_KINDS[kind]}{hint}"
    )


def _kind_of(data: Any) -> str:
    """Name the kind of a value, in brackets, where its look does not say it."""
    names = {
        str: "a text",
        int: "a whole number",
        float: "a number",
        list: "a list",
        dict: "a section",
    }
    return f" ({names[type(data)]})" if type(data) in names else ""


def _number_hint(kind: Any, data: Any) -> str:
    """Say why a text that looks like a number is none."""
    if kind is int and isinstance(data, str) and re.fullmatch(r"[-+]?0[0-9_]+", data):
        return " without a leading zero, which YAML 1.1 reads as octal"
    if (
        kind in (int, float)
        and isinstance(data, str)
        and re.fullmatch(r"[-+]?[0-9][0-9_]*(:[0-5]?[0-9])+(\.[0-9]*)?", data)
    ):
        return ", not one in base 60"
    return ""


def merge(base: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    """`base` with `over` laid on it, section by section, of which an empty one changes nothing;
    neither is changed.
    """
    merged = dict(base)
    for key, value in over.items():
        if isinstance(merged.get(key), dict) and (value is None or isinstance(value, dict)):
            value = merge(merged[key], value or {})
        merged[key] = value
    return merged


def put(data: dict[str, Any], key: str, value: Any, whose: str) -> None:
    """Set a key such as a.b.c in nested mappings; `whose` names it in an error."""
    *sections, last = key.split(".")
    for section in sections:
        if data.get(section) is None:
            data[section] = {}
        below = data[section]
        if not isinstance(below, dict):
            raise ConfigError(f"{whose}: found a value at {shown(section)}, expected a section")
        data = below
    data[last] = value


def differences(
    before: dict[str, Any], now: dict[str, Any], free: tuple[str, ...] = (), where: str = ""
) -> list[str]:
    """The keys in which two nested mappings differ: "key: was ..., is ...".

    Args:
        free: beginnings of keys that may differ.
        where: beginning of the keys that are found.
    """
    found = []
    for name in sorted(before.keys() | now.keys()):
        key, one, other = f"{where}{name}", before.get(name), now.get(name)
        if isinstance(one, dict) and isinstance(other, dict):
            found += differences(one, other, free, f"{key}.")
        elif one != other and not key.startswith(free):
            was, now_is = (message_line(str(value), 3 * _LONGEST_NAME) for value in (one, other))
            found.append(f"{key}: was {was}, is {now_is}")
    return found

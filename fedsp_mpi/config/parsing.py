"""Plain data, as YAML gives it, to frozen dataclasses; mistakes are named by their dotted key."""

from __future__ import annotations

import dataclasses
import difflib
import math
import re
import reprlib
import types
import typing
from collections.abc import Iterable, Sequence
from contextlib import suppress
from typing import Any, Literal, NoReturn

from fedsp_mpi.files.untrusted import JsonObject

Section = JsonObject  # plain data by key, as YAML gives it

LONGEST_MESSAGE = 300  # characters of a message about a configuration
LONGEST_TEXT = 10_000  # characters of a value
_LONGEST_NAME = 60  # characters of a key in a message
# Characters of what another library or a path may add to a message.
_LONGEST_WORD = 256
_LONGEST_ERROR = 2_000
_ITEMS = {int: "0, 1", str: "one, two"}  # what a list of them looks like
_KINDS = {
    int: "a whole number",
    float: "a number that is finite",
    bool: "true or false",
    str: "a text",
}
# Texts in YAML 1.2, but it is plain what they mean.
_SWITCHES = {"yes": True, "no": False, "on": True, "off": False}
# What no text of a configuration may hold: control characters other than line ends and tabs, and
# halves of surrogate pairs.
_UNFIT = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f\ud800-\udfff]")


class ConfigError(ValueError):
    """A mistake in a configuration: the key, what was found, what was expected.

    Args:
        message: of the mistake; begins with its key.
        other_keys: of further mistakes.
    """

    def __init__(self, message: str, other_keys: Iterable[str] = ()) -> None:
        super().__init__(message)
        self.other_keys = tuple(other_keys)


class _Brief(reprlib.Repr):
    """Writes values as YAML does, and shortens long ones."""

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


def shown(value: object) -> str:
    """Write a value for a message; long texts and collections are cut to about 60 characters."""
    return message_line(_Brief().repr(value), 2 * _LONGEST_NAME)


def message_line(text: str, longest: int = LONGEST_MESSAGE) -> str:
    """Write a text in one line of printable characters, without the middle of a long one.

    Args:
        text: of any length.
        longest: characters of the line.
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
    """Write an error's text in one line, in which no word is longer than a path usually is."""
    words = (message_line(word, _LONGEST_WORD) for word in text[: 2 * _LONGEST_ERROR].split())
    return message_line(" ".join(words), _LONGEST_ERROR)


def all_mistakes(mistakes: Sequence[ConfigError]) -> ConfigError:
    """Return the first of some mistakes, which knows the keys of the others."""
    first, *later = mistakes
    keys = list(first.other_keys)
    for mistake in later:
        keys += [str(mistake).partition(": ")[0], *mistake.other_keys]
    return ConfigError(str(first), keys)


def mistake_line(mistake: ConfigError) -> str:
    """Write a mistake in one line, with as many keys of further ones as it has room for."""
    line = message_line(str(mistake))
    keys = [message_line(key, _LONGEST_NAME) for key in mistake.other_keys]
    for num_shown in range(len(keys), 0, -1):
        num_left = len(keys) - num_shown
        ending = f" and {num_left} more" if num_left else ""
        longer = f"{line}; also wrong: {', '.join(keys[:num_shown])}{ending}"
        if len(longer) <= LONGEST_MESSAGE:
            return longer
    return line


def require_text(text: str, where: str) -> None:
    """Raise ConfigError if a text is too long, or has characters that no path or prompt may have.

    Args:
        text: of a configuration.
        where: its dotted key for the message.
    """
    if len(text) > LONGEST_TEXT:
        raise ConfigError(
            f"{where}: found a text of {len(text)} characters, expected at most "
            f"{LONGEST_TEXT}; put less there"
        )
    match = _UNFIT.search(text)
    if match is None:
        return
    character = match.group()
    if "\ud800" <= character <= "\udfff":
        raise ConfigError(
            f"{where}: found {shown(text)}, expected text in UTF-8; correct the bytes, or set "
            "LC_ALL=C.UTF-8 if the terminal's locale is what spoils them"
        )
    raise ConfigError(
        f"{where}: found {shown(text)} with the control character {character!a}, "
        "expected a text without; leave it out"
    )


def parse(kind: Any, data: object, where: str) -> Any:
    """Turn plain data into a dataclass or another type.

    Args:
        kind: the type, such as `Config`, `int | None`, `tuple[str, ...]` or a Literal.
        data: as YAML gives it.
        where: its dotted key for messages.

    Raises:
        ConfigError: a key is unknown, or a value is of another type.
    """
    if dataclasses.is_dataclass(kind):
        return _parse_section(kind, data, where)
    origin = typing.get_origin(kind)
    arguments = typing.get_args(kind)
    if origin in (types.UnionType, typing.Union):
        if data is None and type(None) in arguments:
            return None
        # Of two kinds, such as a text or a list of texts, the value's own one is taken.
        is_list = isinstance(data, (list, tuple))
        kinds = [argument for argument in arguments if argument is not type(None)]
        # A word that stands for a value, such as `auto` for a number.
        words = [word for kind in kinds for word in typing.get_args(kind) if isinstance(word, str)]
        if data in words:
            return data
        kinds = [kind for kind in kinds if typing.get_origin(kind) is not Literal] or kinds
        fitting = [kind for kind in kinds if (typing.get_origin(kind) is tuple) == is_list]
        return parse((fitting or kinds)[0], data, where)
    if origin is tuple:
        if not isinstance(data, (list, tuple)):
            items = _ITEMS.get(arguments[0], "{...}, {...}")
            raise ConfigError(f"{where}: found {shown(data)}, expected a list, such as [{items}]")
        return tuple(
            parse(arguments[0], item, f"{where}[{index}]") for index, item in enumerate(data)
        )
    if origin is dict:
        if data is None:
            data = {}
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
        choices = [str(argument) for argument in arguments]
        near = nearest(data, choices)
        hint = f"; did you mean {near!r}?" if near else ""
        raise ConfigError(
            f"{where}: found {shown(data)}, expected one of {', '.join(choices)}{hint}"
        )
    return _parse_scalar(kind, data, where)


def _parse_section(kind: Any, data: object, where: str) -> Any:
    if data is None:
        data = {}
    if not isinstance(data, dict):
        raise ConfigError(
            f"{where or 'configuration'}: found {shown(data)}, expected a section with keys"
        )
    hints = typing.get_type_hints(kind)
    names = {f.name: f for f in dataclasses.fields(kind)}
    values = {}
    mistakes: list[ConfigError] = []
    for key, value in data.items():
        if key not in names:
            mistakes.append(ConfigError(unknown_key(key, names, where)))
            continue
        default = _default(names[key])
        if _is_section(default) and (value is None or isinstance(value, dict)):
            # A section keeps the defaults of its owner, which need not be those of its class.
            value = merge(dataclasses.asdict(default), value or {})
        try:
            values[key] = parse(hints[key], value, f"{where}.{key}" if where else key)
        except ConfigError as mistake:
            mistakes.append(mistake)
    if mistakes:
        raise all_mistakes(mistakes)
    return kind(**values)


def _is_section(default: object) -> bool:
    return dataclasses.is_dataclass(default) and not isinstance(default, type)


def unknown_key(key: object, names: Iterable[str], where: str = "") -> str:
    """Return the message that a section has no such key.

    Args:
        key: that was found.
        names: of the keys that the section has.
        where: dotted key of the section.
    """
    name = message_line(key, _LONGEST_NAME) if isinstance(key, str) else shown(key)
    near = nearest(key, names, cutoff=0.5)
    if near is None:
        hint = message_line(f"known keys: {', '.join(names)}", 180)
    else:
        hint = f"did you mean {near!r}?"
    dotted = f"{where}.{name}" if where else name
    return f"{dotted}: found an unknown key; {hint}"


def nearest(word: object, names: Iterable[str], cutoff: float = 0.6) -> str | None:
    """Find the name that a misspelt word is most like.

    Args:
        word: as YAML gives it: `off`, for instance, is a bool.
        names: to choose from.
        cutoff: least similarity, from 0 to 1.

    Returns:
        The name; None if the word is like none of them, or no word.
    """
    if not isinstance(word, (str, bool, int)):
        return None
    text = word if isinstance(word, str) else shown(word)
    if isinstance(word, str) and len(text) > _LONGEST_NAME:
        return None
    matches = difflib.get_close_matches(text, list(names), 1, cutoff)
    return matches[0] if matches else None


def _default(definition: dataclasses.Field) -> Any:
    if definition.default_factory is not dataclasses.MISSING:
        return definition.default_factory()
    return definition.default


def _parse_scalar(kind: type, data: object, where: str) -> object:
    if kind is float and isinstance(data, (int, str)) and not isinstance(data, bool):
        with suppress(ValueError, OverflowError):
            data = float(data)  # YAML 1.1 reads 5e-4 as a string
    if kind is bool and isinstance(data, str):
        data = _SWITCHES.get(data.lower(), data)
    is_finite = not isinstance(data, float) or math.isfinite(data)
    is_misplaced_bool = isinstance(data, bool) and kind is not bool  # Python's bool is an int
    if not isinstance(data, kind) or not is_finite or is_misplaced_bool:
        _refuse_scalar(kind, data, where)
    if kind is str:
        require_text(str(data), where)
    return data


def _refuse_scalar(kind: type, data: object, where: str) -> NoReturn:
    needs_quotes = kind is str and isinstance(data, (bool, int, float, dict))
    hint = "; put it in quotes" if needs_quotes else _number_hint(kind, data)
    raise ConfigError(
        f"{where}: found {shown(data)}{_kind_of(data)}, expected {_KINDS[kind]}{hint}"
    )


def _kind_of(data: object) -> str:
    """Name the kind of a value, in brackets, where its looks do not show it."""
    names = {
        str: "a text",
        int: "a whole number",
        float: "a number",
        list: "a list",
        dict: "a section",
    }
    return f" ({names[type(data)]})" if type(data) in names else ""


def _number_hint(kind: type, data: object) -> str:
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


def merge(base: Section, over: Section) -> Section:
    """Lay `over` on `base`, section by section; neither is changed.

    An empty section of `over` changes nothing.
    """
    merged = dict(base)
    for key, value in over.items():
        if isinstance(merged.get(key), dict) and (value is None or isinstance(value, dict)):
            value = merge(merged[key], value or {})
        merged[key] = value
    return merged


def put(data: Section, key: str, value: object, *, whose: str) -> None:
    """Set a key such as a.b.c in nested mappings.

    Args:
        data: is changed.
        key: dotted.
        value: of the key.
        whose: names the key in an error.

    Raises:
        ConfigError: there is a value in the place of a section.
    """
    *sections, last = key.split(".")
    for section in sections:
        if data.get(section) is None:
            data[section] = {}
        inner = data[section]
        if not isinstance(inner, dict):
            raise ConfigError(f"{whose}: found a value at {shown(section)}, expected a section")
        data = inner
    data[last] = value


def differences(
    before: Section, now: Section, *, free: tuple[str, ...] = (), where: str = ""
) -> list[str]:
    """Return the keys in which two nested mappings differ: "key: was ..., is ...".

    Args:
        before: nested mappings.
        now: nested mappings.
        free: beginnings of keys that may differ.
        where: beginning of the dotted keys, with its dot.
    """
    changes: list[str] = []
    for name in sorted(before.keys() | now.keys()):
        key = f"{where}{name}"
        old = before.get(name)
        new = now.get(name)
        if isinstance(old, dict) and isinstance(new, dict):
            changes += differences(old, new, free=free, where=f"{key}.")
        elif old != new and not key.startswith(free):
            was = message_line(str(old), 3 * _LONGEST_NAME)
            now_is = message_line(str(new), 3 * _LONGEST_NAME)
            changes.append(f"{key}: was {was}, is {now_is}")
    return changes

"""Plain data, as YAML gives it, to frozen dataclasses: unknown keys and wrong types are refused by their dotted key."""

from __future__ import annotations

import dataclasses
import difflib
import math
import types
import typing
from contextlib import suppress
from pathlib import Path
from typing import Any, Literal

import yaml

_SOME = {int: "0, 1", str: "one, two"}  # what a list of them looks like


class ConfigError(ValueError):
    """A mistake in a configuration: the key, what was found, what was expected."""


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
            raise ConfigError(f"{where}: found {data!r}, expected a list, such as [{_SOME[arguments[0]]}]")
        return tuple(parse(arguments[0], one, f"{where}[{place}]") for place, one in enumerate(data))
    if origin is dict:
        if not isinstance(data, dict):
            raise ConfigError(f"{where}: found {type(data).__name__}, expected a section of names, such as {{a: b}}")
        key_kind, value_kind = arguments
        return {parse(key_kind, key, where): parse(value_kind, value, f"{where}.{key}") for key, value in data.items()}
    if origin is Literal:
        if data in arguments and type(data) is type(arguments[0]):
            return data
        near = difflib.get_close_matches(str(data), [str(a) for a in arguments], 1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise ConfigError(f"{where}: found {data!r}, expected one of {', '.join(map(str, arguments))}{hint}")
    return _parse_scalar(kind, data, where)


def _parse_section(kind: Any, data: Any, where: str) -> Any:
    if data is None:
        data = {}
    if not isinstance(data, dict):
        raise ConfigError(f"{where or 'configuration'}: found {data!r}, expected a section with keys")
    hints = typing.get_type_hints(kind)
    names = {f.name: f for f in dataclasses.fields(kind)}
    values = {}
    for key, value in data.items():
        dotted = f"{where}.{key}" if where else str(key)
        if key not in names:
            near = difflib.get_close_matches(str(key), names, 1, cutoff=0.5)
            hint = f"did you mean {near[0]!r}?" if near else f"known keys: {', '.join(names)}"
            raise ConfigError(f"{dotted}: found an unknown key; {hint}")
        default = _default(names[key])
        if (
            dataclasses.is_dataclass(default)
            and not isinstance(default, type)
            and (value is None or isinstance(value, dict))
        ):
            value = merge(dataclasses.asdict(default), value or {})
        values[key] = parse(hints[key], value, dotted)
    return kind(**values)


def _default(definition: dataclasses.Field) -> Any:
    if definition.default_factory is not dataclasses.MISSING:
        return definition.default_factory()
    return definition.default


def _parse_scalar(kind: Any, data: Any, where: str) -> Any:
    if kind is float and isinstance(data, (int, str)) and not isinstance(data, bool):
        with suppress(ValueError):
            data = float(data)  # YAML 1.1 reads 5e-4 as a string
    is_finite = not isinstance(data, float) or math.isfinite(data)
    if isinstance(data, kind) and is_finite and not (kind is not bool and isinstance(data, bool)):
        return data
    names = {int: "a whole number", float: "a number that is finite", bool: "true or false", str: "a text"}
    raise ConfigError(f"{where}: found {data!r} ({type(data).__name__}), expected {names[kind]}")


def merge(base: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    """`base` with `over` laid on it, section by section, of which an empty one changes nothing; neither is changed."""
    merged = dict(base)
    for key, value in over.items():
        if isinstance(merged.get(key), dict) and (value is None or isinstance(value, dict)):
            value = merge(merged[key], value or {})
        merged[key] = value
    return merged


def read_yaml(path: Path, seen: tuple[Path, ...] = ()) -> dict[str, Any]:
    """The mapping in a YAML file, laid over those that it extends."""
    if path.resolve() in seen:
        raise ConfigError(f"{path}: found a circle of `extends`, expected a chain that ends")
    try:
        data = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
    except OSError as error:
        raise ConfigError(f"{path}: found no readable file ({error.strerror}), expected a YAML configuration") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        reason = " ".join(str(error).split())
        raise ConfigError(f"{path}: found text that is not YAML ({reason}), expected a YAML configuration") from None
    if not isinstance(data, dict):
        raise ConfigError(f"{path}: found a {type(data).__name__}, expected a mapping of sections")
    return extended(data, path, (*seen, path.resolve()))


def extended(data: dict[str, Any], path: Path, seen: tuple[Path, ...] = ()) -> dict[str, Any]:
    """A mapping that stands in the file `path`, laid over the files that its `extends` names; it is not changed.

    `extends` is one file or a list of them, relative to `path`: the later win over the earlier, the mapping over all.
    """
    found = data.get("extends")
    names = found if isinstance(found, list) else [found] if found is not None else []
    whole: dict[str, Any] = {}
    for name in names:
        if not isinstance(name, str):
            raise ConfigError(f"{path}: found {name!r} in `extends`, expected the name of a file, or a list of them")
        whole = merge(whole, read_yaml(path.parent / name, seen))
    return merge(whole, {key: value for key, value in data.items() if key != "extends"})


def key_value(item: str) -> tuple[str, Any]:
    """A key and its value, which is YAML, from `key=value`."""
    key, equals, text = item.partition("=")
    if not equals or not key:
        raise ConfigError(f"--set {item}: found no '=', expected key=value, for instance federation.rounds=10")
    try:
        return key, yaml.safe_load(text)
    except (yaml.YAMLError, ValueError):  # the latter for 2024-13-45, which looks like a date
        return key, text


def put(data: dict[str, Any], key: str, value: Any, whose: str) -> None:
    """Set a key such as a.b.c in nested mappings; `whose` names it in an error."""
    *sections, last = key.split(".")
    for section in sections:
        if data.get(section) is None:
            data[section] = {}
        below = data[section]
        if not isinstance(below, dict):
            raise ConfigError(f"{whose}: found a value at {section!r}, expected a section")
        data = below
    data[last] = value


def differences(before: dict[str, Any], now: dict[str, Any], free: tuple[str, ...] = (), where: str = "") -> list[str]:
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
            found.append(f"{key}: was {one}, is {other}")
    return found

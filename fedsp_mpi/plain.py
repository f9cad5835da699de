"""Plain data, as YAML gives it, to frozen dataclasses: unknown keys and wrong types are refused by their dotted key."""

from __future__ import annotations

import dataclasses
import difflib
import math
import types
import typing
from contextlib import suppress
from typing import Any, Literal


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
    """`base` with `over` laid on it, section by section; neither is changed."""
    merged = dict(base)
    for key, value in over.items():
        if isinstance(value, dict) and isinstance(merged.get(key), dict):
            value = merge(merged[key], value)
        merged[key] = value
    return merged

"""YAML files and `key=value` to plain data, within bounds.

Nothing in a file can hang, exhaust or confuse the reader. Scalars are those of YAML 1.2 as far as
1.1 agrees: `yes`, `010`, `1:30` and `2024-01-01` are texts. What `yaml.safe_dump` writes (YAML 1.1)
therefore reads back to the same.
"""

from __future__ import annotations

import re
import stat
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import yaml

from fedsp_mpi.config.parsing import ConfigError, Section, merge, message_line, require_text, shown

MOST_BYTES = 256 * 1024  # of a file
MOST_FILES = 100  # that a configuration extends; one that is named twice counts twice
_MOST_VALUES = 50_000  # of a file; those behind an alias count wherever it stands
_MOST_LEVELS = 50  # of nesting
_MOST_DIGITS = 400  # a float has 309 at most
_TAG = "tag:yaml.org,2002:"
_PLAIN_TAGS = (None, "!", f"{_TAG}str")


class _Loader(yaml.SafeLoader):
    """Builds plain data only; raises ConfigError before it gets too deep, too large, or ambiguous.

    Args:
        text: the YAML.
        source: what messages call it.
    """

    yaml_implicit_resolvers: dict[str, object] = {}  # noqa: RUF012
    yaml_constructors: dict[str, object] = {}  # noqa: RUF012

    def __init__(self, text: str, source: str) -> None:
        super().__init__(text)
        self._source = source
        self._level = 0
        self._sizes: dict[int, int] = {}  # values in a complete node, by its id

    def compose_node(
        self, parent: yaml.Node | None, index: int | yaml.Node | None
    ) -> yaml.Node | None:
        """Compose one value.

        Raises:
            ConfigError: there are too many values, or they are nested too deep.
            yaml.YAMLError: it has a tag, which would build more than plain data.
        """
        event = self.peek_event()
        is_alias = isinstance(event, yaml.AliasEvent)
        if not is_alias and getattr(event, "tag", None) not in _PLAIN_TAGS:
            raise yaml.YAMLError(
                f"the tag {shown(event.tag.replace(_TAG, '!!'))} in line "
                f"{event.start_mark.line + 1}"
            )
        self._level += 1
        if self._level > _MOST_LEVELS:
            raise ConfigError(
                f"{self._source}: found values nested deeper than {_MOST_LEVELS} levels in line "
                f"{event.start_mark.line + 1}, expected sections with keys"
            )
        node = super().compose_node(parent, index)
        self._level -= 1
        self._measure(node, event)
        return node

    def compose_mapping_node(self, anchor: str | None) -> yaml.MappingNode:
        """Compose a section; raise ConfigError for a key that stands there twice."""
        node = super().compose_mapping_node(anchor)
        lines: dict[tuple[str, str], int] = {}
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode) or key.tag == f"{_TAG}merge":
                continue
            name = (key.tag, key.value)
            line = key.start_mark.line + 1
            if name in lines:
                raise ConfigError(
                    f"{self._source}: found the key {shown(key.value)} in line {lines[name]} and "
                    f"again in line {line}, expected it once; put all that belongs to it in one "
                    "place"
                )
            lines[name] = line
        return node

    def _measure(self, node: yaml.Node, event: yaml.Event) -> None:
        """Count the values in a node; those behind an alias count again."""
        if isinstance(event, yaml.AliasEvent):
            if id(node) not in self._sizes:
                raise ConfigError(
                    f"{self._source}: found *{event.anchor} within &{event.anchor}, "
                    "expected no circle"
                )
            return
        parts: list[yaml.Node] = [] if isinstance(node, yaml.ScalarNode) else node.value
        if isinstance(node, yaml.MappingNode):
            parts = [part for pair in parts for part in pair]
        size = 1 + sum(self._sizes[id(part)] for part in parts)
        self._sizes[id(node)] = size
        if size > _MOST_VALUES:
            raise ConfigError(
                f"{self._source}: found more than {_MOST_VALUES} values, those behind an alias "
                "(*name) counted where it stands, expected fewer; leave some out"
            )

    def number(self, node: yaml.ScalarNode) -> int:
        """Build a whole number; raise ConfigError if it is longer than any that could be meant."""
        digits = node.value.replace("_", "")
        if len(digits) > _MOST_DIGITS:
            raise ConfigError(
                f"{self._source}: found a number of {len(digits)} digits in line "
                f"{node.start_mark.line + 1}, expected at most {_MOST_DIGITS}"
            )
        return int(digits, 0)

    def undefined(self, node: yaml.Node) -> NoReturn:
        """Raise YAMLError for what has no place in a configuration."""
        raise yaml.YAMLError(
            f"{shown(node.value)}, which is no plain value, in line {node.start_mark.line + 1}"
        )


def _set_up() -> None:
    """Teach the loader its scalars."""
    digits = list("-+0123456789")
    scalars: list[tuple[str, str, list[str]]] = [
        ("bool", "true|True|TRUE|false|False|FALSE", list("tTfF")),
        (
            "int",
            "[-+]?0b[01_]*[01]|[-+]?0x[0-9a-fA-F_]*[0-9a-fA-F]|[-+]?(?:0|[1-9][0-9_]*)",
            digits,
        ),
        (
            "float",
            r"[-+]?[0-9][0-9_]*\.[0-9_]*(?:[eE][-+][0-9]+)?|\.[0-9][0-9_]*(?:[eE][-+][0-9]+)?"
            r"|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN)",
            [*digits, "."],
        ),
        ("merge", "<<", ["<"]),
        ("null", "~|null|Null|NULL|", ["~", "n", "N", ""]),
    ]
    for name, pattern, first in scalars:
        _Loader.add_implicit_resolver(f"{_TAG}{name}", re.compile(f"^(?:{pattern})$"), first)
    safe = yaml.SafeLoader.yaml_constructors
    for name in ("null", "bool", "float", "str", "seq", "map"):
        _Loader.add_constructor(f"{_TAG}{name}", safe[f"{_TAG}{name}"])
    _Loader.add_constructor(f"{_TAG}int", _Loader.number)
    _Loader.add_constructor(None, _Loader.undefined)


_set_up()


def parse_yaml(text: str, source: str) -> Any:
    """Build the plain data of one YAML document.

    Raises:
        ConfigError: it is too large, too deep, or says something twice; the message begins with
            `source`.
        yaml.YAMLError: it is not YAML.
    """
    if len(text) > MOST_BYTES:
        raise ConfigError(f"{source}: found {len(text)} characters, expected at most {MOST_BYTES}")
    loader = _Loader(text, source)
    try:
        return loader.get_single_data()
    finally:
        loader.dispose()


@dataclass
class _Reading:
    """Counts the files of one configuration."""

    files: int = 0


def read_yaml(path: Path, seen: tuple[Path, ...] = (), reading: _Reading | None = None) -> Section:
    """Read the mapping in a YAML file, laid over those that it extends.

    Args:
        path: of the file.
        seen: the files that extend this one, outermost first.
        reading: counts the files of one configuration.

    Raises:
        ConfigError: the first mistake.
    """
    reading = reading or _Reading()
    reading.files += 1
    if reading.files > MOST_FILES:
        raise ConfigError(
            f"{path}: found more than {MOST_FILES} files that extend each other, expected fewer"
        )
    require_text(str(path), "configuration's file" if not seen else f"{seen[-1]}: extends")
    try:
        resolved = path.resolve()
        if resolved in seen:
            raise ConfigError(f"{path}: found a circle of `extends`, expected a chain that ends")
        data = parse_yaml(_content(path), str(path)) or {}
    except (OSError, RuntimeError) as error:  # RuntimeError: links in a circle
        reason = getattr(error, "strerror", None) or message_line(str(error), 100)
        raise ConfigError(
            f"{path}: found no readable file ({reason}), expected a YAML configuration"
        ) from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(
            f"{path}: found text that is not YAML ({_reason(error)}), expected a configuration"
        ) from None
    if not isinstance(data, dict):
        raise ConfigError(f"{path}: found {shown(data)}, expected a mapping of sections")
    return extended(data, path, seen=(*seen, resolved), reading=reading)


def _reason(error: Exception) -> str:
    """Say why a text is not YAML, and in which line if that is known."""
    problem = getattr(error, "problem", None)
    mark = getattr(error, "problem_mark", None)
    where = f" in line {mark.line + 1}" if mark else ""
    return message_line(f"{problem or error}", 120) + where


def _content(path: Path) -> str:
    """Read a regular, small file; raise ConfigError for any other, without opening it."""
    status = path.stat()
    if not stat.S_ISREG(status.st_mode):
        kinds = {stat.S_IFDIR: "a folder", stat.S_IFIFO: "a pipe"}
        kind = kinds.get(stat.S_IFMT(status.st_mode), "a device or socket")
        raise ConfigError(f"{path}: found {kind}, expected a YAML file")
    if status.st_size > MOST_BYTES:
        raise ConfigError(
            f"{path}: found a file of {status.st_size} bytes, expected a YAML configuration "
            f"of at most {MOST_BYTES}"
        )
    return path.read_text(encoding="utf-8")


def extended(
    data: Section, path: Path, *, seen: tuple[Path, ...] = (), reading: _Reading | None = None
) -> Section:
    """Lay a mapping over the files that its `extends` names; the mapping itself is not changed.

    `extends` is one file or a list of them: later files win over earlier ones, the mapping over
    all.

    Args:
        data: the mapping.
        path: of the file that it stands in; names in `extends` are relative to it.
        seen: the files that extend this one, outermost first.
        reading: counts the files of one configuration.

    Raises:
        ConfigError: the first mistake.
    """
    reading = reading or _Reading()
    entry = data.get("extends")
    names: list[object] = []
    if isinstance(entry, list):
        names = entry
    elif entry is not None:
        names = [entry]
    base: Section = {}
    for name in names:
        if not isinstance(name, str):
            raise ConfigError(
                f"{path}: found {shown(name)} in `extends`, expected the name of a file, or a "
                "list of them"
            )
        require_text(name, f"{path}: extends")
        base = merge(base, read_yaml(path.parent / name, seen, reading))
    return merge(base, {key: value for key, value in data.items() if key != "extends"})


def key_value(item: str) -> tuple[str, Any]:
    """Split `key=value` into the key and its value, which is YAML; what is not YAML is a text."""
    key, equals, text = item.partition("=")
    source = setting(item)
    if not equals or not key:
        raise ConfigError(
            f"{source}: found no '=', expected key=value, for instance federation.rounds=10"
        )
    try:
        return key, parse_yaml(text, source)
    except yaml.YAMLError:
        return key, text


def setting(item: str) -> str:
    """Return how messages name an override."""
    return f"--set {message_line(item, 80)}"

"""What the free-form parts of a record must be like, so that everybody who reads one can rely on
it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, get_type_hints

from fedsp_mpi.config import Config

_NUMBER = (int, float)
# Where a value is used as more than a text, what it must be; it may be absent.
_KINDS: dict[str, tuple[type, ...]] = {
    "config.attack.clients": (list,),
    "config.client.alignment.steps": (int,),
    "config.data.loss_over": (str,),
    "config.federation.clients": (int,),
    "config.method": (str,),
    "config.run.label": (str, type(None)),
    "config.run.seed": (int,),
    "sections.data.client_shards": (list,),
    "sections.data.client_shards.*": _NUMBER,
    "sections.models.auxiliary": (int, dict),
    "sections.models.prompt_on_the_wire": (int, dict),
    "sections.privacy.rounds_again": (int,),
}
_WORDS = {
    list: "a list",
    dict: "a mapping",
    int: "a whole number",
    float: "a number",
    str: "a text",
}


def require(config: Mapping[str, Any], sections: Mapping[str, Any]) -> None:
    """Raise ValueError, naming the place, if a part that the package reads is of another kind than
    a run writes.
    """
    _require_sections(Config, config, "config")
    for place, kinds in _KINDS.items():
        root, *path = place.split(".")
        for value in _values({"config": config, "sections": sections}.get(root, {}), path):
            if not isinstance(value, kinds) or isinstance(value, bool):
                raise ValueError(
                    f"{_kind(value)} at {place}, where a run writes {_WORDS[kinds[0]]}"
                )


def _require_sections(kind: Any, content: Any, place: str) -> None:
    """What is a section of the configuration must be a mapping."""
    if not isinstance(content, Mapping):
        raise ValueError(f"{_kind(content)} at {place}, where a run writes a mapping")
    hints = get_type_hints(kind)
    for field in dataclasses.fields(kind):
        below = hints[field.name]
        if dataclasses.is_dataclass(below) and field.name in content:
            _require_sections(below, content[field.name], f"{place}.{field.name}")


def _values(content: Any, path: list[str]) -> list[Any]:
    """What lies at a path; "*" stands for all items of a list."""
    values = [content]
    for name in path:
        if name == "*":
            values = [item for value in values if isinstance(value, list) for item in value]
        else:
            values = [
                value[name] for value in values if isinstance(value, Mapping) and name in value
            ]
    return values


def _kind(value: Any) -> str:
    return _WORDS.get(type(value), f"{value!r}")

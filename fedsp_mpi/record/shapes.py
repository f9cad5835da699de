"""Checks the free-form parts of a record, so that every reader of one can rely on their types."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, get_type_hints

from fedsp_mpi.config import Config
from fedsp_mpi.files.untrusted import JsonMapping

_NUMBER = (int, float)
# What a value must be that the package uses as more than a text; it may be absent.
_TYPES: dict[str, tuple[type, ...]] = {
    "config.attack.clients": (list,),
    "config.client.alignment.steps": (int,),
    "config.data.loss_over": (str,),
    "config.federation.clients": (int,),
    "config.method": (str,),
    "config.run.label": (str, type(None)),
    "config.run.seed": (int,),
    "sections.data.client_shards": (list,),
    "sections.data.client_shards.*": _NUMBER,
    "sections.instruction.text": (str,),
    "sections.models.auxiliary": (int, dict),
    "sections.models.prompt_on_the_wire": (int, dict),
    "sections.origin.initial": (str,),
    "sections.origin.runs": (list,),
    "sections.origin.runs.*": (dict,),
    "sections.origin.runs.*.folder": (str,),
    "sections.origin.runs.*.method": (str,),
    "sections.origin.runs.*.round": (int,),
    "sections.origin.runs.*.rounds": (int,),
    "sections.origin.runs.*.run": (str,),
    "sections.origin.runs.*.weights": (dict,),
    "sections.plain_use.dtype": (str,),
    "sections.plain_use.kind": (str,),
    "sections.plain_use.model": (str,),
    "sections.plain_use.question": (dict,),
    "sections.plain_use.question.choices": (list,),
    "sections.plain_use.question.choices.*": (str,),
    "sections.plain_use.question.gap": (str,),
    "sections.plain_use.question.num_tokens": (int,),
    "sections.plain_use.question.text": (str,),
    "sections.plain_use.tokenizer": (str,),
    "sections.plain_use.tuned": (str,),
    "sections.privacy.rounds_again": (int,),
}
_WORDS = {
    list: "a list",
    dict: "a mapping",
    int: "a whole number",
    float: "a number",
    str: "a text",
}


def require(config: JsonMapping, sections: JsonMapping) -> None:
    """Raise ValueError if a part that the package reads is of another type than a run writes.

    The error names the place.
    """
    _require_sections(Config, config, "config")
    content = {"config": config, "sections": sections}
    for place, types in _TYPES.items():
        for value in _values_at(content, place.split(".")):
            # A bool is an int in Python, and never what a run writes in these places.
            if not isinstance(value, types) or isinstance(value, bool):
                raise ValueError(
                    f"{_described(value)} at {place}, where a run writes {_WORDS[types[0]]}"
                )


def _require_sections(section: Any, content: object, place: str) -> None:
    """Raise ValueError unless every section of the configuration is a mapping.

    Args:
        section: the section's dataclass.
        content: what the record has in its place.
        place: its dotted name, for the error.
    """
    if not isinstance(content, Mapping):
        raise ValueError(f"{_described(content)} at {place}, where a run writes a mapping")
    hints = get_type_hints(section)
    for field in dataclasses.fields(section):
        subsection = hints[field.name]
        if dataclasses.is_dataclass(subsection) and field.name in content:
            _require_sections(subsection, content[field.name], f"{place}.{field.name}")


def _values_at(content: object, path: Sequence[str]) -> list[object]:
    """Return the values at a path of keys; "*" stands for all items of a list."""
    values: list[object] = [content]
    for name in path:
        below: list[object] = []
        for value in values:
            if name == "*" and isinstance(value, list):
                below += value
            elif name != "*" and isinstance(value, Mapping) and name in value:
                below.append(value[name])
        values = below
    return values


def _described(value: object) -> str:
    return _WORDS.get(type(value), f"{value!r}")

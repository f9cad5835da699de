"""The configuration as a JSON schema (draft 2020-12), with which editors complete and check keys.

It says what a file may hold: names, types, choices and ranges. It is stricter than the reader about
spelling (`yes` for true, a number in quotes), and knows nothing of values that contradict each
other, which `check` finds.
"""

from __future__ import annotations

from fedsp_mpi.config.keys import DEFAULT_RECIPE, RECIPES, Key, Section, configuration
from fedsp_mpi.config.silos import SiloConfig
from fedsp_mpi.files.untrusted import JsonObject

DRAFT = "https://json-schema.org/draft/2020-12/schema"
FILES: JsonObject = {"anyOf": [{"type": "string"}, {"type": "array", "items": {"type": "string"}}]}
EXTENDS: JsonObject = {
    **FILES,
    "description": "a file or a list of files, relative to this one, that this one is laid over; "
    "later files win",
}
_SECTION = ["object", "null"]  # an empty one is null in YAML
_NAMES = "of the silos; each goes where {silo} stands in `source`"


def schema() -> JsonObject:
    """Return the JSON schema of a configuration file."""
    return {"$schema": DRAFT, "title": "A configuration of fedsp_mpi", **file_schema()}


def file_schema() -> JsonObject:
    """Return the form of a configuration without the head of a schema, to be part of another."""
    form = _section(configuration())
    form["properties"] = {"extends": EXTENDS, **form["properties"]}
    return form


def _section(section: Section) -> JsonObject:
    """Return the form of a section."""
    properties = {
        member.name.rpartition(".")[2]: (
            _section(member) if isinstance(member, Section) else _key(member)
        )
        for member in section.members
    }
    return {
        "description": section.description,
        "type": _SECTION,
        "properties": properties,
        "additionalProperties": False,
    }


def _key(key: Key) -> JsonObject:
    values = key.values if key.items is None else _items(key.items)
    if values.get("type") == "object":
        values = {**values, "type": _SECTION}
    default = key.defaults[DEFAULT_RECIPE]
    notes = [key.meaning]
    if key.unit:
        notes.append(f"Unit: {key.unit}.")
    for name in RECIPES:
        if key.defaults[name] != default:
            notes.append(f"Default of recipe {name}: {key.default(name)}.")
    return {"description": "\n".join(notes), **values, "default": default}


def _items(kind: Section) -> JsonObject:
    """Return the forms of a list of sections; silos may also be one section with a pattern."""
    item = {**_section(kind), "type": "object"}
    if kind.kind is not SiloConfig:
        return {"type": "array", "items": item}
    names = {"description": _NAMES, "type": "array"}
    pattern = {**item, "properties": {"names": names, **item["properties"]}}
    return {"anyOf": [{"type": "array", "items": item}, pattern]}

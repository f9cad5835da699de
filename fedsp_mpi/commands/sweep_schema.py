"""A sweep file as a JSON schema; what its trials set is the form of a configuration."""

from __future__ import annotations

from fedsp_mpi.commands.trials import AFTER, KEYS, NAME
from fedsp_mpi.config.schema import DRAFT, EXTENDS, FILES, file_schema
from fedsp_mpi.files.untrusted import JsonObject

_LAYER: JsonObject = {"anyOf": [*FILES["anyOf"], {"$ref": "#/$defs/configuration"}]}
_PHASE: JsonObject = {"anyOf": [*FILES["anyOf"], {"$ref": "#/$defs/phase"}]}
_AFTER: JsonObject = {
    "description": "what it starts from the result of",
    "type": ["string", "null"],
}


def sweep_schema() -> JsonObject:
    """Return the JSON schema (draft 2020-12) of a sweep file."""
    names = {"propertyNames": {"pattern": f"^{NAME.pattern}$"}, "minProperties": 1}
    layers = {"type": "object", "additionalProperties": _LAYER}
    phases = {"type": "object", "additionalProperties": _PHASE}
    configuration = file_schema()
    forms: dict[str, JsonObject] = {
        "folder": {"type": "string"},
        "base": _LAYER,
        "seeds": {
            "type": "array",
            "items": {"type": "integer"},
            "minItems": 1,
            "uniqueItems": True,
        },
        "tasks": {**phases, **names},
        "methods": {**layers, **names},
        "trials": {**phases, "type": ["object", "null"]},
    }
    properties = {key: {"description": meaning, **forms[key]} for key, meaning in KEYS.items()}
    return {
        "$schema": DRAFT,
        "title": "A sweep of fedsp_mpi",
        "type": "object",
        "properties": {"extends": EXTENDS, **properties},
        "additionalProperties": False,
        "$defs": {"configuration": configuration, "phase": _with_after(configuration)},
    }


def _with_after(configuration: JsonObject) -> JsonObject:
    """Return the form of settings that may also say what they come after."""
    return {**configuration, "properties": {AFTER: _AFTER, **configuration["properties"]}}

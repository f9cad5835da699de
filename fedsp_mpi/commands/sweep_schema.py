"""A sweep file as a JSON schema; what its trials set is the form of a configuration."""

from __future__ import annotations

from fedsp_mpi.commands.trials import KEYS, NAME
from fedsp_mpi.config.schema import DRAFT, EXTENDS, FILES, file_schema
from fedsp_mpi.files.untrusted import JsonObject

_LAYER: JsonObject = {"anyOf": [*FILES["anyOf"], {"$ref": "#/$defs/configuration"}]}


def sweep_schema() -> JsonObject:
    """Return the JSON schema (draft 2020-12) of a sweep file."""
    names = {"propertyNames": {"pattern": f"^{NAME.pattern}$"}, "minProperties": 1}
    layers = {"type": "object", "additionalProperties": _LAYER}
    forms: dict[str, JsonObject] = {
        "folder": {"type": "string"},
        "base": _LAYER,
        "seeds": {
            "type": "array",
            "items": {"type": "integer"},
            "minItems": 1,
            "uniqueItems": True,
        },
        "tasks": {**layers, **names},
        "methods": {**layers, **names},
        "trials": {**layers, "type": ["object", "null"]},
    }
    properties = {key: {"description": meaning, **forms[key]} for key, meaning in KEYS.items()}
    return {
        "$schema": DRAFT,
        "title": "A sweep of fedsp_mpi",
        "type": "object",
        "properties": {"extends": EXTENDS, **properties},
        "additionalProperties": False,
        "$defs": {"configuration": file_schema()},
    }

"""What a key of the configuration means, said once: where the key is defined.

The reference (`configs/README.md`) and the JSON schema are made of it. A meaning is Markdown
without links: the reference makes links of pages such as configs/silos/README.md.
"""

from __future__ import annotations

import dataclasses
from typing import TypeVar, cast

_Value = TypeVar("_Value")


def option(default: _Value, meaning: str, unit: str = "") -> _Value:
    """Define a key of a section: a field of its dataclass.

    Args:
        default: value where nothing is given; of a section, the values of its keys.
        meaning: of the key; of a section, of those of its keys that have none of their own.
        unit: of a number, such as `tokens`.
    """
    metadata = {"meaning": meaning, "unit": unit}
    if isinstance(default, dict):
        field: object = dataclasses.field(default_factory=default.copy, metadata=metadata)
    else:
        field = dataclasses.field(default=default, metadata=metadata)
    return cast(_Value, field)  # what a dataclass makes of the field

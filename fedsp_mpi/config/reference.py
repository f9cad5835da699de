"""The reference of all keys in Markdown: what `config --reference` prints, and what
`configs/README.md` is.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path

from fedsp_mpi.config.keys import DEFAULT_RECIPE, RECIPES, Key, Section, configuration
from fedsp_mpi.config.silos import SiloConfig
from fedsp_mpi.config.tiers import ExpertConfig
from fedsp_mpi.config.training import ComputeConfig, StageConfig
from fedsp_mpi.files.untrusted import JsonObject

_HEAD = Path(__file__).parent.parent / "resources" / "reference.md"
_TABLE = "| key | values | default | unit | meaning |\n|---|---|---|---|---|"
_TOP = "The keys that stand in no section."
_SHARED = (StageConfig, ComputeConfig)  # sections of which there are several, with the same keys
_LISTS: dict[type, str] = {
    SiloConfig: "list of silos, or one section",
    ExpertConfig: "list of experts",
}
_PAGE = re.compile(r"\bconfigs/(\S+\.md)\b")
_LINK = r"[\1](\1)"
_NO_END = 1e30  # from here on, the end of a range says nothing
_TYPES = {
    "integer": "whole number",
    "number": "number",
    "boolean": "`true` or `false`",
    "string": "text",
    "null": "`null`",
}


def reference() -> str:
    """Return the reference, which ends with a newline."""
    root = configuration()
    shared = _shared_names(root)
    chapters = [_chapter("Top level", _TOP, root.keys)]
    for section in root.sections:
        keys = [key for key in section.all_keys() if key.name not in shared]
        chapters.append(_chapter(f"`{section.name}`", section.description, keys))
    for kind in _SHARED:
        places = [section for section in root.all_sections() if section.kind is kind]
        by_name = {
            shared[key.name]: replace(key, name=shared[key.name])
            for key in places[0].all_keys()
            if key.name in shared
        }
        names = _listed([f"`{place.name}`" for place in places], "and")
        text = f"{places[0].summary} `{_placeholder(kind)}` is each of {names}."
        chapters.append(_chapter(f"`{_placeholder(kind)}`", text, by_name.values()))
    return "\n".join([_HEAD.read_text(encoding="utf-8"), *chapters])


def _placeholder(kind: type) -> str:
    """Return what stands for all sections of a kind: STAGE of StageConfig."""
    return kind.__name__.removesuffix("Config").upper()


def _shared_names(root: Section) -> dict[str, str]:
    """Return the placeholder names of keys that are alike in all sections of a kind, by name."""
    names: dict[str, str] = {}
    for kind in _SHARED:
        places = [section for section in root.all_sections() if section.kind is kind]
        for variants in zip(*(place.all_keys() for place in places)):
            if any(replace(variant, name=variants[0].name) != variants[0] for variant in variants):
                continue
            ending = variants[0].name.removeprefix(places[0].name)
            names |= {variant.name: f"{_placeholder(kind)}{ending}" for variant in variants}
    return names


def _chapter(title: str, text: str, keys: Iterable[Key]) -> str:
    rows = "\n".join(_row(key) for key in keys)
    text = _PAGE.sub(_LINK, text)
    return f"### {title}\n\n{text}\n\n{_TABLE}\n{rows}\n"


def _row(key: Key) -> str:
    default = f"`{key.default(DEFAULT_RECIPE)}`"
    for name in RECIPES:
        if key.defaults[name] != key.defaults[DEFAULT_RECIPE]:
            default += f" ({name}: `{key.default(name)}`)"
    values = _described(key.values) if key.items is None else _LISTS[key.items.kind]
    meaning = _PAGE.sub(_LINK, key.meaning)
    cells = [f"`{key.name}`", values, default, key.unit, meaning]
    return f"| {' | '.join(cells)} |".replace("|  |", "| |")


def _described(values: JsonObject) -> str:
    """Write a JSON schema of values in words."""
    return _listed(_forms(values), "or")


def _forms(values: JsonObject) -> list[str]:
    """Return each form that values may have in words."""
    if "enum" in values:
        return [f"`{value}`" for value in values["enum"]]
    if "const" in values:
        return [f"`{values['const']}`"]
    if "anyOf" in values:  # a range beside it is that of numbers
        limits = {name: limit for name, limit in values.items() if name != "anyOf"}
        return [words for form in values["anyOf"] for words in _forms({**limits, **form})]
    if values["type"] == "array":
        return [f"list of {_described(values['items'])}s"]
    if values["type"] == "object":
        return [f"names, each with {_described(values['additionalProperties'])}"]
    words = _TYPES[values["type"]]
    return [f"{words} {_range(values)}".rstrip() if "number" in words else words]


def _range(values: JsonObject) -> str:
    """Write a range in words; an end that says nothing is left out."""
    is_open = "exclusiveMinimum" in values
    low = values.get("exclusiveMinimum", values.get("minimum"))
    if low is None:
        return ""
    words = f"above {_number(low)}" if is_open else f"from {_number(low)}"
    if "exclusiveMaximum" in values:
        return f"{words} and below {_number(values['exclusiveMaximum'])}"
    high = values["maximum"]
    if high >= _NO_END:
        return words
    return f"{words} {'and up to' if is_open else 'to'} {_number(high)}"


def _number(value: float) -> str:
    """Write an end of a range: in full, or the largest ones in short."""
    return f"{int(value):,}" if value == int(value) and abs(value) < 2**60 else f"{value:.2g}"


def _listed(words: Sequence[str], conjunction: str) -> str:
    *first, last = words
    return f"{', '.join(first)} {conjunction} {last}" if first else last

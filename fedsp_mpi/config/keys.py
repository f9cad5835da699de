"""Every key of the configuration with all that is known of it: from its definition, its range, and
the recipes.

Whether pydantic or msgspec should read configurations was tried with pydantic 2.14 and msgspec 0.22
on these dataclasses. Neither does: both take an unknown key in silence, `stage: {batch_size: 4}`
loses the 200 steps that its owner gives it, pydantic takes `true` for 1, and no message names the
nearest word or what was found, so that every message would be ours again. They know nothing of
recipes, or of a section whose defaults depend on where it stands. What pydantic does well is to say
the type of one value in JSON schema; that is what it is used for.
"""

from __future__ import annotations

import dataclasses
import json
import typing
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

from fedsp_mpi.config.experiment import Config, checked
from fedsp_mpi.config.limits import RANGES, SILO_RANGES
from fedsp_mpi.config.methods import METHODS
from fedsp_mpi.config.model import ModelConfig, Recipe
from fedsp_mpi.config.silos import SiloConfig
from fedsp_mpi.config.tiers import ExpertConfig
from fedsp_mpi.files.untrusted import JsonObject

DEFAULT_RECIPE = Config.recipe
RECIPES: tuple[str, ...] = typing.get_args(Recipe)
_SILO = "federation.silos[]."


@dataclass(frozen=True)
class Key:
    """One key.

    Attributes:
        name: dotted; of an item of a list, `list[].name`.
        values: JSON schema of what it takes.
        defaults: by recipe, as JSON has them.
        meaning: Markdown.
        unit: of a number, or "".
        items: keys of the sections in the list that it takes; None: it takes values.
    """

    name: str
    values: JsonObject
    defaults: Mapping[str, object]
    meaning: str
    unit: str
    items: Section | None = None

    def default(self, recipe: str) -> str:
        """Return the default of a recipe as YAML has it."""
        value = self.defaults[recipe]
        return value if isinstance(value, str) and value else json.dumps(value)


@dataclass(frozen=True)
class Section:
    """A section.

    Attributes:
        name: dotted; "" of the whole configuration.
        kind: its dataclass.
        meaning: of its steps, if its owner says it.
        members: its keys and sections, in their order.
    """

    name: str
    kind: type
    meaning: str
    members: tuple[Key | Section, ...]

    @property
    def summary(self) -> str:
        """What sections of its kind are, in Markdown."""
        return " ".join((self.kind.__doc__ or "").split("\n\n")[0].split())

    @property
    def description(self) -> str:
        """What it is, in Markdown."""
        return f"{self.summary} Its steps: {self.meaning}." if self.meaning else self.summary

    @property
    def keys(self) -> list[Key]:
        """Its keys, without those of its sections."""
        return [member for member in self.members if isinstance(member, Key)]

    @property
    def sections(self) -> list[Section]:
        """Its sections, without those in them."""
        return [member for member in self.members if isinstance(member, Section)]

    def all_keys(self) -> Iterator[Key]:
        """Yield all keys in it, those of its sections too."""
        for member in self.members:
            if isinstance(member, Section):
                yield from member.all_keys()
                continue
            yield member
            if member.items is not None:
                yield from member.items.all_keys()

    def all_sections(self) -> Iterator[Section]:
        """Yield all sections in it, those of its sections too."""
        for section in self.sections:
            yield section
            yield from section.all_sections()


def configuration() -> Section:
    """Return the whole configuration."""
    defaults: dict[str, object] = {}
    for name in RECIPES:
        config = checked({"recipe": name, "model": {"name": "any"}})  # which has to be given
        defaults[name] = replace(config, model=ModelConfig())
    return _section(Config, "", defaults)


def _section(
    kind: type, name: str, defaults: Mapping[str, object], *, meaning: str = ""
) -> Section:
    """Describe a section.

    Args:
        kind: its dataclass.
        name: dotted.
        defaults: the section by recipe.
        meaning: of those of its keys that have none of their own.
    """
    hints = typing.get_type_hints(kind)
    members: list[Key | Section] = []
    for field in dataclasses.fields(kind):
        own_name = f"{name}.{field.name}".lstrip(".")
        own_meaning = field.metadata.get("meaning", "")
        values = {recipe: getattr(section, field.name) for recipe, section in defaults.items()}
        hint = hints[field.name]
        if isinstance(hint, type) and dataclasses.is_dataclass(hint):
            members.append(_section(hint, own_name, values, meaning=own_meaning))
            continue
        unit = field.metadata.get("unit", "")
        items = None
        if hint == tuple[SiloConfig, ...]:
            items = _section(SiloConfig, f"{own_name}[]", dict.fromkeys(RECIPES, SiloConfig()))
        elif hint == tuple[ExpertConfig, ...]:
            items = _section(ExpertConfig, f"{own_name}[]", dict.fromkeys(RECIPES, ExpertConfig()))
        members.append(
            Key(
                name=own_name,
                values={} if items else _values(own_name, hint),
                defaults={recipe: _plain(value) for recipe, value in values.items()},
                meaning=own_meaning or meaning,
                unit=unit,
                items=items,
            )
        )
    return Section(name, kind, meaning, tuple(members))


def _values(name: str, hint: type) -> JsonObject:
    """Return the JSON schema of a key's values: its type, and its range if it has one."""
    from pydantic import TypeAdapter  # here: `--help` must not wait for it

    if name == "method":
        return {"enum": list(METHODS), "type": "string"}
    values = TypeAdapter(hint).json_schema()
    limits = RANGES.get(name) or SILO_RANGES.get(name.removeprefix(_SILO))
    if limits is not None:
        values["exclusiveMinimum" if limits.above else "minimum"] = limits.low
        values["exclusiveMaximum" if limits.below else "maximum"] = limits.high
    return values


def _plain(value: object) -> object:
    return list(value) if isinstance(value, tuple) else value

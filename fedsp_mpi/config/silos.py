"""The key `federation.silos`: clients whose text lies in places of their own.

In a file the silos are a list, or one section for all of them: a pattern with `names`, or a pattern
with `*`, whose matches each rank finds on its own host. All forms become one tuple of `SiloConfig`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import PurePath
from typing import TYPE_CHECKING

from fedsp_mpi.config.limits import SILO_RANGES
from fedsp_mpi.config.options import option
from fedsp_mpi.config.parsing import ConfigError, Section, shown

if TYPE_CHECKING:
    from fedsp_mpi.config.experiment import Config

PLACEHOLDER = "{silo}"  # in a pattern, the place of the name
WILDCARD = "*"  # the name of silos that are still to be found
_MAX_NAME_LENGTH = 64
_ENDING = re.compile(r"\.(csv|tsv|jsonl|ndjson|json|parquet|arrow)(\.(gz|bz2|xz|zst))?$", re.I)
_NAME = re.compile(r"[\w][\w .@+-]*")


@dataclass(frozen=True)
class SiloConfig:
    """One client's own text: where it lies, and how a row of it reads.

    What is not given is as in the section `data`.
    """

    name: str = option(
        "", "in the log, the record and every message; empty: the last part of the source"
    )
    source: str = option("", "required: a folder or a file on the host of its rank, or a hub set")
    host: str | None = option(
        None,
        "name of the host whose ranks play it, also as Slurm has it; `null`: any that sees the "
        "source",
    )
    columns: dict[str, str | tuple[str, ...]] = option({}, "empty: `data.columns`")
    template: str | None = option(None, "`null`: `data.template`")
    verbaliser: tuple[str, ...] = option((), "empty: `data.verbaliser`")
    limit: int | None = option(None, "the most rows of train; `null`: `data.limit.train`", "rows")
    weight: float = option(1.0, "how many times its updates count when they are merged")

    @property
    def is_pattern(self) -> bool:
        """Whether this stands for silos that are still to be found."""
        return self.name == WILDCARD


@dataclass(frozen=True)
class ServerDataConfig:
    """What the server itself owns where clients have silos."""

    source: str | None = option(
        None,
        "with silos: the server's own text, its validation and test splits and, if it has one, its "
        "shard (train); `null`: it owns none",
    )
    columns: dict[str, str | tuple[str, ...]] = option({}, "as `data.columns`, for it")


def with_plain_silos(data: Section) -> Section:
    """Write `federation.silos` as a list, and count its clients; return other data unchanged.

    Raises:
        ConfigError: it is neither a list nor a section with a pattern, or `federation.clients` says
            another number.
    """
    federation = data.get("federation")
    if not isinstance(federation, dict) or not federation.get("silos"):
        return data
    silos = federation["silos"]
    if isinstance(silos, dict):
        silos = _expanded(silos)
    if not isinstance(silos, Sequence) or isinstance(silos, str):
        raise ConfigError(
            f"federation.silos: found {shown(silos)}, expected a list of sections with name and "
            "source, or one section with source and names"
        )
    silos = [_with_name(item) if isinstance(item, dict) else item for item in silos]
    clients = federation.get("clients")
    are_known = all(isinstance(item, dict) and item.get("name") != WILDCARD for item in silos)
    if are_known and clients not in (None, len(silos)):
        raise ConfigError(
            f"federation.clients: found {shown(clients)} with {len(silos)} silos, each of which is "
            "a client, expected none; leave it out"
        )
    number = len(silos) if are_known or clients is None else clients
    return {**data, "federation": {**federation, "silos": silos, "clients": number}}


def _expanded(section: Mapping[str, object]) -> list[Section]:
    """Return the silos of one section: one for each name, or one that stands for all matches."""
    shared = {key: value for key, value in section.items() if key != "names"}
    pattern = shared.get("source")
    names = section.get("names")
    if not isinstance(pattern, str):
        raise ConfigError(
            f"federation.silos.source: found {shown(pattern)}, expected a pattern such as "
            "/data/{silo} with names, or /data/*"
        )
    if names is None:
        return [shared]
    if not isinstance(names, Sequence) or isinstance(names, str):
        raise ConfigError(
            f"federation.silos.names: found {shown(names)}, expected a list, such as [north, east]"
        )
    if PLACEHOLDER not in pattern:
        raise ConfigError(
            f"federation.silos.source: found {shown(pattern)} with names, expected {PLACEHOLDER} "
            "in it, where each name goes"
        )
    return [
        {**shared, "name": name, "source": pattern.replace(PLACEHOLDER, str(name))}
        for name in names
    ]


def _with_name(silo: Section) -> Section:
    """Name a silo after its source, if it has no name; a pattern stands for all its matches."""
    source = silo.get("source")
    if silo.get("name") or not isinstance(source, str):
        return silo
    name = WILDCARD if WILDCARD in source else _ENDING.sub("", PurePath(source).name)
    return {**silo, "name": name}


def require_silos(config: Config) -> None:
    """Raise ConfigError on the first silo that cannot be, or key that has no meaning with silos."""
    silos = config.federation.silos
    if not silos:
        _require_no_silos(config)
        return
    names: dict[str, int] = {}
    for index, silo in enumerate(silos):
        where = f"federation.silos[{index}]"
        _require_silo(silo, where)
        if silo.name in names:
            raise ConfigError(
                f"{where}.name: found {silo.name!r} a second time, expected names that differ"
            )
        names[silo.name] = index
    own_source = "the server server.data"
    if config.tiers.experts:
        own_source = "each expert tiers.experts[].source"
    for key, value, allowed, reason in (
        ("data.source", config.data.source, None, f"each silo has its own, {own_source}"),
        ("data.shots", config.data.shots, None, "nobody sees the labels of all silos"),
        ("data.partition", config.data.partition, "iid", "the text is divided already"),
        ("data.server_share", config.data.server_share, None, "the text is divided already"),
    ):
        if value != allowed:
            expected = "null" if allowed is None else allowed
            raise ConfigError(
                f"{key}: found {shown(value)} with federation.silos, expected {expected}: {reason}"
            )
    _require_evaluation(config)
    if config.attack.clients and config.attack.questions:
        raise ConfigError(
            f"attack.questions: found {config.attack.questions} with federation.silos, expected "
            "0: the test questions are the server's, and do not travel"
        )
    if config.federation.disclose == "nothing" and config.federation.sampling == "by_size":
        raise ConfigError(
            "federation.sampling: found by_size with federation.disclose=nothing, expected "
            "uniform or round_robin: nobody knows the sizes"
        )


def _require_silo(silo: SiloConfig, where: str) -> None:
    if not silo.source.strip():
        raise ConfigError(f"{where}.source: found none, expected a folder or a hub set")
    if PLACEHOLDER in silo.source:
        raise ConfigError(
            f"{where}.source: found {PLACEHOLDER} in {shown(silo.source)}, expected names for it; "
            "add names: [...], or write * to take all that match"
        )
    is_plain = _NAME.fullmatch(silo.name) and len(silo.name) <= _MAX_NAME_LENGTH
    if not silo.is_pattern and not is_plain:
        raise ConfigError(
            f"{where}.name: found {shown(silo.name)}, expected at most {_MAX_NAME_LENGTH} letters, "
            "digits, blanks or one of . _ - + @"
        )
    if silo.limit is not None:
        SILO_RANGES["limit"].require(f"{where}.limit", silo.limit)
    SILO_RANGES["weight"].require(f"{where}.weight", silo.weight)


def _require_no_silos(config: Config) -> None:
    """Raise ConfigError if a key is set that only silos give a meaning."""
    if config.server.data.source is not None:
        raise ConfigError(
            f"server.data.source: found {shown(config.server.data.source)} without "
            "federation.silos, expected null: data.source holds the rows of all"
        )
    if config.evaluation.at != "server":
        raise ConfigError(
            f"evaluation.at: found {config.evaluation.at} without federation.silos, expected server"
        )


def _require_evaluation(config: Config) -> None:
    """Check that somebody has text to judge the rounds by."""
    at = config.evaluation.at
    if config.tiers.experts:
        _require_experts_evaluation(config)
        return
    has_text = server_owns_text(config)
    if at != "silos" and not has_text:
        raise ConfigError(
            f"evaluation.at: found {at}, and the server owns no text (server.data.source), "
            "expected silos; or name text of the server's"
        )
    if at != "server" and config.asks_server:
        raise ConfigError(
            f"evaluation.at: found {at} with search.forward=server, whose clients hold no model, "
            "expected server"
        )
    if not has_text and config.server.accept == "better":
        raise ConfigError(
            "server.accept: found better, and the server owns no text (server.data.source), "
            "expected always"
        )


def _require_experts_evaluation(config: Config) -> None:
    """Check that experts own the server's text, and judge the rounds by it."""
    if config.server.data.source is not None:
        raise ConfigError(
            f"server.data.source: found {shown(config.server.data.source)} with tiers.experts, "
            "expected null: each expert has text of its own (tiers.experts[].source)"
        )
    if config.evaluation.at != "server":
        raise ConfigError(
            f"evaluation.at: found {config.evaluation.at} with tiers.experts, expected server: "
            "experts choose the best round, and users score all tiers (tiers.judge)"
        )


def server_owns_text(config: Config) -> bool:
    """Return whether the server, or experts in its place, may own text where clients have silos."""
    return bool(config.tiers.experts) or config.server.data.source is not None

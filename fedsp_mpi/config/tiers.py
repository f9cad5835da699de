"""The section `tiers`: experts, each with a domain of its own, and the users that belong to them.

In a file an expert's users are names. Together they are the clients of the federation: the first
user that is named is client 0, and one who belongs to several experts is a single client.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from fedsp_mpi.config.options import option
from fedsp_mpi.config.parsing import ConfigError, Section, merge, shown
from fedsp_mpi.config.training import StageConfig

if TYPE_CHECKING:
    from fedsp_mpi.config.experiment import Config

GENERAL = "general"  # the name of the tier above the experts
_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,63}")


@dataclass(frozen=True)
class ExpertConfig:
    """One expert: the owner of a domain's text, to whom a group of users belongs.

    What is not given is as in the section `data`. Experts of the same data share its training rows
    out among themselves.
    """

    name: str = option("", "required: of the expert, and of its domain")
    users: tuple[str, ...] = option(
        (), "required: names of its users; one may belong to several experts"
    )
    task: str | None = option(None, "`null`: `data.task`")
    source: str | None = option(None, "`null`: `data.source`")
    columns: dict[str, str | tuple[str, ...]] = option({}, "empty: `data.columns`")
    classes: tuple[str, ...] = option((), "empty: `data.classes`")
    template: str | None = option(None, "`null`: `data.template`")
    verbaliser: tuple[str, ...] = option((), "empty: `data.verbaliser`")
    partition: Literal["iid", "labels", "quantity"] | None = option(
        None, "how its rows are dealt out among expert and users; `null`: `data.partition`"
    )


@dataclass(frozen=True)
class PersonalConfig:
    """The prompt that a user keeps, tuned on the same text as what is sent."""

    tuning: StageConfig = option(
        StageConfig(), "a round, of the personal prompt; what is not given is as in `client.tuning`"
    )
    proximal: float = option(
        0.0,
        "Ditto's lambda: a term lambda / 2 x its squared distance to the expert's prompt of the "
        "round; 0: plain local tuning, which learns nothing of others",
    )


@dataclass(frozen=True)
class TiersConfig:
    """Personal, expert and general models (`method: plmm`; see configs/plmm/README.md)."""

    experts: tuple[ExpertConfig, ...] = option(
        (), "a list of sections with name, users and the domain's data; their users are the clients"
    )
    personal: PersonalConfig = PersonalConfig()
    upgrade: StageConfig = option(
        StageConfig(steps=2),
        "a round, of each expert's prompt, towards the general model's answers on the "
        "expert's text; before `server.tuning`, from which all but the steps is taken where it is "
        "not given",
    )
    consensus: StageConfig = option(
        StageConfig(steps=2),
        "a round, of the general prompt, towards the experts' answers on public text: a step on "
        "one expert's text, the next one on the next expert's; the rest as in `server.tuning`",
    )
    hidden_weight: float = option(
        1.0,
        "in both, of the mean squared error of the last hidden states, beside the KL divergence "
        "of the answers",
    )
    temperature: float = option(1.0, "of that divergence")
    judge: Literal["ends", "rounds", "never"] = option(
        "ends",
        "when every tier is scored on own, domain's and other text: before the first round and "
        "after the last (`ends`), or after each as well",
    )
    questions: int = option(40, "of each text that tiers are scored on, at most", "questions")

    @property
    def users(self) -> tuple[str, ...]:
        """The names of all users, in the order of their first mention."""
        return tuple(dict.fromkeys(user for expert in self.experts for user in expert.users))

    def experts_of(self, user: str) -> tuple[int, ...]:
        """Return the experts that a user belongs to, by their place in the configuration."""
        return tuple(index for index, expert in enumerate(self.experts) if user in expert.users)


def with_tier_clients(data: Section) -> Section:
    """Make the users of all experts the clients, whatever number of clients a base has; return
    other data unchanged.

    What is misplaced is left as it is, and refused later with a message.

    Raises:
        ConfigError: there are silos, too.
    """
    tiers = data.get("tiers")
    experts = tiers.get("experts") if isinstance(tiers, dict) else None
    federation = data.get("federation") or {}
    if not isinstance(experts, Sequence) or isinstance(experts, str):
        return data
    users: dict[str, None] = {}
    for expert in experts:
        names = expert.get("users") if isinstance(expert, Mapping) else None
        if isinstance(names, Sequence) and not isinstance(names, str):
            users |= dict.fromkeys(str(name) for name in names)
    if not isinstance(federation, dict) or not users:
        return data
    if federation.get("silos"):
        raise ConfigError(
            "federation.silos: found silos with tiers.experts, whose users are the clients and get "
            "their text from the experts' data, expected none; name that data in "
            "tiers.experts[].source (configs/plmm/README.md says what silos of users would take)"
        )
    return {**data, "federation": {**federation, "clients": len(users), "users": list(users)}}


def with_tier_stages(data: Section) -> Section:
    """Fill in how tiers tune: users as in `client.tuning`, experts as in `server.tuning`.

    Args:
        data: the configuration over its recipe, with learning rates. What is misplaced in it is
            refused later.
    """
    tiers = data.get("tiers")
    if not isinstance(tiers, dict):
        return data
    client = _tuning(data, "client")
    server = {key: value for key, value in _tuning(data, "server").items() if key != "steps"}
    defaults = {"personal": {"tuning": client}, "upgrade": server, "consensus": server}
    return {**data, "tiers": merge(defaults, tiers)}


def _tuning(data: Section, role: str) -> Section:
    section = data.get(role)
    tuning = section.get("tuning") if isinstance(section, dict) else None
    return tuning if isinstance(tuning, dict) else {}


def require_tiers(config: Config) -> None:
    """Raise ConfigError on the first expert or key that cannot be with tiers, or without."""
    experts = config.tiers.experts
    has_tiers = config.method_facts.has_tiers
    if config.federation.users != config.tiers.users:
        raise ConfigError(
            f"federation.users: found {shown(list(config.federation.users))}, expected the users "
            "of tiers.experts, from which they follow; leave it out"
        )
    if not has_tiers and experts:
        raise ConfigError(
            f"tiers.experts: found {len(experts)} with method={config.method}, expected none; or "
            "set method=plmm"
        )
    if not has_tiers:
        return
    if not experts:
        raise ConfigError(
            f"tiers.experts: found none with method={config.method}, expected a list of sections "
            "with name and users"
        )
    names: set[str] = {GENERAL}
    for index, expert in enumerate(experts):
        where = f"tiers.experts[{index}]"
        _require_expert(expert, where)
        if expert.name in names:
            raise ConfigError(
                f"{where}.name: found {expert.name!r}, which another tier is called, expected "
                "names that differ"
            )
        names.add(expert.name)
    _require_other_keys(config)


def _require_expert(expert: ExpertConfig, where: str) -> None:
    _require_name(expert.name, f"{where}.name")
    if not expert.users:
        raise ConfigError(f"{where}.users: found none, expected the name of one user at least")
    for place, user in enumerate(expert.users):
        _require_name(user, f"{where}.users[{place}]")
        if user in expert.users[:place]:
            raise ConfigError(f"{where}.users: found {user!r} twice, expected each user once")


def _require_name(name: str, where: str) -> None:
    if not _NAME.fullmatch(name):
        raise ConfigError(
            f"{where}: found {shown(name)}, expected at most 64 letters, digits or one of _ . -"
        )


def _require_other_keys(config: Config) -> None:
    if config.data.partition == "column":
        raise ConfigError(
            "data.partition: found column with tiers.experts, expected iid, labels or quantity: "
            "a domain's rows are dealt out among its expert and its users"
        )
    if config.data.resolved_server_share == 0:
        for key in ("tiers.upgrade", "tiers.consensus"):
            steps = config.value(key).steps
            if steps:
                raise ConfigError(
                    f"{key}.steps: found {steps} with data.server_share=0, expected 0: experts "
                    "without text of their own only merge"
                )

"""The section `tiers`: experts, each with a domain of its own, and the users that belong to them.

In a file an expert's users are names. Together they are the clients of the federation: the first
user that is named is client 0, and one who belongs to several experts is a single client.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal

from fedsp_mpi.config.data import DataConfig
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
    source: str | None = option(
        None,
        "`null`: `data.source`. Where users have silos (`federation.silos`), required: the "
        "expert's own text, opened by the server's rank alone",
    )
    columns: dict[str, str | tuple[str, ...]] = option({}, "empty: `data.columns`")
    classes: tuple[str, ...] = option((), "empty: `data.classes`")
    template: str | None = option(None, "`null`: `data.template`")
    verbaliser: tuple[str, ...] = option((), "empty: `data.verbaliser`")
    partition: Literal["iid", "labels", "quantity"] | None = option(
        None, "how its rows are dealt out among expert and users; `null`: `data.partition`"
    )
    public_test: str | None = option(
        None,
        "where users have silos: questions of the domain, in a place of their own, that every "
        "user's rank may open and score its prompts on. All experts have one, or none: then users "
        "are scored on their own text alone",
    )

    def data_over(self, data: DataConfig) -> DataConfig:
        """Return the section `data` of this expert's domain."""
        return replace(
            data,
            task=self.task or data.task,
            source=self.source if self.source is not None else data.source,
            columns=self.columns or data.columns,
            classes=self.classes or data.classes,
            template=self.template if self.template is not None else data.template,
            verbaliser=self.verbaliser or data.verbaliser,
            partition=self.partition or data.partition,
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

    Where they have silos, these are counted later (`with_plain_silos`).
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
    num_clients = None if federation.get("silos") else len(users)
    return {**data, "federation": {**federation, "clients": num_clients, "users": list(users)}}


def with_silos_of_users(data: Section) -> Section:
    """Put silos into the order of the users that they are named like; return other data unchanged.

    Names that differ are left as they are, and refused later with a message.

    Args:
        data: its silos a list (`with_plain_silos`).
    """
    federation = data.get("federation")
    if not isinstance(federation, dict):
        return data
    users = federation.get("users")
    silos = federation.get("silos")
    if not isinstance(users, list) or not isinstance(silos, Sequence) or not users or not silos:
        return data
    by_name = {str(silo.get("name")): silo for silo in silos if isinstance(silo, dict)}
    if len(by_name) == len(silos) and by_name.keys() == set(users):
        silos = [by_name[user] for user in users]
    return {**data, "federation": {**federation, "silos": silos, "clients": len(users)}}


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
    if config.federation.silos:
        _require_silos_of_users(config)
    else:
        _require_no_public_text(config)
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


def _require_silos_of_users(config: Config) -> None:
    """Check that users and silos are the same, and that each owner's text has a place."""
    tiers = config.tiers
    silos = config.federation.silos
    if not any(silo.is_pattern for silo in silos):  # else they are still to be found
        names = [silo.name for silo in silos]
        without = [user for user in tiers.users if user not in names]
        if without:
            raise ConfigError(
                f"federation.silos: found none named {without[0]!r}, expected a silo for each user "
                "of tiers.experts, of the same name; add it, or leave the user out"
            )
        strangers = [name for name in names if name not in tiers.users]
        if strangers:
            raise ConfigError(
                f"federation.silos: found {strangers[0]!r}, expected the names of users of "
                f"tiers.experts: {', '.join(tiers.users)}; name it among an expert's users"
            )
    private_sources = {expert.source for expert in tiers.experts}
    private_sources |= {silo.source for silo in silos}
    for index, expert in enumerate(tiers.experts):
        where = f"tiers.experts[{index}]"
        if expert.source is None:
            raise ConfigError(
                f"{where}.source: found none with federation.silos, expected the expert's own "
                "text: that of users is in their silos"
            )
        if expert.partition is not None:
            raise ConfigError(
                f"{where}.partition: found {expert.partition} with federation.silos, expected "
                "null: the text is divided already"
            )
        if expert.public_test is not None and expert.public_test in private_sources:
            raise ConfigError(
                f"{where}.public_test: found {shown(expert.public_test)}, which is the source of "
                "an expert or a user, expected a place of its own: every user's rank opens it"
            )
        if (expert.public_test is None) != (tiers.experts[0].public_test is None):
            raise ConfigError(
                f"{where}.public_test: found {shown(expert.public_test)} beside "
                f"{shown(tiers.experts[0].public_test)} of {tiers.experts[0].name}, expected one "
                "for each expert, or none at all"
            )
    for user in tiers.users:
        _require_one_reading(config, user)


def _require_one_reading(config: Config, user: str) -> None:
    """Raise ConfigError if the experts of a user, who has one silo, read text in different ways."""
    first, *more_experts = (config.tiers.experts[index] for index in config.tiers.experts_of(user))
    silos = [silo for silo in config.federation.silos if silo.name == user or silo.is_pattern]
    for other in more_experts:
        data = first.data_over(config.data)
        other_data = other.data_over(config.data)
        for key in ("task", "classes", "columns", "template", "verbaliser"):
            is_own = all(getattr(silo, key, None) for silo in silos)
            if not is_own and getattr(data, key) != getattr(other_data, key):
                raise ConfigError(
                    f"federation.silos: found one silo of user {user}, whose experts {first.name} "
                    f"and {other.name} differ in {key}, expected experts that read it alike; "
                    "give the user one of them, or make it two users with a silo each"
                )


def _require_no_public_text(config: Config) -> None:
    for index, expert in enumerate(config.tiers.experts):
        if expert.public_test is not None:
            raise ConfigError(
                f"tiers.experts[{index}].public_test: found {shown(expert.public_test)} without "
                "federation.silos, expected null: all ranks read the domain's own test split"
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

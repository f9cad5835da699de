"""One experiment's configuration: its sections together, read from YAML and checked."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import reduce
from pathlib import Path
from typing import Any, Literal

import yaml

from fedsp_mpi.config.augment import AugmentConfig
from fedsp_mpi.config.checks import require_consistent
from fedsp_mpi.config.data import DataConfig
from fedsp_mpi.config.federation import ClientConfig, FederationConfig, ServerConfig
from fedsp_mpi.config.instructions import InstructionsConfig
from fedsp_mpi.config.limits import STAGES, require_ranges
from fedsp_mpi.config.lora import LoraConfig
from fedsp_mpi.config.methods import FEDAVG_BBT, METHODS, MethodFacts, require_method
from fedsp_mpi.config.model import (
    AuxiliaryConfig,
    DistillationConfig,
    ModelConfig,
    PromptConfig,
    Recipe,
    recipe,
)
from fedsp_mpi.config.options import option
from fedsp_mpi.config.parsing import (
    ConfigError,
    Section,
    differences,
    merge,
    message_line,
    mistake_line,
    parse,
    put,
)
from fedsp_mpi.config.rates import rates
from fedsp_mpi.config.runtime import (
    CheckpointConfig,
    DeadlineConfig,
    RecordConfig,
    RunConfig,
    TopologyConfig,
    WireConfig,
    check_paths,
)
from fedsp_mpi.config.search import SearchConfig
from fedsp_mpi.config.silos import require_silos, with_plain_silos
from fedsp_mpi.config.threats import AttackConfig
from fedsp_mpi.config.tiers import (
    TiersConfig,
    require_tiers,
    with_silos_of_users,
    with_tier_clients,
    with_tier_stages,
)
from fedsp_mpi.config.training import Dtype
from fedsp_mpi.config.yaml_reader import extended, key_value, parse_yaml, read_yaml, setting

EMBEDDED = Path(__file__).parent.parent / "resources" / "embedded.yaml"


@dataclass(frozen=True)
class EvaluationConfig:
    """What is scored on the test split at the end, and how."""

    batch_tokens: int = option(4096, "of a forward pass", "tokens")
    dtype: Dtype = option(
        "float32", "of scoring; fp32 makes it independent of how options are batched"
    )
    zero_shot: bool = option(True, "score the global model without a prompt")
    server_only: bool = option(True, "train and score the server-only control")
    at: Literal["server", "silos", "both"] = option(
        "server",
        "who judges each round: the `server` on its validation text, the `silos` on what they hold "
        "back, or `both`. Silos choose the best round where the server owns no text",
    )
    held_out: float = option(
        0.1,
        "of a silo's training rows that it holds back to judge by, unless it has a validation "
        "split",
        "fraction",
    )


@dataclass(frozen=True)
class Config:
    """One experiment."""

    recipe: Recipe = option("bridged", "defaults of the keys you leave out")
    method: str = option(
        "fedsp",
        "what is tuned and exchanged. `fedsp`: prompts, by gradients; `fedbpt`: prompts, searched "
        "for without gradients; `prompt_search`: prompts in words; `finetune`: all weights of the "
        "global model; `lora`: low-rank adapters of it; `head`: a classification head on it, for "
        "tasks with one set of classes; `pretrain`: all weights, on plain text; `plmm`: prompts of "
        "users, experts and a general model (`tiers`)",
    )
    run: RunConfig = RunConfig()
    topology: TopologyConfig = TopologyConfig()
    wire: WireConfig = WireConfig()
    model: ModelConfig = ModelConfig()
    data: DataConfig = DataConfig()
    auxiliary: AuxiliaryConfig = AuxiliaryConfig()
    distillation: DistillationConfig = DistillationConfig()
    prompt: PromptConfig = PromptConfig()
    lora: LoraConfig = LoraConfig()
    federation: FederationConfig = FederationConfig()
    server: ServerConfig = ServerConfig()
    client: ClientConfig = ClientConfig()
    augment: AugmentConfig = AugmentConfig()
    tiers: TiersConfig = TiersConfig()
    attack: AttackConfig = AttackConfig()
    search: SearchConfig = SearchConfig()
    instructions: InstructionsConfig = InstructionsConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    record: RecordConfig = RecordConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    deadlines: DeadlineConfig = DeadlineConfig()

    @property
    def method_facts(self) -> MethodFacts:
        """The method's row in config/methods.py."""
        if self.method == "fedbpt" and self.search.rule == "average":
            return FEDAVG_BBT
        return METHODS[self.method]

    @property
    def tunes_weights(self) -> bool:
        """Whether the model's own weights are tuned and travel; then there is no prompt."""
        return self.method_facts.tunes_weights

    @property
    def adapts(self) -> bool:
        """Whether low-rank adapters are tuned and travel, beside weights that stay as they are."""
        return self.method_facts.adapts

    @property
    def classifies(self) -> bool:
        """Whether a classification head is tuned and travels, on weights that stay as they are."""
        return self.method_facts.classifies

    @property
    def tuned_folder(self) -> str:
        """Name of the folder, in the run's, of what is tuned: prompt, adapter, head or model."""
        if self.adapts:
            return "adapter"
        if self.classifies:
            return "head"
        return "model" if self.tunes_weights else "prompt"

    @property
    def trains_all_weights(self) -> bool:
        """Whether all weights of the global model are trained and travel."""
        return self.tunes_weights and not (self.adapts or self.classifies)

    def client_name(self, client: int) -> str:
        """Return what messages call a client; in the tier above, "expert news"."""
        index = client - self.federation.clients
        if 0 <= index < len(self.tiers.experts):
            return f"expert {self.tiers.experts[index].name}"
        return self.federation.client_name(client)

    @property
    def leaves_model(self) -> bool:
        """Whether the run leaves a whole model that a later one can start from."""
        return self.trains_all_weights or (self.adapts and self.lora.merged)

    @property
    def searches(self) -> bool:
        """Whether prompts are searched for without gradients."""
        return self.method_facts.searches

    @property
    def in_words(self) -> bool:
        """Whether prompts are instructions, which are searched for phrase by phrase."""
        return self.method_facts.in_words

    @property
    def has_few_labels(self) -> bool:
        """Whether clients may hold text without labels."""
        return self.data.labels is not None or self.augment.is_on

    @property
    def num_searched(self) -> int:
        """Numbers that a search chooses: those of a point, or the tokens of an instruction."""
        return self.prompt.num_tokens if self.in_words else self.search.dimension

    @property
    def asks_server(self) -> bool:
        """Whether clients hold no model, and have the server run their forward passes."""
        return self.searches and self.search.forward == "server"

    @property
    def translates(self) -> bool:
        """Whether the server learns from the auxiliary model what the merged prompt means."""
        return (
            self.method_facts.distils_prompts
            and self.federation.clients > 0
            and self.server.translation.steps > 0
        )

    @property
    def clients_train_weights(self) -> bool:
        """Whether clients train the weights of the model that they hold, not only prompts."""
        aligns = self.client.training == "joint" or self.client.alignment.steps > 0
        if self.tunes_weights:
            return self.trains_all_weights
        return aligns and not self.searches

    @property
    def distils(self) -> bool:
        """Whether the auxiliary model is aligned with the global one on some text."""
        return not self.tunes_weights and (
            self.auxiliary.first_layers is not None or self.distillation.stage.steps > 0
        )

    def value(self, key: str) -> Any:
        """Return the value of a dotted key such as `client.tuning.steps`."""
        return reduce(getattr, key.split("."), self)

    def check(self) -> None:
        """Raise ConfigError on the first value that cannot work with any model and data."""
        require_method(self.method)
        check_paths(self.value)
        require_ranges(self)
        for key in STAGES:
            self.value(key).check(key)
        self.auxiliary.check("auxiliary")
        self.lora.check("lora")
        self.client.privacy.check("client.privacy")
        self.distillation.check("distillation")
        if self.model.name is None:
            raise ConfigError(
                "model.name: found nothing, expected a hub name or the folder of a causal "
                "language model"
            )
        self.data.check("data")
        require_silos(self)
        require_tiers(self)
        self.attack.check("attack", self.federation.clients)
        require_consistent(self)


def load(
    path: str | Path | Section | None,
    overrides: list[str] | None = None,
    values: Mapping[str, object] | None = None,
) -> Config:
    """Read a YAML file, apply overrides, check the result, and freeze it.

    A file may say `extends: other.yaml`, or name a list of files (relative to itself). Later files
    win over earlier ones, and the file's own keys over all of them.

    Args:
        path: of the file, or what it would say; None: the embedded default.
        overrides: items `key=value`, whose value is YAML.
        values: plain data by key, taken as they stand.

    Raises:
        ConfigError: the first mistake.
    """
    data = given(path, overrides)
    try:
        for key, text in (values or {}).items():
            put(data, key, text, whose=key)
    except ConfigError as error:
        raise ConfigError(message_line(str(error))) from None
    return checked(data)


def given(path: str | Path | Section | None, overrides: list[str] | None = None) -> Section:
    """Read what a file and overrides say, without the defaults of what they leave out.

    Raises:
        ConfigError: they cannot be read.
    """
    try:
        if isinstance(path, dict):
            data = extended(path, Path("configuration"))
        else:
            data = read_yaml(Path(path) if path is not None else EMBEDDED)
        for item in overrides or []:
            key, value = key_value(item)
            put(data, key, value, whose=setting(item))
    except ConfigError as error:
        raise ConfigError(message_line(str(error))) from None
    return data


def checked(data: Section) -> Config:
    """Build the configuration of plain data, laid over its recipe.

    Raises:
        ConfigError: the first mistake.
    """
    name = data.get("recipe")
    try:
        data = with_silos_of_users(with_plain_silos(with_tier_clients(data)))
        recipe_values = recipe(Config.recipe if name is None else name)
        data = merge(recipe_values, data)
        data = with_tier_stages(merge(rates(data), data))
        config: Config = parse(Config, data, "")
        config.check()
    except ConfigError as error:
        raise ConfigError(mistake_line(error)) from None
    return config


# Beginnings of the keys that may differ when a run is resumed: where and how it runs, not what
# comes of it.
_FREE = (
    "run.name",
    "run.folder",
    "run.if_exists",
    "run.resume",
    "run.label",
    "run.task_label",
    "run.permissions",
    "topology.ranks",
    "wire.",
    "deadlines.",
    "checkpoint.",
    "record.",
    "client.resident",
    "federation.silo_cache",
    "distillation.reuse",
    "recipe",
)
# Sections that count for one method only.
_OF_ONE_METHOD = {"search": "fedbpt", "instructions": "prompt_search", "tiers": "plmm"}


def changed_keys(before: Section, now: Section) -> list[str]:
    """Return the keys that keep a run from being resumed: "key: was ..., is ...".

    A key that one of the configurations lacks counts as its default: it did not exist yet when the
    run was begun. Sections of one method, such as `search`, count for that method only.

    With tiers any number of server ranks has the same bits, and may follow another one.

    Args:
        before: the configuration that the run was begun with, as nested mappings.
        now: the one that it is to be resumed with.
    """
    # A key that no longer exists is a ConfigError here, and a difference below.
    with suppress(ConfigError):
        before, now = (
            dataclasses.asdict(parse(Config, settings, "")) for settings in (before, now)
        )
    free = [f"{name}." for name, method in _OF_ONE_METHOD.items() if now.get("method") != method]
    if now.get("method") == _OF_ONE_METHOD["tiers"]:
        free.append("topology.server_ranks")
    return differences(before, now, free=(*_FREE, *free))


def to_yaml(config: Config) -> str:
    """Write the resolved configuration as YAML that `load` reads back to the same."""
    return yaml.safe_dump(dataclasses.asdict(config), sort_keys=False)


def config_text_with_rounds(text: str, rounds: int) -> str:
    """Return a resolved configuration that `to_yaml` wrote, with another number of rounds."""
    data = parse_yaml(text, "config.yaml")
    data["federation"]["rounds"] = rounds
    return yaml.safe_dump(data, sort_keys=False)

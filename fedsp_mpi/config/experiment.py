"""YAML to frozen dataclasses: unknown keys are refused with the nearest name, values are checked
before a run.
"""

from __future__ import annotations

import dataclasses
from contextlib import suppress
from dataclasses import dataclass
from functools import reduce
from pathlib import Path
from typing import Any, Literal

import yaml

from fedsp_mpi.config.limits import STAGES, require_ranges
from fedsp_mpi.config.methods import METHODS, MethodFacts, require_method
from fedsp_mpi.config.model import AuxiliaryConfig, DistillationConfig, PromptConfig, Recipe, recipe
from fedsp_mpi.config.parsing import ConfigError, differences, merge, message_line, parse, put
from fedsp_mpi.config.runtime import (
    CheckpointConfig,
    DeadlineConfig,
    RecordConfig,
    RunConfig,
    TopologyConfig,
    check_paths,
)
from fedsp_mpi.config.search import SearchConfig
from fedsp_mpi.config.threats import AttackConfig, PrivacyConfig
from fedsp_mpi.config.training import ComputeConfig, Dtype, StageConfig
from fedsp_mpi.config.yaml_reader import key_value, read_yaml, setting

EMBEDDED = Path(__file__).parent.parent / "resources" / "embedded.yaml"


@dataclass(frozen=True)
class ModelConfig:
    """The global model: a hub name or a local folder; `embedded` is the tiny GPT-2 of the package."""

    name: str | None = None
    revision: str | None = None
    tokenizer: str | None = None  # None: the model's own
    gradient_checkpointing: bool = False


@dataclass(frozen=True)
class LimitConfig:
    """At most so many rows of each split, the first ones; None takes all."""

    train: int | None = None
    validation: int | None = None
    test: int | None = None


@dataclass(frozen=True)
class DataConfig:
    """The task and where its rows come from; `embedded` is the tiny world of the package."""

    task: str = "multiple_choice"
    source: str | None = (
        None  # None: the task's own hub set; a folder; "hub/name[:configuration]"; "embedded"
    )
    columns: dict[str, str] = dataclasses.field(
        default_factory=dict
    )  # {task's: file's}, where names differ
    # The user's own words, for example "{sentence} It was {mask}." with columns of the task:
    # data/templates.py.
    template: str | None = None  # None: the task's own, which is lm-eval's
    verbaliser: tuple[str, ...] = ()  # a word a class; none: the task's own
    max_length: int = 1024  # tokens of a training text; longer contexts lose their beginning
    limit: LimitConfig = LimitConfig()
    shots: int | None = (
        None  # few-shot: so many examples of each class, drawn by the seed, are all of train
    )
    # What of the training split the server owns: None: a shard like every client's; a fraction
    # below 1; from 1 on, so many examples; 0: nothing, so that what clients learn is all there is.
    server_share: float | None = None
    partition: Literal["iid", "labels", "quantity"] = (
        "iid"  # among the owners: equal, label skew, quantity skew
    )
    # What an answer's cross entropy runs over: all tokens, or those that the task's choices are
    # made of. auto: the choices where every example has the same ones, else the vocabulary.
    loss_over: Literal["vocabulary", "choices", "auto"] = "vocabulary"
    alpha: float = (
        0.5  # of the Dirichlet distribution that makes the skew: 0.1 is strong, 100 hardly any
    )

    def check(self, where: str) -> None:
        if self.server_share is not None and self.server_share > 1 and self.server_share % 1:
            raise ConfigError(
                f"{where}.server_share: found {self.server_share}, expected a fraction below 1, "
                "or a whole number "
                "of examples"
            )


@dataclass(frozen=True)
class FederationConfig:
    """Rounds, clients, and what happens when one of them fails."""

    # 0: centralised, the server tunes alone, on all data unless data.server_share says otherwise
    clients: int = 7
    rounds: int = 10
    # Auxiliary model, optimizers and schedules between rounds; restarted: each round begins from
    # the hand-out.
    client_state: Literal["kept", "restarted"] = "kept"
    on_failure: Literal["drop", "stop"] = "drop"  # a client whose loss or update is not finite
    min_clients: int = 1  # fewer updates than this in a round stop the run
    clients_per_round: int | None = None  # None: all
    sampling: Literal["uniform", "by_size", "round_robin"] = "uniform"  # who they are
    # drop: a client's work is cut after client_seconds, and it counts for what it did. Bits then
    # depend on the clock.
    stragglers: Literal["wait", "drop"] = "wait"
    client_seconds: float | None = None
    # What makes one update of many: the mean weighted by samples, each value's median, or the mean
    # of those that lie no more than so many deviations further from the median than the others do
    # (aggregation/robust.py).
    rule: Literal["mean", "median", "reject_outliers"] = "mean"
    outlier_deviations: float = 3.0


@dataclass(frozen=True)
class ServerConfig:
    """The owner of the global model."""

    # Before the tuning: towards the answers of the auxiliary model under the merged prompts, to
    # questions about distillation.text, or about the server's shard.
    translation: StageConfig = StageConfig(steps=0)
    tuning: StageConfig = StageConfig()
    # better: a round's tuning that makes the validation loss worse is taken back, the control's
    # too.
    accept: Literal["always", "better"] = "always"
    compute: ComputeConfig = ComputeConfig()


@dataclass(frozen=True)
class ClientConfig:
    """An owner of text: tunes its auxiliary model, then the prompts (FedSP, alternative training)."""

    # joint: both at once, in the steps of `tuning`, each with its own optimizer (FedSP without
    # alternative training).
    training: Literal["alternating", "joint"] = "alternating"
    alignment: StageConfig = StageConfig()
    tuning: StageConfig = StageConfig()
    privacy: PrivacyConfig = PrivacyConfig()
    compute: ComputeConfig = ComputeConfig()
    # clients of a rank whose state stays in memory between rounds; that of the others goes to disk
    resident: int = 8


@dataclass(frozen=True)
class EvaluationConfig:
    """What is scored on the test split at the end, and how."""

    batch_tokens: int = 4096  # tokens a forward pass
    dtype: Dtype = (
        "float32"  # of the scoring pass; fp32 makes it independent of how options are batched
    )
    zero_shot: bool = True
    server_only: bool = True


@dataclass(frozen=True)
class Config:
    """One experiment."""

    recipe: Recipe = "bridged"  # values of keys that are not given: resources/recipes
    # fedsp: prompts are the messengers; finetune: the global model's own weights are; fedbpt:
    # prompts are searched for without gradients, as `search` says (algorithms/).
    method: str = "fedsp"
    run: RunConfig = RunConfig()
    topology: TopologyConfig = TopologyConfig()
    model: ModelConfig = ModelConfig()
    data: DataConfig = DataConfig()
    auxiliary: AuxiliaryConfig = AuxiliaryConfig()
    distillation: DistillationConfig = DistillationConfig()
    prompt: PromptConfig = PromptConfig()
    federation: FederationConfig = FederationConfig()
    server: ServerConfig = ServerConfig()
    client: ClientConfig = ClientConfig()
    attack: AttackConfig = AttackConfig()
    search: SearchConfig = SearchConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    record: RecordConfig = RecordConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    deadlines: DeadlineConfig = DeadlineConfig()

    @property
    def method_facts(self) -> MethodFacts:
        """What the method's row in config/methods.py says."""
        if self.method == "fedbpt" and self.search.rule == "average":
            return METHODS["fedavg_bbt"]
        return METHODS[self.method]

    @property
    def tunes_weights(self) -> bool:
        """Whether the model's own weights are tuned and travel; then there is no prompt."""
        return self.method_facts.tunes_weights

    @property
    def searches(self) -> bool:
        """Whether prompts are searched for without gradients."""
        return self.method_facts.searches

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
        """Whether clients train the weights of the model that they hold, and not the prompts alone."""
        aligns = self.client.training == "joint" or self.client.alignment.steps > 0
        return self.tunes_weights or (aligns and not self.searches)

    @property
    def distils(self) -> bool:
        """Whether the auxiliary model is aligned with the global one on some text."""
        return not self.tunes_weights and (
            self.auxiliary.first_layers is not None or self.distillation.stage.steps > 0
        )

    def check(self) -> None:
        """Raise ConfigError on the first value that cannot work, whatever the model and the data."""
        require_method(self.method)
        check_paths(self._value)
        require_ranges(self)
        for key in STAGES:
            self._value(key).check(key)
        self.auxiliary.check("auxiliary")
        self.client.privacy.check("client.privacy")
        self.distillation.check("distillation")
        if self.model.name is None:
            raise ConfigError(
                "model.name: found nothing, expected a hub name or the folder of a causal "
                "language model"
            )
        self.data.check("data")
        self.attack.check("attack", self.federation.clients)
        if self.searches:
            self._check_search()
        self._check_federation()
        self._check_prompt()
        self._check_shares()

    def _value(self, key: str) -> Any:
        return reduce(getattr, key.split("."), self)

    def _check_search(self) -> None:
        """What a search does without: the server's steps, its control, prompts of several matrices,
        another merge.
        """
        if self.federation.clients == 0:
            raise ConfigError(
                "federation.clients: found 0 with method=fedbpt, expected at least 1: "
                "clients search"
            )
        for key, (wanted, why) in self.method_facts.required.items():
            if (value := self._value(key)) != wanted:
                shown = "null" if wanted is None else wanted
                raise ConfigError(
                    f"{key}: found {value} with method=fedbpt, expected {shown}: {why}"
                )
        if (
            self.prompt.kind == "prefix"
            and self.prompt.init == "random"
            and not self.prompt.init_std
        ):
            raise ConfigError(
                "prompt.init_std: found 0 with method=fedbpt, expected a number above 0, which "
                "the search's scale "
                "follows from; or set prompt.init=text"
            )

    def _check_federation(self) -> None:
        plan = self.federation
        if plan.clients == 0:
            self._check_centralised()
            return
        if (plan.clients_per_round or 1) > plan.clients:
            raise ConfigError(
                f"federation.clients_per_round: found {plan.clients_per_round}, expected at "
                f"most the {plan.clients} of "
                "federation.clients"
            )
        if plan.min_clients > (plan.clients_per_round or plan.clients):
            name = "clients_per_round" if plan.clients_per_round else "clients"
            raise ConfigError(
                f"federation.min_clients: found {plan.min_clients}, expected at most the "
                f"{plan.clients_per_round or plan.clients} of federation.{name}"
            )
        if (plan.stragglers == "drop") != (plan.client_seconds is not None):
            raise ConfigError(
                f"federation.stragglers: found {plan.stragglers} with client_seconds "
                f"{plan.client_seconds}, expected "
                "drop with a number of seconds, or wait without one"
            )

    def _check_centralised(self) -> None:
        if not self.server.tuning.steps:
            raise ConfigError(
                "server.tuning.steps: found 0 with federation.clients=0, expected at least 1: "
                "the server tunes alone"
            )
        if self.federation.clients_per_round is not None:
            raise ConfigError(
                "federation.clients_per_round: found with federation.clients=0, expected null"
            )

    def _check_shares(self) -> None:
        if self.data.server_share == 0:
            if self.server.tuning.steps:
                raise ConfigError(
                    f"server.tuning.steps: found {self.server.tuning.steps} with "
                    "data.server_share=0, expected 0: "
                    "a server without examples only averages"
                )
            if self.distils and self.distillation.text is None:
                raise ConfigError(
                    "distillation.text: found none with data.server_share=0, expected a file of "
                    "plain text; or set "
                    "distillation.stage.steps=0 and auxiliary.first_layers=null"
                )
        if self.translates and self.topology.server_ranks > 1:
            raise ConfigError(
                f"server.translation.steps: found {self.server.translation.steps} with "
                "topology.server_ranks="
                f"{self.topology.server_ranks}, expected one rank of the server; or set "
                "server.translation.steps=0"
            )
        if self.translates and self.data.server_share == 0 and self.distillation.text is None:
            raise ConfigError(
                "distillation.text: found none with data.server_share=0, expected a file of "
                "plain text to ask about; "
                "or set server.translation.steps=0"
            )
        for key, stage in (
            ("distillation.stage", self.distillation.stage),
            ("server.tuning", self.server.tuning),
        ):
            if stage.batch_size % self.topology.server_ranks:
                raise ConfigError(
                    f"{key}.batch_size: found {stage.batch_size}, expected a multiple of "
                    "topology.server_ranks="
                    f"{self.topology.server_ranks}, so that each of them gets an equal part"
                )

    def _check_prompt(self) -> None:
        if self.prompt.projection is not None and self.prompt.kind == "input":
            raise ConfigError(
                "prompt.projection: found with prompt.kind=input, expected prompt.kind=prefix"
            )
        if self.prompt.projection is not None and self.prompt.init == "text":
            raise ConfigError("prompt.init: found text with prompt.projection, expected random")
        if self.prompt.encoder is not None and self.prompt.kind != "input":
            raise ConfigError(
                "prompt.encoder: found with prompt.kind=prefix, expected prompt.kind=input"
            )
        if self.prompt.encoder is not None and self.prompt.init == "text":
            raise ConfigError("prompt.init: found text with prompt.encoder, expected random")
        if not self.prompt.init_text.strip():
            raise ConfigError(
                "prompt.init_text: found no words, expected at least one; or set prompt.init=random"
            )
        shared = self.auxiliary.layers_per_cell not in (None, self.auxiliary.depth)
        if self.prompt.mapping == "same_layers" and shared and not self.tunes_weights:
            raise ConfigError(
                "prompt.mapping: found same_layers with an auxiliary model that runs its "
                "layers more than once "
                f"(auxiliary.layers_per_cell={self.auxiliary.layers_per_cell}), expected "
                "repeat; or set "
                "auxiliary.layers_per_cell=null"
            )
        if self.model.gradient_checkpointing and self.prompt.kind == "prefix":
            raise ConfigError(
                "model.gradient_checkpointing: found true with prompt.kind=prefix, which "
                "trains silently wrong "
                "(checkpointed layers drop the prefix); set it to false, or prompt.kind=input"
            )
        if self.model.gradient_checkpointing and self.auxiliary.dropout:
            raise ConfigError(
                "auxiliary.dropout: found true with model.gradient_checkpointing=true, "
                "expected one of them false"
            )


def load(
    path: str | Path | None,
    overrides: list[str] | None = None,
    values: dict[str, str] | None = None,
) -> Config:
    """Read a YAML file (None: the embedded default), apply overrides, check, freeze.

    `overrides` are `key=value`, whose value is YAML; `values` are texts as they stand. A file may
    say `extends: other.yaml`, or a list of files (relative to itself); the later win, and its own
    keys most.
    """
    try:
        data = read_yaml(Path(path) if path is not None else EMBEDDED)
        for item in overrides or []:
            key, value = key_value(item)
            put(data, key, value, setting(item))
        for key, text in (values or {}).items():
            put(data, key, text, key)
    except ConfigError as error:
        raise ConfigError(message_line(str(error))) from None
    return checked(data)


def checked(data: dict[str, Any]) -> Config:
    """The configuration of plain data, laid over its recipe.

    Raises ConfigError on the first mistake.
    """
    try:
        named = data.get("recipe")
        config: Config = parse(
            Config, merge(recipe(Config.recipe if named is None else named), data), ""
        )
        config.check()
    except ConfigError as error:
        raise ConfigError(message_line(str(error))) from None
    return config


# What may differ when a run goes on: where and how it runs, not what comes of it.
_FREE = (
    *(
        f"run.{name}"
        for name in ("name", "folder", "if_exists", "resume", "label", "task_label", "permissions")
    ),
    *(
        "topology.ranks",
        "deadlines.",
        "checkpoint.",
        "record.",
        "client.resident",
        "distillation.reuse",
        "recipe",
    ),
)


def changed_keys(before: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """The keys that keep a run from going on under another configuration: "key: was ..., is ...".

    A key that one of them does not have counts as its default: it was not there yet when a run
    began. How FedBPT searches keeps no other method from anything.
    """
    with suppress(ConfigError):  # a key that is there no more; it is named as a difference then
        before, now = (dataclasses.asdict(parse(Config, each, "")) for each in (before, now))
    return differences(before, now, _FREE if now.get("method") == "fedbpt" else (*_FREE, "search."))


def to_yaml(config: Config) -> str:
    """The resolved configuration as YAML that `load` reads back to the same."""
    return yaml.safe_dump(dataclasses.asdict(config), sort_keys=False)

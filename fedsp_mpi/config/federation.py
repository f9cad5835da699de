"""The sections `federation`, `server` and `client`: rounds, roles, and how each of them tunes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from fedsp_mpi.config.options import option
from fedsp_mpi.config.silos import ServerDataConfig, SiloConfig
from fedsp_mpi.config.threats import PrivacyConfig
from fedsp_mpi.config.training import ComputeConfig, StageConfig


@dataclass(frozen=True)
class OuterConfig:
    """How the server moves, given the mean of what its clients found (aggregation/outer.py)."""

    optimizer: Literal["fedavg", "fedavgm", "diloco", "fedadam", "fedyogi", "fedadagrad"] = option(
        "fedavg",
        "`fedavg` takes the clients' mean over; `fedavgm`, and `diloco` with Nesterov's momentum, "
        "keep a momentum over rounds; `fedadam`, `fedyogi` and `fedadagrad` adapt each value's "
        "step (Reddi et al., 2021). For every method whose prompts or weights are averaged; the "
        "moments, one or two numbers a value, stay at the server",
    )
    learning_rate: float | None = option(
        None,
        "factor of the server's step; `null`: 1, with `diloco` 0.7, with the adaptive three 0.01",
    )
    momentum: float = option(0.9, "of `fedavgm` and `diloco`; beta_1 of the adaptive three")
    decay: float = option(0.99, "beta_2 of `fedadam` and `fedyogi`")
    adaptivity: float = option(
        1e-3, "tau of the adaptive three: added to the root of the second moment"
    )

    @property
    def resolved_learning_rate(self) -> float:
        """The factor of the server's step."""
        if self.learning_rate is not None:
            return self.learning_rate
        return {"fedavg": 1.0, "fedavgm": 1.0, "diloco": 0.7}.get(self.optimizer, 0.01)


@dataclass(frozen=True)
class CompressionConfig:
    """How prompts or weights are exchanged in rounds, both ways (comm/compression.py)."""

    format: Literal["none", "bf16", "int8"] = option(
        "none",
        "what a value travels as: `none`, fp32; otherwise the change against what both sides hold "
        "already, in `bf16`, or in `int8` with an fp32 scale a block. For every method whose "
        "prompts or weights are averaged; after a client's noise, and before `federation.rule`",
    )
    block: int = option(256, "that share a scale, with `int8`", "values")
    error_feedback: bool = option(
        True,
        "what rounding took is added to the next message: the server's, and each client's with "
        "`federation.client_state: kept`",
    )

    @property
    def is_on(self) -> bool:
        """Whether what travels is compressed."""
        return self.format != "none"


@dataclass(frozen=True)
class FederationConfig:
    """Rounds, clients, and what happens when one of them fails."""

    clients: int = option(
        7,
        "0: centralised; the server tunes alone, on all data unless `data.server_share` says "
        "otherwise. With `federation.silos`, their number, and may be left out; with "
        "`tiers.experts`, the number of their users, whatever it says",
        "clients",
    )
    rounds: int = option(10, "broadcast, local training, aggregation and server update", "rounds")
    client_state: Literal["kept", "restarted"] = option(
        "kept",
        "auxiliary model, optimizers and schedules between rounds; `restarted`: every round begins "
        "from the hand-out",
    )
    on_failure: Literal["drop", "stop"] = option(
        "drop", "drop clients that fail from the round, or `stop` the run"
    )
    min_clients: int = option(1, "fewer updates than this in a round stop the run", "clients")
    clients_per_round: int | None = option(None, "partial participation; `null`: all", "clients")
    sampling: Literal["uniform", "by_size", "round_robin"] = option(
        "uniform", "who takes part in a round; `by_size`: in proportion to the shard"
    )
    stragglers: Literal["wait", "drop"] = option(
        "wait",
        "`drop`: cut a client's work after `client_seconds`; it counts for the samples it used. "
        "The one setting under which bits depend on the clock",
    )
    client_seconds: float | None = option(None, "with `stragglers: drop`", "seconds")
    rule: Literal["mean", "median", "reject_outliers"] = option(
        "mean",
        "how updates are aggregated: the mean weighted by samples, the `median` of each value, or "
        "the mean of those that are no outliers",
    )
    outlier_deviations: float = option(
        3.0, "distance from the median beyond which an update is rejected", "deviations"
    )
    outer: OuterConfig = OuterConfig()
    compression: CompressionConfig = CompressionConfig()
    silos: tuple[SiloConfig, ...] = option(
        (),
        "clients with text of their own, instead of a number of clients; a list, or one section "
        "with a pattern and `names`: see configs/silos/README.md. With `tiers.experts`, one for "
        "each user, of the same name",
    )
    users: tuple[str, ...] = option(
        (), "with `tiers.experts`, the names of their users; follows from them"
    )
    disclose: Literal["exact", "rounded", "nothing"] = option(
        "exact", "what a silo says of its size; `rounded`: to two digits"
    )
    silo_cache: str | None = option(
        None,
        "folder for what `datasets` prepares of large silos and hub sets, one folder of the user's "
        "own (0700) for each silo; `null`: below `TMPDIR`. Small local files are read into memory "
        "alone",
    )

    def client_name(self, client: int) -> str:
        """Return what messages call a client: "silo north", "user ann", or "client 3"."""
        if 0 <= client < len(self.silos):  # messages also name clients that cannot be
            return f"silo {self.silos[client].name}"
        if 0 <= client < len(self.users):
            return f"user {self.users[client]}"
        return f"client {client}"


@dataclass(frozen=True)
class ServerConfig:
    """The owner of the global model."""

    data: ServerDataConfig = option(ServerDataConfig(), "")
    translation: StageConfig = option(
        StageConfig(steps=0),
        "a round, before the tuning: towards the auxiliary model's answers under the merged "
        "prompts, to questions about `distillation.text` or the server's shard",
    )
    tuning: StageConfig = option(
        StageConfig(), "a round, of the prompts (or weights) on the global model"
    )
    accept: Literal["always", "better"] = option(
        "always",
        "`better`: a round's tuning that makes the validation loss worse is taken back, the "
        "control's too",
    )
    compute: ComputeConfig = ComputeConfig()


@dataclass(frozen=True)
class ClientConfig:
    """An owner of text, which tunes its auxiliary model and then the prompts.

    FedSP calls this alternative training.
    """

    training: Literal["alternating", "joint"] = option(
        "alternating",
        "first the auxiliary model, then the prompts; `joint`: both at once, in the steps of "
        "`client.tuning`, each with an optimizer of its own",
    )
    alignment: StageConfig = option(
        StageConfig(), "a round, of the auxiliary model, prompts frozen"
    )
    tuning: StageConfig = option(
        StageConfig(), "a round, of the prompts (or weights), auxiliary model frozen"
    )
    proximal: float = option(
        0.0,
        "FedProx's mu: what travels is tuned with a term mu / 2 x its squared distance to the "
        "broadcast",
    )
    privacy: PrivacyConfig = PrivacyConfig()
    compute: ComputeConfig = ComputeConfig()
    resident: int = option(
        8, "of a rank whose state stays in memory; the others' is in `checkpoints/`", "clients"
    )

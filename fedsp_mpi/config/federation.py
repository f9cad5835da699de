"""The sections `federation`, `server` and `client`: rounds, roles, and how each of them tunes."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Literal

from fedsp_mpi.config.silos import ServerDataConfig, SiloConfig
from fedsp_mpi.config.threats import PrivacyConfig
from fedsp_mpi.config.training import ComputeConfig, StageConfig


@dataclass(frozen=True)
class OuterConfig:
    """How the server moves, given the mean of what its clients found (aggregation/outer.py)."""

    # fedavg takes the mean over (with learning_rate=1); diloco is Nesterov's momentum; the last
    # three are adaptive (Reddi et al., 2021).
    optimizer: Literal["fedavg", "fedavgm", "diloco", "fedadam", "fedyogi", "fedadagrad"] = "fedavg"
    learning_rate: float | None = None  # None: 1; diloco 0.7; the adaptive ones 0.01
    momentum: float = 0.9  # beta_1 of the adaptive ones
    decay: float = 0.99  # beta_2 of fedadam and fedyogi
    adaptivity: float = 1e-3  # tau of the adaptive ones

    @property
    def resolved_learning_rate(self) -> float:
        """The factor of the server's step."""
        if self.learning_rate is not None:
            return self.learning_rate
        return {"fedavg": 1.0, "fedavgm": 1.0, "diloco": 0.7}.get(self.optimizer, 0.01)

    @property
    def takes_over_the_mean(self) -> bool:
        """Whether the server goes on from the clients' mean itself."""
        return self.optimizer == "fedavg" and self.resolved_learning_rate == 1


@dataclass(frozen=True)
class FederationConfig:
    """Rounds, clients, and what happens when one of them fails."""

    # 0: centralised, the server tunes alone, on all data unless data.server_share says otherwise.
    # With silos, their number.
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
    outer: OuterConfig = OuterConfig()
    # Clients with text of their own (config/silos.py); none: data.source is divided among clients.
    silos: tuple[SiloConfig, ...] = ()
    # How many examples a silo says it has: as many as there are, rounded to two digits, or nothing.
    disclose: Literal["exact", "rounded", "nothing"] = "exact"
    # Where what `datasets` prepares of a silo goes, a folder for each; None: below TMPDIR.
    silo_cache: str | None = None

    def client_name(self, client: int) -> str:
        """Return what messages call a client: "silo north", or "client 3"."""
        is_silo = 0 <= client < len(self.silos)  # messages also name clients that cannot be
        return f"silo {self.silos[client].name}" if is_silo else f"client {client}"


@dataclass(frozen=True)
class ServerConfig:
    """The owner of the global model."""

    # With federation.silos: its own text.
    data: ServerDataConfig = dataclasses.field(default_factory=ServerDataConfig)

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
    """An owner of text, which tunes its auxiliary model and then the prompts.

    FedSP calls this alternative training.
    """

    # joint: both at once, in the steps of `tuning`, each with its own optimizer (FedSP without
    # alternative training).
    training: Literal["alternating", "joint"] = "alternating"
    alignment: StageConfig = StageConfig()
    tuning: StageConfig = StageConfig()
    # FedProx's mu: tuning has a term mu / 2 x the squared distance to what the server broadcast.
    proximal: float = 0.0
    privacy: PrivacyConfig = PrivacyConfig()
    compute: ComputeConfig = ComputeConfig()
    # Clients of a rank whose state stays in memory between rounds; that of the others goes to disk.
    resident: int = 8

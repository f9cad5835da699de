"""What all ranks of the server have in common: the global model, and the phases of a run."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from fedsp_mpi.comm import Handout, Topology, guard
from fedsp_mpi.comm.exchange import Exchange
from fedsp_mpi.config import Config
from fedsp_mpi.run import build
from fedsp_mpi.run.inputs import ExperimentInputs
from fedsp_mpi.training.device import Compute
from fedsp_mpi.training.process_group import Rendezvous, ServerGroup

if TYPE_CHECKING:
    from fedsp_mpi.comm.solo import Solo
    from fedsp_mpi.comm.wire import Wire
    from fedsp_mpi.models.language_model import LanguageModel
    from fedsp_mpi.roles import ServerRole
    from fedsp_mpi.run.handout import HandoutMeta


class ServerRank(Protocol):
    """A rank of the server: the phases of a run, in their order."""

    def prepare(self) -> Handout | None:
        """Distil the auxiliary model; return what clients get, on rank 0."""

    def build_role(self, meta: HandoutMeta, wire: Wire | Solo) -> ServerRole:
        """Build this rank's part of the server, where an earlier stretch of the run has left it."""

    def score_and_finish(self, role: ServerRole, wire: Wire | Solo) -> bool:
        """Score what was tuned; return False if the run was told to stop before the last score."""

    def close(self) -> None:
        """End what the server's ranks do together."""


@dataclass(frozen=True)
class LoadedServer:
    """What a rank of the server has loaded before the first round.

    Attributes:
        inputs: of the experiment, checked.
        compute: the server's device.
        model: the global model.
    """

    inputs: ExperimentInputs
    compute: Compute
    model: LanguageModel

    @classmethod
    def load(cls, inputs: ExperimentInputs, topology: Topology) -> LoadedServer:
        """Load the global model of checked inputs; raise ValueError if it cannot be read."""
        compute = Compute.of(inputs.config.server.compute, topology)
        compute.begin()
        return cls(inputs, compute, build.global_model(inputs, compute))


@dataclass(frozen=True)
class PreparedServer:
    """What a rank of the server has once the auxiliary model is distilled.

    Attributes:
        group: the ranks that are the server together.
        servers: the method's server, and the control.
        exchange: rank 0's end of compressed rounds.
    """

    group: ServerGroup
    servers: build.Servers
    exchange: Exchange | None = None


def join_group(
    config: Config, rendezvous: Rendezvous, rank: int, *, compute: Compute
) -> ServerGroup:
    """Return the group of the server's ranks, which distil the auxiliary model together.

    With tiers rank 0 alone reads what that needs: it distils alone, by an engine that may not be in
    a group of several, and the ranks connect when it is done (`connect_to_experts`).

    Args:
        config: of the run.
        rendezvous: opened by rank 0.
        rank: of this process.
        compute: its device.

    Raises:
        DeadlineError: one of them did not come.
    """
    if config.method_facts.has_tiers:
        return ServerGroup(rank, rendezvous.size, compute.device)
    return ServerGroup.join(rendezvous, rank, compute.device, seconds=config.deadlines.server)


def connect_to_experts(config: Config, rendezvous: Rendezvous, group: ServerGroup) -> None:
    """Connect the server's ranks before the rounds, where they have not distilled together.

    Args:
        config: of the run.
        rendezvous: opened by rank 0.
        group: as `join_group` returned it.

    Raises:
        DeadlineError: one of them did not come.
    """
    if config.method_facts.has_tiers:
        group.connect(rendezvous, seconds=config.deadlines.server)


def stop_requested() -> bool:
    """Return whether this process was told to stop (SIGUSR1)."""
    return guard.stop_requested

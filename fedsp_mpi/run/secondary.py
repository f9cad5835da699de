"""What the server's other ranks do before the first round and after the last, where the server is
more than rank 0.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from fedsp_mpi import comm
from fedsp_mpi.comm import Topology, guard
from fedsp_mpi.config import Config
from fedsp_mpi.log import Log

if TYPE_CHECKING:
    from fedsp_mpi.roles import ServerRole


class SecondaryServer:
    """A rank that holds the global model and shares the server's work. It decides nothing and
    writes nothing.

    Args:
        config: the run's.
        here: this rank's place.
        address, port: where the server's ranks meet.

    Raises ValueError if model or data cannot be read here.
    """

    def __init__(self, config: Config, here: Topology, address: str, port: int) -> None:
        from fedsp_mpi.run import build
        from fedsp_mpi.run.inputs import ExperimentInputs
        from fedsp_mpi.training.device import Compute
        from fedsp_mpi.training.process_group import Rendezvous

        self.materials = ExperimentInputs(config)
        self.materials.check()
        self._config, self._rank = config, here.rank
        self._meeting = Rendezvous(address, port, config.topology.server_ranks)
        self._compute = Compute.of(config.server.compute, here)
        self._compute.begin()
        self._model = build.global_model(self.materials, self._compute)

    def prepare(self) -> tuple[None, None]:
        """Join the team and help to distil. There is nothing to hand out, and no verdict."""
        from fedsp_mpi.run import auxiliary_model, build
        from fedsp_mpi.training.distill import StoppedError
        from fedsp_mpi.training.process_group import ServerGroup

        seconds = self._config.deadlines.server
        self._team = ServerGroup.join(
            self._meeting, self._rank, self._compute.device, seconds=seconds
        )
        try:
            auxiliary_model.help_to_distil(
                self.materials, self._model, self._team, lambda: guard.told_to_stop
            )
        except StoppedError:
            return None, None  # rank 0 says so to all
        self._servers = build.servers(self.materials, self._model, self._compute, group=self._team)
        return None, None

    def side(self, given: comm.Handout) -> ServerRole:
        """This rank's side of the rounds, where an earlier stretch of the run has left it."""
        from fedsp_mpi.record import Checkpoints
        from fedsp_mpi.run import build

        role = build.server_role(
            self.materials, self._servers, self._compute, group=self._team, journal=None
        )
        if done := given.meta["done"]:
            checkpoints = Checkpoints(Path(given.meta["folder"]))
            newest, _ = checkpoints.newest()
            assert newest is not None and newest.round == done, "rank 0 removed all later ones"
            role.load_state(checkpoints.read_server(newest))
        return role

    def finish(self, here: ServerRole, wire: Any) -> bool:
        """Help to score. False if the run was told to stop before the last score."""
        from fedsp_mpi.run.final_scores import score_all

        self._compute.begin()
        return score_all(here, self.materials, Log(), lambda: guard.told_to_stop)

    def leave(self) -> None:
        """End what the server's ranks do together."""
        self._team.leave()

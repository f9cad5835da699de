"""The server's other ranks, where the server is more than rank 0."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING

from fedsp_mpi.comm import Topology
from fedsp_mpi.config import Config
from fedsp_mpi.log import Log
from fedsp_mpi.record import Checkpoints
from fedsp_mpi.roles import ServerRole
from fedsp_mpi.run import auxiliary_model, build
from fedsp_mpi.run.any_inputs import inputs_of
from fedsp_mpi.run.final_scores import score_all
from fedsp_mpi.run.handout import HandoutMeta
from fedsp_mpi.run.server_rank import (
    LoadedServer,
    PreparedServer,
    connect_to_experts,
    join_group,
    stop_requested,
)
from fedsp_mpi.run.user_silos import UserSiloInputs
from fedsp_mpi.training.distill import StoppedError
from fedsp_mpi.training.process_group import Rendezvous

if TYPE_CHECKING:
    from fedsp_mpi.comm.solo import Solo
    from fedsp_mpi.comm.wire import Wire


class SecondaryServer:
    """A rank that holds the global model and shares the server's work.

    It decides nothing and writes nothing. Its phases are those of `server_rank.ServerRank`. With
    tiers it plays some of the experts, and leaves what needs the text of all of them to rank 0.

    Args:
        config: of the run.
        topology: this rank's place.
        rendezvous: where the server's ranks meet.
        candidates: ids of the tokens that losses run over, where text of several experts decides.

    Attributes:
        digests: of clients' texts, of which this rank reads none.

    Raises:
        ValueError: model or data cannot be read here.
    """

    digests: Mapping[str, str] = MappingProxyType({})

    def __init__(
        self,
        config: Config,
        topology: Topology,
        rendezvous: Rendezvous,
        *,
        candidates: Sequence[int] | None,
    ) -> None:
        inputs = inputs_of(config)
        if isinstance(inputs, UserSiloInputs):
            size = rendezvous.size
            inputs.read_only_experts(range(topology.rank, len(inputs.domains), size), candidates)
        inputs.check()
        self._config = config
        self._rank = topology.rank
        self._rendezvous = rendezvous
        self._loaded = LoadedServer.load(inputs, topology)
        self._prepared: PreparedServer | None = None  # from `prepare` on

    def prepare(self) -> None:
        """Join the group and help to distil. There is nothing to hand out."""
        loaded = self._loaded
        group = join_group(self._config, self._rendezvous, self._rank, compute=loaded.compute)
        try:
            if not self._has_tiers:
                auxiliary_model.help_to_distil(
                    loaded.inputs, loaded.model, group, stop=stop_requested
                )
        except StoppedError:
            return  # rank 0 refuses to continue, for all ranks
        servers = build.servers(loaded.inputs, loaded.model, loaded.compute, group=group)
        self._prepared = PreparedServer(group, servers)

    def build_role(self, meta: HandoutMeta, wire: Wire | Solo) -> ServerRole:
        """Build this rank's part of the server, where an earlier stretch of the run has left it."""
        assert self._prepared is not None, "prepare comes first"
        connect_to_experts(self._config, self._rendezvous, self._prepared.group)
        checkpoints = Checkpoints(Path(meta.folder))
        role = build.server_role(
            self._loaded.inputs,
            self._prepared.servers,
            self._loaded.compute,
            group=self._prepared.group,
            wire=wire,
            checkpoints=checkpoints,
            journal=None,
        )
        if meta.rounds_done:
            newest, _ = checkpoints.newest()
            assert newest is not None and newest.round == meta.rounds_done, (
                "rank 0 removed all later ones"
            )
            role.load_state(checkpoints.read_server(newest))
        return role

    def score_and_finish(self, role: ServerRole, wire: Wire | Solo) -> bool:
        """Help to score; return False if the run was told to stop before the last score."""
        if self._has_tiers:  # rank 0 does it alone
            self.close()
            return True
        self._loaded.compute.begin()
        return score_all(role, self._loaded.inputs, Log(), stop=stop_requested)

    def close(self) -> None:
        """End what the server's ranks do together."""
        assert self._prepared is not None, "prepare comes first"
        self._prepared.group.leave()

    @property
    def _has_tiers(self) -> bool:
        return self._config.method_facts.has_tiers

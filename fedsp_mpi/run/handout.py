"""What the server tells all ranks before the rounds, beside tensors: places, and who does what."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from fedsp_mpi.files.untrusted import JsonMapping, JsonObject
from fedsp_mpi.record.checkpoint import CheckpointFile


@dataclass(frozen=True)
class ServerMeeting:
    """Where the server's ranks meet, if there are several.

    Attributes:
        address: of rank 0's host.
        port: on which rank 0 listens.
        hosts: of all ranks.
        candidates: ids of the tokens that losses run over, where they follow from text of all
            experts; None: they follow from what each of these ranks reads, or are all.
    """

    address: str
    port: int
    hosts: Sequence[str]
    candidates: Sequence[int] | None = None

    def to_json(self) -> JsonObject:
        """Return this as it travels."""
        return {
            "address": self.address,
            "port": self.port,
            "hosts": list(self.hosts),
            "candidates": self.candidates,
        }

    @classmethod
    def from_json(cls, values: JsonMapping) -> ServerMeeting:
        """Read what the server sent."""
        return cls(values["address"], values["port"], values["hosts"], values["candidates"])


@dataclass(frozen=True)
class HandoutMeta:
    """What every rank must know before the rounds.

    Attributes:
        assignment: ids of the clients of each rank.
        processes: host and process id of each rank.
        folder: of the run, absolute.
        cell: the configuration of the clients' model, as transformers writes it.
        depth: layers that the clients' model runs.
        rounds_done: by an earlier stretch of the run.
        client_states: the checkpoint file of each client that has one, by client.
        sizes: number of training examples of the server, and what each silo has declared; empty
            where clients share one source.
        candidates: ids of the tokens that losses run over, where clients have silos; None: all.
    """

    assignment: Sequence[Sequence[int]]
    processes: Sequence[tuple[str, int]]
    folder: str
    cell: JsonMapping = field(default_factory=dict)
    depth: int = 0
    rounds_done: int = 0
    client_states: Mapping[int, CheckpointFile] = field(default_factory=dict)
    sizes: Sequence[int] = ()
    candidates: Sequence[int] | None = None

    @property
    def rank_of(self) -> dict[int, int]:
        """The rank that plays each client, by client."""
        return {client: rank for rank, ids in enumerate(self.assignment) for client in ids}

    def to_json(self) -> JsonObject:
        """Return this as it travels."""
        return {
            "assignment": [list(ids) for ids in self.assignment],
            "processes": [list(process) for process in self.processes],
            "folder": self.folder,
            "cell": dict(self.cell),
            "depth": self.depth,
            "done": self.rounds_done,
            "sizes": list(self.sizes),
            "candidates": None if self.candidates is None else list(self.candidates),
            "states": {str(client): list(file) for client, file in self.client_states.items()},
        }

    @classmethod
    def from_json(cls, values: JsonMapping) -> HandoutMeta:
        """Read what the server handed out."""
        return cls(
            assignment=values["assignment"],
            processes=[(host, pid) for host, pid in values["processes"]],
            folder=values["folder"],
            cell=values["cell"],
            depth=values["depth"],
            rounds_done=values["done"],
            client_states={
                int(client): CheckpointFile(*file) for client, file in values["states"].items()
            },
            sizes=values["sizes"],
            candidates=values["candidates"],
        )

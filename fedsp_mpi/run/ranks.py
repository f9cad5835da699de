"""What the ranks say of themselves before a run, and which of them does what."""

from __future__ import annotations

import os
import platform
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field

from fedsp_mpi import comm
from fedsp_mpi.comm import Topology
from fedsp_mpi.comm.inspection import ProtocolError, require_fields
from fedsp_mpi.config import Config
from fedsp_mpi.config.parsing import differences
from fedsp_mpi.files.untrusted import JsonMapping, JsonObject
from fedsp_mpi.log import one_line
from fedsp_mpi.run import devices
from fedsp_mpi.run.devices import DeviceInfo

Assignment = list[tuple[int, ...]]  # ids of the clients of each rank


@dataclass(frozen=True)
class RankInfo:
    """What a rank says of itself at the start; the record keeps it.

    Attributes:
        host: its host's name.
        pid: its process on that host.
        device: names of its devices, for people.
        devices: of its roles, by role.
        cores: that it may run on.
    """

    host: str
    pid: int
    device: str
    devices: dict[str, DeviceInfo]
    cores: int

    def to_json(self) -> JsonObject:
        """Return this as it travels, and as the record keeps it."""
        return {
            "host": self.host,
            "pid": self.pid,
            "device": self.device,
            "devices": {role: device.to_json() for role, device in self.devices.items()},
            "cores": self.cores,
        }

    @classmethod
    def from_json(cls, values: JsonMapping, rank: int) -> RankInfo:
        """Read what a rank sent; raise ProtocolError, naming the rank, if it cannot be."""
        kinds = {"host": str, "pid": int, "device": str, "devices": dict, "cores": int}
        require_fields(values, rank, kinds)
        # The guard signals these processes when a rank hangs; 0 and negative numbers would mean
        # whole groups of them.
        if values["pid"] < 2:
            raise ProtocolError(
                f"rank {rank}: found process {values['pid']} on {values['host']!r}, which cannot be"
            )
        require_fields(values["devices"], rank, dict.fromkeys(values["devices"], dict))
        devices = {
            role: DeviceInfo.from_json(device, rank) for role, device in values["devices"].items()
        }
        return cls(values["host"], values["pid"], values["device"], devices, values["cores"])


@dataclass(frozen=True)
class ReadyReport:
    """What a rank says when it has loaded model and data, or has failed to.

    Attributes:
        error: the mistake that it found; None if it is ready.
        seconds: since the start of the set-up.
        digests: of the texts of its clients, by name (run/fingerprints.py).
    """

    error: str | None
    seconds: float
    digests: Mapping[str, str] = field(default_factory=dict)

    def to_json(self) -> JsonObject:
        """Return this as it travels."""
        return {"error": self.error, "seconds": self.seconds, "texts": dict(self.digests)}

    @classmethod
    def from_json(cls, values: JsonMapping, rank: int) -> ReadyReport:
        """Read what a rank sent; raise ProtocolError, naming the rank, if it cannot be."""
        kinds: dict[str, type | tuple[type, ...]] = {
            "seconds": (int, float),
            "error": (str, type(None)),
            "texts": dict,
        }
        require_fields(values, rank, kinds)
        return cls(values["error"], values["seconds"], values["texts"])


def introduction(config: Config, topology: Topology, error: ValueError | None = None) -> JsonObject:
    """Return what this rank sends at the start: what it is, or why it cannot take part.

    Args:
        config: this rank's.
        topology: this rank's place.
        error: what is wrong with the configuration on this rank.
    """
    host = platform.node()
    if error is not None:
        return {"host": host, "error": one_line(error)}
    by_role = devices.devices(config, topology)
    for device in by_role.values():
        if device.error is not None:
            return {"host": host, "error": f"rank {topology.rank} on {host}: {device.error}"}
    names = " and ".join(sorted({device.name for device in by_role.values()}))
    info = RankInfo(host, os.getpid(), names, by_role, topology.cores)
    return info.to_json() | {"config": asdict(config)}


def read_introductions(messages: Sequence[JsonMapping]) -> list[RankInfo]:
    """Read the introductions of all ranks on the server.

    Args:
        messages: what each rank sent, by rank.

    Raises:
        ProtocolError: a message cannot be.
        comm.Refused: a rank cannot take part, or has another configuration than the server.
    """
    ranks: list[RankInfo] = []
    errors: list[str] = []
    for rank, message in enumerate(messages):
        require_fields(message, rank, {"host": str})
        if not message["host"].isprintable():
            raise ProtocolError(
                f"rank {rank}: found {message['host']!r} as its host, which cannot be"
            )
        if "error" in message:
            require_fields(message, rank, {"error": str})
            errors.append(message["error"])
        else:
            require_fields(message, rank, {"config": dict})
            ranks.append(RankInfo.from_json(message, rank))
    if errors:
        raise comm.Refused(errors[0])
    for message in messages:
        changes = differences(messages[0]["config"], message["config"])
        if changes:
            raise comm.Refused(
                f"configuration: found another one on host {message['host']} than on the "
                f"server's ({'; '.join(changes)}), expected the same on every rank; put the file "
                "where all hosts see it"
            )
    return ranks


def require_topology(config: Config, ranks: Sequence[RankInfo], topology: Topology) -> None:
    """Check the number of ranks and the server's GPUs.

    Args:
        config: of the run.
        ranks: all of them.
        topology: of the server.

    Raises:
        ValueError: they are not what the configuration asks for, or there are more ranks than
            clients.
    """
    expected = config.topology.ranks
    servers = config.topology.server_ranks
    size = topology.size
    if expected is not None and size != expected:
        raise ValueError(
            f"topology.ranks: found {size} ranks, expected {expected}; start that many processes"
        )
    if servers > 1 and size <= servers:
        raise ValueError(
            f"topology.server_ranks: found {servers} with {size} ranks, expected at least one "
            f"rank more, for the clients; start {servers + 1} processes or more"
        )
    assign_clients([1.0] * config.federation.clients, size, servers)
    for sharing in devices.shared_gpus([rank.devices for rank in ranks[:servers]]).values():
        raise ValueError(
            f"topology.server_ranks: found ranks {sharing} on one GPU, expected one for each; "
            f"start them where there are {servers} GPUs, or set server.compute.device=cpu"
        )


def assign_clients(work: Sequence[float], size: int, server_ranks: int) -> Assignment:
    """Spread the clients over the ranks, so that each rank has about the same work.

    The server's ranks have no clients, unless there is one rank for all.

    Args:
        work: of each client, relative to the others.
        size: number of ranks.
        server_ranks: how many of them, from rank 0 on, are the server.

    Raises:
        ValueError: there are more ranks than clients.
    """
    if not work:
        return [()] * size
    if size == 1:
        return [tuple(range(len(work)))]
    servers: Assignment = [()] * server_ranks
    return servers + comm.spread(list(work), size - server_ranks)


def load_waves(hosts: Sequence[str]) -> list[set[int]]:
    """Return the ranks that load model and data at the same time, wave by wave.

    Ranks of one host must not fill its cache together: the lowest rank of each host goes first. On
    the server's host the server itself has been the first. Where no rank needs to wait, all go in
    one wave.

    Args:
        hosts: by rank.
    """
    second = {
        rank for rank, host in enumerate(hosts) if host != hosts[0] and hosts.index(host) != rank
    }
    first = set(range(len(hosts))) - second
    return [wave for wave in (first, second) if wave]

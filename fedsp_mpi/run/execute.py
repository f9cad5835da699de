"""A run from its start to its table: preparation, hand-out, rounds, scores, record."""

from __future__ import annotations

import os
import platform
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from fedsp_mpi import comm
from fedsp_mpi.comm import guard
from fedsp_mpi.comm.inspection import ProtocolError, require_fields
from fedsp_mpi.config import Config
from fedsp_mpi.config.parsing import differences
from fedsp_mpi.log import Log, RoundProgress, one_line
from fedsp_mpi.run import devices as placement
from fedsp_mpi.run.server import ServerRun

if TYPE_CHECKING:
    from fedsp_mpi.comm.solo import Solo
    from fedsp_mpi.comm.wire import Wire
    from fedsp_mpi.roles import HostedClients
    from fedsp_mpi.run.secondary import SecondaryServer

Made = TypeVar("Made")


def execute(
    config: Config | ValueError, name: str, log: Log, aside: Log | None = None
) -> Path | None:
    """Run one experiment; every rank calls this. The server gets the run's folder, the others None.

    Heavy libraries are imported by the server at once and by the clients when the hand-out has
    come, so that ranks that only wait leave the processor to the distillation.

    Args:
        config: checked, the same on every rank; or what is wrong with it, which all ranks then
            hear.
        name: the configuration's name, for a run that has none.
        log: speaks on the server only.
        aside: speaks on every rank; that of the first which plays clients says how far these are in
            a long round.

    Raises comm.Refused on every rank for a mistake of the user, before anything was trained where
    that is possible; with status 75 if the run was told to stop (SIGUSR1), and with 0 if there is
    nothing to go on with.
    """
    begun = time.perf_counter()
    with guard.phase("start-up"):
        wire = connect(config if isinstance(config, Config) else Config())
        hosts = wire.collect(_introduction(config, wire.topology))
        wire.agree(_first_mistake(hosts) if hosts else None)
    assert isinstance(config, Config)
    if hosts:
        guard.know_peers((host["host"], host["pid"]) for host in hosts)
    server = ServerRun(config, name, log, hosts, begun) if wire.is_server else None
    try:
        with guard.phase("checks"):
            verdict = server.refusal(wire) if server else None
            met = wire.agree(
                verdict, "handout", server.meeting_point() if server and not verdict else None
            )
        helper = _helper(config, wire, met, server) if met else None
        _train(config, wire, server, server or helper, aside or Log())
    except Exception as error:
        if server:
            server.give_up(error)
        raise
    with guard.phase("end"):
        wire.finish()
    return server.folder if server else None


def connect(config: Config) -> Wire | Solo:
    """The wire between all ranks.

    Raises comm.Refused if the launcher's processes do not see each other.
    """
    try:
        return comm.connect(deadlines=comm.Deadlines(**asdict(config.deadlines)))
    except ValueError as error:
        raise comm.Refused(str(error)) from None


def _train(
    config: Config,
    wire: Wire | Solo,
    server: ServerRun | None,
    role: ServerRun | SecondaryServer | None,
    aside: Log,
) -> None:
    """`server` is rank 0's, `role` that of every rank of the server."""
    with guard.phase("distillation"):
        handout, verdict = role.prepare() if role else (None, None)
        wire.agree(verdict, "handout")
    with guard.phase("hand-out"):
        given = wire.handout(handout)
        del handout
    if server is None:
        guard.report_into(Path(given.meta["folder"]))
    guard.know_peers(given.meta["processes"])
    clients = _client_side(config, wire, given, server, aside)
    here, done = role.side(given) if role else None, given.meta["done"]
    del given
    from fedsp_mpi.federate import Schedule, federate

    schedule = Schedule(config.federation, config.checkpoint, done)
    finished = federate(wire, schedule, server=here, clients=clients)
    with guard.phase("end of the rounds"):
        peaks = wire.collect(placement.peak(), "end")
        if server and peaks:
            server.record.describe(memory=placement.peaks(peaks, config.topology.server_ranks))
    with guard.phase("evaluation"):
        if role and here:
            finished = finished and role.finish(here, wire)
            role.leave()
        wire.agree(server.stopped() if server and not finished else None, "finish")


def _helper(
    config: Config, wire: Wire | Solo, met: list[Any], server: ServerRun | None
) -> SecondaryServer | None:
    """What this rank needs to share the server's work, if it is one of those that do."""
    address, port, hosts = met
    turns = reading_turns(hosts[: config.topology.server_ranks])
    turns = [turn - {0} for turn in turns]

    def make() -> SecondaryServer:
        from fedsp_mpi.run.secondary import SecondaryServer

        return SecondaryServer(config, wire.topology, address, port)

    return _in_turns(wire, turns, make, "helper", server)


def _client_side(
    config: Config, wire: Wire | Solo, given: comm.Handout, server: ServerRun | None, aside: Log
) -> HostedClients | None:
    """The clients of this rank, if it has any, once all ranks have theirs."""
    turns = reading_turns([host for host, _ in given.meta["processes"]])
    assignment = given.meta["assignment"]
    mine = assignment[wire.topology.rank]
    first = next((rank for rank, ids in enumerate(assignment) if ids), None)
    every = config.record.progress_seconds if wire.topology.rank == first else None

    def make() -> HostedClients:
        from fedsp_mpi.run import build, fingerprints
        from fedsp_mpi.run.inputs import ExperimentInputs
        from fedsp_mpi.training.device import Compute

        compute = Compute.of(config.client.compute, wire.topology)
        materials = server.materials if server else ExperimentInputs(config)
        clients = build.hosted_clients(
            materials,
            compute,
            given,
            ids=mine,
            call_server=wire.call,
            progress=RoundProgress(aside.say, every),
        )
        clients.digests.update(fingerprints.of_clients(materials, mine))
        return clients

    return _in_turns(wire, turns, make if mine else None, "client", server)


def _in_turns(
    wire: Wire | Solo,
    turns: list[set[int]],
    make: Callable[[], Made] | None,
    who: str,
    server: ServerRun | None,
) -> Made | None:
    """What `make` gives on each rank that is in a turn, turn by turn.

    A mistake found on one is told to all.
    """
    start, made, error = time.perf_counter(), None, None
    with guard.phase(f"{who} set-up"):
        for turn in turns:
            if make is not None and wire.topology.rank in turn:
                try:
                    made = make()
                except ValueError as found:
                    error = f"rank {wire.topology.rank} on {platform.node()}: {one_line(found)}"
            texts = getattr(made, "digests", {})  # of clients: what they read
            ready = wire.collect(
                {"error": error, "seconds": time.perf_counter() - start, "texts": texts}
            )
            wire.agree(server.heard(ready or [], who) if server else None)
    return made


def reading_turns(hosts: list[str]) -> list[set[int]]:
    """Which ranks read model and data at the same time, so that those of one host never fill its
    cache together.

    The first on the server's host was the server; on any other it is the lowest rank. Where no rank
    needs to wait, all take one turn.

    Args:
        hosts: by rank.
    """
    late = {
        rank for rank, host in enumerate(hosts) if host != hosts[0] and hosts.index(host) != rank
    }
    return [turn for turn in (set(range(len(hosts))) - late, late) if turn]


def _introduction(config: Config | ValueError, here: comm.Topology) -> dict[str, Any]:
    """What a rank says of itself at the start."""
    if not isinstance(config, Config):
        return {"host": platform.node(), "error": one_line(config)}
    devices = placement.devices(config, here)
    if error := next((device["error"] for device in devices.values() if "error" in device), None):
        return {"host": platform.node(), "error": f"rank {here.rank} on {platform.node()}: {error}"}
    names = " and ".join(sorted({device["name"] for device in devices.values()}))
    said = {
        "host": platform.node(),
        "pid": os.getpid(),
        "device": names,
        "devices": devices,
        "cores": here.cores,
    }
    return {**said, "config": asdict(config)}


def _first_mistake(hosts: list[dict[str, Any]]) -> comm.Refused | None:
    """What is wrong with somebody's configuration, or how it differs from the server's."""
    for rank, host in enumerate(hosts):
        about: dict[str, type] = (
            {"error": str}
            if "error" in host
            else {"pid": int, "device": str, "devices": dict, "config": dict}
        )
        require_fields(host, rank, {"host": str, **about})
        # The guard signals these processes when a rank hangs; 0 and negative numbers would mean
        # whole groups of them.
        if host.get("pid", 2) < 2 or not host["host"].isprintable():
            raise ProtocolError(
                f"rank {rank}: found process {host.get('pid')} on {host['host']!r}, which cannot be"
            )
    if error := next((host["error"] for host in hosts if "error" in host), None):
        return comm.Refused(error)
    configs = [host.pop("config") for host in hosts]
    for host, config in zip(hosts, configs):
        if changed := differences(configs[0], config):
            return comm.Refused(
                f"configuration: found another one on host {host['host']} than on the server's "
                f"({'; '.join(changed)}), "
                "expected the same on every rank; put the file where all hosts see it"
            )
    return None

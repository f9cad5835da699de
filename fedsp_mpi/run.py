"""A run from its start to its table: preparation, hand-out, rounds, scores, record."""

from __future__ import annotations

import os
import platform
import time
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fedsp_mpi import comm
from fedsp_mpi.comm import guard
from fedsp_mpi.config import Config
from fedsp_mpi.log import Log
from fedsp_mpi.plain import differences
from fedsp_mpi.server_run import ServerRun, one_line

if TYPE_CHECKING:
    from fedsp_mpi.comm.solo import Solo
    from fedsp_mpi.comm.wire import Wire
    from fedsp_mpi.federate import ClientSide


def execute(config: Config | ValueError, name: str, log: Log) -> Path | None:
    """Run one experiment; every rank calls this. The server gets the run's folder, the others None.

    Heavy libraries are imported by the server at once and by the clients when the hand-out has come, so that ranks that
    only wait leave the processor to the distillation.

    Args:
        config: checked, the same on every rank; or what is wrong with it, which all ranks then hear.
        name: the configuration's name, for a run that has none.
        log: speaks on the server only.

    Raises comm.Refused on every rank for a mistake of the user, before anything was trained where that is possible;
    with status 75 if the run was told to stop (SIGUSR1), and with 0 if there is nothing to go on with.
    """
    begun = time.perf_counter()
    with guard.phase("start-up"):
        wire = connect(config if isinstance(config, Config) else Config())
        hosts = wire.collect(_introduction(config))
        wire.agree(_first_mistake(hosts) if hosts else None)
    assert isinstance(config, Config)
    if hosts:
        guard.know_peers((host["host"], host["pid"]) for host in hosts)
    server = ServerRun(config, name, log, hosts, begun) if wire.is_server else None
    try:
        with guard.phase("checks"):
            wire.agree(server.refusal(wire) if server else None, "handout")
        _train(config, wire, server)
    except Exception as error:
        if server:
            server.give_up(error)
        raise
    with guard.phase("end"):
        wire.finish()
    return server.folder if server else None


def connect(config: Config) -> Wire | Solo:
    """The wire between all ranks. Raises comm.Refused if the launcher's processes do not see each other."""
    try:
        return comm.connect(deadlines=comm.Deadlines(**asdict(config.deadlines)))
    except ValueError as error:
        raise comm.Refused(str(error)) from None


def _train(config: Config, wire: Wire | Solo, server: ServerRun | None) -> None:
    with guard.phase("distillation"):
        handout, verdict = server.prepare() if server else (None, None)
        wire.agree(verdict, "handout")
    with guard.phase("hand-out"):
        given = wire.handout(handout)
        del handout
    if server is None:
        guard.report_into(Path(given.meta["folder"]))
    guard.know_peers(given.meta["processes"])
    clients = _client_side(config, wire, given, server)
    here, done = server.side(given) if server else None, given.meta["done"]
    del given
    from fedsp_mpi.federate import Plan, federate

    finished = federate(wire, Plan(config.federation, config.checkpoint, done), here, clients)
    with guard.phase("evaluation"):
        if server and here and finished:
            finished = server.finish(here, wire)
        wire.agree(None if finished or not server else server.stopped(), "finish")


def _client_side(config: Config, wire: Wire | Solo, given: comm.Handout, server: ServerRun | None) -> ClientSide | None:
    """The clients of this rank, if it has any, once all ranks have theirs. A mistake found on one is told to all."""
    start, clients, error = time.perf_counter(), None, None
    mine = given.meta["assignment"][wire.topology.rank]
    with guard.phase("client set-up"):
        if mine:
            from fedsp_mpi import build
            from fedsp_mpi.training.device import Compute
        for turn in reading_turns([host for host, _ in given.meta["processes"]]):
            if mine and wire.topology.rank in turn:
                try:
                    compute = Compute.of(config.client.compute, wire.topology.local_rank)
                    materials = server.materials if server else build.Materials(config)
                    clients = build.client_side(materials, compute, given, mine)
                except ValueError as found:
                    error = f"rank {wire.topology.rank} on {platform.node()}: {one_line(found)}"
            ready = wire.collect({"error": error, "seconds": time.perf_counter() - start})
            wire.agree(server.heard(ready or []) if server else None)
    return clients


def reading_turns(hosts: list[str]) -> list[set[int]]:
    """Which ranks read model and data at the same time, so that those of one host never fill its cache together.

    The first on the server's host was the server; on any other it is the lowest rank. Where no rank needs to wait, all
    take one turn.

    Args:
        hosts: by rank.
    """
    late = {rank for rank, host in enumerate(hosts) if host != hosts[0] and hosts.index(host) != rank}
    return [turn for turn in (set(range(len(hosts))) - late, late) if turn]


def _introduction(config: Config | ValueError) -> dict[str, Any]:
    """What a rank says of itself at the start. torch is imported for it only where there is a GPU to name."""
    if not isinstance(config, Config):
        return {"host": platform.node(), "error": one_line(config)}
    device = "cpu"
    wanted = {config.server.compute.device, config.client.compute.device}
    if wanted != {"cpu"} and any(Path("/dev").glob("nvidia[0-9]*")):
        import torch

        device = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
    cores = len(os.sched_getaffinity(0))
    said = {"host": platform.node(), "pid": os.getpid(), "device": device, "cores": cores}
    return {**said, "config": asdict(config)}


def _first_mistake(hosts: list[dict[str, Any]]) -> comm.Refused | None:
    """What is wrong with somebody's configuration, or how it differs from the server's."""
    if error := next((host["error"] for host in hosts if "error" in host), None):
        return comm.Refused(error)
    configs = [host.pop("config") for host in hosts]
    for host, config in zip(hosts, configs):
        if changed := differences(configs[0], config):
            return comm.Refused(
                f"configuration: found another one on host {host['host']} than on the server's ({'; '.join(changed)}), "
                "expected the same on every rank; put the file where all hosts see it"
            )
    return None

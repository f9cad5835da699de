"""Check cluster, configuration, model and data before a run, by all ranks together in seconds."""

from __future__ import annotations

import os
import platform
from collections.abc import Sequence
from dataclasses import asdict
from importlib import metadata
from typing import TYPE_CHECKING

from fedsp_mpi.comm import diagnostics
from fedsp_mpi.commands.check_inputs import FolderView, ServerChecks
from fedsp_mpi.commands.check_ranks import check_ranks, check_world
from fedsp_mpi.commands.check_report import CheckReport
from fedsp_mpi.commands.check_silos import check_silos
from fedsp_mpi.config import Config
from fedsp_mpi.files.untrusted import JsonObject
from fedsp_mpi.log import Log, one_line
from fedsp_mpi.run import devices as placement
from fedsp_mpi.run import execute
from fedsp_mpi.run.environment import VERSIONS

if TYPE_CHECKING:
    from fedsp_mpi.comm.solo import Solo
    from fedsp_mpi.comm.wire import Wire

# Seconds between two clocks above which times in logs and of files mislead.
_MAX_CLOCK_SKEW = 1.0


def check(
    config: Config, log: Log, *, name: str = "embedded", error: ValueError | None = None
) -> None:
    """Check everything that a run of this configuration needs; every rank calls this.

    Args:
        config: checked.
        log: gets a line for each finding; speaks on the server only.
        name: of the configuration, for a run that has none.
        error: what is wrong with the configuration on this rank; `config` is the default one then.

    Raises:
        Refused: on every rank, if anything failed.
    """
    wire = execute.connect(config)
    report = CheckReport(log)
    ranks = (
        wire.collect(_introduction(config, wire, error)) or []
    )  # of all ranks, on the server only
    ranks_agree = not ranks or check_ranks(report, config, ranks, error=error)
    wire.agree(None if ranks_agree else report.verdict())
    silos = None
    if config.federation.silos:
        has_patterns = any(silo.is_pattern for silo in config.federation.silos)
        silos = check_silos(report, config, name, wire=wire)
        config = silos.config if silos else config
        if silos and ranks and has_patterns:
            check_world(report, config, len(ranks))
    server = ServerChecks(report, config, ranks, silos=silos) if wire.is_server else None
    try:
        handout = wire.handout(server.check_inputs() if server else None)
        views = wire.collect(FolderView.of(handout.meta, wire.topology.rank).to_json())
        if server and views:
            server.check_views([FolderView.from_json(view) for view in views])
    finally:
        if server:
            server.clean_up()
    _check_wire(report, wire, num_ranks=len(ranks), num_values=handout.contract.up.num_values)
    if ranks:
        log.say(f"{len(report.failures)} failed, {report.num_warnings} to look at")
    wire.agree(report.verdict() if wire.is_server else None)
    wire.finish()


def _introduction(config: Config, wire: Wire | Solo, error: ValueError | None) -> JsonObject:
    """Return what a rank says of itself, as JSON; it must not import torch on ranks without GPU."""
    topology = wire.topology
    versions = {name: _version(name) for name in ("fedsp_mpi", *VERSIONS)}
    introduction = {
        "host": topology.host,
        "place": f"local rank {topology.local_rank} of {topology.local_size}",
        "cores": sorted(os.sched_getaffinity(0)),
        "memory": diagnostics.free_memory(),
        "versions": {"python": platform.python_version(), **versions},
        **diagnostics.library(wire),
    }
    if error is not None:
        return introduction | {"mistake": one_line(error), "config": None, "devices": {}}
    devices = placement.devices(config, topology)
    by_role = {role: device.to_json() for role, device in devices.items()}
    return introduction | {"config": asdict(config), "devices": by_role}


def _version(name: str) -> str:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return "not installed"


def _check_wire(report: CheckReport, wire: Wire | Solo, *, num_ranks: int, num_values: int) -> None:
    """Check the speed of the wire and the ranks' clocks; collective.

    Args:
        report: gets the findings, on the server.
        wire: between all ranks.
        num_ranks: on the server, all of them.
        num_values: fp32 values of a client's prompt.
    """
    seconds = diagnostics.speed(wire)
    skews = diagnostics.clocks(wire)
    if not seconds:  # not the server, or one process
        return
    num_bytes = 4 * num_values
    num_client_ranks = num_ranks - 1
    speeds = []
    for operation in ("broadcast", "gather"):
        elapsed = seconds[f"{operation}_seconds"]
        rate = num_client_ranks * num_bytes / elapsed
        speeds.append(f"{operation} {1e3 * elapsed:.1f} ms, {rate / 1e9:.2f} GB/s")
    prompts = f"prompts of {num_bytes / 1e6:.2f} MB and {num_client_ranks} client ranks"
    report.add("ok", "speed", f"{prompts}: {'; '.join(speeds)}")
    _check_clocks(report, skews)


def _check_clocks(report: CheckReport, skews: Sequence[tuple[float, float]]) -> None:
    """Warn if a rank's clock is off.

    Args:
        report: gets the finding.
        skews: seconds that each rank's clock is ahead of the server's, and their error.
    """
    worst = max(range(len(skews)), key=lambda rank: abs(skews[rank][0]))
    skew, error = skews[worst]
    finding = f"at most {abs(skew):.3f} s apart (rank {worst}, measured to {error:.3f} s)"
    if abs(skew) - error > _MAX_CLOCK_SKEW:
        advice = "times in logs and files mislead: synchronise the hosts by NTP"
        report.add("warn", "clocks", f"{finding}; {advice}")
    else:
        report.add("ok", "clocks", finding)

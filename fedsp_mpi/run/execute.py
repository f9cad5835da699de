"""One run from its start to its end, on every rank: preparation, hand-out, rounds, scores.

What the server finds wrong, all ranks hear and raise together (`agreed`).
"""

from __future__ import annotations

import platform
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Protocol, TypeVar

from fedsp_mpi import comm
from fedsp_mpi.comm import guard
from fedsp_mpi.config import Config
from fedsp_mpi.files.untrusted import JsonMapping
from fedsp_mpi.log import Log, one_line
from fedsp_mpi.run import devices
from fedsp_mpi.run.agreement import agreed
from fedsp_mpi.run.handout import HandoutMeta, ServerMeeting
from fedsp_mpi.run.preload import Preload, uncollected
from fedsp_mpi.run.ranks import (
    RankInfo,
    ReadyReport,
    introduction,
    load_waves,
    read_introductions,
    require_topology,
)
from fedsp_mpi.run.silos import OpenSilos, open_silos

if TYPE_CHECKING:
    from fedsp_mpi.comm.solo import Solo
    from fedsp_mpi.comm.wire import Wire
    from fedsp_mpi.roles import HostedClients
    from fedsp_mpi.run.secondary import SecondaryServer
    from fedsp_mpi.run.server import ServerRun
    from fedsp_mpi.run.server_rank import ServerRank


def execute(
    config: Config,
    name: str,
    log: Log,
    *,
    client_log: Log | None = None,
    error: ValueError | None = None,
) -> Path | None:
    """Run one experiment; every rank calls this.

    Heavy libraries are imported by the server at once, and by ranks that play clients while they
    wait for it.

    Args:
        config: checked, the same on every rank.
        name: of the configuration, for a run that has none.
        log: speaks on the server only.
        client_log: speaks on every rank; the first rank that plays clients says on it how far they
            are in a long round.
        error: what is wrong with the configuration on this rank; `config` is the default one then.

    Returns:
        The run's folder on the server, None elsewhere.

    Raises:
        comm.Refused: on every rank, for a mistake of the user, before training where that is
            possible; with status 75 if the run was told to stop (SIGUSR1), and with 0 if there is
            nothing left to do.
    """
    started_at = time.perf_counter()
    server: ServerRun | None = None
    with guard.phase("start-up"):
        wire = connect(config)
        messages = wire.collect(introduction(config, wire.topology, error))
        with agreed(wire):
            ranks = read_introductions(messages) if messages else []
        if config.wire.encryption:
            wire.exchange_keys()
    if ranks:
        guard.set_peers((rank.host, rank.pid) for rank in ranks)
    silos: OpenSilos | None = None
    if config.federation.silos:
        with guard.phase("silos"):
            silos = open_silos(config, name, wire, log=log)
        config = silos.config
    guard.name_clients(config.client_name)
    preload = None
    if _will_play(config, wire.topology):
        preload = Preload()
    try:
        with guard.phase("checks"), agreed(wire, "handout") as agreement:
            if wire.is_server:
                server = _start(
                    config, name, wire, silos=silos, ranks=ranks, log=log, started_at=started_at
                )
                guard.report_into(server.folder, f"go on with {server.resume_command}")
                meeting = server.meeting()
                agreement.note = meeting.to_json() if meeting else None
        helper = None
        if agreement.note:
            meeting = ServerMeeting.from_json(agreement.note)
            helper = _load_helper(config, wire, server, meeting=meeting)
        server_rank: ServerRank | None = server or helper

        if preload is not None:
            preload.join()
        handed_out = _hand_out(wire, server_rank)
        meta = HandoutMeta.from_json(handed_out.meta)
        if config.wire.encryption:
            wire.exchange_client_keys(meta.assignment)
        if wire.fingerprints is not None:
            ids = meta.assignment[wire.topology.rank]
            _tell_keys(config, wire.fingerprints, ids, log=client_log)
            if server is not None:
                server.record_keys(wire.fingerprints)
        if server is None:
            from fedsp_mpi.record import resume_command

            machine = {"hosts": meta.processes, "launcher": comm.launcher_name()}
            command = resume_command(Path(meta.folder), machine)
            guard.report_into(Path(meta.folder), f"go on with {command}")
        guard.set_peers(meta.processes)
        clients = _load_clients(
            config, wire, handed_out, silos=silos, meta=meta, server=server, log=client_log or Log()
        )
        role = server_rank.build_role(meta, wire) if server_rank else None
        del handed_out  # its tensors take as much memory as the clients' model

        from fedsp_mpi.federate import Schedule, federate

        schedule = Schedule(
            config.federation,
            config.checkpoint,
            meta.rounds_done,
            asks_silos=config.evaluation.at != "server",
            overlaps=_overlaps(config, wire.topology),
            judge_tiers=config.tiers.judge if config.method_facts.has_tiers else "never",
            client_name=config.client_name,
        )
        is_complete = federate(wire, schedule, server=role, clients=clients)

        with guard.phase("end of the rounds"):
            peaks = wire.collect(devices.peak_memory(), "end")
            if server and peaks:
                memory = devices.peaks_by_role(peaks, config.topology.server_ranks)
                server.record.describe(memory=memory)
        with guard.phase("evaluation"), agreed(wire, "finish"):
            if server_rank and role:
                is_complete = is_complete and server_rank.score_and_finish(role, wire)
                server_rank.close()
            if server and not is_complete:
                raise server.stop_refusal()
    except (Exception, KeyboardInterrupt) as failure:
        if server:
            server.record_failure(failure)
        if preload is not None and isinstance(failure, comm.Refused):
            preload.join()  # the process is about to end, and not in the middle of an import
        raise
    guard.expect_ends()
    with guard.phase("end"):
        wire.finish()
    if server is None:
        return None
    server.release()
    return server.folder


def _tell_keys(
    config: Config, fingerprints: JsonMapping, ids: Sequence[int], *, log: Log | None
) -> None:
    """Say, where silos are played, what their keys are: the record's can be held against that.

    Args:
        config: of the run.
        fingerprints: of all keys.
        ids: of this rank's clients.
        log: speaks on every rank.
    """
    if log is None or not config.federation.silos:
        return
    for client in ids:
        name = config.federation.client_name(client)
        key = fingerprints["clients"][str(client)]
        log.say(f"key       {name} {key}, for a server with the key {fingerprints['server']}")


def connect(config: Config) -> Wire | Solo:
    """Connect all ranks; raise comm.Refused if the launcher's processes do not see each other."""
    try:
        return comm.connect(deadlines=comm.Deadlines(**asdict(config.deadlines)))
    except ValueError as error:
        raise comm.Refused(str(error)) from None


def _will_play(config: Config, topology: comm.Topology) -> bool:
    """Return whether a rank is likely to play clients, and has no part in the server."""
    first = config.topology.server_ranks
    return first <= topology.rank < first + config.federation.clients


def _overlaps(config: Config, topology: comm.Topology) -> bool:
    """Return whether a round is validated and recorded while clients work on the next one.

    Not where the server is not free then, or where the next broadcast changes what is recorded.
    """
    return not (
        topology.solo
        or config.evaluation.at != "server"
        or config.asks_server
        or config.federation.compression.is_on
        or config.method_facts.has_tiers
    )


def _start(
    config: Config,
    name: str,
    wire: Wire | Solo,
    *,
    silos: OpenSilos | None,
    ranks: Sequence[RankInfo],
    log: Log,
    started_at: float,
) -> ServerRun:
    """Start the server; what can be checked without torch is checked before it is imported."""
    try:
        require_topology(config, ranks, wire.topology)
        with uncollected():
            from fedsp_mpi.run.server import ServerRun
    except (ValueError, OSError) as error:
        raise comm.Refused(one_line(error)) from None
    return ServerRun.start(
        config, name, silos, ranks=ranks, topology=wire.topology, log=log, started_at=started_at
    )


def _hand_out(wire: Wire | Solo, server_rank: ServerRank | None) -> comm.Handout:
    """Distil the auxiliary model on the server's ranks, and hand it out to all."""
    with guard.phase("distillation"), agreed(wire, "handout"):
        handout = server_rank.prepare() if server_rank else None
    with guard.phase("hand-out"):
        return wire.handout(handout)


# -- loading model and data ------------------------------------------------------------------------


class _HasDigests(Protocol):
    @property
    def digests(self) -> Mapping[str, str]: ...


Loaded = TypeVar("Loaded", bound=_HasDigests)


def _load_helper(
    config: Config,
    wire: Wire | Solo,
    server: ServerRun | None,
    *,
    meeting: ServerMeeting,
) -> SecondaryServer | None:
    """Load the global model on the server's other ranks; return None elsewhere."""
    server_ranks = config.topology.server_ranks
    waves = [wave - {0} for wave in load_waves(meeting.hosts[:server_ranks])]

    def load() -> SecondaryServer:
        from fedsp_mpi.run.secondary import SecondaryServer
        from fedsp_mpi.training.process_group import Rendezvous

        rendezvous = Rendezvous(meeting.address, meeting.port, server_ranks)
        return SecondaryServer(config, wire.topology, rendezvous, candidates=meeting.candidates)

    return _load_in_waves(wire, waves, load, role="helper", server=server)


def _load_clients(
    config: Config,
    wire: Wire | Solo,
    handed_out: comm.Handout,
    *,
    silos: OpenSilos | None,
    meta: HandoutMeta,
    server: ServerRun | None,
    log: Log,
) -> HostedClients | None:
    """Build the clients of every rank that has some; return this rank's, or None.

    Args:
        config: of the run.
        wire: between all ranks.
        handed_out: by the server.
        meta: what the hand-out says beside its tensors.
        server: rank 0's.
        log: says how far the clients of the first rank that has some are in a long round.
    """
    hosting = {rank for rank, ids in enumerate(meta.assignment) if ids}
    waves = [wave & hosting for wave in load_waves([host for host, _ in meta.processes])]
    rank = wire.topology.rank
    ids = meta.assignment[rank]
    is_first = rank == min(hosting, default=None)

    def load() -> HostedClients:
        from fedsp_mpi.run import build, fingerprints
        from fedsp_mpi.run.any_inputs import inputs_of
        from fedsp_mpi.training.device import Compute

        compute = Compute.of(config.client.compute, wire.topology)
        inputs = server.inputs if server else None
        if silos is not None:
            silos.inputs.receive(meta)
            inputs = silos.inputs
        inputs = inputs or inputs_of(config)
        clients = build.hosted_clients(
            inputs,
            compute,
            handed_out.tensors,
            meta=meta,
            ids=ids,
            call_server=wire.call,
            # One rank speaks for all: their clients have about the same work.
            progress=log.round_progress(
                config.record.progress_seconds if is_first else None,
                config.federation.client_name,
            ),
        )
        clients.digests.update(fingerprints.of_clients(inputs, ids))
        return clients

    return _load_in_waves(wire, waves, load, role="client", server=server)


def _load_in_waves(
    wire: Wire | Solo,
    waves: Sequence[set[int]],
    load: Callable[[], Loaded],
    *,
    role: str,
    server: ServerRun | None,
) -> Loaded | None:
    """Call `load` on the ranks of each wave, wave by wave; all ranks hear of a mistake.

    Collective.

    Args:
        wire: between all ranks.
        waves: the ranks that load at the same time.
        load: reads model and data; raises ValueError.
        role: what is loaded: "client" or "helper".
        server: rank 0's.

    Returns:
        What `load` returned; None on ranks that are in no wave.

    Raises:
        comm.Refused: on every rank, if one of them raised ValueError.
    """
    start = time.perf_counter()
    rank = wire.topology.rank
    loaded: Loaded | None = None
    with guard.phase(f"{role} set-up"):
        for wave in waves:
            error = None
            if rank in wave:
                try:
                    loaded = load()
                except ValueError as mistake:
                    error = f"rank {rank} on {platform.node()}: {one_line(mistake)}"
            digests = loaded.digests if loaded is not None else {}
            report = ReadyReport(error, time.perf_counter() - start, digests)
            messages = wire.collect(report.to_json())
            with agreed(wire):
                if server and messages:
                    reports = [
                        ReadyReport.from_json(message, sender)
                        for sender, message in enumerate(messages)
                    ]
                    server.report_ready(reports, role)
    return loaded

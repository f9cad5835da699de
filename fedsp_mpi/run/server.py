"""Rank 0 before the first round and after the last: checks, record, preparation, scores."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from fedsp_mpi import comm
from fedsp_mpi.comm import Topology
from fedsp_mpi.config import Config
from fedsp_mpi.files.untrusted import JsonMapping
from fedsp_mpi.log import Log, duration, one_line
from fedsp_mpi.record import (
    Checkpoints,
    RunRecord,
    event_files,
    newest_environment,
    resume_command,
)
from fedsp_mpi.record.journal import RoundJournal, manifest_rows
from fedsp_mpi.record.tables import never_merged, wire_rows
from fedsp_mpi.report import handed_out
from fedsp_mpi.roles import ServerRole
from fedsp_mpi.run import auxiliary_model, build, fingerprints, overview, plain_use
from fedsp_mpi.run.any_inputs import inputs_of
from fedsp_mpi.run.final_scores import score_all
from fedsp_mpi.run.folder import RunFolder
from fedsp_mpi.run.handout import HandoutMeta, ServerMeeting
from fedsp_mpi.run.inputs import ExperimentInputs
from fedsp_mpi.run.opening import (
    STOPPED,
    OpenRecord,
    begin_record,
    record_failure,
    resume_record,
)
from fedsp_mpi.run.ranks import Assignment, RankInfo, ReadyReport, assign_clients
from fedsp_mpi.run.server_rank import (
    LoadedServer,
    PreparedServer,
    connect_to_experts,
    join_group,
    stop_requested,
)
from fedsp_mpi.run.silos import OpenSilos
from fedsp_mpi.training.distill import StoppedError
from fedsp_mpi.training.process_group import SINGLE_RANK, Rendezvous

if TYPE_CHECKING:
    from fedsp_mpi.comm.solo import Solo
    from fedsp_mpi.comm.wire import Wire

_MAX_NAMED = 5  # lost clients that are named


class ServerRun:
    """Rank 0 of the server, which decides and writes the record.

    `start` makes one. Its phases are those of `server_rank.ServerRank`.

    Args:
        loaded: inputs and global model.
        place: the run's folder, locked.
        opened: the record.
        rendezvous: where the server's ranks meet.
        assignment: the clients of each rank.
        ranks: all of them.
        log: is told what happens.
        started_at: time.perf_counter() at the start of the run.

    Attributes:
        inputs: of the experiment.
        folder: of the run.
        record: of the run.
    """

    def __init__(
        self,
        loaded: LoadedServer,
        *,
        place: RunFolder,
        opened: OpenRecord,
        rendezvous: Rendezvous,
        assignment: Assignment,
        ranks: Sequence[RankInfo],
        log: Log,
        started_at: float,
    ) -> None:
        self._loaded = loaded
        self._place = place  # holds the lock
        self._opened = opened
        self._rendezvous = rendezvous
        self._assignment = assignment
        self._ranks = ranks
        self._log = log
        self._started_at = started_at
        self._prepared: PreparedServer | None = None  # from `prepare` on

    @classmethod
    def start(
        cls,
        config: Config,
        name: str,
        silos: OpenSilos | None = None,
        *,
        ranks: Sequence[RankInfo],
        topology: Topology,
        log: Log,
        started_at: float,
    ) -> ServerRun:
        """Find every mistake that can be found without training, load the model, open the record.

        Weights are read last, when everything else is known to be right.

        Args:
            config: of the run.
            name: of the configuration, for a run that has none.
            silos: those of the clients; None: they share one source.
            ranks: all of them.
            topology: of the server.
            log: gets an overview of the run.
            started_at: time.perf_counter() at the start of the run.

        Raises:
            comm.Refused: the first mistake; or there is nothing left to do.
        """
        place = RunFolder(config, name)
        try:
            if config.record.tensorboard:
                event_files.require_library()
            inputs = inputs_of(config) if silos is None else silos.inputs
            place.acquire(inputs.paths)
            servers = config.topology.server_ranks
            if silos is None:
                inputs.check()
                assignment = assign_clients(inputs.work, topology.size, servers)
            else:
                assignment = silos.assignment  # and the inputs are checked
            build.method_of(inputs)
            overview.say_ranks(log, config, ranks=ranks, assignment=assignment, topology=topology)
            overview.say_inputs(log, inputs, is_embedded=name == "embedded")
            log.say(f"folder    {place.path}")
            loaded = LoadedServer.load(inputs, topology)
            is_one_host = len({rank.host for rank in ranks[:servers]}) == 1
            rendezvous = Rendezvous.open(servers, is_one_host)
            digests = fingerprints.of_server(inputs, loaded.model)
            if place.is_resumed:
                opened = resume_record(
                    place.path,
                    config,
                    digests,
                    gets_rounds=place.gets_rounds,
                    ranks=ranks,
                    log=log,
                )
            else:
                opened = begin_record(place, inputs, digests, ranks=ranks, assignment=assignment)
        except (ValueError, OSError) as error:
            place.release()
            raise comm.Refused(one_line(error)) from None
        except BaseException:
            place.release()  # a notebook goes on after Ctrl-C, and may start a run there
            raise
        return cls(
            loaded,
            place=place,
            opened=opened,
            rendezvous=rendezvous,
            assignment=assignment,
            ranks=ranks,
            log=log,
            started_at=started_at,
        )

    @property
    def inputs(self) -> ExperimentInputs:
        return self._loaded.inputs

    @property
    def folder(self) -> Path:
        return self._place.path

    @property
    def record(self) -> RunRecord:
        return self._opened.record

    @property
    def resume_command(self) -> str:
        """What a user types to go on with this run."""
        run = self.record.run
        return resume_command(self.folder, newest_environment(run.environment, run.sections))

    def meeting(self) -> ServerMeeting | None:
        """Return where the server's other ranks meet this one; None if there are none."""
        if self._config.topology.server_ranks == 1:
            return None
        hosts = [rank.host for rank in self._ranks]
        candidates = None
        if self._has_tiers and self.inputs.candidates is not None:
            candidates = self.inputs.candidates.tolist()
        return ServerMeeting(self._rendezvous.address, self._rendezvous.port, hosts, candidates)

    def record_failure(self, error: BaseException) -> None:
        """Write into the record that the run ended before its end, and why.

        Where no other rank can be writing any more, the folder is unlocked.
        """
        record_failure(self.record, error)
        if len(self._ranks) == 1 or isinstance(error, comm.Refused):
            self.release()

    def report_ready(self, reports: Sequence[ReadyReport], role: str) -> None:
        """Log and record the slowest set-up, and the digests of the clients' texts.

        Args:
            reports: of all ranks.
            role: what was set up: "client" or "helper".

        Raises:
            comm.Refused: the first error that a rank reports; or a text is not the one that the
                run was begun with.
            ProtocolError: a rank sent digests of what is not its own.
        """
        for report in reports:
            if report.error is not None:
                raise comm.Refused(report.error)
        digests: dict[str, str] = {}
        for rank, report in enumerate(reports):
            fingerprints.require_own(
                report.digests, rank, self._assignment[rank], config=self._config
            )
            digests |= report.digests
        digests_before = self.record.run.sections.get(fingerprints.SECTION, {})
        try:
            fingerprints.require_same(self.folder, digests_before, digests)
        except ValueError as error:
            raise comm.Refused(one_line(error)) from None
        self._opened.digests.update(fingerprints.updated(digests_before, digests))
        seconds = max(report.seconds for report in reports)
        self.record.describe(
            timing={f"seconds_{role}_setup": seconds},
            **{fingerprints.SECTION: self._opened.digests},
        )
        self._log.say(f"{role}s are ready after {duration(seconds)}")

    def prepare(self) -> comm.Handout:
        """Distil the auxiliary model, describe all models in the record; return what clients get.

        Raises:
            comm.Refused: the run was told to stop meanwhile.
        """
        inputs = self.inputs
        loaded = self._loaded
        resumed = self._opened.resumed
        group = join_group(self._config, self._rendezvous, 0, compute=loaded.compute)
        try:
            client_model, account = auxiliary_model.auxiliary_model(
                inputs,
                loaded.model,
                loaded.compute,
                group=SINGLE_RANK if self._has_tiers else group,
                folder=self.folder,
                log=self._log,
                stop=stop_requested,
                is_resumed=resumed is not None,
                digest=self._opened.digests[fingerprints.WEIGHTS],
            )
        except StoppedError as stopped:
            self.record.describe(distillation={"steps": stopped.kept})
            raise comm.Refused(f"{stopped}; go on with {self.resume_command}", STOPPED) from None
        servers = build.servers(
            inputs,
            loaded.model,
            loaded.compute,
            group=group,
            client_model=client_model,
            progress=self._log.round_progress(None, self._config.federation.client_name),
        )
        exchange = None
        if self._config.federation.compression.is_on:
            state = Checkpoints(self.folder).read_server(resumed) if resumed else None
            exchange = build.exchange(inputs, servers.server, state)
        self._prepared = PreparedServer(group, servers, exchange)
        candidates = inputs.candidates
        has_silos = bool(self._config.federation.silos)
        meta = HandoutMeta(
            assignment=self._assignment,
            processes=[(rank.host, rank.pid) for rank in self._ranks],
            folder=str(self.folder.resolve()),
            sizes=inputs.shard_sizes if has_silos else (),
            candidates=candidates.tolist() if has_silos and candidates is not None else None,
        )
        server = servers.server
        handout = build.handout(
            inputs, client_model, server, meta=meta, resumed=resumed, exchange=exchange
        )
        counts = build.parameter_counts(
            inputs, loaded.model, client_model, server=server, contract=handout.contract
        )
        self.record.describe(models=counts, distillation=account)
        self._log.say(
            f"parameters: global model {counts['global']:,}, auxiliary model "
            f"{counts['auxiliary']:,}, prompts {counts['prompt']:,} "
            f"({counts['prompt_on_the_wire']:,} travel)"
        )
        self._log.say(f"clients get: {handed_out.sentence(counts)}")
        return handout

    def record_keys(self, fingerprints: JsonMapping) -> None:
        """Write the fingerprints of all keys of this start into the record, and log them.

        Args:
            fingerprints: cipher and fingerprints, as `Wire.fingerprints` returns them.
        """
        sections = self.record.run.sections
        number = len(sections.get("encryption", {})) + 1
        start = {"round": self.record.run.committed_rounds, **fingerprints}
        self.record.describe(encryption={str(number): start})
        self._log.say(
            f"sealed    all that goes up, by {fingerprints['cipher']}; the server's key is "
            f"{fingerprints['server']}"
        )

    def build_role(self, meta: HandoutMeta, wire: Wire | Solo) -> ServerRole:
        """Build this rank's part of the server, where an earlier stretch of the run has left it."""
        assert self._prepared is not None, "prepare comes first"
        connect_to_experts(self._config, self._rendezvous, self._prepared.group)
        checkpoints = Checkpoints(self.folder)
        journal = RoundJournal(
            record=self.record,
            checkpoints=checkpoints,
            log=self._log,
            keep_prompts=self._config.record.prompts and not self._config.tunes_weights,
            rank_of=meta.rank_of,
            carried=wire_rows(self.record.run.wire),
            inputs=fingerprints.combined(self._opened.digests),
            events=self._event_files(),
        )
        role = build.server_role(
            self.inputs,
            self._prepared.servers,
            self._loaded.compute,
            group=self._prepared.group,
            wire=wire,
            checkpoints=checkpoints,
            journal=journal,
            exchange=self._prepared.exchange,
        )
        if self._opened.resumed:
            role.load_state(checkpoints.read_server(self._opened.resumed))
        return role

    def score_and_finish(self, role: ServerRole, wire: Wire | Solo) -> bool:
        """Write what was tuned, score it, and close the record.

        Returns:
            False if the run was told to stop before the last score.
        """
        journal = role.journal
        assert journal is not None, "rank 0 writes the journal"
        self._loaded.compute.begin()
        if self._has_tiers:
            self.close()  # the other ranks do not read all text that is scored
        exported = role.best.exported
        build.save(self.inputs, role.server, exported=exported, folder=self.folder)
        words = build.method_of(self.inputs).words(self.inputs, exported)
        if words is not None:
            self.record.describe(instruction={"text": words, "round": role.best.round})
        is_complete = score_all(
            role,
            self.inputs,
            self._log,
            stop=stop_requested,
            scored=self.record.run.methods(),
            write=self.record.write_results,
        )
        if not is_complete:
            return False
        self.record.describe(**{plain_use.SECTION: plain_use.plain_use(self.inputs)})
        self.record.write_wire(manifest_rows(wire.manifest, journal.carried))
        self.record.describe(
            timing={
                "seconds": time.perf_counter() - self._started_at,
                "seconds_checkpoints": sum(journal.checkpoint_seconds),
                "checkpoints": len(journal.checkpoint_seconds),
            }
        )
        if journal.events is not None:
            journal.events.finish(self.record.run)
        self.record.finish()
        if not self._config.checkpoint.keep_client_states:
            journal.checkpoints.remove_clients()
        self._name_lost_clients()
        return True

    def release(self) -> None:
        """Unlock the folder: the process may live on, and resume the run."""
        self._place.release()

    def stop_refusal(self) -> comm.Refused:
        """Return what all ranks are told when the run was told to stop."""
        num_rounds = self.record.run.committed_rounds
        return comm.Refused(
            f"told to stop after round {num_rounds}; go on with {self.resume_command}", STOPPED
        )

    def close(self) -> None:
        """End what the server's ranks do together."""
        assert self._prepared is not None, "prepare comes first"
        self._prepared.group.leave()

    @property
    def _config(self) -> Config:
        return self.inputs.config

    @property
    def _has_tiers(self) -> bool:
        return self._config.method_facts.has_tiers

    def _event_files(self) -> event_files.EventFiles | None:
        """Open TensorBoard's files, if they are asked for."""
        if not self._config.record.tensorboard:
            return None
        return event_files.EventFiles(self.folder, self.record.run)

    def _name_lost_clients(self) -> None:
        """Name the clients that took part and whose updates were never merged.

        The run looks complete without them.
        """
        lost = never_merged(self.record.run.clients)
        if not lost:
            return
        self._log.say(
            f"of {self._config.federation.clients} clients, {len(lost)} took part in vain: in no "
            "round was their update merged; correct what is wrong with them, and run again:"
        )
        for client, reason in sorted(lost.items())[:_MAX_NAMED]:
            name = self._config.federation.client_name(client)
            self._log.say(f"  {name}: {' '.join(reason.split())}")

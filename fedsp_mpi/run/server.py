"""What the server does before the first round and after the last: checks, record, preparation,
scores.
"""

from __future__ import annotations

import time
from contextlib import suppress
from dataclasses import asdict, replace
from typing import TYPE_CHECKING, Any

from fedsp_mpi import comm
from fedsp_mpi.comm import guard
from fedsp_mpi.comm.inspection import require_fields
from fedsp_mpi.config import Config, to_yaml
from fedsp_mpi.config.parsing import error_line
from fedsp_mpi.files import ownership
from fedsp_mpi.log import Log, duration
from fedsp_mpi.run import devices, environment
from fedsp_mpi.run.folder import RunFolder

if TYPE_CHECKING:
    from fedsp_mpi.comm.solo import Solo
    from fedsp_mpi.comm.wire import Wire
    from fedsp_mpi.models.language_model import LanguageModel
    from fedsp_mpi.record import Checkpoint, RunRecord
    from fedsp_mpi.roles import ServerRole
    from fedsp_mpi.run.build import Servers
    from fedsp_mpi.run.inputs import ExperimentInputs
    from fedsp_mpi.training.device import Compute
    from fedsp_mpi.training.process_group import Rendezvous, ServerGroup

_SHOWN = 5  # lost clients that are named
STOPPED = 75  # exit status: told to stop; run.resume goes on


class ServerRun:
    """What the server does before the first round and after the last."""

    def __init__(
        self, config: Config, name: str, log: Log, hosts: list[dict[str, Any]] | None, begun: float
    ) -> None:
        self.config, self.log, self.hosts, self._begun = config, log, hosts or [], begun
        self._place, self._is_embedded = RunFolder(config, name), name == "embedded"
        self.folder = self._place.path
        self.resumed: Checkpoint | None = None
        self._rounds_again = 0  # that clients have been asked for more than once
        self.materials: ExperimentInputs
        self.record: RunRecord
        self._inputs: dict[str, str] = {}
        self._meeting: Rendezvous
        self._team: ServerGroup
        self._servers: Servers
        self._model: LanguageModel
        self._compute: Compute
        self._assignment: list[tuple[int, ...]]

    def refusal(self, wire: Wire | Solo) -> comm.Refused | None:
        """Find every mistake that can be found without training, and open the record. The first
        one, or None.

        The weights are read last, when everything else is known to be right.
        """
        try:
            self._check_ranks(wire)
            from fedsp_mpi.run import build
            from fedsp_mpi.run.inputs import ExperimentInputs, expected_work
            from fedsp_mpi.training.device import Compute
            from fedsp_mpi.training.process_group import Rendezvous

            self.materials = ExperimentInputs(self.config)
            self._place.take(self.materials.paths)
            self.materials.check()
            self._compute = Compute.of(self.config.server.compute, wire.topology)
            self._assignment = self._spread(wire, expected_work(self.materials))
            self._summary(wire)
            self._compute.begin()
            self._model = build.global_model(self.materials, self._compute)
            places = {host["host"] for host in self.hosts[: self._num_servers]}
            self._meeting = Rendezvous.open(self._num_servers, len(places) == 1)
            self._open_record()
        except (ValueError, OSError) as error:
            self._place.give_back()
            return comm.Refused(one_line(error))
        except comm.Refused as nothing_to_do:
            return nothing_to_do
        guard.report_into(self.folder)
        return None

    def meeting_point(self) -> tuple[str, int, list[str]] | None:
        """What the server's other ranks hear, if there are some: where to find this one, and the
        hosts of all ranks.
        """
        if self._num_servers == 1:
            return None
        return self._meeting.address, self._meeting.port, [host["host"] for host in self.hosts]

    def give_up(self, error: Exception) -> None:
        """Write into the record that the run ended before its end."""
        if hasattr(self, "record"):
            stopped = isinstance(error, comm.Refused) and error.exit_status == STOPPED
            with suppress(ValueError, OSError):  # the error is what matters
                self.record.finish("stopped" if stopped else "failed", one_line(error))

    def prepare(self) -> tuple[comm.Handout | None, comm.Refused | None]:
        """Distil the auxiliary model, describe all models in the record, and give what goes to the
        clients.

        A verdict instead, if the run was told to stop meanwhile.
        """
        from fedsp_mpi.run import auxiliary_model, build
        from fedsp_mpi.training.distill import StoppedError
        from fedsp_mpi.training.process_group import ServerGroup

        self._team = ServerGroup.join(
            self._meeting, 0, self._compute.device, seconds=self.config.deadlines.server
        )
        about = (self.materials, self._model, self._compute, self._team)
        resumed = self.resumed
        try:
            small, story = auxiliary_model.auxiliary_model(
                *about,
                self.folder,
                self.log,
                lambda: guard.told_to_stop,
                resumed is not None,
                self._inputs["weights of model.name"],
            )
        except StoppedError as stopped:
            self.record.describe(distillation={"steps": stopped.kept})
            return None, comm.Refused(str(stopped), STOPPED)
        self._servers = build.servers(
            self.materials, self._model, self._compute, group=self._team, client_model=small
        )
        meta = {
            "assignment": [list(ids) for ids in self._assignment],
            "processes": [(host["host"], host["pid"]) for host in self.hosts],
            "folder": str(self.folder.resolve()),
        }
        server = self._servers.server
        handout = build.handout(self.materials, small, server, meta=meta, resumed=resumed)
        sizes = build.parameter_counts(
            self.materials, self._model, small, server=server, contract=handout.contract
        )
        self.record.describe(models=sizes, distillation=story)
        self.log.say(
            "parameters: global model {global:,}, auxiliary model {auxiliary:,}, prompts {prompt:,} "
            "({prompt_on_the_wire:,} travel)".format(**sizes)
        )
        return handout, None

    def stopped(self) -> comm.Refused:
        """What all ranks hear when the run was told to stop."""
        from fedsp_mpi.record import resume_command

        rounds = self.record.run.committed_rounds
        again = resume_command(self.folder, self.record.run.config)
        return comm.Refused(f"told to stop after round {rounds}; go on with {again}", STOPPED)

    def heard(self, ready: list[dict[str, Any]], who: str) -> comm.Refused | None:
        """Take note that ranks are ready, and of what they read.

        The first mistake that one of them found, or None.
        """
        for rank, answer in enumerate(ready):
            require_fields(
                answer, rank, {"seconds": (int, float), "error": (str, type(None)), "texts": dict}
            )
        if mistake := next((answer["error"] for answer in ready if answer["error"]), None):
            return comm.Refused(mistake)
        from fedsp_mpi.run import fingerprints

        for rank, answer in enumerate(ready):
            fingerprints.require_own(answer["texts"], rank, self._assignment[rank])
        texts = {name: digest for answer in ready for name, digest in answer["texts"].items()}
        try:
            fingerprints.require_same(
                self.folder, self.record.run.sections.get(fingerprints.SECTION, {}), texts
            )
        except ValueError as error:
            return comm.Refused(one_line(error))
        self._inputs |= texts
        seconds = max(answer["seconds"] for answer in ready)
        self.record.describe(
            timing={f"seconds_{who}_setup": seconds}, **{fingerprints.SECTION: self._inputs}
        )
        self.log.say(f"{who}s are ready after {duration(seconds)}")
        return None

    def side(self, given: comm.Handout) -> ServerRole:
        """The server's side of the rounds, where an earlier stretch of the run has left it."""
        from fedsp_mpi.record import Checkpoints
        from fedsp_mpi.record.journal import RoundJournal
        from fedsp_mpi.record.tables import wire_rows
        from fedsp_mpi.run import build, fingerprints

        ranks = {
            client: rank for rank, ids in enumerate(given.meta["assignment"]) for client in ids
        }
        checkpoints = Checkpoints(self.folder)
        self._journal = RoundJournal(
            record=self.record,
            checkpoints=checkpoints,
            log=self.log,
            keep_prompts=self.config.record.prompts and not self.config.tunes_weights,
            rank_of=ranks,
            carried=wire_rows(self.record.run.wire),
            inputs=fingerprints.combined(self._inputs),
        )
        role = build.server_role(
            self.materials,
            self._servers,
            self._compute,
            group=self._team,
            journal=self._journal,
        )
        if self.resumed:
            role.load_state(checkpoints.read_server(self.resumed))
        return role

    def finish(self, here: ServerRole, wire: Wire | Solo) -> bool:
        """Write what was tuned, score, close the record.

        False if the run was told to stop before the last score.
        """
        from fedsp_mpi.record.journal import manifest_rows
        from fedsp_mpi.run import build
        from fedsp_mpi.run.final_scores import score_all

        self._compute.begin()
        build.save(self.materials, here.server, here.best.exported, self.folder)
        there = self.record.run.methods()
        finished = score_all(
            here,
            self.materials,
            self.log,
            lambda: guard.told_to_stop,
            there,
            self.record.write_results,
        )
        if not finished:
            return False
        self.record.write_wire(manifest_rows(wire.manifest, self._journal.carried))
        checkpoints = self._journal.checkpoint_seconds
        spent = {"seconds_checkpoints": sum(checkpoints), "checkpoints": len(checkpoints)}
        self.record.describe(timing={"seconds": time.perf_counter() - self._begun, **spent})
        self.record.finish()
        if not self.config.checkpoint.keep_client_states:
            self._journal.checkpoints.remove_clients()
        self._name_lost_clients()
        return True

    def _name_lost_clients(self) -> None:
        """Say which clients took part and have no share in what was tuned: the run looks complete
        without them.
        """
        from fedsp_mpi.record.tables import never_merged

        lost = never_merged(self.record.run.clients)
        if not lost:
            return
        self.log.say(
            f"{len(lost)} of {self.config.federation.clients} clients took part, and in no "
            "round was their update "
            "merged; correct what is wrong with them, and run again:"
        )
        for client, reason in sorted(lost.items())[:_SHOWN]:
            self.log.say(f"  client {client}: {' '.join(reason.split())}")

    def leave(self) -> None:
        """End what the server's ranks do together."""
        self._team.leave()

    @property
    def _num_servers(self) -> int:
        return self.config.topology.server_ranks

    def _check_ranks(self, wire: Wire | Solo) -> None:
        wanted, found, servers = self.config.topology.ranks, wire.topology.size, self._num_servers
        if wanted is not None and found != wanted:
            raise ValueError(
                f"topology.ranks: found {found} ranks, expected {wanted}; start that many processes"
            )
        if servers > 1 and found <= servers:
            raise ValueError(
                f"topology.server_ranks: found {servers} with {found} ranks, expected at least "
                "one rank more, for the "
                f"clients; start {servers + 1} processes or more"
            )
        self._spread(wire, [1.0] * self.config.federation.clients)
        if shared := [
            ranks for ranks in devices.shared_gpus(self.hosts[:servers]).values() if len(ranks) > 1
        ]:
            raise ValueError(
                f"topology.server_ranks: found ranks {shared[0]} on one GPU, expected one for "
                "each; start them where "
                f"there are {servers} GPUs, or set server.compute.device=cpu"
            )

    def _spread(self, wire: Wire | Solo, work: list[float]) -> list[tuple[int, ...]]:
        """Clients of every rank; the server's have none, unless there is one rank for all."""
        if not work:
            return [()] * wire.topology.size
        if wire.topology.size == 1:
            return [tuple(range(len(work)))]
        servers: list[tuple[int, ...]] = [()] * self._num_servers
        return servers + comm.spread(work, wire.topology.size - len(servers))

    def _open_record(self) -> None:
        """Begin a record, or go on with the one that is there."""
        from fedsp_mpi.run import fingerprints

        self._inputs = fingerprints.of_server(self.materials, self._model)
        if self._place.goes_on:
            self._go_on()
        else:
            self._begin()

    def _go_on(self) -> None:
        from fedsp_mpi.record import Checkpoints, RunRecord, read
        from fedsp_mpi.run import fingerprints

        before = read(self.folder).sections.get(fingerprints.SECTION, {})
        fingerprints.require_same(self.folder, before, self._inputs)
        ownership.remove_parts(self.folder)
        checkpoints = Checkpoints(self.folder)
        self.resumed, damaged = checkpoints.newest()
        for each in damaged:
            self.log.say(f"checkpoint is not usable: {each}")
        done = self.resumed.round if self.resumed else 0
        self._require_own_checkpoint(before)
        self.record = RunRecord.open(self.folder)
        if done > (rounds := self.record.run.committed_rounds):
            raise ValueError(
                f"{self.folder}: found a checkpoint of round {done} and a record of {rounds} "
                "rounds, expected them of "
                "one run; choose another run.name"
            )
        # The noise of rounds that are done again is new, and so is that of the one that was under
        # way.
        self._rounds_again = (
            self.record.run.sections.get("privacy", {}).get("rounds_again", 0) + rounds - done + 1
        )
        self.record.describe(**self._privacy())
        self.record.cut(done)
        checkpoints.remove_after(done)
        number = len(self.record.run.sections.get("resumes", {})) + 1
        self.record.describe(
            resumes={
                str(number): {"round": done, "environment": environment.environment(self.hosts)}
            }
        )
        self.log.say(
            f"goes on after round {done} of {self.folder}"
            + ("" if self.resumed else ": it has no checkpoint")
        )

    def _begin(self) -> None:
        from fedsp_mpi.record import RunRecord

        self._place.clear()
        again: dict[str, Any] = {"name": self.folder.name, "if_exists": "refuse", "resume": "never"}
        self.record = RunRecord.create(
            self.folder,
            config=asdict(self.config),
            config_text=to_yaml(replace(self.config, run=replace(self.config.run, **again))),
            environment=environment.environment(self.hosts),
        )
        splits, shards = self.materials.splits, self.materials.shards
        self.record.describe(
            data={
                "task": self.config.data.task,
                "train": len(splits.train),
                "validation": len(splits.validation),
                "test": len(splits.test),
                "server_shard": len(shards[0]),
                "client_shards": [len(shard) for shard in shards[1:]],
                "notes": list(self.materials.notes),
            },
            topology={"assignment": [list(ids) for ids in self._assignment]},
            inputs=self._inputs,
            **self._privacy(),
        )

    def _require_own_checkpoint(self, before: dict[str, Any]) -> None:
        """Raise ValueError if the checkpoint was made from other inputs than the record; say so if
        it has no digest.
        """
        from fedsp_mpi.run import fingerprints

        if self.resumed is None:
            return
        if not before or self.resumed.inputs is None:
            self.log.say(
                "checkpoint: has no digests of texts and weights; whether they are the same "
                "is not checked"
            )
        elif self.resumed.inputs != fingerprints.combined(before):
            raise ValueError(
                f"{self.folder}: found a checkpoint of round {self.resumed.round} that was made "
                "from other texts or "
                "weights than the record, expected them of one run; copy the whole run folder "
                "again, or choose another "
                "run.name"
            )

    def _privacy(self) -> dict[str, Any]:
        """What is promised to clients whose updates get noise: epsilon of a round, and of all if
        they are in each.
        """
        settings, again = self.config.client.privacy, self._rounds_again
        if settings.epsilon is None:
            return {}
        whole = (self.config.federation.rounds + again) * settings.epsilon
        return {
            "privacy": asdict(settings)
            | {"epsilon": settings.epsilon, "epsilon_all": whole, "rounds_again": again}
        }

    def _whose_settings(self) -> str:
        """Where the settings come from, if they were made for another model than the one that is
        tuned.
        """
        if not self._is_embedded or self.config.model.name == "embedded":
            return ""
        return (
            ", with the settings of the embedded default, which suit its tiny model; for "
            "others begin from "
            "configs/smollm2/arc_easy.yaml"
        )

    def _summary(self, wire: Wire | Solo) -> None:
        say, config = self.log.say, self.config
        by_host: dict[str, list[str]] = {}
        for host in self.hosts:
            by_host.setdefault(host["host"], []).extend(
                device["name"] for device in host["devices"].values()
            )
        where = ", ".join(
            f"{host} ({', '.join(sorted(set(names)))})" for host, names in by_host.items()
        )
        size, servers = wire.topology.size, self._num_servers
        kind = (
            "one process plays all"
            if size == 1
            else f"{servers} server, {size - servers} client ranks"
        )
        say(f"ranks     {size} ({kind}) on {where}")
        for uuid, some in devices.shared_gpus(self.hosts).items():
            say(f"          {uuid} is shared by ranks {devices.spans(some)}")
        most = max(len(ids) for ids in self._assignment)
        threads = environment.threads(self.hosts)
        say(f"clients   {config.federation.clients}, at most {most} on a rank; threads: {threads}")
        model, splits, shards = (
            self.materials.model_config,
            self.materials.splits,
            self.materials.shards,
        )
        say(f"recipe    {config.recipe}{self._whose_settings()}")
        say(f"model     {config.model.name}: {model.model_type}, {model.num_hidden_layers} layers")
        each = sum(map(len, shards[1:])) // max(1, len(shards) - 1)
        train = (
            f"{len(splits.train)} train ({len(shards[0])} the server's, about {each} each client's)"
        )
        say(
            f"data      {config.data.task}: {train}, {len(splits.validation)} validation, "
            f"{len(splits.test)} test"
        )
        for note in self.materials.notes:
            say(f"          {note}")
        for told in self._privacy().values():
            say(
                f"privacy   an update's epsilon is {told['epsilon']:g}, of all rounds "
                f"{told['epsilon_all']:g}"
            )
        if config.asks_server:
            say(
                "privacy   clients hold no model: their text goes to the server "
                "(search.forward=server)"
            )
        say(f"folder    {self.folder}")


def one_line(error: Exception) -> str:
    """What an error says, in one line, with long values shortened."""
    return error_line(str(error)) or type(error).__name__

"""The federation: one round, written once for the server, for clients, and for both in one.

Every rank calls `federate` with its own side of the round: `server` on the server's ranks,
`clients` on those that play clients, both where there is a single process.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial

import numpy as np

from fedsp_mpi.comm import RoundBroadcast, Updates, guard
from fedsp_mpi.comm.inspection import ProtocolError, reading, require_fields
from fedsp_mpi.comm.solo import Solo
from fedsp_mpi.comm.wire import Wire
from fedsp_mpi.config import FederationConfig
from fedsp_mpi.config.runtime import CheckpointConfig
from fedsp_mpi.files.untrusted import JsonMapping, JsonObject
from fedsp_mpi.log import duration
from fedsp_mpi.record.atomic import RecordError
from fedsp_mpi.record.checkpoint import CheckpointFile
from fedsp_mpi.record.journal import RoundJournal
from fedsp_mpi.record.tables import RoundRow, SiloRow, mean_silo_loss
from fedsp_mpi.roles import (
    HostedClients,
    ServerRole,
    UpperTier,
    read_silo_rows,
    read_tier_scores,
    silo_row_json,
)
from fedsp_mpi.tensors import ClientError, Failure, NamedTensors, Update
from fedsp_mpi.training.loop import Trace

Closing = Callable[[], None]

_MAX_REASONS = 3  # of clients that failed, in one message


class ClientFailedError(RuntimeError):
    """Clients failed, and the configuration or the quorum does not let the run continue.

    Attributes:
        explains_itself: its message is all that a user needs; see `comm.guard.Guard`.
    """

    explains_itself = True


@dataclass(frozen=True)
class Schedule:
    """How many rounds there are, and when they are put on disk.

    Attributes:
        federation: the number of rounds, and what happens when clients fail.
        checkpoint: when checkpoints are written.
        rounds_done: by an earlier stretch of the run.
        asks_silos: whether silos judge each round on the text that they hold back.
        overlaps: whether a round is validated and recorded while clients work on the next one.
        judge_tiers: when users and the server score the prompts of all tiers: "never", before the
            first round and after the last ("ends"), or after each as well ("rounds").
        client_name: returns what messages call a client of an id.
        on_stop: what a message says where `federation.on_failure` stops the run.
    """

    federation: FederationConfig
    checkpoint: CheckpointConfig
    rounds_done: int = 0
    asks_silos: bool = False
    overlaps: bool = False
    judge_tiers: str = "never"
    client_name: Callable[[int], str] = "client {}".format
    on_stop: str = "federation.on_failure=stop; =drop goes on without them"

    def is_due(self, round: int) -> bool:
        """Return whether a checkpoint follows a round: after every so many, and after the last."""
        every = self.checkpoint.every
        if every is None:
            return False
        return round % every == 0 or round == self.federation.rounds

    def judges_tiers(self, round: int) -> bool:
        """Return whether tiers are scored after a round; 0 is before the first."""
        is_end = round in (0, self.federation.rounds)
        return self.judge_tiers == "rounds" or (self.judge_tiers == "ends" and is_end)

    def num_evaluations(self, round: int) -> int:
        """Return how often clients judge between the last round's record and a round's."""
        is_first = round == 1 and self.judges_tiers(0)
        return self.asks_silos + self.judges_tiers(round) + is_first


def federate(
    wire: Wire | Solo,
    schedule: Schedule,
    *,
    server: ServerRole | None,
    clients: HostedClients | None,
) -> bool:
    """Run all remaining rounds.

    Args:
        wire: between all ranks.
        schedule: of the rounds.
        server: this rank's part of the server.
        clients: those that this rank plays.

    Returns:
        False if the run was told to stop (SIGUSR1 at the server) before its last round; a
        checkpoint is written then.

    Raises:
        ClientFailedError: on the server, if too many clients failed.
        RecordError: on the server, if a rank cannot write its part of a checkpoint.
    """
    start = time.perf_counter()
    close_previous: Closing = _nothing_is_left
    if schedule.rounds_done == 0 and schedule.judges_tiers(0):
        judge_tiers(0, wire, schedule, server=server, clients=clients)
    for round in range(schedule.rounds_done + 1, schedule.federation.rounds + 1):
        close = run_round(
            round, wire, schedule, server=server, clients=clients, close_previous=close_previous
        )
        if close is None:
            last = round - 1
            if schedule.rounds_done < last and not schedule.is_due(last):
                files = collect_clients(last, wire, schedule, server=server, clients=clients)
                save_checkpoint(last, schedule, server, files=files)
            return False
        files = None
        if schedule.is_due(round):
            files = collect_clients(round, wire, schedule, server=server, clients=clients)

        finish = partial(
            finish_round, round, schedule, server, close=close, files=files, start=start
        )
        if schedule.overlaps and round < schedule.federation.rounds:
            close_previous = finish
        else:
            finish()
            close_previous = _nothing_is_left
    return True


def finish_round(
    round: int,
    schedule: Schedule,
    server: ServerRole | None,
    *,
    close: Closing,
    files: ClientFiles | None,
    start: float,
) -> None:
    """Do what is left of a round, log it, and complete its checkpoint; no client takes part.

    Args:
        round: that ends.
        schedule: of the rounds.
        server: this rank's part of the server.
        close: validates and records.
        files: of the clients' states; None where no checkpoint is due.
        start: of the rounds, in seconds of `time.perf_counter`.
    """
    close()
    if server and server.journal:
        _log_round(server.journal, round, schedule, elapsed=time.perf_counter() - start)
    save_checkpoint(round, schedule, server, files=files)


def run_round(
    round: int,
    wire: Wire | Solo,
    schedule: Schedule,
    *,
    server: ServerRole | None,
    clients: HostedClients | None,
    close_previous: Closing,
) -> Closing | None:
    """Run one round: broadcast, local training, gather, aggregate, server update, validate, record.

    Args:
        round: from 1.
        wire: between all ranks.
        schedule: of the rounds.
        server: this rank's part of the server.
        clients: those that this rank plays.
        close_previous: does what is left of the round before.

    Returns:
        What is left of this round and needs no client: validation and record. None if the server
        broadcast the word to stop.

    Raises:
        ClientFailedError: on the server, if too many clients failed.
    """
    watch = Stopwatch()

    # --- broadcast ---
    with guard.phase("broadcast", round=round):
        is_root = server is not None and server.is_root
        broadcast = wire.broadcast(_round_broadcast(round, server) if server and is_root else None)
        watch.lap("broadcast")

    # --- the end of the round before, while clients work ---
    close_previous()
    watch.skip()
    if broadcast.stop:
        return None

    # --- the server-only control, while clients work ---
    control_loss = math.nan
    if server and server.control:
        with guard.phase("server-only control", round=round):
            server.compute.begin()
            server.control.server_update(round)
            control_loss = server.validate_control(round)
            watch.lap("control")

    # --- local training; the server answers the calls of clients that hold no model ---
    with guard.phase("local work", round=round):
        if server and server.answer:
            wire.serve(server.answer)
        results = train_clients(clients, broadcast) if clients else []

    # --- gather ---
    with guard.phase("gather", round=round):
        expected = server.expected(round) if server and server.expected else None
        updates = wire.gather(round, results, expected)
        watch.lap("clients")
    if server is None:
        if schedule.asks_silos:
            judge_at_silos(round, wire, schedule, server=None, clients=clients)
        if schedule.judges_tiers(round):
            judge_tiers(round, wire, schedule, server=None, clients=clients)
        return _nothing_is_left

    # --- aggregate ---
    server.compute.begin()
    with guard.phase("merge", round=round):
        if updates is not None and schedule.federation.clients:
            assert broadcast.tensors is not None
            require_quorum(updates, schedule)
            aggregate = server.server.aggregate(updates)
            require_quorum(updates, schedule)  # the rule may have rejected some
            server.outer.step(broadcast.tensors, aggregate)
            server.server.load_aggregate(aggregate)
        wire.meet_as_server(server.group.size)
        server.group.lead(server.server.parameters())
        watch.lap("merge")

    # --- server update ---
    tuning: ServerTuning | UnvalidatedTuning | None = None
    if server.server.tunes:
        tuning = tune_on_server(round, schedule, server, watch=watch)

    # --- validate at the server, and where the text is ---
    silo_scores: list[SiloRow] = []
    if schedule.asks_silos:
        silo_scores = judge_at_silos(round, wire, schedule, server=server, clients=clients)
        watch.lap("validation")
    if schedule.judges_tiers(round):
        judge_tiers(round, wire, schedule, server=server, clients=clients)
        watch.lap("validation")
    result = RoundResult(
        round=round,
        updates=updates,
        tuning=tuning,
        control_loss=control_loss,
        silo_scores=silo_scores,
        round_bytes=wire.round_bytes(),
        evaluation_bytes=schedule.num_evaluations(round) * wire.evaluation_bytes(),
        entries=wire.manifest,
        watch=watch,
    )
    if schedule.overlaps:
        watch.stop()
    return partial(validate_and_record, result, server)


@dataclass(frozen=True)
class ServerTuning:
    """What the server's tuning of a round was worth.

    Attributes:
        trace: of its steps.
        merged_loss: validation loss before it, in nats a token.
        loss: of what is kept.
    """

    trace: Trace
    merged_loss: float
    loss: float


@dataclass(frozen=True)
class UnvalidatedTuning:
    """A round's tuning at the server that stands whatever it was worth, to be validated later.

    Attributes:
        trace: of its steps.
        merged: what there was before it.
    """

    trace: Trace
    merged: NamedTensors

    def validate(self, server: ServerRole) -> ServerTuning:
        """Validate what the server has tuned, and what it had merged before."""
        loss = server.validation_loss(server.server)
        tuned = server.server.export()
        server.server.restore(self.merged)
        merged_loss = server.validation_loss(server.server)
        server.server.restore(tuned)
        return ServerTuning(self.trace, merged_loss, loss)


@dataclass(frozen=True)
class RoundResult:
    """What a round has brought, on a rank of the server, until it is recorded.

    Attributes:
        round: its number.
        updates: of the clients; None on the server's other ranks.
        tuning: of the server, validated or not yet; None where it does not tune.
        control_loss: validation loss of the server-only control, in nats a token.
        silo_scores: what silos have scored.
        round_bytes: on the wire, by direction and client.
        evaluation_bytes: of what silos have scored.
        entries: the wire's manifest so far.
        watch: of the round.
    """

    round: int
    updates: Updates | None
    tuning: ServerTuning | UnvalidatedTuning | None
    control_loss: float
    silo_scores: Sequence[SiloRow]
    round_bytes: Mapping[str, Mapping[int, int]]
    evaluation_bytes: int
    entries: Sequence[JsonMapping]
    watch: Stopwatch


def tune_on_server(
    round: int, schedule: Schedule, server: ServerRole, *, watch: Stopwatch
) -> ServerTuning | UnvalidatedTuning:
    """Tune the merged prompts at the server, and keep that if the validation loss says so.

    Where prompts are kept in any case, clients need not wait until they are validated.

    Args:
        round: from 1.
        schedule: of the run.
        server: holds the merged prompts, and holds the result afterwards.
        watch: of the round.
    """
    if schedule.overlaps and server.always_accept and server.server.prompt is not None:
        with guard.phase("server tuning", round=round):
            merged = server.server.export()
            trace = server.server.server_update(round) or Trace()
            watch.lap("server")
        return UnvalidatedTuning(trace, merged)
    with guard.phase("validation of the merged prompts", round=round):
        merged_loss = server.validation_loss(server.server)
        watch.lap("validation")
    with guard.phase("server tuning", round=round):
        before = None if server.always_accept else server.server.export()
        if server.above:  # a round of the tier above, whose clients are parts of this server
            run_tier_above(round, schedule, server.above)
        trace = server.server.server_update(round) or Trace()
        watch.lap("server")
    with guard.phase("validation", round=round):
        loss = server.accept_or_revert(before, merged_loss)
        watch.lap("validation")
    return ServerTuning(trace, merged_loss, loss)


def run_tier_above(round: int, schedule: Schedule, above: UpperTier) -> None:
    """Run one round of the tier above; validation and record belong to the round that it is in.

    Collective among the server's ranks, each of which plays some of its clients.

    Args:
        round: that it is in, from 1.
        schedule: of the run; the tier has a federation of its own.
        above: the tier, whose clients are parts of this server.
    """
    close = run_round(
        round,
        above.wire,
        Schedule(
            above.federation,
            schedule.checkpoint,
            client_name=schedule.client_name,
            on_stop="the tier above needs all experts",
        ),
        server=above.server,
        clients=above.clients,
        close_previous=_nothing_is_left,
    )
    if close is not None:
        close()


def validate_and_record(result: RoundResult, server: ServerRole) -> None:
    """Validate what is not validated yet, see whether the round is the best, and record it.

    What is left of a round whose result can be broadcast; no client takes part.
    """
    round = result.round
    watch = result.watch
    watch.skip()
    tuning = result.tuning
    if tuning is None:
        with guard.phase("validation", round=round):
            server.compute.begin()
            loss = server.validation_loss(server.server)
            tuning = ServerTuning(Trace(), loss, loss)
            watch.lap("validation")
    elif isinstance(tuning, UnvalidatedTuning):
        with guard.phase("validation", round=round):
            server.compute.begin()
            tuning = tuning.validate(server)
            watch.lap("validation")
    with guard.phase("best round", round=round):
        is_best = server.keep_if_best(round, tuning.loss, result.silo_scores)
    updates = result.updates
    if updates is None or server.journal is None:
        return
    with guard.phase("record", round=round):
        row = RoundRow(
            round=round,
            num_clients=len(updates.reports) + len(updates.failures),
            num_failed=len(updates.failures) + len(updates.rejected),
            server_loss_first=tuning.trace.first,
            server_loss_last=tuning.trace.last,
            validation_merged=tuning.merged_loss,
            validation_loss=tuning.loss,
            control_validation_loss=result.control_loss,
            is_best=is_best,
            bytes_down=result.evaluation_bytes,
            **watch.seconds(),
        )
        server.journal.commit_round(
            row,
            updates,
            dict(server.server.export()) if server.journal.keep_prompts else None,
            silos=result.silo_scores,
            tiers=server.tier_rows,
            round_bytes=result.round_bytes,
            entries=result.entries,
        )
        server.tier_rows.clear()


def train_clients(clients: HostedClients, broadcast: RoundBroadcast) -> list[Update | Failure]:
    """Train this process's clients that take part in a round, one after the other.

    An error of one client becomes a Failure; the others go on.
    """
    assert broadcast.tensors is not None
    clients.compute.begin()
    participants = set(clients.participants(broadcast.round))
    ids = [client for client in clients.ids if client in participants]
    clients.cache.start_round(ids)
    clients.progress.begin(broadcast.round)
    results: list[Update | Failure] = []
    for position, client in enumerate(ids, 1):
        clients.progress.client(client, position, len(ids))
        with guard.phase("local training", round=broadcast.round, client=client):
            try:
                clients.cache.load(client)
                update = clients.client.local_update(client, broadcast.round, broadcast.tensors)
                results.append(update)
            except ClientError as error:
                results.append(Failure(client, broadcast.round, "local training", str(error)))
            clients.cache.store(client, broadcast.round)
    return results


def judge_at_silos(
    round: int,
    wire: Wire | Solo,
    schedule: Schedule,
    *,
    server: ServerRole | None,
    clients: HostedClients | None,
) -> list[SiloRow]:
    """Have every silo score what the round has brought, on the text that it holds back.

    Args:
        round: that ends.
        wire: between all ranks.
        schedule: of the rounds.
        server: this rank's part of the server.
        clients: those that this rank plays.

    Returns:
        On the server's first rank a row for each silo that could score; none elsewhere.
    """
    with guard.phase("evaluation at the silos", round=round):
        tensors = _broadcast_for_scoring(round, wire, schedule, server=server)
        rows = clients.score_silos(round, tensors) if clients else []
        answers = wire.collect({"scores": [silo_row_json(row) for row in rows]}, "evaluation")
        if server is not None:
            wire.meet_as_server(server.group.size)
        if answers is None or server is None or server.journal is None:
            return []
        return read_silo_rows(answers, server.journal.rank_of, round)


def judge_tiers(
    round: int,
    wire: Wire | Solo,
    schedule: Schedule,
    *,
    server: ServerRole | None,
    clients: HostedClients | None,
) -> None:
    """Have users score all tiers' prompts on their own text, and the server on its own.

    The scores go into the record with the next round that is committed.

    Args:
        round: that ends; 0 before the first.
        wire: between all ranks.
        schedule: of the rounds.
        server: this rank's part of the server.
        clients: those that this rank plays.
    """
    with guard.phase("evaluation of the tiers", round=round):
        tensors = _broadcast_for_scoring(round, wire, schedule, server=server)
        scores = clients.score_tiers(round, tensors) if clients else []
        answers = wire.collect({"tiers": [asdict(score) for score in scores]}, "evaluation")
        if answers is None or server is None or server.journal is None:
            return
        users = schedule.federation.users
        rank_of = server.journal.rank_of
        server.tier_rows += read_tier_scores(answers, rank_of, round, users=users)
        if server.score_tiers is not None:
            server.compute.begin()
            server.tier_rows += server.score_tiers(round)


def require_quorum(updates: Updates, schedule: Schedule) -> None:
    """Raise ClientFailedError if the run should not continue with the updates that there are.

    Called before the rule of aggregation and after it: an update that the rule rejected does not
    count.
    """
    federation = schedule.federation
    reasons = [
        f"{schedule.client_name(failure.client)} in {failure.phase}: {failure.reason}"
        for failure in updates.failures
    ]
    if reasons and federation.on_failure == "stop":
        raise ClientFailedError(f"{_joined(reasons)} ({schedule.on_stop})")
    for client, reason in updates.rejected.items():
        reasons.append(f"{schedule.client_name(client)} rejected: {reason}")
    num_accepted = len(updates.reports) - len(updates.rejected)
    if reasons and num_accepted < federation.min_clients:
        raise ClientFailedError(
            f"found {num_accepted} updates, expected at least federation.min_clients="
            f"{federation.min_clients}: {_joined(reasons)}"
        )


def _joined(reasons: Sequence[str]) -> str:
    """Return the first reasons in one line, and how many more there are."""
    shown = "; ".join(reasons[:_MAX_REASONS])
    num_others = len(reasons) - _MAX_REASONS
    return f"{shown}; and {num_others} more" if num_others > 0 else shown


def collect_clients(
    round: int,
    wire: Wire | Solo,
    schedule: Schedule,
    *,
    server: ServerRole | None,
    clients: HostedClients | None,
) -> ClientFiles | None:
    """Have the ranks write the states of the clients that they play, for a checkpoint.

    After the last round clients are asked only if their states are to be kept. Collective.

    Args:
        round: whose updates are merged.
        wire: between all ranks.
        schedule: of the rounds.
        server: this rank's part of the server.
        clients: those that this rank plays.

    Returns:
        On the server's first rank the files by client; None elsewhere.

    Raises:
        RecordError: on the server, if a rank cannot write.
    """
    with guard.phase("checkpoint", round=round):
        start = time.perf_counter()
        answers: Sequence[JsonMapping] | None = []
        if round < schedule.federation.rounds or schedule.checkpoint.keep_client_states:
            answers = wire.collect(_save_clients(clients), "checkpoint")
        if server is None or server.journal is None or answers is None:
            return None
        files = _client_files(answers, server.journal.rank_of)
        return ClientFiles(files, time.perf_counter() - start)


def save_checkpoint(
    round: int, schedule: Schedule, server: ServerRole | None, *, files: ClientFiles | None
) -> None:
    """Write the server's part of a checkpoint, which completes it.

    Args:
        round: that is recorded.
        schedule: of the rounds.
        server: this rank's part of the server.
        files: of the clients; None where nothing is to be written.
    """
    if files is None or server is None or server.journal is None:
        return
    with guard.phase("checkpoint", round=round):
        start = time.perf_counter()
        journal = server.journal
        journal.checkpoints.commit(
            round,
            server.state(),
            files.by_client,
            keep=schedule.checkpoint.keep,
            best=server.best.round,
            inputs=journal.inputs,
        )
        journal.checkpoint_seconds.append(files.seconds + time.perf_counter() - start)


@dataclass(frozen=True)
class ClientFiles:
    """The clients' part of a checkpoint.

    Attributes:
        by_client: the file of each client's state, by client id.
        seconds: that writing them took.
    """

    by_client: dict[int, CheckpointFile]
    seconds: float


def _nothing_is_left() -> None:
    """Stand for the end of a round on a rank that has nothing to do there."""


def _round_broadcast(round: int, server: ServerRole) -> RoundBroadcast:
    if guard.stop_requested and not server.is_inner:  # the outer round goes on to its end
        return RoundBroadcast(round, stop=True)
    return RoundBroadcast(round, tensors=server.server.broadcast())


def _broadcast_for_scoring(
    round: int, wire: Wire | Solo, schedule: Schedule, *, server: ServerRole | None
) -> NamedTensors:
    """Send what the round has brought to all clients, who score it on their own text."""
    tuned = RoundBroadcast(round, tensors=server.server.broadcast()) if server else None
    is_root = server is not None and server.is_root
    broadcast = wire.broadcast(tuned if is_root else None, schedule.federation.clients)
    assert broadcast.tensors is not None
    return broadcast.tensors


def _save_clients(clients: HostedClients | None) -> JsonObject:
    """Write the states of this process's clients; return their files, or why there are none."""
    try:
        files = clients.cache.save() if clients else {}
    except RecordError as error:
        return {"states": {}, "error": str(error)}
    return {"states": {str(client): file for client, file in files.items()}, "error": None}


def _client_files(
    answers: Sequence[JsonMapping], rank_of: Mapping[int, int]
) -> dict[int, CheckpointFile]:
    """Return the files that ranks have written for their clients, by client id.

    Raises:
        RecordError: a rank could not write.
        ProtocolError: a rank names a client that it does not play.
    """
    files: dict[int, CheckpointFile] = {}
    for rank, answer in enumerate(answers):
        with reading(rank, "a list of the states that it has saved"):
            require_fields(answer, rank, {"error": (str, type(None)), "states": dict})
            if answer["error"]:
                raise RecordError(str(answer["error"]))
            for client, file in answer["states"].items():
                if rank_of.get(int(client)) != rank:
                    raise ProtocolError(
                        f"rank {rank}: found a state of client {int(client)}, which it does not "
                        "play"
                    )
                files[int(client)] = CheckpointFile.of(file)
    return files


def _log_round(journal: RoundJournal, round: int, schedule: Schedule, *, elapsed: float) -> None:
    rounds = schedule.federation.rounds
    row = journal.record.run.rounds[-1]
    clients = journal.record.run.clients
    rows_of_round = clients[len(clients) - int(row["num_clients"]) :]
    statuses = rows_of_round["status"].tolist()
    excluded = ""
    for status in ("failed", "rejected"):
        if status in statuses:
            excluded += f", {statuses.count(status)} of them {status}"
    control = ""
    if not math.isnan(row["control_validation_loss"]):
        control = f", server-only {row['control_validation_loss']:.4f}"
    best = ", best so far" if row["is_best"] else ""
    remaining = elapsed / (round - schedule.rounds_done) * (rounds - round)
    losses = f"validation loss {row['validation_loss']:.4f}{best}"
    losses += f" (merged {row['validation_merged']:.4f}{control})"
    silos = journal.record.run.silos
    silos = silos[(silos["round"] == round) & np.isfinite(silos["loss"])]
    if len(silos):
        worst = silos[silos["loss"].argmax()]
        name = schedule.client_name(int(worst["silo"]))
        at_silos = f"loss at the silos {mean_silo_loss(silos):.4f}"
        at_silos += f" (worst {worst['loss']:.4f}, {name})"
        is_judged_by_silos = math.isnan(row["validation_loss"])
        losses = f"{at_silos}{best}" if is_judged_by_silos else f"{losses}, {at_silos}"
    time_left = f"  {duration(remaining)} left" if round < rounds else ""
    journal.log.say(
        f"round {round}/{rounds}  {losses}  {row['num_clients']} clients{excluded}"
        f"  {duration(row['seconds_total'])}{time_left}"
    )


class Stopwatch:
    """Seconds of one round by phase; a phase that comes twice is added up."""

    def __init__(self) -> None:
        self._start = time.perf_counter()
        self._last = self._start
        self._total: float | None = None
        self._laps: dict[str, float] = {}

    def lap(self, phase: str) -> None:
        """Add the time since the last lap to a phase."""
        now = time.perf_counter()
        self._laps[phase] = self._laps.get(phase, 0.0) + now - self._last
        self._last = now

    def skip(self) -> None:
        """Count the time since the last lap for no phase."""
        self._last = time.perf_counter()

    def stop(self) -> None:
        """End the round: what is timed from now on lies in the next one."""
        self._total = time.perf_counter() - self._start

    def seconds(self) -> JsonObject:
        """Return the seconds as the fields of a round's row."""
        total = self._total
        if total is None:
            total = time.perf_counter() - self._start
        laps = {f"seconds_{phase}": seconds for phase, seconds in self._laps.items()}
        return {**laps, "seconds_total": total}

"""The federation: one round, written once, for the server, for the clients, and for one process
that is both.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from fedsp_mpi.comm import RoundBroadcast, Updates, guard
from fedsp_mpi.comm.inspection import ProtocolError, reading, require_fields
from fedsp_mpi.comm.solo import Solo
from fedsp_mpi.comm.wire import Wire
from fedsp_mpi.config import FederationConfig
from fedsp_mpi.config.runtime import CheckpointConfig
from fedsp_mpi.log import duration
from fedsp_mpi.record.atomic import RecordError
from fedsp_mpi.record.checkpoint import CheckpointFile
from fedsp_mpi.record.tables import ClientRow, RoundRow, WireRow
from fedsp_mpi.roles import HostedClients, RoundJournal, ServerRole
from fedsp_mpi.tensors import ClientError, Failure, Update


class ClientFailedError(RuntimeError):
    """Clients failed, and the configuration or the quorum does not let the run go on without them."""


@dataclass(frozen=True)
class Plan:
    """How many rounds, and when they are put on disk.

    Attributes:
        done: rounds that an earlier stretch of the run has done.
    """

    federation: FederationConfig
    checkpoint: CheckpointConfig
    done: int = 0

    def is_due(self, round: int) -> bool:
        """Whether a checkpoint is written after `round`: every so many, and after the last."""
        every = self.checkpoint.every
        return every is not None and (round % every == 0 or round == self.federation.rounds)


def federate(
    wire: Wire | Solo, plan: Plan, here: ServerRole | None, clients: HostedClients | None
) -> bool:
    """All rounds that are left. Every rank calls this; `here` is the server's side, `clients` the
    others'.

    Returns:
        False if the run was told to stop (SIGUSR1 at the server) before its last round; a
        checkpoint is written then.
    """
    start, rounds = time.perf_counter(), plan.federation.rounds
    for round in range(plan.done + 1, rounds + 1):
        if not run_round(round, wire, plan, here, clients):
            if plan.done < round - 1 and not plan.is_due(round - 1):
                save(round - 1, wire, plan, here, clients)
            return False
        if here and here.archive:
            _tell(here.archive, round, plan, time.perf_counter() - start)
        if plan.is_due(round):
            save(round, wire, plan, here, clients)
    return True


def run_round(
    round: int,
    wire: Wire | Solo,
    plan: Plan,
    here: ServerRole | None,
    clients: HostedClients | None,
) -> bool:
    """One round: prompts go down, are tuned on private text, come up, are merged and tuned on the
    global model.

    False if the server's word is to stop. Raises ClientFailedError at the server if too many
    clients failed.
    """
    watch = Stopwatch()
    with guard.phase("broadcast", round=round):
        down = wire.broadcast(_word(round, here) if here and here.archive else None)
        watch.lap("broadcast")
    if down.stop:
        return False
    if here and here.control:
        with guard.phase("server-only control", round=round):
            here.compute.begin()
            here.control.absorb(round)  # while the clients work
            watch.lap("control")
    with guard.phase("local training and gather", round=round):
        work = local_work(clients, down) if clients else ()
        updates = wire.gather(round, work, *((here.answer, here.expected(round)) if here else ()))
        watch.lap("clients")
    if here is None:
        return True
    here.compute.begin()
    with guard.phase("merge", round=round):
        if updates is not None and plan.federation.clients:
            require_quorum(updates, plan.federation)
            together = here.server.merge(updates)
            require_quorum(updates, plan.federation)  # the rule may have left some out
            here.server.take(together)
        here.team.lead(here.server.parameters())
        watch.lap("merge")
    with guard.phase("validation of the merged prompts", round=round):
        merged_loss = here.loss(here.server)
        watch.lap("validation")
    with guard.phase("server tuning", round=round):
        merged = None if here.keeps_worse else here.server.tuned()
        trace = here.server.absorb(round)
        watch.lap("server")
    with guard.phase("validation", round=round):
        loss, is_best = here.settle(round, merged, merged_loss)
        control_loss = here.settle_control(round)
        watch.lap("validation")
    if updates is None or here.archive is None:
        return True
    with guard.phase("record", round=round):
        row = RoundRow(
            round=round,
            num_clients=len(updates.reports) + len(updates.failures),
            num_failed=len(updates.failures) + len(updates.rejected),
            server_loss_first=trace.first,
            server_loss_last=trace.last,
            validation_merged=merged_loss,
            validation_loss=loss,
            control_validation_loss=control_loss,
            is_best=is_best,
            **watch.seconds(),
        )
        prompts = dict(here.server.tuned()) if here.archive.keep_prompts else None
        commit(here.archive, wire, row, updates, prompts)
    return True


def _word(round: int, here: ServerRole) -> RoundBroadcast:
    return (
        RoundBroadcast(round, stop=True)
        if guard.told_to_stop
        else RoundBroadcast(round, tensors=here.server.broadcast())
    )


def save(
    round: int,
    wire: Wire | Solo,
    plan: Plan,
    here: ServerRole | None,
    clients: HostedClients | None,
) -> None:
    """Write a checkpoint: the clients' states by those who play them, while the server ends the
    round; then its own.

    After the last round the clients are not asked, because they have nothing left to do.
    Raises RecordError at the server if somebody cannot write.
    """
    with guard.phase("checkpoint", round=round):
        start = time.perf_counter()
        last = round == plan.federation.rounds
        answers = [] if last else wire.collect(_saved(clients), "checkpoint")
        if here is None or here.archive is None or answers is None:
            return
        archive = here.archive
        pieces = _saved_pieces(answers, archive.rank_of)
        archive.checkpoints.commit(
            round,
            here.state(),
            pieces,
            plan.checkpoint.keep,
            best=here.best.round,
            inputs=archive.inputs,
        )
        here.archive.seconds_checkpoints.append(time.perf_counter() - start)


def _saved(clients: HostedClients | None) -> dict[str, Any]:
    """The files of this process's clients, or why there are none, for the server."""
    try:
        states = clients.shelf.save() if clients else {}
    except RecordError as error:
        return {"states": {}, "error": str(error)}
    return {"states": {str(id): list(piece) for id, piece in states.items()}, "error": None}


def _saved_pieces(
    answers: Sequence[dict[str, Any]], rank_of: Mapping[int, int]
) -> dict[int, CheckpointFile]:
    """The files that ranks have written for their clients, by client id.

    Raises RecordError if a rank could not write, ProtocolError if it names what is not its own.
    """
    pieces: dict[int, CheckpointFile] = {}
    for rank, answer in enumerate(answers):
        with reading(rank, "a list of the states that it has saved"):
            require_fields(answer, rank, {"error": (str, type(None)), "states": dict})
            if answer["error"]:
                raise RecordError(str(answer["error"]))
            for id, piece in answer["states"].items():
                if rank_of.get(int(id)) != rank:
                    raise ProtocolError(
                        f"rank {rank}: found a state of client {int(id)}, which it does not play"
                    )
                pieces[int(id)] = CheckpointFile.of(piece)
    return pieces


def local_work(clients: HostedClients, down: RoundBroadcast) -> Iterator[Update | Failure]:
    """The work of this process's clients that take part, one by one.

    What makes one of them fail is a value.
    """
    assert down.tensors is not None
    clients.compute.begin()
    chosen = set(clients.chosen(down.round))
    mine = [id for id in clients.ids if id in chosen]
    clients.shelf.begin(mine)
    clients.progress.begin(down.round)
    for place, id in enumerate(mine, 1):
        clients.progress.client(id, place, len(mine))
        with guard.phase("local training", round=down.round, client=id):
            try:
                clients.shelf.fetch(id)
                yield clients.client.local(id, down.round, down.tensors)
            except ClientError as error:
                yield Failure(id, down.round, "local training", str(error))
            clients.shelf.put(id, down.round)


def require_quorum(updates: Updates, plan: FederationConfig) -> None:
    """Raise ClientFailedError if the run should not go on with the updates that there are.

    Asked before the rule of aggregation and after it: an update that the rule rejected does not
    count.
    """
    who = [f"client {f.client} in {f.phase}: {f.reason}" for f in updates.failures]
    if who and plan.on_failure == "stop":
        raise ClientFailedError(
            f"{'; '.join(who)} (federation.on_failure=stop; =drop goes on without them)"
        )
    who += [f"client {client} rejected: {reason}" for client, reason in updates.rejected.items()]
    left = len(updates.reports) - len(updates.rejected)
    if who and left < plan.min_clients:
        raise ClientFailedError(
            f"found {left} updates, expected at least "
            f"federation.min_clients={plan.min_clients}: {'; '.join(who)}"
        )


def commit(
    archive: RoundJournal,
    wire: Wire | Solo,
    row: RoundRow,
    updates: Updates,
    prompts: dict[str, np.ndarray] | None,
) -> None:
    """Write one round into the record: when this returns, the round is on disk."""
    size = wire.round_bytes()

    def client_row(client: int, **rest: Any) -> ClientRow:
        down, up = size["down"].get(client, 0), size["up"].get(client, 0)
        return ClientRow(
            round=row.round,
            client=client,
            rank=archive.rank_of[client],
            bytes_down=down,
            bytes_up=up,
            **rest,
        )

    rejected = {
        client: {"status": "rejected", "reason": why} for client, why in updates.rejected.items()
    }
    clients = [
        client_row(r.client, samples=int(r.weight), **r.metrics, **rejected.get(r.client, {}))
        for r in updates.reports
    ]
    clients += [
        client_row(f.client, status="failed", reason=f"{f.phase}: {f.reason}")
        for f in updates.failures
    ]
    row = replace(row, bytes_down=sum(size["down"].values()), bytes_up=sum(size["up"].values()))
    ordered = sorted(clients, key=lambda client: client.client)
    archive.record.commit_round(row, ordered, prompts, manifest(wire, archive.carried))


def manifest(wire: Wire | Solo, carried: Sequence[WireRow] = ()) -> list[WireRow]:
    """The wire's manifest as rows of the record, on top of what earlier stretches of the run sent."""
    rows = {(row.direction, row.phase, row.name): row for row in carried}
    for entry in wire.manifest:
        kept = {
            name: entry[name]
            for name in ("name", "dtype", "direction", "phase", "bytes", "bytes_crossed")
        }
        row = WireRow(**kept, shape=tuple(entry["shape"] or ()), count=entry["messages"])
        rows[row.direction, row.phase, row.name] = _added(
            rows.get((row.direction, row.phase, row.name)), row
        )
    return list(rows.values())


def _added(before: WireRow | None, row: WireRow) -> WireRow:
    if before is None:
        return row
    sums = {
        name: getattr(before, name) + getattr(row, name)
        for name in ("count", "bytes", "bytes_crossed")
    }
    return replace(row, **sums)


class Stopwatch:
    """Seconds by phase of one round; a phase that comes twice is added up."""

    def __init__(self) -> None:
        self._start = self._last = time.perf_counter()
        self._laps: dict[str, float] = {}

    def lap(self, phase: str) -> None:
        now = time.perf_counter()
        self._laps[phase] = self._laps.get(phase, 0.0) + now - self._last
        self._last = now

    def seconds(self) -> dict[str, Any]:
        """As the fields of a round's row."""
        laps = {f"seconds_{phase}": seconds for phase, seconds in self._laps.items()}
        return {**laps, "seconds_total": time.perf_counter() - self._start}


def _tell(archive: RoundJournal, round: int, plan: Plan, elapsed: float) -> None:
    rounds = plan.federation.rounds
    row = archive.record.run.rounds[-1]
    there = archive.record.run.clients
    some = there[there["round"] == round]["status"].tolist()
    left_out = "".join(
        f", {some.count(kind)} of them {kind}" for kind in ("failed", "rejected") if kind in some
    )
    loss = row["control_validation_loss"]
    control = "" if math.isnan(loss) else f", server-only {loss:.4f}"
    best = ", best so far" if row["is_best"] else ""
    left = duration(elapsed / (round - plan.done) * (rounds - round))
    archive.log.say(
        f"round {round}/{rounds}  validation loss {row['validation_loss']:.4f}{best}"
        f" (merged {row['validation_merged']:.4f}{control})  {row['num_clients']} clients{left_out}"
        f"  {duration(row['seconds_total'])}  {left} left"
    )

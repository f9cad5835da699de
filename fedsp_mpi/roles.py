"""The two sides of a round: the server, with what it is judged by, and the clients of a process."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np

from fedsp_mpi.aggregation.outer import OuterOptimizer
from fedsp_mpi.algorithms.base import Client, Server
from fedsp_mpi.comm import guard
from fedsp_mpi.comm.exchange import Exchange
from fedsp_mpi.comm.inspection import Expected, ProtocolError, reading, require_fields
from fedsp_mpi.comm.solo import Solo
from fedsp_mpi.comm.wire import Wire
from fedsp_mpi.config import FederationConfig
from fedsp_mpi.data.tokens import Text
from fedsp_mpi.evaluation.scoring import answer_loss_mean
from fedsp_mpi.files.untrusted import JsonMapping, JsonObject
from fedsp_mpi.log import RoundProgress
from fedsp_mpi.record.client_cache import ClientStateCache
from fedsp_mpi.record.journal import RoundJournal
from fedsp_mpi.record.tables import SiloRow, TierRow, mean_silo_loss, table
from fedsp_mpi.tensors import ClientError, NamedTensors, State, join_states, part_of_state
from fedsp_mpi.training.device import Compute, oom_as_client_error
from fedsp_mpi.training.process_group import ServerGroup


def silo_row_json(row: SiloRow) -> JsonObject:
    """Return a silo's score as it travels."""
    return {
        "silo": row.silo,
        "n": row.n,
        "loss": row.loss if math.isfinite(row.loss) else None,
        "acc": row.acc if math.isfinite(row.acc) else None,
    }


def read_silo_rows(
    answers: Sequence[JsonMapping], rank_of: Mapping[int, int], round: int
) -> list[SiloRow]:
    """Read what ranks sent of their silos' scores, by client.

    Args:
        answers: by rank.
        rank_of: the rank that plays each client.
        round: that was scored.

    Raises:
        ProtocolError: a rank scores a silo that it does not play, or sends what cannot be.
    """
    rows: dict[int, SiloRow] = {}
    for rank, answer in enumerate(answers):
        with reading(rank, "the scores of its silos"):
            require_fields(answer, rank, {"scores": list})
            for values in answer["scores"]:
                number = (float, int, type(None))
                require_fields(values, rank, {"silo": int, "n": int, "loss": number, "acc": number})
                loss, acc = (
                    math.nan if values[name] is None else float(values[name])
                    for name in ("loss", "acc")
                )
                row = SiloRow(round=round, silo=values["silo"], n=values["n"], loss=loss, acc=acc)
                if row.loss < 0 or not (math.isnan(row.acc) or 0 <= row.acc <= 1):
                    raise ProtocolError(
                        f"rank {rank}: found loss {row.loss:g} and accuracy {row.acc:g} of client "
                        f"{row.silo}, expected a loss from 0 and a fraction"
                    )
                if rank_of.get(row.silo) != rank or row.silo in rows or row.n < 0:
                    raise ProtocolError(
                        f"rank {rank}: found a score of client {row.silo}, which it does not play "
                        "or has scored already"
                    )
                rows[row.silo] = row
    return [rows[silo] for silo in sorted(rows)]


TIERS = ("personal", "expert", "general")
TIER_TEXTS = ("own", "domain", "other")


@dataclass(frozen=True)
class TierScore:
    """What a user's rank says of one tier's prompt on one text.

    Attributes:
        client: id of the user.
        model: one of `TIERS`.
        text: one of `TIER_TEXTS`.
        n: number of questions.
        loss: in nats per token.
        acc: fraction from 0 to 1.
    """

    client: int
    model: str
    text: str
    n: int
    loss: float
    acc: float

    @classmethod
    def from_json(cls, values: JsonMapping, rank: int) -> TierScore:
        """Read what a rank sent; raise ProtocolError, naming the rank, if it cannot be."""
        number = (float, int)
        require_fields(values, rank, {"client": int, "model": str, "text": str, "n": int})
        require_fields(values, rank, {"loss": number, "acc": number})
        score = cls(**{name: values[name] for name in cls.__dataclass_fields__})
        is_named = score.model in TIERS and score.text in TIER_TEXTS
        if not is_named or score.n < 0 or not score.loss >= 0 or not 0 <= score.acc <= 1:
            raise ProtocolError(
                f"rank {rank}: found a score of {score.model} prompts on {score.text} text with "
                f"loss {score.loss:g} and accuracy {score.acc:g}, expected one of "
                f"{', '.join(TIERS)} on {', '.join(TIER_TEXTS)} text, a loss from 0 and a fraction"
            )
        return score


def read_tier_scores(
    answers: Sequence[JsonMapping],
    rank_of: Mapping[int, int],
    round: int,
    *,
    users: Sequence[str],
) -> list[TierRow]:
    """Read what ranks sent of their users' scores of all tiers, by client.

    Args:
        answers: by rank.
        rank_of: the rank that plays each client.
        round: that was scored.
        users: names, by client id.

    Raises:
        ProtocolError: a rank scores for a user that it does not play, or sends what cannot be.
    """
    scores: dict[tuple[int, int, int], TierScore] = {}
    for rank, answer in enumerate(answers):
        with reading(rank, "the scores of its users"):
            require_fields(answer, rank, {"tiers": list})
            for values in answer["tiers"]:
                score = TierScore.from_json(values, rank)
                key = (score.client, TIERS.index(score.model), TIER_TEXTS.index(score.text))
                if rank_of.get(score.client) != rank or key in scores:
                    raise ProtocolError(
                        f"rank {rank}: found a score of client {score.client}, which it does not "
                        "play or has scored already"
                    )
                scores[key] = score
    return [
        TierRow(
            round=round,
            name=users[score.client],
            model=score.model,
            text=score.text,
            at="device",
            n=score.n,
            loss=float(score.loss),
            acc=float(score.acc),
        )
        for _, score in sorted(scores.items())
    ]


class _HasState(Protocol):
    def state(self) -> State: ...

    def load_state(self, state: State) -> None: ...


@dataclass
class HostedClients:
    """The clients that this process plays.

    Attributes:
        client: the method's side of them.
        ids: of all that this process plays.
        compute: their device.
        cache: their states, some of them on disk.
        participants: returns the clients of all processes that take part in a round.
        progress: is told of every client and step.
        digests: of their tokenised texts, by name.
        score_silo: returns a client's row on the text that it holds back, of the round and the
            tensors given; None where silos do not judge.
        score_tiers_of: returns a user's scores of all tiers, given what was broadcast; None without
            tiers.
    """

    client: Client
    ids: Sequence[int]
    compute: Compute
    cache: ClientStateCache
    participants: Callable[[int], Sequence[int]]
    progress: RoundProgress = field(default_factory=RoundProgress)
    digests: dict[str, str] = field(default_factory=dict)
    score_silo: Callable[[int, int, NamedTensors], SiloRow | None] | None = None
    score_tiers_of: Callable[[int, NamedTensors], Sequence[TierScore]] | None = None

    def score_silos(self, round: int, tensors: NamedTensors) -> list[SiloRow]:
        """Return a row for each silo of this process that could score what a round has brought.

        Args:
            round: that ends.
            tensors: what the server would begin the next round with.
        """
        assert self.score_silo is not None, "silos judge only where they hold text back"
        self.compute.begin()
        rows = []
        self.cache.start_round(self.ids)
        for client in self.ids:
            with guard.phase("evaluation at the silos", round=round, client=client):
                self.cache.load(client)
                # A silo that runs out of memory here has no row; training says what is wrong.
                with suppress(ClientError), oom_as_client_error():
                    row = self.score_silo(client, round, tensors)
                    if row is not None:
                        rows.append(row)
                self.cache.store(client, round)
        return rows

    def score_tiers(self, round: int, tensors: NamedTensors) -> list[TierScore]:
        """Return the scores of all tiers of each user of this process that could score.

        Args:
            round: that ends; 0 before the first.
            tensors: what the server would begin the next round with.
        """
        assert self.score_tiers_of is not None, "users judge only where there are tiers"
        self.compute.begin()
        scores: list[TierScore] = []
        self.cache.start_round(self.ids)
        for client in self.ids:
            with guard.phase("evaluation of the tiers", round=round, client=client):
                self.cache.load(client)
                # A user that runs out of memory here has no scores; training says what is wrong.
                with suppress(ClientError), oom_as_client_error():
                    scores += self.score_tiers_of(client, tensors)
                self.cache.store(client, round)
        return scores


@dataclass
class Best:
    """What the server exported when its validation loss was lowest.

    Attributes:
        exported: the prompt, or the model's weights.
        round: that it is of; 0 before the first.
        loss: in nats a token.
    """

    exported: NamedTensors
    round: int = 0
    loss: float = math.inf

    def update_if_better(self, export: Callable[[], NamedTensors], round: int, loss: float) -> bool:
        """Take over what has a lower loss, and return whether it has.

        Of equal losses the first stays; a loss that is not a number is never better.

        Args:
            export: returns what the server exports.
            round: that it is of.
            loss: on the validation texts, in nats a token.
        """
        if not loss < self.loss:
            return False
        self.exported = export()
        self.round = round
        self.loss = loss
        return True

    def state(self) -> State:
        """Return this as a checkpoint stores it."""
        position = {"round": np.array(self.round), "loss": np.array(self.loss)}
        return join_states({"tuned": dict(self.exported), "at": position})

    def load_state(self, state: State) -> None:
        """Continue from `state()`."""
        for name, value in part_of_state(state, "tuned").items():
            self.exported[name][...] = value
        self.round = int(state["at/round"])
        self.loss = float(state["at/loss"])


@dataclass
class UpperTier:
    """A round inside the server's part of each round, whose clients are parts of the server.

    Attributes:
        wire: between the server's ranks, all of which play clients of that round.
        federation: of that round: who takes part, and what follows if one fails.
        server: of that round, on rank 0; None on the server's other ranks.
        clients: of that round that this rank plays.
    """

    wire: Wire | Solo
    federation: FederationConfig
    server: ServerRole | None
    clients: HostedClients


@dataclass
class ServerRole:
    """The server, the control that tunes beside it without clients, and what both are judged by.

    Where several ranks are the server, each has one; they do the same, or deal out what they do,
    and end each round with the same values.

    Attributes:
        server: the method's side.
        control: the same without clients (server-only); None if there is none.
        compute: the server's device.
        validation: texts that every round is judged by.
        batch_tokens: most tokens of a forward pass of validation.
        group: the ranks that are the server together.
        journal: what is written; None on the server's other ranks.
        expected: returns who answers in a round, and what they may send; None likewise.
        always_accept: whether a round's tuning stands if it made the validation loss worse.
        answer: returns the losses that clients without a model ask for; None if all hold one.
        outer: moves the server's values by the clients' mean.
        exchange: what the wire's next broadcast depends on, where it compresses; None on the
            server's other ranks.
        validate: returns the validation loss of a server that has several prompts, each with texts
            of its own; None: its prompt's on `validation`.
        above: a round inside the server's part of each round; None: there is none.
        is_inner: this is the server of such a round, which is recorded with the outer one.
        score_tiers: returns the server's own scores of all tiers after a round; None without tiers.
        tier_rows: scores of tiers that are not yet in the record.
        best: of the server.
        control_best: of the control.
    """

    server: Server
    control: Server | None
    compute: Compute
    validation: Sequence[Text]
    batch_tokens: int
    group: ServerGroup
    journal: RoundJournal | None = None
    expected: Callable[[int], Expected] | None = None
    always_accept: bool = True
    answer: Callable[[np.ndarray], np.ndarray] | None = None
    outer: OuterOptimizer = field(default_factory=OuterOptimizer)
    exchange: Exchange | None = None
    validate: Callable[[Server], float] | None = None
    above: UpperTier | None = None
    is_inner: bool = False
    score_tiers: Callable[[int], Sequence[TierRow]] | None = None
    tier_rows: list[TierRow] = field(default_factory=list)
    best: Best = field(init=False)
    control_best: Best | None = field(init=False)

    def __post_init__(self) -> None:
        self.best = Best(self.server.export())
        self.control_best = Best(self.control.export()) if self.control else None

    def validation_loss(self, server: Server) -> float:
        """Return the mean answer loss on the validation texts, in nats a token; nan without any."""
        if self.validate is not None:
            return self.validate(server)
        if not self.validation:
            return math.nan
        return answer_loss_mean(
            server.model,
            server.prompt,
            self.validation,
            batch_tokens=self.batch_tokens,
            group=self.group,
        )

    def accept_or_revert(self, aggregate: NamedTensors | None, aggregate_loss: float) -> float:
        """Validate what the server tuned; revert to the aggregate if the loss rose.

        Args:
            aggregate: what the server exported before it tuned; None with `server.accept=always`.
            aggregate_loss: its validation loss.

        Returns:
            The validation loss of what is kept.
        """
        loss = self.validation_loss(self.server)
        if aggregate is not None and not loss <= aggregate_loss:
            self.server.restore(aggregate)
            loss = aggregate_loss
        return loss

    def keep_if_best(self, round: int, loss: float, silos: Sequence[SiloRow]) -> bool:
        """Take over what the round has brought if it is the best so far; return whether it is.

        The server's validation loss decides; where it owns no such text, the silos' mean loss.

        Args:
            round: that ends.
            loss: on the server's validation texts, in nats a token.
            silos: what silos have scored.
        """
        if not self.validation:
            loss = self.group.tell(mean_silo_loss(table(SiloRow, silos)))
        return self.best.update_if_better(self.server.export, round, loss)

    @property
    def is_root(self) -> bool:
        """Whether this rank begins rounds: it writes the record, or its round is an inner one."""
        return self.journal is not None or self.is_inner

    def validate_control(self, round: int) -> float:
        """Validate the control, which continues from its best; return its loss, nan without one."""
        if self.control is None or self.control_best is None:
            return math.nan
        loss = self.validation_loss(self.control)
        is_best = self.control_best.update_if_better(self.control.export, round, loss)
        if not is_best and not self.always_accept:
            self.control.restore(self.control_best.exported)
        return loss

    def state(self) -> State:
        """Return all that the server's next round depends on."""
        return join_states({name: part.state() for name, part in self._parts().items()})

    def load_state(self, state: State) -> None:
        """Continue from `state()`."""
        for name, part in self._parts().items():
            part.load_state(part_of_state(state, name))

    def _parts(self) -> Mapping[str, _HasState]:
        parts: dict[str, _HasState] = {
            "server": self.server,
            "best": self.best,
            "outer": self.outer,
        }
        if self.exchange is not None:
            parts["exchange"] = self.exchange
        if self.above is not None and self.above.server is not None:
            parts["above"] = self.above.server
        if self.control is not None and self.control_best is not None:
            parts["control"] = self.control
            parts["control_best"] = self.control_best
        return parts

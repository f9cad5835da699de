"""The two sides of a round: the server, with what it is judged by, and the clients of a process."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np

from fedsp_mpi.algorithms.base import Client, Server
from fedsp_mpi.comm.inspection import Expected
from fedsp_mpi.data.tokens import Text
from fedsp_mpi.evaluation.scoring import answer_loss_mean
from fedsp_mpi.log import RoundProgress
from fedsp_mpi.record.client_cache import ClientStateCache
from fedsp_mpi.record.journal import RoundJournal
from fedsp_mpi.tensors import NamedTensors, State, join_states, part_of_state
from fedsp_mpi.training.device import Compute
from fedsp_mpi.training.process_group import ServerGroup


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
    """

    client: Client
    ids: Sequence[int]
    compute: Compute
    cache: ClientStateCache
    participants: Callable[[int], Sequence[int]]
    progress: RoundProgress = field(default_factory=RoundProgress)
    digests: dict[str, str] = field(default_factory=dict)


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

    def update_if_better(self, exported: NamedTensors, round: int, loss: float) -> bool:
        """Take over what has a lower loss, and return whether it has.

        Of equal losses the first stays; a loss that is not a number is never better.

        Args:
            exported: what the server exported.
            round: that it is of.
            loss: on the validation texts, in nats a token.
        """
        if not loss < self.loss:
            return False
        self.exported = exported
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
class ServerRole:
    """The server, the control that tunes beside it without clients, and what both are judged by.

    Where several ranks are the server, each has one; they do the same and end each round with the
    same values.

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
    best: Best = field(init=False)
    control_best: Best | None = field(init=False)

    def __post_init__(self) -> None:
        self.best = Best(self.server.export())
        self.control_best = Best(self.control.export()) if self.control else None

    def validation_loss(self, server: Server) -> float:
        """Return the mean answer loss on the validation texts, in nats a token."""
        return answer_loss_mean(
            server.model, server.prompt, self.validation, self.batch_tokens, self.group
        )

    def accept_or_revert(
        self, round: int, aggregate: NamedTensors | None, aggregate_loss: float
    ) -> tuple[float, bool]:
        """Validate what the server tuned; revert to the aggregate if the loss rose.

        Args:
            round: that was tuned.
            aggregate: what the server exported before it tuned; None with `server.accept=always`.
            aggregate_loss: its validation loss.

        Returns:
            The validation loss of what is kept, and whether it is the lowest so far.
        """
        loss = self.validation_loss(self.server)
        if aggregate is not None and not loss <= aggregate_loss:
            self.server.restore(aggregate)
            loss = aggregate_loss
        return loss, self.best.update_if_better(self.server.export(), round, loss)

    def validate_control(self, round: int) -> float:
        """Validate the control, which continues from its best; return its loss, nan without one."""
        if self.control is None or self.control_best is None:
            return math.nan
        loss = self.validation_loss(self.control)
        is_best = self.control_best.update_if_better(self.control.export(), round, loss)
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
        parts: dict[str, _HasState] = {"server": self.server, "best": self.best}
        if self.control is not None and self.control_best is not None:
            parts["control"] = self.control
            parts["control_best"] = self.control_best
        return parts

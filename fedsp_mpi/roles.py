"""The two sides of a round: what an algorithm gives to each, and what it is judged by."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
from torch import nn

from fedsp_mpi.aggregation.fedavg import Updates
from fedsp_mpi.comm.inspection import Expected
from fedsp_mpi.data.tokens import Text
from fedsp_mpi.evaluation.scoring import answer_loss_mean
from fedsp_mpi.log import Log, RoundProgress
from fedsp_mpi.models.backbone import LanguageModel
from fedsp_mpi.models.prompts import Prompt
from fedsp_mpi.record.checkpoint import Checkpoints, ClientStateCache, StateHolder
from fedsp_mpi.record.tables import WireRow
from fedsp_mpi.record.writer import RunRecord
from fedsp_mpi.tensors import NamedTensors, State, Update, join_states, part_of_state
from fedsp_mpi.training.device import Compute
from fedsp_mpi.training.loop import Trace
from fedsp_mpi.training.process_group import ServerGroup


class Server(Protocol):
    """What the round asks of the server's side of an algorithm."""

    model: LanguageModel

    @property
    def prompt(
        self,
    ) -> Prompt | None: ...  # goes before every text; None: the model is what is tuned

    def parameters(self) -> Iterable[nn.Parameter]: ...

    def broadcast(self) -> NamedTensors: ...

    def merge(self, updates: Updates) -> NamedTensors: ...

    def take(self, merged: NamedTensors) -> None: ...

    def absorb(self, round: int) -> Trace: ...

    def tuned(self) -> NamedTensors: ...

    def load(self, tuned: NamedTensors) -> None: ...

    def state(self) -> State: ...

    def load_state(self, state: State) -> None: ...


class Client(Protocol):
    """What the round asks of the clients' side of an algorithm."""

    @property
    def states(self) -> StateHolder: ...

    def local(self, client: int, round: int, down: NamedTensors) -> Update: ...


@dataclass
class HostedClients:
    """The clients that this process plays."""

    client: Client
    ids: Sequence[int]
    compute: Compute
    shelf: ClientStateCache
    chosen: Callable[[int], Sequence[int]]  # round -> the clients that take part in it
    progress: RoundProgress = field(default_factory=RoundProgress)
    texts: dict[str, str] = field(default_factory=dict)  # digests of their tokenised texts, by name


@dataclass
class Best:
    """What the server had tuned when its validation loss was lowest so far."""

    tuned: NamedTensors
    round: int = 0
    loss: float = math.inf

    def offer(self, tuned: NamedTensors, round: int, loss: float) -> bool:
        """Take this if it is better: of equal losses the first stays, and one that is not a number
        never is better.
        """
        if not loss < self.loss:
            return False
        self.tuned, self.round, self.loss = tuned, round, loss
        return True

    def state(self) -> State:
        """As a checkpoint keeps it."""
        return join_states(
            {
                "tuned": dict(self.tuned),
                "at": {"round": np.array(self.round), "loss": np.array(self.loss)},
            }
        )

    def load_state(self, state: State) -> None:
        """Go on from `state()`."""
        for name, value in part_of_state(state, "tuned").items():
            self.tuned[name][...] = value
        self.round, self.loss = int(state["at/round"]), float(state["at/loss"])


@dataclass
class RoundJournal:
    """What rank 0 alone writes, and what it needs for it."""

    record: RunRecord
    keep_prompts: bool
    rank_of: dict[int, int]
    expected: Callable[
        [int], Expected
    ]  # round -> the clients that answer in it, and what they may say
    log: Log
    checkpoints: Checkpoints
    carried: Sequence[WireRow] = ()  # the manifest of the run's earlier stretches
    inputs: str | None = None  # digest of all that the run reads
    seconds_checkpoints: list[float] = field(default_factory=list)


@dataclass
class ServerRole:
    """The server, the control that trains beside it without clients, and what both are judged by.

    Where several ranks are the server, each has one; they do the same and end each round with the
    same.
    """

    server: Server
    control: Server | None
    compute: Compute
    validation: Sequence[Text]
    batch_tokens: int
    team: ServerGroup
    archive: RoundJournal | None
    keeps_worse: bool = True  # whether a round's tuning stands if it made the validation loss worse
    answer: Callable[[np.ndarray], np.ndarray] | None = (
        None  # to what clients that hold no model ask in a round
    )
    best: Best = field(init=False)
    control_best: Best | None = field(init=False)

    def __post_init__(self) -> None:
        self.best = Best(self.server.tuned())
        self.control_best = Best(self.control.tuned()) if self.control else None

    def expected(self, round: int) -> Expected | None:
        """Who answers in a round; None on the server's other ranks, which collect nothing."""
        return self.archive.expected(round) if self.archive else None

    def loss(self, server: Server) -> float:
        """Validation loss of what a server has tuned."""
        return answer_loss_mean(
            server.model, server.prompt, self.validation, self.batch_tokens, self.team
        )

    def settle(
        self, round: int, merged: NamedTensors | None, merged_loss: float
    ) -> tuple[float, bool]:
        """Judge what a round's tuning made of the merged messengers, and take it back if it had to
        be better.

        Args:
            merged: the messengers as they were before; None if what is worse is kept.

        Returns:
            The validation loss of what is kept, and whether it is the best so far.
        """
        loss = self.loss(self.server)
        if merged is not None and not loss <= merged_loss:
            self.server.load(merged)
            loss = merged_loss
        return loss, self.best.offer(self.server.tuned(), round, loss)

    def settle_control(self, round: int) -> float:
        """The same for the control, which goes on from the best that it had."""
        if self.control is None or self.control_best is None:
            return math.nan
        loss = self.loss(self.control)
        if not self.control_best.offer(self.control.tuned(), round, loss) and not self.keeps_worse:
            self.control.load(self.control_best.tuned)
        return loss

    def state(self) -> State:
        """All that the server's next round depends on."""
        return join_states({name: part.state() for name, part in self._parts().items()})

    def load_state(self, state: State) -> None:
        """Go on from `state()`."""
        for name, part in self._parts().items():
            part.load_state(part_of_state(state, name))

    def _parts(self) -> dict[str, Any]:
        parts = {
            "server": self.server,
            "best": self.best,
            "control": self.control,
            "control_best": self.control_best,
        }
        return {name: part for name, part in parts.items() if part is not None}

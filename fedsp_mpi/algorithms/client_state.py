"""What the clients of one process keep between rounds: their model's weights, if they train them,
and optimizers.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from fedsp_mpi.models import auxiliary
from fedsp_mpi.models.backbone import LanguageModel
from fedsp_mpi.tensors import ClientError, NamedTensors, State, Update, join_states, part_of_state
from fedsp_mpi.training.engine import TorchEngine


class Client(Protocol):
    """The clients of any method, as those see them that stand around their work: noise, an attack
    that is watched.
    """

    @property
    def states(self) -> Any: ...

    def local(self, client: int, round: int, down: NamedTensors) -> Update: ...


class ShardError(ClientError):
    """A client's text cannot be trained on."""


@dataclass
class ClientState:
    """One client's.

    Attributes:
        weights: off the device, by name.
        engines: an optimizer for each stage, by the stage's name.
    """

    weights: Mapping[str, Tensor]
    engines: Mapping[str, TorchEngine]


class ClientStates:
    """The benches of all clients that share one working model.

    Args:
        model: a client's weights are put into it while it works.
        handed_out: where every client begins.
        engines: makes the optimizers of a client that begins.
        trains: whether clients train the weights; otherwise all have those that were handed out.
        keep: whether anything lives on from round to round; otherwise every round begins from the
            hand-out.
    """

    def __init__(
        self,
        model: LanguageModel,
        handed_out: NamedTensors,
        engines: Callable[[], Mapping[str, TorchEngine]],
        trains: bool,
        keep: bool,
    ) -> None:
        self._model, self._engines, self._trains, self._keep = model, engines, trains, keep
        self._handed_out = handed_out.torch()
        self._there: dict[int, ClientState] = {}
        self._is_fresh = False  # the model holds what was handed out

    def take(self, client: int) -> ClientState:
        """Have the client's weights in the model, and its optimizers at hand.

        It keeps nothing until `put`.
        """
        bench = self._there.pop(client, None) or ClientState(self._handed_out, self._engines())
        if not self._is_fresh:
            auxiliary.load_weights(self._model, bench.weights)
        self._is_fresh = not self._trains
        for engine in bench.engines.values():
            engine.to(self._model.device)
            engine.forget_gradient()  # of a client that failed in the middle of a step
        return bench

    def put(self, client: int, bench: ClientState) -> None:
        """Keep what the client's work made of its bench, off the device; the hand-out itself stays
        as it was.
        """
        if not self._keep:
            return
        for engine in bench.engines.values():
            engine.to(torch.device("cpu"))
        if self._trains:
            bench = ClientState(self._copied(bench.weights), bench.engines)
        self._there[client] = bench

    def has_state(self, client: int) -> bool:
        """Whether a client keeps something between rounds; before it has begun, it does not."""
        return client in self._there

    def client_state(self, client: int) -> State:
        """What a client keeps between rounds."""
        bench = self._there[client]
        parts = {name: engine.state() for name, engine in bench.engines.items()}
        return join_states({"weights": arrays(bench.weights), **parts} if self._trains else parts)

    def load_client_state(self, client: int, state: State) -> None:
        """Go on from `client_state()`, whose arrays are the client's from now on."""
        engines = self._engines()
        for name, engine in engines.items():
            engine.load_state(part_of_state(state, name))
        weights = tensors(part_of_state(state, "weights")) if self._trains else self._handed_out
        self._there[client] = ClientState(weights, engines)

    def forget(self, client: int) -> None:
        """Drop what a client keeps."""
        self._there.pop(client, None)

    def _copied(self, before: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        working = self._model.weights.items()
        if before is self._handed_out:
            return {name: weight.data.to("cpu", copy=True) for name, weight in working}
        return {name: before[name].copy_(weight.data) for name, weight in working}


class StatelessClients:
    """For clients that keep nothing between rounds."""

    def has_state(self, client: int) -> bool:
        """They never have."""
        return False

    def client_state(self, client: int) -> State:
        """Nothing."""
        return {}

    def load_client_state(self, client: int, state: State) -> None:
        """Nothing is there to be loaded."""

    def forget(self, client: int) -> None:
        """Nothing is there to be dropped."""


def arrays(some: Mapping[str, Tensor]) -> State:
    """Tensors as a state keeps them: views, where they lie on the CPU."""
    return {name: tensor.detach().cpu().numpy() for name, tensor in some.items()}


def tensors(state: State) -> dict[str, Tensor]:
    """The other way round."""
    return {name: torch.from_numpy(value) for name, value in state.items()}

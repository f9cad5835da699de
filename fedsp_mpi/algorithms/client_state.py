"""What the clients of a process keep between rounds: optimizers, and weights if they train them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from fedsp_mpi.models import auxiliary
from fedsp_mpi.models.language_model import LanguageModel
from fedsp_mpi.tensors import NamedTensors, State, join_states, part_of_state
from fedsp_mpi.training.engine import TorchEngine


@dataclass
class ClientState:
    """What one client keeps.

    Attributes:
        weights: fp32 on the CPU, by name.
        engines: an optimizer for each stage, by the stage's name.
    """

    weights: Mapping[str, Tensor]
    engines: Mapping[str, TorchEngine]


class ClientStates:
    """The states of all clients that share one working model.

    Args:
        model: a client's weights are loaded into it while the client works.
        initial: the weights that were handed out, where every client begins.
        build_engines: builds the optimizers of a client that begins.
        trains_model: whether clients train the weights; otherwise all use the initial ones.
        keep: whether anything lives on from round to round; otherwise every round begins from the
            hand-out.
    """

    def __init__(
        self,
        model: LanguageModel,
        initial: NamedTensors,
        build_engines: Callable[[], Mapping[str, TorchEngine]],
        *,
        trains_model: bool,
        keep: bool,
    ) -> None:
        self._model = model
        self._initial = initial.torch()
        self._build_engines = build_engines
        self._trains_model = trains_model
        self._keep = keep
        self._states: dict[int, ClientState] = {}
        self._holds_initial = False  # whether the model's weights are the initial ones

    def restore(self, client: int) -> ClientState:
        """Load a client's weights into the model, and return its state.

        The state is taken out of the store: unless `store` is called, the client begins anew.
        """
        state = self._states.pop(client, None)
        if state is None:
            state = ClientState(self._initial, self._build_engines())
        if not self._holds_initial:
            auxiliary.load_weights(self._model, state.weights)
        self._holds_initial = not self._trains_model
        for engine in state.engines.values():
            engine.to(self._model.device)
            engine.zero_grad()  # left by a client that failed in the middle of a step
        return state

    def show(self, client: int) -> None:
        """Load a client's weights into the model, and leave its state where it is."""
        state = self._states.get(client)
        if not self._holds_initial:
            weights = self._initial if state is None else state.weights
            auxiliary.load_weights(self._model, weights)
        self._holds_initial = not self._trains_model

    def store(self, client: int, state: ClientState) -> None:
        """Keep a client's state after its work, on the CPU."""
        if not self._keep:
            return
        for engine in state.engines.values():
            engine.to(torch.device("cpu"))
        if self._trains_model:
            state = ClientState(self._copy_weights(state.weights), state.engines)
        self._states[client] = state

    def has_state(self, client: int) -> bool:
        """Return whether a client keeps something; before its first round it does not."""
        return client in self._states

    def client_state(self, client: int) -> State:
        """Return what a client keeps, as a checkpoint stores it."""
        state = self._states[client]
        parts: dict[str, State] = {}
        if self._trains_model:
            parts["weights"] = arrays(state.weights)
        for name, engine in state.engines.items():
            parts[name] = engine.state()
        return join_states(parts)

    def load_client_state(self, client: int, state: State) -> None:
        """Continue from `client_state()`, whose arrays belong to the client from now on."""
        engines = self._build_engines()
        for name, engine in engines.items():
            engine.load_state(part_of_state(state, name))
        weights = self._initial
        if self._trains_model:
            weights = tensors(part_of_state(state, "weights"))
        self._states[client] = ClientState(weights, engines)

    def forget(self, client: int) -> None:
        """Drop what a client keeps."""
        self._states.pop(client, None)

    def _copy_weights(self, previous: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """Copy the model's weights to the CPU, into the previous tensors where there are some."""
        weights = self._model.weights.items()
        if previous is self._initial:  # shared by all clients
            return {name: weight.data.to("cpu", copy=True) for name, weight in weights}
        return {name: previous[name].copy_(weight.data) for name, weight in weights}


class StatelessClients:
    """The state store of clients that keep nothing between rounds: every method is a no-op."""

    def has_state(self, client: int) -> bool:
        """Return False."""
        return False

    def client_state(self, client: int) -> State:
        """Return an empty state."""
        return {}

    def load_client_state(self, client: int, state: State) -> None:
        """Do nothing."""

    def forget(self, client: int) -> None:
        """Do nothing."""


def arrays(by_name: Mapping[str, Tensor]) -> State:
    """Return tensors [*shape] as numpy arrays, which share the memory of those on the CPU."""
    return {name: tensor.detach().cpu().numpy() for name, tensor in by_name.items()}


def tensors(state: State) -> dict[str, Tensor]:
    """Wrap a state's arrays [*shape] as CPU tensors [*shape] that share their memory."""
    return {name: torch.from_numpy(value) for name, value in state.items()}

"""Clients that pack their updates for a compressed exchange, with error feedback."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from fedsp_mpi.algorithms.base import Client, WrappedClient
from fedsp_mpi.comm.compression import encode_against, encode_change
from fedsp_mpi.comm.messages import invalid_values
from fedsp_mpi.config import CompressionConfig
from fedsp_mpi.record.client_cache import StateHolder
from fedsp_mpi.tensors import NamedTensors, State, Update, join_states, part_of_state


class CompressedClient(WrappedClient):
    """Clients of any method in which an update has the names and shapes of the broadcast.

    What rounding took from a client's update is added to its next one, in whichever round that is.
    Clients do not hear whether the server averaged an update: one that a rule rejects is not sent
    again.

    Args:
        client: does the work.
        compression: format of what travels.
        keep: whether clients keep anything between rounds; otherwise there is no error feedback.
    """

    def __init__(self, client: Client, compression: CompressionConfig, *, keep: bool) -> None:
        super().__init__(client)
        self._compression = compression
        self._has_feedback = compression.error_feedback and keep
        self._states = ResidualStates(client.states)

    @property
    def states(self) -> StateHolder:
        """What clients keep between rounds, residuals included."""
        return self._states

    def local_update(self, client: int, round: int, broadcast: NamedTensors) -> Update:
        """Train one client, and pack its update; see `Client.local_update`.

        Raises:
            ClientError: as the client alone.
        """
        update = self._client.local_update(client, round, broadcast)
        values = update.tensors.flat
        if update.tensors.schema != broadcast.schema or invalid_values(values):
            return update  # which the wire refuses, or makes a failure of
        if self._has_feedback:
            residual = self._states.residual(client, values.size)
            packed, _ = encode_against(
                values, broadcast.flat, residual, compression=self._compression
            )
        else:
            packed = encode_change(values, broadcast.flat, self._compression)
        return replace(update, packed=packed)


class ResidualStates:
    """The states of clients, and the residual of each.

    Args:
        holder: holds the rest of what a client keeps.
    """

    def __init__(self, holder: StateHolder) -> None:
        self._holder = holder
        self._residuals: dict[int, np.ndarray] = {}

    def residual(self, client: int, num_values: int) -> np.ndarray:
        """Return a client's residual, fp32 [num_values], to be written to; 0 in the beginning."""
        if client not in self._residuals:
            self._residuals[client] = np.zeros(num_values, dtype=np.float32)
        return self._residuals[client]

    def has_state(self, client: int) -> bool:
        """Return whether a client keeps something."""
        return client in self._residuals or self._holder.has_state(client)

    def client_state(self, client: int) -> State:
        """Return what a client keeps, as a checkpoint stores it."""
        parts: dict[str, State] = {}
        if self._holder.has_state(client):
            parts["client"] = self._holder.client_state(client)
        if client in self._residuals:
            parts["compression"] = {"residual": self._residuals[client]}
        return join_states(parts)

    def load_client_state(self, client: int, state: State) -> None:
        """Continue from `client_state()`, whose arrays belong to the client from now on."""
        client_state = part_of_state(state, "client")
        if client_state:
            self._holder.load_client_state(client, client_state)
        residual = part_of_state(state, "compression").get("residual")
        if residual is not None:
            self._residuals[client] = residual

    def forget(self, client: int) -> None:
        """Drop what a client keeps."""
        self._residuals.pop(client, None)
        self._holder.forget(client)

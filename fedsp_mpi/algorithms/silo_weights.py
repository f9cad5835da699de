"""How much the updates of a silo count: as its configuration says, and as its examples disclose."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from fedsp_mpi.algorithms.base import Client, WrappedClient
from fedsp_mpi.tensors import NamedTensors, Update


class WeightedClient(WrappedClient):
    """Clients of any method, whose updates are merged with weights of the user's.

    Args:
        client: does the work.
        factors: how many times each client's updates count, by id.
        samples: the number of samples that a client sends in the place of its own, by id; others
            send their own.
    """

    def __init__(
        self, client: Client, factors: Mapping[int, float], samples: Mapping[int, float]
    ) -> None:
        super().__init__(client)
        self._factors = factors
        self._samples = samples

    def local_update(self, client: int, round: int, broadcast: NamedTensors) -> Update:
        """Train one client, and weigh its update; see `Client.local_update`.

        Raises:
            ClientError: as the client alone.
        """
        update = self._client.local_update(client, round, broadcast)
        samples = self._samples.get(client, update.weight)
        return replace(update, weight=samples * self._factors[client])

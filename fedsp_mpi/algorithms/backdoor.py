"""The backdoor study: how well the attack works on what a poisoned client itself has tuned.

It is measured before the client's update is averaged with those of others.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import replace

from fedsp_mpi.algorithms.base import Client, WrappedClient
from fedsp_mpi.tensors import NamedTensors, Update
from fedsp_mpi.training.device import oom_as_client_error

METRICS = ("attack_success",)


class AttackMonitor(WrappedClient):
    """Clients of any method; the poisoned ones report how often the trigger works.

    Args:
        client: does the work.
        poisoned_ids: of the clients that are poisoned.
        attack_success: returns the share, from 0 to 1, of triggered questions that the client's
            model answers as the attacker wants, right after its local update.
    """

    def __init__(
        self, client: Client, poisoned_ids: Collection[int], attack_success: Callable[[], float]
    ) -> None:
        super().__init__(client)
        self._poisoned_ids = frozenset(poisoned_ids)
        self._attack_success = attack_success

    def local_update(self, client: int, round: int, broadcast: NamedTensors) -> Update:
        """Train one client, and measure the attack if it is poisoned; see `Client.local_update`.

        Raises:
            ClientError: as the client alone; OutOfMemoryError while measuring.
        """
        update = self._client.local_update(client, round, broadcast)
        if client not in self._poisoned_ids:
            return update
        with oom_as_client_error():
            success = self._attack_success()
        return replace(update, metrics={**update.metrics, "attack_success": success})

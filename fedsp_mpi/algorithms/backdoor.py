"""How well a poisoned client's own work does what the attacker wants, before it is averaged with
that of others.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import replace
from typing import Any

from fedsp_mpi.algorithms.client_state import Client
from fedsp_mpi.tensors import NamedTensors, Update
from fedsp_mpi.training.device import oom_as_client_error

METRICS = ("attack_success",)


class AttackMonitor:
    """Clients of any method, some of which are poisoned and tell how often the trigger works on
    what they tuned.

    Args:
        client: does the work.
        who: the ids of the poisoned ones.
        measure: the attack's success rate, a fraction, on what `client` has just tuned and still
            holds.
    """

    def __init__(self, client: Client, who: Collection[int], measure: Callable[[], float]) -> None:
        self._client, self._who, self._measure = client, frozenset(who), measure

    @property
    def states(self) -> Any:
        """What the clients keep between rounds."""
        return self._client.states

    def local(self, client: int, round: int, down: NamedTensors) -> Update:
        """One client's round, with the attack's success if it is a poisoned one.

        The same errors as without.
        """
        update = self._client.local(client, round, down)
        if client not in self._who:
            return update
        with oom_as_client_error():
            success = self._measure()
        return replace(update, metrics=update.metrics | dict(zip(METRICS, (success,))))

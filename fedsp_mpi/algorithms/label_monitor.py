"""The study of pseudo-labels: how many of them are right, where somebody knows.

It is measured beside the method, which never sees these answers: a simulation knows the labels that
its clients do not hold.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace

import numpy as np

from fedsp_mpi.algorithms.augment import AugmentedClient
from fedsp_mpi.algorithms.base import WrappedClient
from fedsp_mpi.tensors import NamedTensors, Update

METRICS = ("pseudo_precision",)


class LabelMonitor(WrappedClient):
    """Clients that label text, of which the record says how many of their labels are right.

    Args:
        client: labels and trains.
        gold: the right classes of each client's unlabelled texts, int64 [unlabelled], by client.
    """

    def __init__(self, client: AugmentedClient, gold: Mapping[int, np.ndarray]) -> None:
        super().__init__(client)
        self._augmented = client
        self._gold = gold

    def local_update(self, client: int, round: int, broadcast: NamedTensors) -> Update:
        """Train one client, and judge the pseudo-labels that it trained on.

        See `Client.local_update`.

        Raises:
            ClientError: as the client alone.
        """
        update = self._augmented.local_update(client, round, broadcast)
        labels = self._augmented.pseudo_labels(client)
        precision = math.nan
        if labels is not None and len(labels.rows):
            right = labels.classes == self._gold[client][labels.rows]
            precision = float(right.mean())
        return replace(update, metrics={**update.metrics, "pseudo_precision": precision})
